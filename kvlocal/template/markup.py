"""Markup: what a template writes around contents, found by rendering short conversations with stand-ins for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvlocal.template.answer import MARKER_ENDS, THOUGHT_END, THOUGHT_START
from kvlocal.template.compiled import AnswerFormat, TemplateError

# A message of a conversation, whoever keeps it: "role" and "content", a text that may be empty; where it has them also "tool_calls", a list as in
# OpenAI's chat completions, "tool_call_id", "name" and "reasoning_content".
Message = dict[str, Any]
Render = Callable[..., str]

# Stand-ins for contents. A template copies contents, so wherever one of these appears, a content belongs.
SYSTEM, USER, ASSISTANT = "Kvlsys0Q", "Kvlusr1Q", "Kvlast1Q"
USER_2, ASSISTANT_2, USER_3 = "Kvlusr2Q", "Kvlast2Q", "Kvlusr3Q"
THOUGHT = "Kvlthk1Q"

# markers that no line ends behind
_TIGHT = ("|>", "]")


@dataclass(frozen=True)
class UserTurn:
    """The markup around a user's content at one point of a conversation, `before + content + after + header` in front of every answer.

    messages: the conversation it was taken from, the user's turn last
    generated: what follows where an answer is to be generated, such as the beginning of a thought
    given: what follows in front of an answer that is there already, such as an empty thought
    """

    messages: tuple[Message, ...]
    before: str
    after: str
    header: str
    generated: str
    given: str

    @property
    def answered(self) -> str:
        """What stands between the user's content and an answer in a history."""
        return self.after + self.header + self.given

    @property
    def opened(self) -> str:
        """What stands behind the user's content where an answer is to be generated."""
        return self.after + self.header + self.generated


@dataclass(frozen=True)
class Thoughts:
    """The markup around the thought of an answer, behind the header that every answer has."""

    before: str
    after: str


class Markup:
    """The markup of a template.

    Args:
        render: gives the text of messages, with the start of an answer if `opening`; raises TemplateError.
        answer_format: gives the format of the answer to messages.

    Attributes:
        first: the first user turn, without and with a system text before it.
        later: every other user turn.
        closing: what ends an answer that another turn follows.
        last_closing: what ends the last answer.
        user_header: what stands between that and a later user turn's content.
        answer_format: of the answers of a family that has thoughts, else None.
        thoughts: the markup of thoughts, None where there are none or where it is not known.
        history_dependent: earlier turns look otherwise later on, at a point where no stand-in does.

    Raises:
        TemplateError: the template cannot render the simplest conversation.
    """

    def __init__(self, render: Render, answer_format: Callable[[Sequence[Message]], AnswerFormat]) -> None:
        self._render = render
        history = [user(USER), assistant(ASSISTANT), user(USER_2)]
        try:
            between_turns = between(render(history, opening=True), USER, ASSISTANT)
        except TemplateError:
            # the simplest conversation says better what is wrong
            self._turn("", user(USER))
            raise
        self.first = {
            False: self._turn(between_turns, user(USER)),
            True: self._turn(between_turns, system(SYSTEM), user(USER)),
        }
        self.later = self._turn(between_turns, *history)
        behind_answer = between(self.later.before, ASSISTANT)
        self.last_closing = self._end_of_last_answer()
        self.closing = shared_start(self.last_closing, behind_answer)
        self.user_header = behind_answer[len(self.closing) :]
        self.answer_format = self._find_answer_format(answer_format)
        self.thoughts = self._find_thoughts(answer_format, self.answer_format) if self.answer_format else None
        self.history_dependent = self._depends_on_history()

    def first_header(self, has_system: bool) -> str:
        """The markup before the content of the first user turn, as far as every user turn begins with it."""
        before = self.first[has_system].before
        headers = (self.user_header, self.user_header.lstrip())
        return next((header for header in headers if before.endswith(header)), "")

    def all_texts(self) -> str:
        """All markup, in no particular order."""
        texts = [self.closing, self.last_closing, self.user_header]
        texts += [text for turn in (*self.first.values(), self.later) for text in (turn.before, turn.answered, turn.opened)]
        texts += [self.thoughts.before, self.thoughts.after] if self.thoughts else []
        return "\n".join(texts)

    def _turn(self, in_history: str, *messages: Message) -> UserTurn:
        content = messages[-1]["content"]
        closed = self._render(messages, opening=False)
        opened = self._render(messages, opening=True)
        if content not in closed or content not in opened:
            raise TemplateError("the model's chat template leaves out the user's text: use another GGUF file")
        before, _, rest = opened.rpartition(content)
        after = shared_start(closed.rpartition(content)[2], rest)
        # what only the generation prompt has belongs to answers that are generated
        shared = shared_start(rest, in_history)
        after = after if shared.startswith(after) else shared
        return UserTurn(messages, before, after, shared[len(after) :], rest[len(shared) :], in_history[len(shared) :])

    def _end_of_last_answer(self) -> str:
        """What the template writes after an answer when nothing follows it."""
        try:
            return between(self._render([user(USER), assistant(ASSISTANT)], opening=False), ASSISTANT)
        except TemplateError:
            return ""

    def _find_answer_format(self, answer_format: Callable[[Sequence[Message]], AnswerFormat]) -> AnswerFormat | None:
        try:
            found = answer_format([user(USER)])
        except TemplateError:
            return None
        return found if found.supports_thinking else None

    def _find_thoughts(self, answer_format: Callable[[Sequence[Message]], AnswerFormat], usual: AnswerFormat) -> Thoughts | None:
        turn = self.first[False]
        try:
            text = answer_format([user(USER), {**assistant(ASSISTANT), "reasoning_content": THOUGHT}]).prompt
            before, after = between(text, USER, THOUGHT), between(text, THOUGHT, ASSISTANT)
            if before.startswith(turn.after + turn.header):
                return Thoughts(before[len(turn.after + turn.header) :], after)
        except TemplateError:
            pass
        # a template that leaves out the thoughts of all answers: what the markers alone tell
        start, end = usual.thinking_start, usual.thinking_end
        return _thoughts_between(turn, start, end) if start and end else None

    def _depends_on_history(self) -> bool:
        turns = [user(USER), assistant(ASSISTANT), user(USER_2), assistant(ASSISTANT_2), user(USER_3)]
        first, later = self.first[False], self.later
        behind = self.closing + self.user_header
        expected = [
            USER, first.answered, ASSISTANT, behind, USER_2, later.answered, ASSISTANT_2, behind, USER_3, later.opened,
        ]  # fmt: skip
        answer = THOUGHT_START + THOUGHT + THOUGHT_END + ASSISTANT
        try:
            plain = self._render(turns, opening=True)
            with_system = self._render([system(SYSTEM), *turns], opening=True)
            with_thought = self._render([user(USER), assistant(answer), user(USER_2)], opening=True)
        except TemplateError:
            return True
        return (
            plain != first.before + "".join(expected)
            or with_system != self.first[True].before + "".join(expected)
            or THOUGHT not in with_thought
        )


