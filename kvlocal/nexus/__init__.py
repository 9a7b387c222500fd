"""Nexus tokens: trained embeddings that stand for finished turns of a conversation."""
