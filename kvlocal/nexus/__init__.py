"""Nexus tokens: trained soft tokens that stand for finished turns of a conversation."""
