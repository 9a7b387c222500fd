"""ChatTemplate: the text and tokens that each step of a conversation appends, from the model's own chat template."""

import itertools
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt

from kvlocal.errors import KvlocalError
from kvlocal.llama.engine import Model
from kvlocal.llama.library import load

Role = Literal["system", "user", "assistant"]
Message = dict[str, str]

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Gemma has no system role; refusing it makes ChatTemplate put the text into the first user turn.
GEMMA = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% set name = 'model' if message['role'] == 'assistant' else 'user' %}"
    "{{ '<start_of_turn>' + name + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PLAIN = (
    "{% for message in messages %}"
    "{{ '### ' + message['role'] | capitalize + ':\n' + message['content'] | trim + '\n\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant:\n' }}{% endif %}"
)
# A model that knows no end-of-turn token goes on with the user's next turn.
PLAIN_STOP_STRINGS = ("\n### User:",)

_FOLD_SEPARATOR = "\n\n"

# Stand-ins for contents. A template copies contents, so wherever one of these appears, a content belongs.
_SYSTEM, _USER, _ASSISTANT = "Kvlsys0Q", "Kvlusr1Q", "Kvlast1Q"
_USER_2, _ASSISTANT_2, _USER_3 = "Kvlusr2Q", "Kvlast2Q", "Kvlusr3Q"
_THOUGHT = "Kvlthk1Q"

_LIMIT_SECONDS = 10.0  # for one rendering; templates take thousandths of that

_C_WHITESPACE = " \t\n\v\f\r"


class TemplateError(KvlocalError):
    """The chat template cannot be used, or refuses the conversation."""


@dataclass(frozen=True)
class Piece:
    """A stretch of text with one origin.

    Attributes:
        role: whose turn it belongs to; everything before the first user turn is "system".
        text: never empty.
        kind: "markup" comes from the template and may contain control tokens; "content" was written by someone and
            never yields one.
        before: of the first piece of a list, template text like that in front of it ("" at the start of a
            conversation); some vocabularies put a space behind a control token, or swallow one.
    """

    role: Role
    text: str
    kind: Literal["markup", "content"]
    before: str = field(default="", compare=False, repr=False)


@dataclass(frozen=True)
class _Turn:
    """The markup around a user's content at one point of a conversation.

    The template's text is `before + content + after`, then `opening` where an answer is to follow.
    """

    messages: tuple[Message, ...]  # the conversation it was taken from, the user's turn last
    before: str
    after: str
    opening: str


