"""A line of a batch: the conversation it holds, and what became of it."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

from kvlocal.chat.config import SessionConfig
from kvlocal.chat.session import Message
from kvlocal.errors import KvlocalError
from kvlocal.llama.sampling import SamplingParams

ROLES = ("system", "user", "assistant")

Identity = str | int | float | bool | None


class LineError(KvlocalError):
    """A line of the input is no conversation."""


@dataclass(frozen=True)
class Job:
    """A conversation to complete.

    number: of its line, from 1
    id: any JSON scalar; the line number if the line has none
    messages: {"role", "content"}, at least one
    wishes: what it wants otherwise than the other conversations, by the names of WISHES
    """

    number: int
    id: Identity
    messages: list[Message]
    wishes: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, number: int, line: bytes) -> Self:
        """Reads `{"id": ..., "messages": [{"role", "content"}, ...]}` and the WISHES; other keys, of messages too, are left out.

        Raises LineError, in one sentence, if the line is not UTF-8 or not such an object, if the roles come in an order no chat has (a system
        message that is not the first, or an answer to nothing), or if a wish is of the wrong type.
        """
        try:
            record = json.loads(line.decode("utf-8-sig"), parse_constant=_refuse, parse_float=_finite)
        except UnicodeDecodeError:
            raise LineError("it is not UTF-8: convert the file") from None
        except json.JSONDecodeError as error:
            raise LineError(f"it is not JSON ({error.msg} at column {error.colno}): write one object a line") from None
        except (ValueError, RecursionError) as error:
            raise LineError(f"it cannot be read as JSON ({error}): write one object a line") from None
        if not isinstance(record, dict) or "messages" not in record:
            raise LineError('it has no messages: write {"id": ..., "messages": [{"role": ..., "content": ...}]}')
        identity, messages = record.get("id", number), record["messages"]
        if isinstance(identity, (dict, list)):
            raise LineError("its id is not a scalar: use a string or a number")
        if not isinstance(messages, list) or not messages:
            raise LineError("its messages are not a list with at least one message in it: give the conversation's turns")
        for i, message in enumerate(messages):
            _check_message(i, message, messages[i - 1]["role"] if i else None)
        wishes = {name: record[name] for name in WISHES if record.get(name) is not None}
        for name, value in wishes.items():
            wish = WISHES[name]
            if isinstance(value, bool) or not isinstance(value, wish.type):
                raise LineError(f"its {name} is {json.dumps(value)[:40]}: give {wish.kind}")
        if "system" in wishes and messages[0]["role"] == "system":
            raise LineError("it has a system prompt and a system message: leave one of them out")
        return cls(number, identity, [{"role": message["role"], "content": message["content"]} for message in messages], wishes)

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
        for name, value in self.wishes.items():
            config = WISHES[name].grant(config, value)
        return config if self.system is None else replace(config, system=self.system)


@dataclass(frozen=True)
class Wish:
    """Something a conversation can want otherwise.

    type, kind: of the value, for Python and for people
    grant: puts it into a configuration
    """

    type: type | tuple[type, ...]
    kind: str
    grant: Callable[[SessionConfig, Any], SessionConfig]


def _with_policy(config: SessionConfig, name: str) -> SessionConfig:
    """Hyper-parameters are those of the policy they were given for."""
    return config if name == config.policy else replace(config, policy=name, policy_args={})


def _with_temperature(config: SessionConfig, temperature: float) -> SessionConfig:
    """The repeat penalty follows, if it is the one that goes with the temperature there is."""
    sampling = config.sampling
    follows = sampling.repeat_penalty == SamplingParams(sampling.temperature).repeat_penalty
    # an integer may be too large for a float
    temperature = math.inf if temperature > sys.float_info.max else temperature
    penalty = None if follows else sampling.repeat_penalty
    return replace(config, sampling=replace(sampling, temperature=temperature, repeat_penalty=penalty))


WISHES = {
    "max_tokens": Wish(int, "a whole number", lambda config, value: replace(config, max_tokens=value)),
    "temperature": Wish((int, float), "a number", _with_temperature),
    "seed": Wish(int, "a whole number", lambda config, value: replace(config, sampling=replace(config.sampling, seed=value))),
    "system": Wish(str, "a text", lambda config, value: replace(config, system=value)),
    "policy": Wish(str, "the name of a policy", _with_policy),
    "kv_budget": Wish(int, "a whole number", lambda config, value: replace(config, budget=value)),
}


@dataclass(frozen=True)
class Result:
    """A completed conversation.

    number, id: of its job
    messages: the given ones, with the answers in their places
    stop_reasons: of each answer, "end" or "length" (cut off at max_tokens)
    seed: of the random numbers; None for a conversation with nothing to answer, which is not read
    kv: budget, peak_cells, history_tokens, compressions, evicted (KvStats)
    timings: seconds in all; prompt_tokens, and prompt_seconds for them and for setting up; answer_tokens, answer_seconds, tokens_per_second;
        and where the time went (kvlocal.cache.compression.Seconds); with waiting for the conversations beside it
    """

    number: int
    id: Identity
    messages: list[Message]
    stop_reasons: list[str]
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
    """A line that gave no result, and why. id: the line number if the line could not be read."""

    number: int
    id: Identity
    error: KvlocalError

    def record(self) -> dict[str, Any]:
        """The object of the output line."""
        return {"id": self.id, "error": str(self.error)}


def _check_message(index: int, message: Any, role_before: str | None) -> None:
    if not isinstance(message, dict):
        raise LineError(f'message {index + 1} is not an object: write {{"role": ..., "content": ...}}')
    role = message.get("role")
    if role not in ROLES:
        raise LineError(f"message {index + 1} has the role {json.dumps(role)[:40]}: use one of {', '.join(ROLES)}")
    if not isinstance(message.get("content"), str):
        raise LineError(f"the content of message {index + 1} is not a string: give its text")
    if role == "system" and index > 0:
        raise LineError(f"message {index + 1} is a system message: it can only be the first")
    if role == "assistant" and role_before != "user":
        raise LineError(f"message {index + 1} answers nothing: put a user turn before it")


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON number")


def _finite(text: str) -> float:
    """Otherwise 1e999 would come out as Infinity, which is no JSON."""
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text[:20]} is too large a number")
    return value
