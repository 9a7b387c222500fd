"""Runs quantized GGUF models on a patched llama.cpp and keeps long chats inside a fixed KV-cache budget.

The rooms of this package, from the ground up; each imports only from those above it: errors and interrupts, files, gguf, policies, llama,
hub, template, cache, nexus, chat, conversations, batch, serving, openai_forms, server, compat, training, evaluation, benchmark, doctor. The
names below are what a program needs.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvlocal.cache.budgeted import BudgetedCache
    from kvlocal.cache.config import CacheConfig
    from kvlocal.chat.config import SessionConfig
    from kvlocal.chat.session import ChatSession
    from kvlocal.chat.text_session import TextSession
    from kvlocal.errors import KvlocalError
    from kvlocal.hub.catalogue import resolve
    from kvlocal.hub.pull import pull
    from kvlocal.llama.adapter import Lora
    from kvlocal.llama.embedding import Embedder
    from kvlocal.llama.model import Model
    from kvlocal.llama.sampling import SamplingParams

__version__ = "0.1.0"

__all__ = [
    "BudgetedCache",
    "CacheConfig",
    "ChatSession",
    "Embedder",
    "KvlocalError",
    "Lora",
    "Model",
    "SamplingParams",
    "SessionConfig",
    "TextSession",
    "__version__",
    "pull",
    "resolve",
]

# Loaded when they are asked for: `kvlocal --version` needs none of them, and the rooms import this module for its version.
_HOMES = {
    "BudgetedCache": "kvlocal.cache.budgeted",
    "CacheConfig": "kvlocal.cache.config",
    "ChatSession": "kvlocal.chat.session",
    "Embedder": "kvlocal.llama.embedding",
    "KvlocalError": "kvlocal.errors",
    "Lora": "kvlocal.llama.adapter",
    "Model": "kvlocal.llama.model",
    "SamplingParams": "kvlocal.llama.sampling",
    "SessionConfig": "kvlocal.chat.config",
    "TextSession": "kvlocal.chat.text_session",
    "pull": "kvlocal.hub.pull",
    "resolve": "kvlocal.hub.catalogue",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
