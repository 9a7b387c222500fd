"""A line of a batch: the conversation it holds, and what became of it."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

from kvlocal.chat.config import SessionConfig
from kvlocal.chat.messages import MessageError, check_order, parse_messages
from kvlocal.errors import KvlocalError
from kvlocal.files.json_line import JsonError, json_value
from kvlocal.llama.sampling import SamplingParams
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
        """Reads `{"id": ..., "messages": [{"role", "content"}, ...]}` and the OPTIONS; other keys, of messages too, are left out.

        Raises LineError, in one sentence, if the line is not UTF-8 or not such an object, if the roles come in an order no chat has (a system
        message that is not the first, or an answer to nothing), or if an option is of the wrong type.
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
        except (MessageError, LineError) as error:
            raise LineError(str(error), identity) from None

    @property
    def system(self) -> str | None:
        """The conversation's system message."""
        return self.messages[0]["content"] if self.messages[0]["role"] == "system" else None

    @property
    def unanswered(self) -> list[int]:
        """Indices of the user turns that no assistant turn follows."""
        roles = [message["role"] for message in self.messages] + ["user"]
        return [i for i in range(len(self.messages)) if roles[i] == "user" and roles[i + 1] == "user"]

    def configure(self, config: SessionConfig) -> SessionConfig:
        """A configuration as this conversation wants it.

        Raises:
            KvlocalError: a value is out of range.
        """
        for name, value in self.options.items():
            config = OPTIONS[name].apply(config, value)
        return config if self.system is None else replace(config, system=self.system)


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
    """The repeat penalty follows, if it is the one that goes with the temperature there is."""
    sampling = config.sampling
    follows = sampling.repeat_penalty == SamplingParams(sampling.temperature).repeat_penalty
    # an integer may be too large for a float
    temperature = math.inf if temperature > sys.float_info.max else temperature
    penalty = None if follows else sampling.repeat_penalty
    return replace(config, sampling=replace(sampling, temperature=temperature, repeat_penalty=penalty))


OPTIONS = {
    "max_tokens": LineOption(int, "a whole number", lambda config, value: replace(config, max_tokens=value)),
    "temperature": LineOption((int, float), "a number", _with_temperature),
    "seed": LineOption(int, "a whole number", lambda config, value: replace(config, sampling=replace(config.sampling, seed=value))),
    "system": LineOption(str, "a text", lambda config, value: replace(config, system=value)),
    "policy": LineOption(str, "the name of a policy", _with_policy),
    "kv_budget": LineOption(int, "a whole number", lambda config, value: replace(config, memory=None, budget=value)),
}


@dataclass(frozen=True)
class Result:
    """A completed conversation.

    number, id: of its line
    messages: the given ones, with the answers in their places
    stop_reasons: of each answer, "end" or "length" (cut off at max_tokens)
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

    def record(self) -> dict[str, Any]:
        """The object of the output line."""
        fields = asdict(self)
        del fields["number"]
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


def _readable_id(found: Any) -> Identity:
    """The id of a line that is no proper JSON, if all of it can be read."""
    identity = found.get("id") if isinstance(found, dict) else None
    return None if isinstance(identity, (dict, list)) or "\ufffd" in str(identity) else identity


def _options(record: Mapping[str, Any], *, has_system: bool) -> dict[str, Any]:
    options = {name: record[name] for name in OPTIONS if record.get(name) is not None}
    for name, value in options.items():
        option = OPTIONS[name]
        if isinstance(value, bool) or not isinstance(value, option.type):
            raise LineError(f"its {name} is {json.dumps(value)[:40]}: give {option.kind}")
    if "system" in options and has_system:
        raise LineError("it has a system prompt and a system message: leave one of them out")
    return options
