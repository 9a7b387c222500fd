"""Which conversation a history belongs to: a chain of hashes over its turns, so that two of them are compared by how far their chains agree.

Those who send a history send it as they show it, so what is compared is what was said: thoughts do not count, nor does white space around an answer.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any

from kvlocal.template.answer import split_thought
from kvlocal.template.markup import Message


def owner_digest(owner: str) -> str:
    """What stands for an owner, from which nobody learns who it is."""
    return hashlib.sha256(owner.encode(errors="surrogatepass")).hexdigest()[:32]


def turn_digest(turn: Message) -> str:
    """Of one turn: who says what, and which tools it calls or answers."""
    content = turn["content"]
    if turn["role"] == "assistant":
        content = split_thought(content)[2].strip()
    return _digest([turn["role"], content, turn.get("tool_calls"), turn.get("tool_call_id")])


def chain(owner: str, system: str | None, tools: Sequence[Mapping[str, Any]], turns: Sequence[Message]) -> list[str]:
    """Of the first n turns of a conversation, for every n from 0 on; two are the same only if all before them is.

    owner: an owner_digest
    """
    digests = [_digest([owner, system, list(tools)])]
    for turn in turns:
        digests.append(_digest([digests[-1], turn_digest(turn)]))
    return digests


def n_common(one: Sequence[str], other: Sequence[str]) -> int:
    """With how many turns two conversations begin alike, by their chains; -1 if not even what comes before the first one is the same."""
    return bisect_left(range(min(len(one), len(other))), True, key=lambda n: one[n] != other[n]) - 1


def n_overlap(kept: Sequence[str], given: Sequence[str]) -> int:
    """How many of the first given turns are the last kept ones, by the digests of turns: 0 unless that is a whole exchange at least."""
    longest = min(len(kept), len(given))
    return next((n for n in range(longest, 1, -1) if list(kept[-n:]) == list(given[:n])), 0)


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
