"""What is compared: policies with their hyper-parameters and session fields, each at every ratio."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from kvlocal import policies
from kvlocal.chat.config import SessionConfig
from kvlocal.errors import KvlocalError

ALL = "all"

# Fields of SessionConfig that a spec may set; the run sets the others.
SESSION_FIELDS = {"positions": str, "window": int, "stride": int, "read_stride": int, "n_sink": int, "archive": str, "archive_type": str}


class VariantError(KvlocalError):
    """A policy spec that cannot be run."""


@dataclass(frozen=True)
class Variant:
    """One policy at one ratio.

    spec: as it was written, and as rows name it
    ratio: share of the history to remove
    policy, policy_args: as in SessionConfig
    fields: other fields of SessionConfig
    """

    spec: str
    ratio: float
    policy: str
    policy_args: Mapping[str, str] = field(default_factory=dict)
    fields: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, spec: str, ratio: float) -> Self:
        """Reads `name[:arg=value[:arg=value]]`.

        An argument that is no hyper-parameter of the policy but one of SESSION_FIELDS goes to the session.

        Raises:
            VariantError: no such policy or argument, or a value it does not take.
        """
        name, *arguments = spec.split(":")
        own: dict[str, str] = {}
        others: dict[str, Any] = {}
        known = {f.name for f in dataclasses.fields(policies.POLICIES[name])} if name in policies.POLICIES else set()
        for argument in arguments:
            key, equals, value = argument.partition("=")
            key = key.strip().replace("-", "_")
            if not (key and equals and value):
                raise VariantError(f"{argument!r} in {spec!r} is not of the form name=value")
            if key in SESSION_FIELDS and key not in known:
                try:
                    others[key] = SESSION_FIELDS[key](value)
                except ValueError:
                    raise VariantError(f"{key} in {spec!r} is {value!r}: it must be a whole number") from None
            else:
                own[key] = value
        try:
            policies.make(name, own)
            config = SessionConfig(policy=name, policy_args=own, **others)
        except KvlocalError as error:
            raise VariantError(f"{spec!r} cannot be run: {error}") from None
        if config.archive_type and config.store == "off":
            raise VariantError(f"{spec!r} has a type for an archive and no archive: leave out archive_type, or what keeps the archive away")
        return cls(spec, ratio, name, own, others)

    @property
    def wants_nexus(self) -> bool:
        """Whether it cannot do without Nexus tokens."""
        return "nexus" in policies.make(self.policy, self.policy_args).needs

    def config(self, base: SessionConfig) -> SessionConfig:
        """The configuration of a session of this variant."""
        changes: dict[str, Any] = {"ratio": self.ratio or None, "policy": self.policy, "policy_args": self.policy_args}
        config = dataclasses.replace(base, **changes, **self.fields)
        # whatever device computes, a text is read alike
        return dataclasses.replace(config, read_stride=config.slack)


FULL = Variant("full", 0.0, "full")


def parse_all(specs: str, ratios: Sequence[float]) -> list[Variant]:
    """The full context first, then each policy of a comma separated list at each ratio, without repetitions.

    `all` stands for every policy but full.

    Raises:
        VariantError: as Variant.parse.
    """
    names: dict[str, None] = {}
    for spec in filter(None, (part.strip() for part in specs.split(","))):
        names.update(dict.fromkeys(policies.POLICIES if spec == ALL else [spec]))
    names.pop(FULL.spec, None)
    return [FULL, *(Variant.parse(spec, ratio) for ratio in dict.fromkeys(ratios) for spec in names)]
