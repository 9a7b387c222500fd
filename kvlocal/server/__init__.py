"""Conversations over HTTP, in the forms in which OpenAI's and Anthropic's clients ask for them."""
