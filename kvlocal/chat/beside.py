"""Sessions that decode together: the slots that all of them have room in."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from kvlocal.chat.config import SessionConfig
from kvlocal.chat.session import ChatSession
from kvlocal.errors import KvlocalError
from kvlocal.llama.context import MAX_SEQUENCES, Context
from kvlocal.llama.model import Model
from kvlocal.llama.slots import Slots
from kvlocal.nexus.tokens import NexusTokens

S = TypeVar("S", bound=Slots)


def slots_for(
    n: int, model: Model, config: SessionConfig, nexus: NexusTokens | None = None, token_share: float = 0.0
) -> tuple[Slots, int]:
    """As slots_of_kind, for slots in rounds.

    token_share: as for kvlocal.llama.slots.Rounds
    """
    return slots_of_kind(partial(Slots, token_share=token_share), n, model, config, nexus)


def slots_of_kind(make: Callable[..., S], n: int, model: Model, config: SessionConfig, nexus: NexusTokens | None = None) -> tuple[S, int]:
    """Slots for n sessions with a configuration, and the budget of each, in cells.

    A session is made once for it, so that what is wrong with the configuration itself is said at once.

    make: makes them, as Slots is made

    Raises:
        KvlocalError: no session is possible with this configuration, or there is not enough memory for n of them.
    """
    if not 1 <= n <= MAX_SEQUENCES:
        raise KvlocalError(f"{n} conversations cannot decode together: choose 1 to {MAX_SEQUENCES}")
    asked: dict[str, Any] = {}

    def make_context(model: Model, **options: Any) -> Context:
        asked.update(options)
        return Context(model, **options)

    with ChatSession(model, config, nexus=nexus, undo=False, make_context=make_context) as session:
        budget = session.cache.budget
    return make(n, model, **asked), budget
