"""Measures how much of a conversation each policy keeps: one run, the same chats for all of them."""
