"""One conversation with a model, turn by turn, inside a fixed KV budget."""
