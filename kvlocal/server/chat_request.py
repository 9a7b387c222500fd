"""A body of /v1/chat/completions, as what an engine is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from kvlocal.chat.messages import canonical, parse_messages
from kvlocal.chat.options import AnswerOptions, ToolChoice
from kvlocal.errors import KvlocalError
from kvlocal.llama.sampling import MAX_SEED, SamplingParams, with_temperature
from kvlocal.server.errors import invalid, not_among, of_failure
from kvlocal.server.schemas import MAX_STOPS, ChatRequest, NamedTool, ResponseFormat, Sampled
from kvlocal.serving.request import AnswerRequest

# a request with top_p = 0 wants the likeliest token alone, which a share above 0 that no token falls below also gives
_LEAST_TOP_P = 1e-6


def answer_requests(
    fields: ChatRequest, owner: str, defaults: SamplingParams, *, system: str | None = None, keep_trimmed: bool = False
) -> list[AnswerRequest]:
    """What an engine is asked for, once for each of the `n` answers that are wanted; each has a seed of its own.

    Args:
        owner: whose conversation it is.
        defaults: how tokens are drawn where the request does not say it.
        system: the system prompt of a conversation that has none.
        keep_trimmed: as AnswerRequest has it.

    Raises:
        ApiError: a field has a value that is not possible.
    """
    try:
        messages = canonical(parse_messages([_with_content(message) for message in fields.messages]))
        options = answer_options(fields)
        params = [sampling(fields, defaults, i) for i in range(fields.n or 1)]
    except KvlocalError as error:
        raise of_failure(error) from None
    if not messages or messages[-1]["role"] not in ("user", "tool"):
        raise invalid("the last message is none that can be answered: end with one of the user or of a tool", "messages")
    if system is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    kept: dict[str, Any] = {"conversation": fields.conversation, "keep_trimmed": keep_trimmed}
    return [AnswerRequest(owner, messages, each, options, **kept) for each in params]


def sampling(fields: Sampled, defaults: SamplingParams, index: int = 0) -> SamplingParams:
    """How the tokens of an answer are drawn, the first of a request (0) with the seed that it names, the others with those that follow.

    Raises:
        ApiError: a name of logit_bias is no token.
        SamplingError: a value is out of range.
    """
    given: dict[str, Any] = {
        "temperature": fields.temperature,
        "top_p": None if fields.top_p is None else max(fields.top_p, _LEAST_TOP_P),
        "top_k": None if fields.top_k is None else max(fields.top_k, 0),
        "min_p": fields.min_p,
        "repeat_penalty": fields.repeat_penalty,
        "presence_penalty": fields.presence_penalty,
        "frequency_penalty": fields.frequency_penalty,
        "logit_bias": None if fields.logit_bias is None else _biases(fields.logit_bias),
        "seed": None if fields.seed is None or fields.seed == -1 else (fields.seed + index) % (MAX_SEED + 1),
    }
    params = defaults if fields.temperature is None else with_temperature(defaults, fields.temperature)
    return replace(params, **{name: value for name, value in given.items() if value is not None})


def answer_options(fields: ChatRequest) -> AnswerOptions:
    """What the answer may be.

    Raises:
        ApiError: two fields contradict each other, or one has a value that is not possible.
        KvlocalError: so it is for AnswerOptions.
    """
    choice, allowed = _tool_choice(fields)
    if fields.top_logprobs is not None and not fields.logprobs:
        raise invalid("top_logprobs is given without logprobs: set logprobs to true", "top_logprobs")
    schema = None if fields.response_format is None else _schema(fields.response_format)
    if schema is not None and fields.grammar is not None:
        raise invalid("an answer cannot follow a grammar and a JSON schema at once: leave one of them out", "grammar")
    return AnswerOptions(
        stop=stops(fields.stop),
        max_tokens=limit(fields.max_tokens if fields.max_completion_tokens is None else fields.max_completion_tokens),
        grammar=fields.grammar,
        json_schema=schema,
        tools=[tool.model_dump(exclude_none=True) for tool in fields.tools or ()],
        tool_choice=choice,
        allowed_tools=allowed,
        parallel_tool_calls=fields.parallel_tool_calls is not False,
        top_logprobs=(fields.top_logprobs or 0) if fields.logprobs else None,
    )


def stops(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """The stop texts of a request.

    Raises:
        ApiError: one is empty, or there are too many.
    """
    texts = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if len(texts) > MAX_STOPS:
        raise invalid(f"stop has {len(texts)} texts: give at most {MAX_STOPS}", "stop")
    if "" in texts:
        raise invalid("stop has an empty text: leave it out", "stop")
    return texts


def limit(max_tokens: int | None) -> int | None:
    """The longest answer, in tokens; None where the request leaves it open, as it does with -1.

    Raises:
        ApiError: it is 0.
    """
    if max_tokens == 0:
        raise invalid("max_tokens is 0: it has to be at least 1", "max_tokens")
    return None if max_tokens in (None, -1) else max_tokens


def _with_content(message: Any) -> Any:
    """An answer that said nothing, or was refused, comes back with null for its content."""
    if isinstance(message, dict) and message.get("role") == "assistant" and message.get("content") is None:
        return {**message, "content": ""}
    return message


def _biases(biases: Mapping[str, float]) -> dict[int, float]:
    try:
        return {int(token): value for token, value in biases.items()}
    except ValueError:
        raise invalid("logit_bias has a name that is no token: name tokens by their numbers", "logit_bias") from None


def _schema(wanted: ResponseFormat) -> Mapping[str, Any] | None:
    if wanted.type == "json_object":
        return wanted.schema_ or {"type": "object"}
    if wanted.type == "json_schema":
        schema = wanted.json_schema.schema_ if wanted.json_schema else wanted.schema_
        if schema is None:
            raise invalid("response_format has no schema: give it as json_schema.schema", "response_format.json_schema")
        return schema
    return None


def _tool_choice(fields: ChatRequest) -> tuple[ToolChoice, tuple[str, ...]]:
    """The choice and the names of the tools that it leaves, () for all."""
    choice, names = fields.tool_choice, [tool.function.name for tool in fields.tools or ()]
    if isinstance(choice, NamedTool):
        name = choice.function.name
        if name not in names:
            raise invalid(f"tool_choice {not_among(name, names) if names else 'names a tool, and there are none'}", "tool_choice")
        return "required", (name,)
    if choice == "required" and not names:
        raise invalid("tool_choice is required, and there are no tools: give some", "tool_choice")
    return choice or "auto", ()
