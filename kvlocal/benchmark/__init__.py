"""How fast a compressed conversation is against stock llama.cpp, measured in alternation on the same machine."""
