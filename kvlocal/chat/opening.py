"""What a conversation begins with, and whether it can: everything that is wrong with a configuration and can be known without a cache."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kvlocal import policies
from kvlocal.cache.config import allocation, check_budget, least_budget
from kvlocal.cache.fitting import fitted
from kvlocal.cache.second_read import EXCHANGE, INSTRUCTION
from kvlocal.chat.config import SessionConfig, SessionError
from kvlocal.llama.model import Model
from kvlocal.nexus.tokens import NexusTokens
from kvlocal.template.chat_template import ChatTemplate
from kvlocal.template.pieces import Piece


def checked_template(model: Model, config: SessionConfig, nexus: NexusTokens | None) -> ChatTemplate:
    """The template of a model, for a session with this configuration and these Nexus tokens.

    Raises:
        SessionError, CacheError: such a session cannot be made.
        TemplateError: the template is broken.
    """
    config = fitted(model.path, config, model.placement)
    if "nexus" in policies.make(config.policy, config.policy_args).needs and nexus is None:
        raise SessionError(f"the policy {config.policy} needs Nexus tokens for {model.path.name}: give a Nexus file or choose another policy")
    check_budget(model, config)
    template = ChatTemplate.from_model(model, config.tools, config.thinking)
    checked_opening(model, config, template, config.system)
    return template


def checked_opening(model: Model, config: SessionConfig, template: ChatTemplate, system: str | None) -> tuple[Sequence[Piece], int]:
    """What a conversation with this system prompt begins with, and how many tokens it has; SessionError if they leave too little of the budget."""
    pieces = template.prefix(system)
    n_system = sum(len(tokens) for _, tokens in template.tokens(model, pieces))
    budget, least = allocation(config, model.n_ctx_train).budget, least_budget(config, n_system)
    if least > budget:
        raise SessionError(
            f"the system prompt takes {n_system} tokens, which always stay, and leaves too little of a budget of {budget}: "
            f"shorten it or give a budget of at least {least}"
        )
    return pieces, n_system


def repetition(model: Model, template: ChatTemplate) -> npt.NDArray[np.int32]:
    """The tokens of a user turn that asks for a repetition of what was said, int32 [n]."""
    return np.concatenate([tokens for _, tokens in template.tokens(model, template.user_turn(EXCHANGE, INSTRUCTION))])
