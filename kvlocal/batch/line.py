"""A line of a batch: the conversation it holds, and what became of it."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

from kvlocal.chat.config import SessionConfig, SessionError
from kvlocal.chat.messages import MessageError, check_order, parse_messages
from kvlocal.chat.options import AnswerOptions
from kvlocal.errors import KvlocalError
from kvlocal.files.json_line import JsonError, json_value
from kvlocal.llama.sampling import with_temperature
from kvlocal.template.markup import Message

Identity = str | int | float | bool | None


class LineError(KvlocalError):
    """A line of the input is no conversation.

    id: of the line, as far as it could be read; None if nobody can know it
    """

    def __init__(self, text: str, identity: Identity = None) -> None:
        super().__init__(text)
        self.id = identity


@dataclass(frozen=True)
class Line:
    """A conversation to complete.

    number: of its line, from 1
    id: any JSON scalar; the line number if the line has none
    messages: {"role", "content"}, at least one
    options: what it has otherwise than the other conversations, by the names of OPTIONS
    """

    number: int
    id: Identity
    messages: list[Message]
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, number: int, line: bytes) -> Self:
        """Reads `{"id": ..., "messages": [{"role", "content"}, ...]}` and the OPTIONS; other keys, of messages too, are left out, unless they look
        like options.

        Raises LineError, in one sentence, if the line is not UTF-8 or not such an object, if the roles come in an order no chat has (a system
        message that is not the first, or an answer to nothing), if an option is of the wrong type, or if there is none of that name.
        """
        try:
            record = json_value(line)
        except JsonError as error:
            raise LineError(str(error), _readable_id(error.found)) from None
        identity = record.get("id", number) if isinstance(record, dict) else None
        if isinstance(identity, (dict, list)):
            raise LineError("its id is not a scalar: use a string or a number")
        if not isinstance(record, dict) or "messages" not in record:
            raise LineError('it has no messages: write {"id": ..., "messages": [{"role": ..., "content": ...}]}', identity)
        try:
            messages = parse_messages(record["messages"])
            check_order(messages)
            return cls(number, identity, messages, _options(record, has_system=messages[0]["role"] == "system"))
        except (MessageError, LineError, SessionError) as error:
            raise LineError(str(error), identity) from None

    @property
    def system(self) -> str | None:
        """The conversation's system message."""
        return self.messages[0]["content"] if self.messages[0]["role"] == "system" else None

    @property
    def asked(self) -> AnswerOptions:
        """What its answers are asked for."""
        return asked_for(self.options)

    @property
    def unanswered(self) -> list[int]:
        """Indices of the turns that no assistant turn follows: texts of the user, or the last of what tools gave back."""
        roles = [message["role"] for message in self.messages] + ["user"]
        return [i for i in range(len(self.messages)) if roles[i] in ("user", "tool") and roles[i + 1] == "user" and not self._goes_on(i)]

    def _goes_on(self, i: int) -> bool:
        """Whether what tools gave back is followed by the user's text, with which it is read."""
        return self.messages[i]["role"] == "tool" and i + 1 < len(self.messages)

    def configure(self, config: SessionConfig) -> SessionConfig:
        """A configuration as this conversation wants it.

        Raises:
            KvlocalError: a value is out of range.
        """
        for name, value in self.options.items():
            config = OPTIONS[name].apply(config, value)
        return config if self.system is None else replace(config, system=self.system)


