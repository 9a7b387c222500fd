"""WordWrap: a text that comes in pieces, broken between words at the margin of a terminal."""

from collections.abc import Callable

from rich.cells import cell_len

_TAB = 8  # columns between two places that a terminal goes to


class WordWrap:
    """Breaks lines between words. A word is given once its end has come, so that nothing that is shown moves any more. One that is longer than a
    line, such as a path, stays in one piece, which the terminal breaks, so that it can be copied. Characters that are two columns wide are words of
    their own, as those scripts have no spaces.

    Args:
        width: gives the columns of the terminal.
    """

    def __init__(self, width: Callable[[], int]) -> None:
        self._width = width
        self._column = 0
        self._spaces, self._word = "", ""

    def push(self, text: str) -> str:
        """What can be written now that this has come."""
        written = []
        for character in text:
            if character == "\n":
                written += [self._placed(), "\n"]
                self._column, self._spaces = 0, ""
            elif character in " \t":
                written.append(self._placed())
                self._spaces += character
            elif cell_len(character) > 1:
                written.append(self._placed())
                self._word = character
                written.append(self._placed())
            else:
                self._word += character
        return "".join(written)

    def flush(self) -> str:
        """The rest, without spaces at its end."""
        rest, self._spaces = self._placed(), ""
        return rest

    def _placed(self) -> str:
        """The word that has come, behind the spaces before it or at the beginning of a line."""
        word, self._word = self._word, ""
        if not word:
            return ""
        spaces, self._spaces = self._spaces, ""
        # the last column stays free: what stands there makes some terminals go on in the next line and others not
        n, room = cell_len(word), self._width() - 1
        start = self._column
        for space in spaces:
            start += _TAB - start % _TAB if space == "\t" else 1
        if self._column and start + n > room:
            self._column = n % self._width()
            return "\n" + word
        self._column = (start + n) % self._width()
        return spaces + word
