"""AnswerOptions: what one answer is asked for besides how its tokens are drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from kvlocal.chat.config import SessionError

ToolChoice = Literal["auto", "required", "none"]

# the most log-probabilities of a token that can be asked for
MAX_TOP_LOGPROBS = 20


@dataclass(frozen=True)
class AnswerOptions:
    """What an answer is asked for.

    stop: texts that end it and are not part of it
    max_tokens: the longest answer, in tokens; None for what the session has
    grammar: what the whole answer follows, in GBNF, llama.cpp's notation; None for none
    json_schema: the answer is one JSON value of this schema; {} takes any value; None for none
    tools: the tools that may be called, as OpenAI's chat completions have them: those of the session (SessionConfig.tools), or () for these
    tool_choice: "auto" lets the model choose, "required" has it call one, "none" has it call none
    allowed_tools: the names of the tools that may be called; () for all of them
    parallel_tool_calls: several may be called in one answer
    top_logprobs: log-probabilities of this many of the likeliest tokens are told for each token, and its own; None for none at all

    Raises:
        SessionError: a value is out of range, or two of them contradict each other.
    """

    stop: Sequence[str] = ()
    max_tokens: int | None = None
    grammar: str | None = None
    json_schema: Mapping[str, Any] | None = None
    tools: Sequence[Mapping[str, Any]] = ()
    tool_choice: ToolChoice = "auto"
    allowed_tools: Sequence[str] = ()
    parallel_tool_calls: bool = True
    top_logprobs: int | None = None

    def __post_init__(self) -> None:
        for name in ("stop", "tools", "allowed_tools"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not all(self.stop):
            raise SessionError("a stop text is empty: leave it out, or give at least one character")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise SessionError(f"max_tokens is {self.max_tokens}: it must be at least 1")
        if self.tool_choice not in get_args(ToolChoice):
            raise SessionError(f"tool_choice is {self.tool_choice!r}: use one of {', '.join(get_args(ToolChoice))}")
        if self.top_logprobs is not None and not 0 <= self.top_logprobs <= MAX_TOP_LOGPROBS:
            raise SessionError(f"top_logprobs is {self.top_logprobs}: give 0 to {MAX_TOP_LOGPROBS}")
        if self.grammar is not None and self.json_schema is not None:
            raise SessionError("an answer cannot follow a grammar and a JSON schema at once: give one of them")