class ChatTemplate:
    """A chat template as increments: each call gives only what has to be appended to the cache.

    The markup is found once by rendering conversations of at most three user turns with stand-ins for the contents,
    so no call costs more for a longer history. Appending the pieces of a conversation gives the template's own
    rendering of it whenever the template treats all later turns alike; where it does not, `history_dependent` is set
    and the markup is that of the shortest conversation with an earlier turn.

    Args:
        template: the Jinja source, rendered in llama-cpp-python's sandbox.
        source: where it comes from: "gguf", "default:chatml", "default:gemma" or "default:plain".
        bos_token, eos_token: their texts, for the template's use.
        add_bos: put BOS in front when the template does not.
        stop_strings: texts that end an answer, for models without a token for it.

    Attributes:
        system_folded: the template has no system role, so the system text opens the first user turn.
        history_dependent: the template would render earlier turns in another way later, for instance without their
            reasoning; the cache keeps what was appended.

    Raises:
        TemplateError: the template is broken or cannot render the simplest conversation.
    """

    def __init__(
        self,
        template: str,
        *,
        source: str = "gguf",
        bos_token: str = "",
        eos_token: str = "",
        add_bos: bool = False,
        stop_strings: tuple[str, ...] = (),
    ) -> None:
        self.source = source
        self.stop_strings = stop_strings
        self._bos_in_front = bos_token if add_bos else ""
        formatter = load().llama_cpp.llama_chat_format.Jinja2ChatFormatter
        try:
            self._formatters = {
                opening: formatter(template, eos_token, bos_token, add_generation_prompt=opening)
                for opening in (False, True)
            }
        except Exception as error:
            raise TemplateError(
                f"the model's chat template is broken ({_line(error)}): use another GGUF file"
            ) from error

        self.system_folded = not self._supports_system()
        self._first = {
            False: self._turn(_user(_USER)),
            True: self._turn(_system(_SYSTEM), _user(_USER)),
        }
        self._later = self._turn(_user(_USER), _assistant(_ASSISTANT), _user(_USER_2))
        between = _between(self._later.before, _ASSISTANT)
        self._closing = _shared_start(self._end_of_last_answer(), between)
        self._user_header = between[len(self._closing) :]
        self._answer_lead = self._find_answer_lead()
        self.history_dependent = self._depends_on_history()

    @classmethod
    def from_model(cls, model: Model) -> Self:
        """The template in the GGUF's metadata, or a default that fits the vocabulary."""
        bos, eos = (
            model.token_bytes(token, special=True).decode("utf-8", "replace") if token is not None else ""
            for token in (model.bos, model.eos)
        )
        template, source, stop_strings = model.metadata.get("tokenizer.chat_template", ""), "gguf", ()
        if not template.strip():
            if _is_one_token(model, "<|im_start|>") and _is_one_token(model, "<|im_end|>"):
                template, source = CHATML, "default:chatml"
            elif _is_one_token(model, "<start_of_turn>") and _is_one_token(model, "<end_of_turn>"):
                template, source = GEMMA, "default:gemma"
            else:
                template, source, stop_strings = PLAIN, "default:plain", PLAIN_STOP_STRINGS
        return cls(
            template, source=source, bos_token=bos, eos_token=eos, add_bos=model.add_bos, stop_strings=stop_strings
        )

    def render(self, messages: Sequence[Message], *, opening: bool) -> str:
        """The template's own text of a whole conversation, with the start of an answer if `opening`.

        Raises:
            TemplateError: the template refuses it.
        """
        if self.system_folded:
            messages = _fold(messages)
        try:
            with _limited(_LIMIT_SECONDS):
                text = self._formatters[opening](messages=[dict(message) for message in messages]).prompt
        except Exception as error:
            raise TemplateError(
                f"the model's chat template refuses this conversation ({_line(error)}): change its roles or their order"
            ) from error
        if self._bos_in_front and not text.startswith(self._bos_in_front):
            text = self._bos_in_front + text
        return text

    def prefix(self, system: str | None) -> list[Piece]:
        """What comes before the first user turn: BOS, and the system block or the template's default for it."""
        if not self._has_system([] if system is None else [_system(system)]):
            return _pieces("", ("system", self._first[False].before.removesuffix(self._first_header(False)), "markup"))
        head, content, tail = self._system_block(system)
        return _pieces(
            "",
            ("system", head, "markup"),
            ("system", content, "content"),
            ("system", tail.removesuffix(self._first_header(True)), "markup"),
        )

    def user_turn(self, messages: Sequence[Message], user: str) -> list[Piece]:
        """What a user turn appends: the end of the answer before it, the turn, and the start of the answer to it.

        Args:
            messages: the conversation so far, ending with an assistant turn, or without any turn.
            user: what the user wrote.
        """
        return self.user_start(messages, user) + self.user_end(messages)

    def user_start(self, messages: Sequence[Message], user: str) -> list[Piece]:
        """The part of a user turn up to the end of what is known of its content, which may go on; `user_end` gives the rest.

        Args:
            messages: as for `user_turn`.
            user: what the user wrote so far.
        """
        turn = self._next_turn(messages)
        if turn is self._later:
            header, before, closing = self._user_header, _ASSISTANT, self._closing
        else:
            header = self._first_header(self._has_system(messages))
            before, closing = turn.before.removesuffix(header), ""
        return _pieces(
            before,
            ("assistant", closing, "markup"),
            ("user", header, "markup"),
            ("user", self._user_content(turn, user), "content"),
        )

    def user_end(self, messages: Sequence[Message]) -> list[Piece]:
        """What follows the content of a user turn: its end, and the start of the answer.

        Args:
            messages: the conversation before that turn.
        """
        turn = self._next_turn(messages)
        return _pieces(_USER, ("user", turn.after, "markup"), ("assistant", turn.opening, "markup"))

    def _next_turn(self, messages: Sequence[Message]) -> _Turn:
        return self._later if _has_turns(messages) else self._first[self._has_system(messages)]

    def given_assistant(self, messages: Sequence[Message], text: str) -> list[Piece]:
        """What an answer that is given, not generated, appends. The next `user_turn` closes it.

        Args:
            messages: the conversation so far, which `user_turn` has ended with the start of an answer; other endings
                are taken as well, and get one.
            text: the answer.
        """
        last = messages[-1]["role"] if messages else "system"
        return _pieces(
            _ASSISTANT if last == "assistant" else self._later.after + self._later.opening,
            ("assistant", self._closing if last == "assistant" else "", "markup"),
            ("assistant", "" if last == "user" else self._later.opening, "markup"),
            ("assistant", self._answer_lead, "markup"),
            ("assistant", self._assistant_content(text), "content"),
        )

    def close_assistant(self, messages: Sequence[Message], text: str) -> list[Piece]:
        """What ends an answer: the first part of what the next `user_turn` appends."""
        return _pieces(_ASSISTANT, ("assistant", self._closing, "markup"))

    def tokens(self, model: Model, pieces: Sequence[Piece]) -> list[tuple[Role, npt.NDArray[np.int32]]]:
        """The tokens of each piece: one (role, [n] int32) for each, in order; n may be 0.

        Joined, they are what tokenizing the joined texts gives, except that contents never yield a control token or
        any other token that the template's markup uses. A token that spans two pieces belongs to the one that holds
        its middle.
        """
        return _Tokenizer(model, self._markup()).run(pieces)

    def _markup(self) -> str:
        """All markup of the template, in no particular order."""
        texts = [self._closing, self._user_header, self._answer_lead]
        texts += [
            part for turn in (*self._first.values(), self._later) for part in (turn.before, turn.after, turn.opening)
        ]
        return "\n".join(texts)

    def _has_system(self, messages: Sequence[Message]) -> bool:
        # an empty system block still replaces the template's default one; folded, it is nothing at all
        return any(
            message["role"] == "system" and (message["content"] or not self.system_folded) for message in messages
        )

    def _supports_system(self) -> bool:
        self.system_folded = False
        try:
            return _SYSTEM in self.render([_system(_SYSTEM), _user(_USER)], opening=False)
        except TemplateError:
            return False

    def _turn(self, *messages: Message) -> _Turn:
        user = messages[-1]["content"]
        closed = self.render(messages, opening=False)
        opened = self.render(messages, opening=True)
        if user not in closed or user not in opened:
            raise TemplateError("the model's chat template leaves out the user's text: use another GGUF file")
        before, _, rest = opened.rpartition(user)
        after = _shared_start(closed.rpartition(user)[2], rest)
        return _Turn(messages, before, after, rest[len(after) :])

    def _first_header(self, has_system: bool) -> str:
        """The markup before the content of the first user turn, as far as every user turn begins with it."""
        before = self._first[has_system].before
        headers = (self._user_header, self._user_header.lstrip())
        return next((header for header in headers if before.endswith(header)), "")

    def _end_of_last_answer(self) -> str:
        """What the template writes after an answer when nothing follows it."""
        try:
            return _between(self.render([_user(_USER), _assistant(_ASSISTANT)], opening=False), _ASSISTANT)
        except TemplateError:
            return ""

    def _find_answer_lead(self) -> str:
        """Markup that an earlier answer has between the start of an answer, as generation gets it, and its content."""
        found = _between(self._later.before, _USER, _ASSISTANT)
        usual = self._first[False].after + self._first[False].opening
        return found.removeprefix(usual) if found.startswith(usual) else ""

    def _depends_on_history(self) -> bool:
        turns = [_user(_USER), _assistant(_ASSISTANT), _user(_USER_2), _assistant(_ASSISTANT_2), _user(_USER_3)]
        opening = self._first[False].after + self._first[False].opening + self._answer_lead
        between = self._closing + self._user_header
        expected = [
            _USER, opening, _ASSISTANT, between, _USER_2, opening, _ASSISTANT_2, between,
            _USER_3, self._later.after, self._later.opening,
        ]  # fmt: skip
        answer = f"<think>\n{_THOUGHT}\n</think>\n\n{_ASSISTANT}"
        try:
            plain = self.render(turns, opening=True)
            with_system = self.render([_system(_SYSTEM), *turns], opening=True)
            with_thought = self.render([_user(_USER), _assistant(answer), _user(_USER_2)], opening=True)
        except TemplateError:
            return True
        return (
            plain != self._first[False].before + "".join(expected)
            or with_system != self._first[True].before + "".join(expected)
            or _THOUGHT not in with_thought
        )

    def _system_block(self, system: str) -> tuple[str, str, str]:
        """Markup before the system text, that text as rendered, and markup from there to the user's text.

        Rendered anew each time: a template may write the date into this block.
        """

        def before_user(text: str) -> str:
            return self.render([_system(text), _user(_USER)], opening=False).rpartition(_USER)[0]

        head, _, tail = before_user(_SYSTEM).partition(_SYSTEM)
        return head, _inside(before_user(system), head, tail, system), tail

    def _user_content(self, turn: _Turn, user: str) -> str:
        """The user's text as the template writes it: some strip it."""
        return self._content([*turn.messages[:-1], _user(user)], turn.before, turn.after + turn.opening, user)

    def _assistant_content(self, text: str) -> str:
        """An answer as the template writes it in a history: some strip it, or drop its reasoning."""
        head, _, tail = self._later.before.partition(_ASSISTANT)
        messages = [_user(_USER), _assistant(text), _user(_USER_2)]
        return self._content(messages, head, tail + _USER_2 + self._later.after + self._later.opening, text)

    def _content(self, messages: Sequence[Message], head: str, tail: str, text: str) -> str:
        try:
            return _inside(self.render(messages, opening=True), head, tail, text)
        except TemplateError:
            # the template interprets contents, and not this one; the markup around it is known all the same
            return text


