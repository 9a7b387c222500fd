"""The fields of a request for a chat completion, as what an engine is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from kvlocal.chat.config import check_tools
from kvlocal.chat.messages import canonical, parse_messages
from kvlocal.chat.options import AnswerOptions, ToolChoice
from kvlocal.errors import KvlocalError
from kvlocal.llama.sampling import MAX_DRY_TOKENS, MAX_SEED, SamplingParams, with_temperature
from kvlocal.template.markup import Message

# a request with top_p = 0 wants the likeliest token alone, which a share above 0 that no token falls below also gives
_LEAST_TOP_P = 1e-6

FORMATS = ("text", "json_object", "json_schema")


class FieldError(KvlocalError, ValueError):
    """A field of a request has a value that is not possible.

    field: its name
    """

    def __init__(self, message: str, field: str) -> None:
        super().__init__(message)
        self.field = field


def conversation(messages: Any) -> list[Message]:
    """The messages of a request, in an order that a session can have; the last one can be answered.

    Raises:
        MessageError: they are no messages.
        FieldError: the last one cannot be answered.
    """
    if isinstance(messages, list):
        messages = [_with_content(message) for message in messages]
    found = canonical(parse_messages(messages))
    if not found or found[-1]["role"] not in ("user", "tool"):
        raise FieldError("the last message is none that can be answered: end with one of the user or of a tool", "messages")
    return found


def sampling(
    defaults: SamplingParams,
    index: int = 0,
    *,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    seed: int | None = None,
    logit_bias: Mapping[Any, float] | None = None,
    dry_penalty_last_n: int | None = None,
    dry_sequence_breakers: Sequence[str] | None = None,
    **others: float | None,
) -> SamplingParams:
    """How the tokens of an answer are drawn, the first of a request (0) with the seed that it names, the others with those that follow.

    Args:
        defaults: what is left open.
        temperature, top_p: as SamplingParams has them, but that 0 is a possible top_p.
        top_k: 0 and less are off.
        seed: any number; -1 is a random one.
        logit_bias: by tokens, which may be texts.
        dry_penalty_last_n: -1 is as many as possible.
        dry_sequence_breakers: as SamplingParams has them.
        others: more fields of SamplingParams, None for what is left open.

    Raises:
        FieldError: a name of logit_bias is no token.
        SamplingError: a value is out of range.
    """
    given: dict[str, Any] = {
        **others,
        "temperature": temperature,
        "top_p": None if top_p is None else max(top_p, _LEAST_TOP_P),
        "top_k": None if top_k is None else max(top_k, 0),
        "logit_bias": None if logit_bias is None else _biases(logit_bias),
        "dry_penalty_last_n": MAX_DRY_TOKENS if dry_penalty_last_n == -1 else dry_penalty_last_n,
        "dry_sequence_breakers": None if dry_sequence_breakers is None else tuple(dry_sequence_breakers),
        "seed": None if seed is None or seed == -1 else (seed + index) % (MAX_SEED + 1),
    }
    params = defaults if temperature is None else with_temperature(defaults, temperature)
    return replace(params, **{name: value for name, value in given.items() if value is not None})


def answer_options(
    *,
    stop: Sequence[str] = (),
    max_tokens: int | None = None,
    grammar: str | None = None,
    response_format: Mapping[str, Any] | None = None,
    tools: Sequence[Mapping[str, Any]] = (),
    tool_choice: str | Mapping[str, Any] | None = None,
    parallel_tool_calls: bool = True,
    logprobs: bool = False,
    top_logprobs: int | None = None,
) -> AnswerOptions:
    """What the answer may be.

    Args:
        stop, max_tokens, grammar: as AnswerOptions has them.
        others: as requests have them, in OpenAI's forms; llama.cpp's servers take the schema of a response format beside its type too.

    Raises:
        FieldError: two fields contradict each other, or one has a value that is not possible.
        KvlocalError: so it is for AnswerOptions.
    """
    check_tools(tools)
    choice, allowed = _tool_choice(tool_choice, [tool["function"]["name"] for tool in tools])
    if top_logprobs is not None and not logprobs:
        raise FieldError("top_logprobs is given without logprobs: set logprobs to true", "top_logprobs")
    return AnswerOptions(
        stop=stop,
        max_tokens=max_tokens,
        grammar=grammar,
        json_schema=schema_of(response_format, grammar),
        tools=tools,
        tool_choice=choice,
        allowed_tools=allowed,
        parallel_tool_calls=parallel_tool_calls,
        top_logprobs=(top_logprobs or 0) if logprobs else None,
    )


def schema_of(response_format: Mapping[str, Any] | None, grammar: str | None) -> Mapping[str, Any] | None:
    """The JSON schema that an answer has to follow, None for none.

    Raises:
        FieldError: there is none where there has to be one, or there is a grammar besides.
    """
    schema = None if response_format is None else _schema(response_format)
    if schema is not None and grammar is not None:
        raise FieldError("an answer cannot follow a grammar and a JSON schema at once: leave one of them out", "grammar")
    return schema


def not_among(value: str, known: Sequence[str]) -> str:
    """The end of a sentence about a value that is none of those known."""
    return f"is {value[:40]!r}: use one of {', '.join(known)}"


def _with_content(message: Any) -> Any:
    """An answer that said nothing, or was refused, comes back with null for its content."""
    if isinstance(message, dict) and message.get("role") == "assistant" and message.get("content") is None:
        return {**message, "content": ""}
    return message


def _biases(biases: Mapping[Any, float]) -> dict[int, float]:
    try:
        return {int(token): value for token, value in biases.items()}
    except (ValueError, TypeError):
        raise FieldError("logit_bias has a name that is no token: name tokens by their numbers", "logit_bias") from None


def _schema(wanted: Mapping[str, Any]) -> Mapping[str, Any] | None:
    kind, beside = wanted.get("type"), wanted.get("schema")
    if kind not in FORMATS:
        raise FieldError(f"the type of response_format {not_among(str(kind), FORMATS)}", "response_format.type")
    if kind == "text":
        return None
    if kind == "json_object":
        schema = beside or {"type": "object"}
    else:
        inside = wanted.get("json_schema")
        schema = inside.get("schema") if isinstance(inside, Mapping) else beside
        if schema is None:
            raise FieldError("response_format has no schema: give it as json_schema.schema", "response_format.json_schema")
    if not isinstance(schema, Mapping):
        raise FieldError("the schema of response_format is no object: give a JSON schema", "response_format.schema")
    return schema


def _tool_choice(choice: str | Mapping[str, Any] | None, names: Sequence[str]) -> tuple[ToolChoice, tuple[str, ...]]:
    """The choice and the names of the tools that it leaves, () for all."""
    if isinstance(choice, Mapping):
        function = choice.get("function")
        name = str(function.get("name")) if isinstance(function, Mapping) else ""
        if name not in names:
            raise FieldError(f"tool_choice {not_among(name, names) if names else 'names a tool, and there are none'}", "tool_choice")
        return "required", (name,)
    if choice == "required" and not names:
        raise FieldError("tool_choice is required, and there are no tools: give some", "tool_choice")
    return choice or "auto", ()  # type: ignore[return-value]  # AnswerOptions checks it