def _thoughts_between(turn: UserTurn, start: str, end: str) -> Thoughts:
    """The markup of thoughts, from their markers and from what stands in front of answers, which may be an empty thought."""
    if start in turn.given:
        n = turn.given.index(start) + len(start)
        before, empty = turn.given[:n], turn.given[n:]
    elif start in turn.generated:
        before, empty = turn.generated, turn.given
    elif start in turn.header and end not in turn.header:
        before, empty = "", turn.given
    else:
        before, empty = start if start.endswith(_TIGHT) else start + "\n", turn.given
    if end in empty:
        return Thoughts(before, empty[empty.index(end) :])
    return Thoughts(before, end + empty if end.endswith(_TIGHT) else f"\n{end}\n\n{empty}")


def system(content: str) -> Message:
    return {"role": "system", "content": content}


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def between(text: str, start: str, end: str = "") -> str:
    """What stands between two texts, or after the first one."""
    _, found, rest = text.partition(start)
    if not found or end not in rest:
        raise TemplateError("the model's chat template leaves out what was said: use another GGUF file")
    return rest.partition(end)[0] if end else rest


def shared_start(a: str, b: str) -> str:
    """What both begin with. Where they part, a marker may have begun in both; it is left out."""
    n = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    shared = a[:n]
    if shared in (a, b):
        return shared
    return shared[: max(shared.rfind(end) + 1 for end in (*MARKER_ENDS, " ", "\n"))]


def inside(text: str, head: str, tail: str, default: str) -> str:
    """What stands between a known start and a known end of a text, or the default if it has not got them."""
    if len(text) >= len(head) + len(tail) and text.startswith(head) and text.endswith(tail):
        return text[len(head) : len(text) - len(tail)]
    return default


def with_folded_system(messages: Sequence[Mapping[str, str]]) -> list[Message]:
    """The same conversation with the system text at the start of the first user turn."""
    system_texts = [message["content"] for message in messages if message["role"] == "system" and message["content"]]
    turns = [dict(message) for message in messages if message["role"] != "system"]
    first = next((i for i, message in enumerate(turns) if message["role"] == "user"), None)
    if first is not None:
        turns[first] = user("\n\n".join([*system_texts, turns[first]["content"]]))
    return turns