class _Tokenizer:
    """Tokenizes pieces as llama.cpp would tokenize their joined text, but keeps contents from yielding markers.

    llama.cpp first cuts a text at its special tokens and then tokenizes each run of plain text between them. Here
    only markup is cut, and the runs, which may join markup and content, are read without special tokens.

    Args:
        model: the vocabulary.
        markup: all markup of the template. The special tokens in it are the template's markers.
    """

    def __init__(self, model: Model, markup: str) -> None:
        self._model = model
        lib = load().llama_cpp
        special = lib.LLAMA_TOKEN_ATTR_CONTROL | lib.LLAMA_TOKEN_ATTR_UNKNOWN | lib.LLAMA_TOKEN_ATTR_USER_DEFINED
        self._lstrip, self._rstrip = lib.LLAMA_TOKEN_ATTR_LSTRIP, lib.LLAMA_TOKEN_ATTR_RSTRIP
        self._markers: dict[str, int] = {}
        for token in map(int, np.unique(model.tokenize(markup, parse_special=True))):
            text = model.token_bytes(token, special=True).decode("utf-8", "replace")
            # runs of spaces and newlines can be tokens of this sort too; they are no markers
            if model.token_attributes(token) & special and text.strip() and text in markup:
                self._markers[text] = token
        # llama.cpp finds user-defined tokens even in text that is read without special tokens
        found_anyway = [
            text for text, token in self._markers.items() if token in model.tokenize(text, parse_special=False)
        ]
        self._marker = _any_of(self._markers)
        self._found_anyway = _any_of(found_anyway, overlapping=True)

    def run(self, pieces: Sequence[Piece]) -> list[tuple[Role, npt.NDArray[np.int32]]]:
        tokens: list[list[npt.NDArray[np.int32]]] = [[np.empty(0, dtype=np.int32)] for _ in pieces]
        fresh, strip_left = self._state_after(pieces[0].before if pieces else "")
        for parts, i, marker in self._cut(pieces):
            attributes = self._model.token_attributes(marker) if marker is not None else 0
            for owner, array in self._tokenize_run(parts, fresh, strip_left, bool(attributes & self._lstrip)):
                tokens[owner].append(array)
            if marker is not None:
                tokens[i].append(np.array([marker], dtype=np.int32))
            fresh, strip_left = True, bool(attributes & self._rstrip)
        return [(piece.role, np.concatenate(arrays)) for piece, arrays in zip(pieces, tokens, strict=True)]

    def _state_after(self, before: str) -> tuple[bool, bool]:
        """Whether the next run is at the start of a text or behind a special token, and whether that swallows space."""
        if not before:
            return True, False
        *_, last = [None, *self._marker.finditer(before)]
        if last is None:
            return False, False
        strips = bool(self._model.token_attributes(self._markers[last[0]]) & self._rstrip)
        rest = before[last.end() :]
        fresh = not (rest.lstrip(_C_WHITESPACE) if strips else rest)
        return fresh, fresh and strips

    def _cut(self, pieces: Sequence[Piece]) -> Iterator[tuple[list[tuple[int, str]], int, int | None]]:
        """Runs of plain text, as (piece, text) parts, each with the marker that ends it and that marker's piece."""
        parts: list[tuple[int, str]] = []
        for i, piece in enumerate(pieces):
            start = 0
            for match in self._marker.finditer(piece.text if piece.kind == "markup" else ""):
                yield [*parts, (i, piece.text[start : match.start()])], i, self._markers[match[0]]
                parts, start = [], match.end()
            parts.append((i, piece.text[start:]))
        yield parts, 0, None

    def _tokenize_run(
        self, parts: list[tuple[int, str]], fresh: bool, strip_left: bool, strip_right: bool
    ) -> Iterator[tuple[int, npt.NDArray[np.int32]]]:
        """The tokens of a run by the piece that holds their middle."""
        text = "".join(part for _, part in parts)
        owners = np.repeat([i for i, _ in parts], [len(_utf8(part)) for _, part in parts])
        # some special tokens swallow the whitespace beside them; it is ASCII, so characters are bytes
        if strip_right:
            text = text.rstrip(_C_WHITESPACE)
            owners = owners[: len(_utf8(text))]
        if strip_left:
            owners = owners[len(text) - len(text.lstrip(_C_WHITESPACE)) :]
            text = text.lstrip(_C_WHITESPACE)
        if not text:
            return
        tokens = self._read(text, fresh)
        if owners[0] == owners[-1]:
            yield int(owners[0]), tokens
            return
        lengths = np.array([len(self._model.token_bytes(token)) for token in tokens.tolist()])
        n_bytes = int(lengths.sum())
        middles = np.cumsum(lengths) - lengths + (lengths - 1) // 2
        if n_bytes == len(owners) + 1:
            # the space in front
            middles -= 1
        elif n_bytes != len(owners):
            # a vocabulary that rewrites the text; where a part ends can only be estimated
            middles = middles * len(owners) // max(n_bytes, 1)
        owner_of = owners[np.clip(middles, 0, len(owners) - 1)]
        for owner in np.unique(owner_of):
            yield int(owner), tokens[owner_of == owner]

    def _read(self, text: str, fresh: bool) -> npt.NDArray[np.int32]:
        """The tokens of plain text. A marker in it is read in two parts, which leaves nothing to be found."""
        starts = [match.start() + 1 for match in self._found_anyway.finditer(text)]
        chunks = [text[i:j] for i, j in itertools.pairwise([0, *starts, len(text)])]
        return np.concatenate([self._read_chunk(chunk, fresh and not i) for i, chunk in enumerate(chunks)])

    def _read_chunk(self, text: str, fresh: bool) -> npt.NDArray[np.int32]:
        tokens = self._model.tokenize(text, parse_special=False)
        if fresh or not self._model.adds_space:
            return tokens
        # behind other text there is no space in front; a byte that joins with nothing stands for that text
        text_before = self._model.tokenize("\x01", parse_special=False)
        behind = self._model.tokenize("\x01" + text, parse_special=False)
        n = len(text_before)
        return behind[n:] if np.array_equal(behind[:n], text_before) else tokens


