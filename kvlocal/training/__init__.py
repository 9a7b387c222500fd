"""Trains Nexus tokens and adapters for a compressed cache: a decoder in PyTorch, its weights and examples, written dialogues, distillation and
reinforcement learning.
"""