def asked_for(options: Mapping[str, Any]) -> AnswerOptions:
    """What answers are asked for by options as OpenAI's chat completions have them: "stop", "tool_choice", "response_format", "logprobs" and
    "top_logprobs".

    Raises:
        KvlocalError: one of them is none.
    """
    stop = options.get("stop", ())
    stop = [stop] if isinstance(stop, str) else stop
    if not all(isinstance(text, str) for text in stop):
        raise LineError("its stop is not a list of texts: give a text, or a list of texts")
    choice, allowed = options.get("tool_choice", "auto"), []
    if isinstance(choice, dict):
        function = choice.get("function")
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise LineError('its tool_choice names no tool: write {"type": "function", "function": {"name": ...}}')
        choice, allowed = "required", [function["name"]]
    n_top = options.get("top_logprobs")
    if n_top is not None and not options.get("logprobs"):
        raise LineError("it has top_logprobs without logprobs: set logprobs to true")
    return AnswerOptions(
        stop=stop,
        tool_choice=choice,
        allowed_tools=allowed,
        json_schema=_schema(options.get("response_format", {})),
        top_logprobs=(n_top or 0) if options.get("logprobs") else None,
    )


def _schema(response_format: Mapping[str, Any]) -> Mapping[str, Any] | None:
    kind, schema = response_format.get("type", "text"), response_format.get("json_schema")
    if kind == "text":
        return None
    if kind == "json_object":
        return {}
    if kind == "json_schema" and isinstance(schema, dict) and isinstance(schema.get("schema"), dict):
        found: Mapping[str, Any] = schema["schema"]
        return found
    raise LineError('its response_format is none: write {"type": "json_object"} or {"type": "json_schema", "json_schema": {"schema": ...}}')


@dataclass(frozen=True)
class LineOption:
    """Something a conversation can have otherwise.

    type, kind: of the value, for Python and for people
    apply: puts it into a configuration
    """

    type: type | tuple[type, ...]
    kind: str
    apply: Callable[[SessionConfig, Any], SessionConfig]


def _with_policy(config: SessionConfig, name: str) -> SessionConfig:
    """Hyper-parameters are those of the policy they were given for."""
    return config if name == config.policy else config.with_policy(name, {})


def _with_temperature(config: SessionConfig, temperature: float) -> SessionConfig:
    # an integer may be too large for a float
    temperature = math.inf if temperature > sys.float_info.max else temperature
    return replace(config, sampling=with_temperature(config.sampling, temperature))


def _sampled(name: str) -> Callable[[SessionConfig, Any], SessionConfig]:
    """Puts a number that samples into a configuration."""
    return lambda config, value: replace(config, sampling=replace(config.sampling, **{name: value}))


def _with_breakers(config: SessionConfig, texts: list[Any]) -> SessionConfig:
    if not all(isinstance(text, str) for text in texts):
        raise LineError("its dry_sequence_breakers are not all texts: give a list of texts")
    return _sampled("dry_sequence_breakers")(config, tuple(texts))


def _with_biases(config: SessionConfig, biases: dict[str, Any]) -> SessionConfig:
    if not all(re.fullmatch("[0-9]+", token) and type(bias) in (int, float) for token, bias in biases.items()):
        raise LineError('its logit_bias is none: write numbers by the numbers of tokens, such as {"17": -100}')
    return _sampled("logit_bias")(config, {int(token): bias for token, bias in biases.items()})


def _unchanged(config: SessionConfig, _: Any) -> SessionConfig:
    """What concerns answers is no part of it (Line.asked)."""
    return config


# what OpenAI's requests have and other programs for models, and a conversation here has not: leaving them out would change answers without a word
OTHER_OPTIONS = frozenset(
    {"best_of", "function_call", "functions", "max_completion_tokens", "n", "num_predict", "repetition_penalty", "stream", "typical_p"}
)  # fmt: skip

