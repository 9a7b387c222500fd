"""The policies by name, one file a method: which cells of each layer and head stay, from arrays alone.

A new one is a file beside these and a line in POLICIES.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from kvlocal.errors import KvlocalError
from kvlocal.policies.base import CacheState, Plan, Policy
from kvlocal.policies.dynsplit import DynSplit
from kvlocal.policies.full import Full
from kvlocal.policies.gkv import GKV
from kvlocal.policies.h2o import H2O
from kvlocal.policies.hybrid import Hybrid
from kvlocal.policies.kvzip import KVzip
from kvlocal.policies.kvzip_gkv import KVzipGKV
from kvlocal.policies.kvzip_snapkv import KVzipSnapKV
from kvlocal.policies.nexus import Nexus
from kvlocal.policies.recall import Recall
from kvlocal.policies.rkv import RKV
from kvlocal.policies.snapkv import SnapKV
from kvlocal.policies.streaming import Streaming

__all__ = [
    "DEFAULT_POLICY", "DEFAULT_SHARE", "POLICIES", "WITHOUT_ARCHIVE", "WITHOUT_NEXUS",
    "CacheState", "Plan", "Policy", "PolicyError", "Recall", "make",
]  # fmt: skip

POLICIES: dict[str, type[Policy]] = {
    "full": Full,
    "streaming": Streaming,
    "h2o": H2O,
    "snapkv": SnapKV,
    "recall": Recall,
    "rkv": RKV,
    "gkv": GKV,
    "kvzip": KVzip,
    "kvzip-gkv": KVzipGKV,
    "kvzip-snapkv": KVzipSnapKV,
    "dynsplit": DynSplit,
    "nexus": Nexus,
    "hybrid": Hybrid,
}

DEFAULT_POLICY = "recall"
DEFAULT_SHARE = 0.02  # that the commands give it of Nexus tokens, where there are some for the model
WITHOUT_ARCHIVE = "hybrid"  # the default of the commands where there is no archive, but Nexus tokens for the model
WITHOUT_NEXUS = "kvzip-snapkv"  # and where there is neither

_BOOL = {"true": True, "on": True, "1": True, "yes": True, "false": False, "off": False, "0": False, "no": False}


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
        kind: type[Any] = type(fields[key].default)
        try:
            values[key] = _BOOL[str(value).lower()] if kind is bool else kind(value)
        except (KeyError, TypeError, ValueError):
            wanted = {bool: "true or false", int: "a whole number"}.get(kind, f"a {kind.__name__}")
            raise PolicyError(f"the hyper-parameter {key} of {name} must be {wanted}, not {value!r}") from None
    try:
        return policy(**values)
    except ValueError as error:
        raise PolicyError(f"the policy {name} cannot work so: {error}") from None


def _choice(wrong: str, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(wrong, known, 1)
    names = ", ".join(known)
    return f"{close[0]} (of {names})" if close else f"one of {names}" if len(known) > 1 else names
