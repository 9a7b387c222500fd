"""TextStream: turns the bytes of tokens into text as they come, without ever showing half a character."""

import codecs
from collections.abc import Sequence


class TextStream:
    """Incremental UTF-8 decoding.

    Bytes that cannot be UTF-8 become U+FFFD; bytes that may still become a character are kept back.

    Args:
        stop: strings that end the text. They are never shown, and text that may be the start of one is kept back.

    Attributes:
        stopped_by: the one that ended it, "" as long as none has.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stop = tuple(text for text in stop if text)
        self._held = self.stopped_by = ""

    @property
    def stopped(self) -> bool:
        """Whether a stop string came."""
        return bool(self.stopped_by)

    def push(self, data: bytes) -> str:
        """Take the next bytes and give the text that is certain now."""
        return self._release(self._decoder.decode(data))

    def flush(self, cut: bool = False) -> str:
        """Give what was kept back. The stream is then at the start of a new text.

        cut: the text would have gone on: the beginning of a character is left out, and that of a stop string
        """
        rest = ""
        if not cut:
            rest = self._release(self._decoder.decode(b"", final=True))
            rest += self._held
        self._held = self.stopped_by = ""
        self._decoder.reset()
        return rest

    def _release(self, text: str) -> str:
        if self.stopped:
            return ""
        text = self._held + text
        at, self.stopped_by = first_stop(text, self._stop)
        if self.stopped:
            self._held = ""
            return text[:at]
        split = len(text) - n_begun(text, self._stop)
        self._held = text[split:]
        return text[:split]


def first_stop(text: str, stop: Sequence[str], start: int = 0) -> tuple[int, str]:
    """Where the first stop string is, behind `start`, and which it is, the longest there; the length of the text and "" if there is none."""
    found = [(at, -len(each), each) for each in stop if (at := text.find(each, start)) >= 0]
    at, _, which = min(found, default=(len(text), 0, ""))
    return at, which


def n_begun(text: str, stop: Sequence[str]) -> int:
    """How many characters at the end of a text may be the beginning of a stop string."""
    return max((_overlap(text, each) for each in stop), default=0)


def pieces_of(pieces: Sequence[bytes], text: str) -> tuple[int, int]:
    """How many of these pieces, in order, say the text or, where it ends within a piece, as much of its beginning as whole pieces do; and how many of
    its characters these are.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    found = clean = (0, 0)
    n_decoded = 0
    for i, data in enumerate(pieces, 1):
        n_decoded += len(decoder.decode(data))
        if n_decoded > len(text):
            # no further than to the last character that ended with a piece
            return clean
        # bytes that are kept back begin one more character
        is_within = bool(decoder.getstate()[0])
        if n_decoded + is_within <= len(text):
            found = i, n_decoded + is_within
        if not is_within:
            clean = i, n_decoded
    return found


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that `stop` begins with."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