def _system(content: str) -> Message:
    return {"role": "system", "content": content}


def _user(content: str) -> Message:
    return {"role": "user", "content": content}


def _assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def _has_turns(messages: Sequence[Message]) -> bool:
    return any(message["role"] != "system" for message in messages)


def _fold(messages: Sequence[Message]) -> list[Message]:
    """The same conversation with the system text at the start of the first user turn."""
    system = [message["content"] for message in messages if message["role"] == "system" and message["content"]]
    turns = [message for message in messages if message["role"] != "system"]
    first = next((i for i, message in enumerate(turns) if message["role"] == "user"), None)
    if first is not None:
        turns[first] = _user(_FOLD_SEPARATOR.join([*system, turns[first]["content"]]))
    return turns


def _pieces(before: str, *parts: tuple[Role, str, Literal["markup", "content"]]) -> list[Piece]:
    pieces = [Piece(role, text, kind) for role, text, kind in parts if text]
    return [replace(pieces[0], before=before), *pieces[1:]] if pieces else []


def _between(text: str, start: str, end: str = "") -> str:
    """What stands between two texts, or after the first one."""
    _, found, rest = text.partition(start)
    if not found or end not in rest:
        raise TemplateError("the model's chat template leaves out what was said: use another GGUF file")
    return rest.partition(end)[0] if end else rest


