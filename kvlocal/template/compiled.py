"""CompiledTemplate and AnswerFormat: llama.cpp's Jinja engine and its parsers of answers (kvlocal-chat.h), within limits of time and memory."""

from __future__ import annotations

import json
import re
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from kvlocal.errors import KvlocalError
from kvlocal.llama.grammar import GrammarRules
from kvlocal.llama.library import load_chat

Message = Mapping[str, Any]

# What one rendering may take; templates take thousandths of that.
LIMIT_SECONDS = 10.0
LIMIT_BYTES = 64 << 20


class TemplateError(KvlocalError):
    """The chat template cannot be used, or refuses the conversation."""


class AnswerError(KvlocalError):
    """An answer is not in the format of the model's family."""


class ToolCall(NamedTuple):
    """A call of a tool: its name, its arguments, a JSON object as text, and its id, "" where the family has none."""

    name: str
    arguments: str
    id: str


@dataclass(frozen=True)
class Answer:
    """What an answer says.

    content: the text for the user
    reasoning: the thought before it, "" if there is none
    tool_calls: the tools it calls; the arguments of the last one are incomplete as long as the answer goes on
    """

    content: str
    reasoning: str
    tool_calls: Sequence[ToolCall] = ()


class AnswerFormat:
    """How a model answers in a kind of conversation, as llama.cpp knows it for its family or finds it out from the template.

    prompt: the text of the conversation, with what the family needs
    supports_thinking: whether there are thoughts
    thinking_start, thinking_end: the texts around a thought, "" where they are not known
    stops: texts that end an answer
    grammar: what the answer has to follow, None for nothing
    """

    def __init__(self, description: Mapping[str, Any], pointer: Any) -> None:
        self.prompt: str = description["prompt"]
        self.supports_thinking: bool = description["supports_thinking"]
        self.thinking_start: str = description["thinking_start"]
        self.thinking_end: str = next(iter(description["thinking_ends"]), "").strip()
        self.stops: tuple[str, ...] = tuple(description["stops"])
        self.grammar = _rules(description, (self.thinking_start, self.thinking_end))
        self._pointer = pointer
        self._free = weakref.finalize(self, load_chat().lib.kvl_chat_format_free, pointer)
        self._free.atexit = False  # the system frees it

    def parse(self, text: str, *, is_partial: bool = False) -> Answer:
        """Reads an answer.

        Args:
            text: what the model wrote behind the generation prompt, with the texts of control tokens.
            is_partial: the answer still goes on.

        Raises:
            AnswerError: it is not in this format.
        """
        found = self._parsed(text, is_partial)
        calls = [ToolCall(call["name"], call["arguments"], call["id"]) for call in found["tool_calls"]]
        return Answer(found["content"].removeprefix(self._of_prompt), found["reasoning_content"], calls)

    @cached_property
    def _of_prompt(self) -> str:
        """What the parser takes for the beginning of the answer and is the end of the prompt, such as a line break behind an empty thought."""
        try:
            return str(self._parsed("", is_partial=True)["content"])
        except AnswerError:
            return ""

    def _parsed(self, text: str, is_partial: bool) -> dict[str, Any]:
        out = load_chat().ffi.new("struct kvl_chat_text **")
        data = _utf8(text)
        _check(load_chat().lib.kvl_chat_parse(self._pointer, data, len(data), is_partial, out), AnswerError)
        found: dict[str, Any] = json.loads(_taken(out))
        return found