OPTIONS = {
    "max_tokens": LineOption(int, "a whole number", lambda config, value: replace(config, max_tokens=value)),
    "temperature": LineOption((int, float), "a number", _with_temperature),
    "seed": LineOption(int, "a whole number", lambda config, value: replace(config, sampling=replace(config.sampling, seed=value))),
    "system": LineOption(str, "a text", lambda config, value: replace(config, system=value)),
    "policy": LineOption(str, "the name of a policy", _with_policy),
    "kv_budget": LineOption(int, "a whole number", lambda config, value: replace(config, memory=None, budget=value)),
    **{name: LineOption(int, "a whole number", _sampled(name)) for name in ("top_k", "dry_allowed_length", "dry_penalty_last_n")},
    **{
        name: LineOption((int, float), "a number", _sampled(name))
        for name in ("top_p", "min_p", "repeat_penalty", "presence_penalty", "frequency_penalty", "dry_multiplier", "dry_base", "xtc_probability",
                     "xtc_threshold")
    },
    "dry_sequence_breakers": LineOption(list, "a list of texts", _with_breakers),
    "logit_bias": LineOption(dict, "an object of tokens and numbers", _with_biases),
    "logprobs": LineOption(bool, "true or false", _unchanged),
    "top_logprobs": LineOption(int, "a whole number", _unchanged),
    "tools": LineOption(list, "a list of tools", lambda config, value: replace(config, tools=value)),
    "tool_choice": LineOption((str, dict), "auto, required, none or a tool", _unchanged),
    "stop": LineOption((str, list), "a text, or a list of texts", _unchanged),
    "response_format": LineOption(dict, 'an object such as {"type": "json_object"}', _unchanged),
}


@dataclass(frozen=True)
class Result:
    """A completed conversation.

    number, id: of its line
    messages: the given ones, with the answers in their places
    stop_reasons: of each answer, "end", "length" (cut off at max_tokens), "stop" (at a stop text) or "tool_calls"
    logprobs: of each answer, its tokens and how likely they and others were, as OpenAI's chat completions have them ("content"); None if they were
        not asked for, and then not in the output
    recalled: of each answer, the turns that were recalled for it (kvlocal.chat.looked_at.recalled_turns)
    seed: of the random numbers; None for a conversation with nothing to answer, which is not read
    kv: budget, peak_cells, history_tokens, compressions, evicted (KvStats)
    timings: seconds in all; prompt_tokens, and prompt_seconds for them and for setting up; answer_tokens, answer_seconds, tokens_per_second;
        and where the time went (kvlocal.cache.compression.Seconds); with waiting for the conversations beside it
    """

    number: int
    id: Identity
    messages: list[Message]
    stop_reasons: Sequence[str]
    recalled: Sequence[Sequence[int]]
    seed: int | None
    kv: dict[str, float]
    timings: dict[str, float]
    logprobs: Sequence[Mapping[str, Any]] | None = None

    def record(self) -> dict[str, Any]:
        """The object of the output line."""
        fields = asdict(self)
        del fields["number"]
        if self.logprobs is None:
            del fields["logprobs"]
        return fields


@dataclass(frozen=True)
class Failure:
    """A line that gave no result, and why. id: that of the line, as far as it could be read; None if nobody can know it."""

    number: int
    id: Identity
    error: KvlocalError

    def record(self) -> dict[str, Any]:
        """The object of the output line."""
        return {"id": self.id, "error": str(self.error)}


Outcome = Result | Failure


def _readable_id(found: Any) -> Identity:
    """The id of a line that is no proper JSON, if all of it can be read."""
    identity = found.get("id") if isinstance(found, dict) else None
    return None if isinstance(identity, (dict, list)) or "\ufffd" in str(identity) else identity


def _options(record: Mapping[str, Any], *, has_system: bool) -> dict[str, Any]:
    other = sorted(OTHER_OPTIONS & record.keys())
    if other:
        raise LineError(f"a line cannot have {other[0]}: leave it out")
    options = {name: record[name] for name in OPTIONS if record.get(name) is not None}
    for name, value in options.items():
        option = OPTIONS[name]
        if isinstance(value, bool) != (option.type is bool) or not isinstance(value, option.type):
            raise LineError(f"its {name} is {json.dumps(value)[:40]}: give {option.kind}")
    if "system" in options and has_system:
        raise LineError("it has a system prompt and a system message: leave one of them out")
    asked_for(options)
    return options
