"""Trains Nexus tokens: a decoder in PyTorch, its weights and examples, dialogues that a model writes with itself, and distillation."""
