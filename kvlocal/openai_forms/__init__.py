"""OpenAI's chat completions without a network: what a request asks for, and how its reply is written."""
