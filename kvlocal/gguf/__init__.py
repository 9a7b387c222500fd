"""Reads the headers of GGUF files, and finds what in a file makes it unsafe to load; writes adapters."""
