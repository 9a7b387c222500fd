"""The arguments of Llama's methods: what they become for an engine, and which cannot be had."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

from kvlocal.chat.options import AnswerOptions
from kvlocal.compat.errors import NotSupported
from kvlocal.compat.grammar import rules_of
from kvlocal.llama.sampling import SamplingParams
from kvlocal.openai_forms import chat_fields
from kvlocal.openai_forms.chat_fields import FieldError
from kvlocal.template.markup import Message

# the arguments that are no numbers with fractions
_WHOLE = {
    "last_n_tokens_size", "logprobs", "main_gpu", "max_tokens", "mirostat_mode", "n_batch", "n_ctx", "n_gpu_layers", "n_threads", "n_ubatch",
    "pooling_type", "seed", "split_mode", "top_k", "top_logprobs",
}  # fmt: skip

# arguments that change what comes out, and the values of them that change nothing
_AS_IT_IS: dict[str, Any] = {"logits_processor": None, "mirostat_mode": 0, "stopping_criteria": None, "suffix": None, "typical_p": 1}


def check_numbers(**arguments: Any) -> None:
    """Whether arguments that have to be numbers are, or None where they are left out.

    Raises:
        FieldError: one is not.
    """
    for name, value in arguments.items():
        wanted, kind = (Integral, "a whole number") if name in _WHOLE else (Real, "a number")
        if value is not None and (isinstance(value, bool) or not isinstance(value, wanted)):
            raise FieldError(f"{name} has to be {kind}", name)


def check_others(**arguments: Any) -> None:
    """Whether arguments ask for nothing that kvlocal has not.

    Raises:
        NotSupported: one does.
    """
    for name, value in arguments.items():
        if value is not None and value != _AS_IT_IS[name]:
            raise NotSupported(f"kvlocal's Llama has no {name}: leave it out")


def stops(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """The texts that end an answer.

    Raises:
        FieldError: they are no texts.
    """
    texts = (stop,) if isinstance(stop, str) else tuple(stop or ()) if stop is None or isinstance(stop, Sequence) else (None,)
    if not all(isinstance(text, str) and text for text in texts):
        raise FieldError("stop has to be a text or a list of texts, none of them empty", "stop")
    return texts


def limit(max_tokens: int | None) -> int | None:
    """The longest answer, in tokens; None for as long as it gets."""
    return None if max_tokens is None or max_tokens <= 0 else int(max_tokens)


def sampling(drawn: SamplingParams, seed: int | None, **arguments: Any) -> SamplingParams:
    """How tokens are drawn.

    Args:
        drawn: what no argument says.
        seed: of the random numbers, None for any.
        arguments: of the method, as kvlocal.openai_forms.chat_fields.sampling has them.

    Raises:
        KvlocalError: a value is not possible.
    """
    biases = arguments.pop("logit_bias", None)
    if biases is not None and not isinstance(biases, Mapping):
        raise FieldError("logit_bias has to be a dict of tokens and numbers", "logit_bias")
    check_numbers(seed=seed, **arguments)
    check_numbers(**{f"logit_bias of {token}": value for token, value in (biases or {}).items()})
    return chat_fields.sampling(drawn, seed=seed, logit_bias=biases, **arguments)


def messages(given: Any) -> list[Message]:
    """The conversation of a request, those who call functions by the older names among them.

    Raises:
        KvlocalError: it is none, or there is nothing to answer.
    """
    if isinstance(given, Sequence) and not isinstance(given, str):
        given = [_with_calls(message) for message in given]
    return chat_fields.conversation(given)


def _with_calls(message: Any) -> Any:
    """A message of the time when tools were functions, as it is written now."""
    if not isinstance(message, Mapping):
        return message
    if message.get("role") == "function":
        return {**message, "role": "tool"}
    if call := message.get("function_call"):
        rest = {name: value for name, value in message.items() if name != "function_call"}
        return rest if rest.get("tool_calls") else {**rest, "tool_calls": [{"type": "function", "function": call}]}
    return dict(message)


def _plain(name: str, value: Any) -> Any:
    """A copy of an argument as JSON has it.

    Raises:
        FieldError: there is something in it that JSON has not.
    """
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise FieldError(f"{name} has something in it that JSON has not ({error}): give texts, numbers, lists and dicts", name) from None


def prompt(given: Any) -> str | list[int]:
    """The text of a request, or its tokens.

    Raises:
        FieldError: it is neither.
    """
    if isinstance(given, str):
        return given
    tokens: Sequence[Any] = given if isinstance(given, Sequence) and not isinstance(given, bytes) else [None]
    if not all(isinstance(token, Integral) and not isinstance(token, bool) for token in tokens):
        raise FieldError("prompt has to be a text or a list of tokens", "prompt")
    return [int(token) for token in tokens]


def text_options(*, grammar: Any, stop: Any, max_tokens: Any, logprobs: Any) -> AnswerOptions:
    """What the continuation of a text may be, with arguments as the method has them.

    Raises:
        KvlocalError: a value is not possible.
    """
    check_numbers(max_tokens=max_tokens, logprobs=logprobs)
    rules = rules_of(grammar)
    return AnswerOptions(
        stop=stops(stop), max_tokens=limit(max_tokens), grammar=rules.grammar, json_schema=rules.json_schema, top_logprobs=logprobs
    )


def chat_options(
    *,
    functions: Sequence[Mapping[str, Any]] | None,
    function_call: str | Mapping[str, Any] | None,
    tools: Sequence[Mapping[str, Any]] | None,
    tool_choice: str | Mapping[str, Any] | None,
    grammar: Any,
    response_format: Mapping[str, Any] | None,
    **arguments: Any,
) -> AnswerOptions:
    """What the answer to a conversation may be.

    Args:
        functions, function_call: tools by the older names.
        grammar: as rules_of takes it.
        arguments: stop, max_tokens, logprobs and top_logprobs, as the method has them.

    Raises:
        KvlocalError: a value is not possible.
    """
    for name, value in (("functions", functions), ("tools", tools)):
        if value is not None and (isinstance(value, str) or not isinstance(value, Sequence)):
            raise FieldError(f"{name} has to be a list", name)
    functions, tools, response_format = (
        _plain(name, value) for name, value in (("functions", functions), ("tools", tools), ("response_format", response_format))
    )
    if functions is not None:
        tools = [{"type": "function", "function": function} for function in functions]
    if function_call is not None:
        tool_choice = {"type": "function", "function": function_call} if isinstance(function_call, Mapping) else function_call
    check_numbers(max_tokens=arguments["max_tokens"], top_logprobs=arguments["top_logprobs"])
    if response_format is not None and not isinstance(response_format, Mapping):
        raise FieldError("response_format has to be an object with a type", "response_format")
    rules = rules_of(grammar)
    if rules.json_schema is not None:
        if response_format is not None and response_format.get("type") != "text":
            raise FieldError("an answer cannot follow a grammar and a response_format at once: leave one of them out", "grammar")
        response_format = {"type": "json_object", "schema": rules.json_schema}
    return chat_fields.answer_options(
        stop=stops(arguments["stop"]),
        max_tokens=limit(arguments["max_tokens"]),
        grammar=rules.grammar,
        response_format=response_format,
        tools=tuple(tools or ()),
        tool_choice=tool_choice,
        # a tool that is named is called once
        parallel_tool_calls=not isinstance(tool_choice, Mapping),
        logprobs=bool(arguments["logprobs"]),
        top_logprobs=arguments["top_logprobs"] if arguments["logprobs"] else None,
    )
