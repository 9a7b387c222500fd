"""Nexus tokens: trained soft tokens that stand for finished segments of a conversation."""
