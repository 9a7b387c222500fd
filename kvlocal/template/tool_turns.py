"""ToolTurns: calls of tools and their results in a conversation, as the template writes them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence

from kvlocal.template.answer import split_thought
from kvlocal.template.compiled import TemplateError
from kvlocal.template.markup import USER, Markup, Message, shared_start, user
from kvlocal.template.pieces import Kind, Piece, Role, pieces_of

# stand-ins for an argument, for a result, and for a marker that someone wrote
_ARGUMENT, _RESULT = "Kvlarg1Q", "Kvlres1Q"
_MARKER = re.compile(r"Kvlmrk(\d+)Q")


class ToolTurns:
    """What is appended for calls of tools that are given, and for what tools gave back.

    Args:
        render: gives the text of messages with the tools, with the start of an answer if `opening`; raises TemplateError.
        markup: of the same template with the same tools.
        ends: the texts of the tokens that end answers.
        markers: finds the texts of control tokens, which contents must not yield.
    """

    def __init__(self, render: Callable[..., str], markup: Markup, ends: Sequence[str], markers: re.Pattern[str]) -> None:
        self._render, self._markup, self._markers = render, markup, markers
        self._ends = [text for text in (*ends, markup.closing.strip()) if text]

    def results(self, call: Message, new: Sequence[Message]) -> list[Piece]:
        """What follows an answer that calls tools: its end, the results, and what every answer to them begins with.

        Args:
            call: that answer.
            new: messages of tools, and of the user behind them.

        Raises:
            TemplateError: the template has no such messages.
        """
        hidden = _Hidden(self._markers)
        calls = [_with_arguments(each, json.dumps({_ARGUMENT: _ARGUMENT})) for each in call.get("tool_calls", ())]
        messages = [user(USER), {"role": "assistant", "content": "", "tool_calls": calls}]
        before = self._render(messages, opening=False)
        messages += [{**message, "content": hidden.put(message["content"])} for message in new]
        closed, opened = self._render(messages, opening=False), self._render(messages, opening=True)
        if _ARGUMENT not in before or _ARGUMENT not in closed:
            raise TemplateError("the model's chat template leaves out calls of tools: use another model for them")
        behind, rest = (text[text.rindex(_ARGUMENT) + len(_ARGUMENT) :] for text in (before, opened))
        shared = shared_start(behind, rest)
        at, length = self._end_in(shared or rest, rest)
        if at < 0:
            at, length = len(shared), 0
        closing = rest[at : at + length]
        opening = opened[len(closed) :] if opened.startswith(closed) else ""
        header = opening.removesuffix(self._markup.later.generated)
        text = rest[at + length : len(rest) - len(opening)]
        in_front = opened[: len(opened) - len(rest) + at]
        return pieces_of(
            in_front,
            ("assistant", closing, "markup"),
            *hidden.parts(text, [message["content"] for message in messages[2:]], "user"),
            ("assistant", header, "markup"),
        )

    def calls(self, message: Message) -> list[Piece]:
        """A given answer that calls tools, behind what every answer begins with.

        Raises:
            TemplateError: the template has none.
        """
        hidden = _Hidden(self._markers)
        thought, is_closed, said = split_thought(message["content"])
        content = hidden.put(said if is_closed else message["content"])
        calls = [_with_arguments(each, hidden.put(each["function"]["arguments"])) for each in message["tool_calls"]]
        given: Message = {"role": "assistant", "content": content, "tool_calls": calls}
        if thought and is_closed:
            given["reasoning_content"] = hidden.put(thought)
        turn = self._markup.first[False]
        header = turn.after + turn.header
        body = self._up_to_end(header, given, followed=True) or self._up_to_end(header, given, followed=False)
        if not all(call["function"]["name"] in body for call in calls):
            raise TemplateError("the model's chat template leaves out calls of tools: use another model for them")
        return pieces_of(header, *hidden.parts(body, [content], "assistant"))

    def _up_to_end(self, header: str, given: Message, *, followed: bool) -> str:
        """What calls are written as, behind the header: as templates write those that have results or, `followed` being false, the last message,
        where nothing else tells where they end. "" if that cannot be found out.
        """
        names = [call["function"]["name"] for call in given["tool_calls"]]
        results = [
            {"role": "tool", "content": _RESULT, "tool_call_id": call.get("id", ""), "name": name}
            for call, name in zip(given["tool_calls"], names, strict=True)
        ]
        try:
            text = self._render([user(USER), given, *(results if followed else ())], opening=False).partition(USER)[2].partition(_RESULT)[0]
        except TemplateError:
            if followed:
                return ""
            raise
        body = text.removeprefix(header) if text.startswith(header) else text[len(shared_start(header, text)) :]
        at = max((body.rfind(end, max(0, body.rfind(names[-1]))) for end in self._ends), default=-1)
        if at >= 0:
            return body[:at]
        return "" if followed else body

    def _end_in(self, text: str, whole: str) -> tuple[int, int]:
        """Where an answer ends in a text that another one begins with, and how long what ends it is there; -1 and 0 if it does not."""
        found = [(at, end) for end in self._ends if (at := text.find(end)) >= 0]
        if not found:
            return -1, 0
        at, end = min(found)
        closing = self._markup.closing
        return at, len(closing) if closing and whole.startswith(closing, at) else len(end)


class _Hidden:
    """Texts of control tokens in contents, hidden behind stand-ins while the template writes the contents."""

    def __init__(self, markers: re.Pattern[str]) -> None:
        self._markers = markers
        self._found: list[str] = []

    def put(self, text: str) -> str:
        """The text with stand-ins."""

        def hide(match: re.Match[str]) -> str:
            self._found.append(match[0])
            return f"Kvlmrk{len(self._found) - 1}Q"

        return self._markers.sub(hide, text)

    def parts(self, text: str, contents: Sequence[str], role: Role) -> list[tuple[Role, str, Kind]]:
        """What the template wrote, as parts; what stood behind stand-ins is content, as are the contents that it copied as they are."""
        parts: list[tuple[Role, str, Kind]] = []
        for content in contents:
            before, found, behind = text.partition(content) if content else (text, "", "")
            if found:
                parts += [*self._markup_parts(before, role), (role, self._shown(content), "content")]
                text = behind
        return [*parts, *self._markup_parts(text, role)]

    def _markup_parts(self, text: str, role: Role) -> list[tuple[Role, str, Kind]]:
        # the pattern has one group, so that every other part is a number
        return [
            (role, self._marker(part) if i % 2 else part, "content" if i % 2 else "markup") for i, part in enumerate(_MARKER.split(text))
        ]

    def _shown(self, text: str) -> str:
        return _MARKER.sub(lambda match: self._marker(match[1]), text)

    def _marker(self, number: str) -> str:
        return self._found[int(number)] if int(number) < len(self._found) else f"Kvlmrk{number}Q"


def _with_arguments(call: Message, arguments: str) -> Message:
    return {**call, "function": {**call["function"], "arguments": arguments}}


def as_text(message: Message) -> str:
    """What a message says, with its calls of tools, for a template that has none."""
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls", ())]
    return "\n".join(filter(None, [message["content"], *calls]))
