"""Chat templates: the text that each step of a conversation appends, and the text that streams out of a model."""
