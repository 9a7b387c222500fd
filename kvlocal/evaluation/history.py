"""Reads the history of a chat with compression on, turn by turn, as a conversation would bring it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from kvlocal.chat.config import SessionConfig
from kvlocal.chat.session import ChatSession
from kvlocal.evaluation.variants import FULL, Variant
from kvlocal.llama.model import Model
from kvlocal.nexus.tokens import NexusTokens
from kvlocal.template.chat_template import ChatTemplate
from kvlocal.template.markup import Message


def turn_tokens(model: Model, template: ChatTemplate, messages: Sequence[Message]) -> list[npt.NDArray[np.int32]]:
    """The tokens of what comes before the first turn, and of each turn, as a session without a system prompt reads them: int32 [n] each."""
    pieces = [template.prefix(None)]
    for i, message in enumerate(messages):
        turn = template.user_turn if message["role"] == "user" else template.given_assistant
        pieces.append(turn(messages[max(0, i - 2) : i], message["content"]))
    return [np.concatenate([tokens for _, tokens in template.tokens(model, part)]) if part else np.empty(0, np.int32) for part in pieces]


def margin(config: SessionConfig) -> int:
    """Positions to leave free at the end of the trained context: nearer to it, a session would move keys back."""
    return config.stride + 2 * config.n_ubatch


@contextmanager
def read_history(
    model: Model, base: SessionConfig, variant: Variant, history: Sequence[Message], n_history: int, n_prefix: int, spare: int,
    nexus: NexusTokens | None,
) -> Iterator[tuple[ChatSession, float]]:
    """A session that has read the history and compressed it, and the share of the history's cells that were removed.

    Args:
        base: what all variants have in common; a budget in it is that of every variant but the full context.
        history: whole turns, the last of them an answer.
        n_history, n_prefix: its tokens, with what comes before the first turn, and those of that alone.
        spare: tokens to be read in `ChatSession.hold`.
        nexus: for the policies that need Nexus tokens.
    """
    config = variant.config(base)
    if config.budget is None or variant == FULL:
        # no more than it will ever hold, instead of a cache for the longest conversation
        config = replace(config, budget=max(max(n_prefix, config.n_sink) + 2 * config.window, round((1 - variant.ratio) * n_history)))
    with ChatSession(model, config, spare=spare, n_outputs=config.n_ubatch, nexus=nexus) as session:
        for message in history:
            session.add_turn(message["role"], message["content"])
            if message["role"] == "assistant":
                session.finish_turn()
                session.second_read()
        session.compress()
        kv = session.kv
        yield session, 1 - kv.used / kv.history_tokens
