"""A body of /v1/chat/completions, as what an engine is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvlocal.chat.options import AnswerOptions
from kvlocal.errors import KvlocalError
from kvlocal.llama.sampling import SamplingParams
from kvlocal.openai_forms import chat_fields
from kvlocal.server.errors import invalid, of_failure
from kvlocal.server.schemas import MAX_STOPS, ChatRequest, Fields, ResponseFormat, Sampled
from kvlocal.serving.request import AnswerRequest


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
        messages = chat_fields.conversation(fields.messages)
        options = answer_options(fields)
        params = [sampling(fields, defaults, i) for i in range(fields.n or 1)]
    except KvlocalError as error:
        raise of_failure(error) from None
    if system is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    kept: dict[str, Any] = {"conversation": fields.conversation, "keep_trimmed": keep_trimmed}
    return [AnswerRequest(owner, messages, each, options, **kept) for each in params]


def sampling(fields: Sampled, defaults: SamplingParams, index: int = 0) -> SamplingParams:
    """How the tokens of an answer are drawn, the first of a request (0) with the seed that it names, the others with those that follow.

    Raises:
        KvlocalError: a value is not possible.
    """
    return chat_fields.sampling(
        defaults,
        index,
        temperature=fields.temperature,
        top_p=fields.top_p,
        top_k=fields.top_k,
        min_p=fields.min_p,
        repeat_penalty=fields.repeat_penalty,
        presence_penalty=fields.presence_penalty,
        frequency_penalty=fields.frequency_penalty,
        logit_bias=fields.logit_bias,
        dry_multiplier=fields.dry_multiplier,
        dry_base=fields.dry_base,
        dry_allowed_length=fields.dry_allowed_length,
        dry_penalty_last_n=fields.dry_penalty_last_n,
        dry_sequence_breakers=fields.dry_sequence_breakers,
        xtc_probability=fields.xtc_probability,
        xtc_threshold=fields.xtc_threshold,
        seed=fields.seed,
    )


def answer_options(fields: ChatRequest) -> AnswerOptions:
    """What the answer may be.

    Raises:
        ApiError: a value is not possible.
        KvlocalError: so it is for the library.
    """
    choice = fields.tool_choice
    return chat_fields.answer_options(
        stop=stops(fields.stop),
        max_tokens=limit(fields.max_tokens if fields.max_completion_tokens is None else fields.max_completion_tokens),
        grammar=fields.grammar,
        response_format=response_format_of(fields.response_format),
        tools=[tool.model_dump(exclude_none=True) for tool in fields.tools or ()],
        tool_choice=choice.model_dump() if isinstance(choice, Fields) else choice,
        parallel_tool_calls=fields.parallel_tool_calls is not False,
        logprobs=fields.logprobs is True,
        top_logprobs=fields.top_logprobs,
    )


def response_format_of(wanted: ResponseFormat | None) -> dict[str, Any] | None:
    """The format of an answer, in plain values."""
    return None if wanted is None else wanted.model_dump(by_alias=True)


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