class CompiledTemplate:
    """A chat template, compiled once; may be used from several threads at once.

    Args:
        source: the Jinja source.
        bos_token, eos_token: their texts, for the template's use.
        seconds: how long each call may take.

    Raises:
        TemplateError: it is broken, or goes beyond the limits.
    """

    def __init__(self, source: str, *, bos_token: str = "", eos_token: str = "", seconds: float = LIMIT_SECONDS) -> None:
        chat = load_chat()
        out = chat.ffi.new("struct kvl_chat **")
        texts = [_utf8(text) for text in (source, bos_token, eos_token)]
        sized = [argument for text in texts for argument in (text, len(text))]
        _check(chat.lib.kvl_chat_compile(*sized, seconds, LIMIT_BYTES, out), TemplateError)
        self._pointer = out[0]
        self._free = weakref.finalize(self, chat.lib.kvl_chat_free, out[0])
        self._free.atexit = False  # the system frees it

    def render(self, messages: Sequence[Message], *, opening: bool, now: int, **asked: object) -> str:
        """The text of a conversation.

        Args:
            opening: with the start of an answer.
            now: the time for the template's use, in seconds since 1970.
            asked: "enable_thinking", where it is wanted (kvlocal-chat.h).

        Raises:
            TemplateError: it refuses the conversation, or goes beyond the limits.
        """
        out = load_chat().ffi.new("struct kvl_chat_text **")
        data = _request(messages, add_generation_prompt=opening, now=now, **asked)
        _check(load_chat().lib.kvl_chat_render(self._pointer, data, len(data), out), TemplateError)
        return _taken(out)

    def answer_format(self, messages: Sequence[Message], *, opening: bool = True, **asked: object) -> AnswerFormat:
        """The format of the answer to a conversation.

        Args:
            opening: with the start of an answer.
            asked: "tools", "tool_choice", "parallel_tool_calls", "json_schema", "enable_thinking", "now", where they are wanted (kvlocal-chat.h).

        Raises:
            TemplateError: as `render`.
        """
        chat = load_chat()
        pointer, out = chat.ffi.new("struct kvl_chat_format **"), chat.ffi.new("struct kvl_chat_text **")
        data = _request(messages, add_generation_prompt=opening, **asked)
        _check(chat.lib.kvl_chat_apply(self._pointer, data, len(data), pointer, out), TemplateError)
        return AnswerFormat(json.loads(_taken(out)), pointer[0])


# the kinds of llama.cpp's triggers (common_grammar_trigger_type)
_WORD, _PATTERN_FULL = 1, 3


def _rules(description: Mapping[str, Any], thought: tuple[str, str]) -> GrammarRules | None:
    """The grammar of a format, as the sampler takes it."""
    if not description["grammar"]:
        return None
    if not description["grammar_lazy"]:
        return GrammarRules(description["grammar"], description["generation_prompt"])
    triggers = []
    for trigger in description["grammar_triggers"]:
        pattern = trigger["value"]
        if trigger["type"] == _WORD:
            pattern = re.escape(pattern)
        elif trigger["type"] == _PATTERN_FULL:
            pattern = rf"\A(?:{pattern})\Z"
        triggers.append(pattern)
    return GrammarRules(description["grammar"], description["generation_prompt"], triggers, thought)


def _request(messages: Sequence[Message], **options: object) -> bytes:
    return _utf8(json.dumps({"messages": [dict(message) for message in messages], **options}, ensure_ascii=False))


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "replace")


def _check(status: int, error: type[KvlocalError]) -> None:
    if status < 0:
        chat = load_chat()
        message = chat.ffi.string(chat.lib.kvl_chat_last_error()).decode("utf-8", "replace")
        # the engine shows the place in the template first and says what is wrong last
        lines = [line.strip() for line in message.splitlines() if line.strip()]
        raise error((lines[-1] if lines else "no reason is given").removeprefix("Error: ").removeprefix("Jinja Exception: ").rstrip("."))


def _taken(out: Any) -> str:
    """The text of a result, which is freed."""
    chat = load_chat()
    try:
        return bytes(chat.ffi.buffer(chat.lib.kvl_chat_text_data(out[0]), chat.lib.kvl_chat_text_size(out[0]))).decode("utf-8", "replace")
    finally:
        chat.lib.kvl_chat_text_free(out[0])
