"""Runs quantized GGUF models on a patched llama.cpp and keeps long chats inside a fixed KV-cache budget."""

__version__ = "0.1.0"