def _shared_start(a: str, b: str) -> str:
    """What both begin with. Where they part, a marker may have begun in both; it is left out."""
    n = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    shared = a[:n]
    if shared in (a, b):
        return shared
    return shared[: max(shared.rfind(end) + 1 for end in (">", "]", " ", "\n"))]


def _inside(text: str, head: str, tail: str, default: str) -> str:
    """What stands between a known start and a known end of a text, or the default if it has not got them."""
    if len(text) >= len(head) + len(tail) and text.startswith(head) and text.endswith(tail):
        return text[len(head) : len(text) - len(tail)]
    return default


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _any_of(texts: Iterable[str], *, overlapping: bool = False) -> re.Pattern[str]:
    """Finds these texts, the longest first; never matches if there are none."""
    either = "|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True)) or "(?!)"
    return re.compile(f"(?={either})" if overlapping else either)


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "replace")


def _is_one_token(model: Model, text: str) -> bool:
    return len(model.tokenize(text, parse_special=True)) == 1


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Ends Python code in the block with a TimeoutError after so long: the sandbox limits a loop, but not loops in loops."""
    end = time.monotonic() + seconds

    def watch(_frame: FrameType, _event: str, _argument: object) -> Any:
        if time.monotonic() > end:
            raise TimeoutError(f"it takes more than {seconds:g} seconds")
        return watch

    before = sys.gettrace()
    sys.settrace(watch)
    try:
        yield
    finally:
        sys.settrace(before)
