"""The policies by name. A new one is a file beside these and a line in POLICIES."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from kvlocal.errors import KvlocalError
from kvlocal.policies.base import CacheState, Plan, Policy
from kvlocal.policies.full import Full
from kvlocal.policies.gkv import GKV
from kvlocal.policies.streaming import Streaming

__all__ = ["DEFAULT_POLICY", "POLICIES", "CacheState", "Plan", "Policy", "PolicyError", "make"]

POLICIES: dict[str, type[Policy]] = {
    "full": Full,
    "streaming": Streaming,
    "gkv": GKV,
}

DEFAULT_POLICY = "gkv"


class PolicyError(KvlocalError):
    """No such policy, or a hyper-parameter it does not take."""


def make(name: str, args: Mapping[str, Any] | None = None) -> Policy:
    """The policy of that name with these hyper-parameters, whose values may be text.

    Raises:
        PolicyError: unknown name, unknown hyper-parameter or a value out of range.
    """
    if name not in POLICIES:
        raise PolicyError(f"there is no policy {name!r}: choose {_choice(name, POLICIES)}")
    policy = POLICIES[name]
    fields = {field.name: field for field in dataclasses.fields(policy)}
    values = {}
    for key, value in (args or {}).items():
        if key not in fields:
            known = f"it takes {_choice(key, fields)}" if fields else "it takes none"
            raise PolicyError(f"the policy {name} has no hyper-parameter {key!r}: {known}")
        kind = type(fields[key].default)
        try:
            values[key] = kind(value)
        except (TypeError, ValueError):
            raise PolicyError(f"the hyper-parameter {key} of {name} must be a {kind.__name__}, not {value!r}") from None
    try:
        return policy(**values)
    except ValueError as error:
        raise PolicyError(f"the policy {name} cannot work so: {error}") from None


def _choice(wrong: str, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(wrong, known, 1)
    names = ", ".join(known)
    return f"{close[0]} (of {names})" if close else f"one of {names}" if len(known) > 1 else names
