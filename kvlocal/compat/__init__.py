"""kvlocal for programs that are written for llama-cpp-python: its Llama, with chats that have no end."""

from kvlocal.compat.errors import NotSupported
from kvlocal.compat.grammar import LlamaGrammar
from kvlocal.compat.llama import Llama, LlamaState

__all__ = ["Llama", "LlamaGrammar", "LlamaState", "NotSupported"]
