"""One conversation with a model, turn by turn, or one text that it goes on with, inside a fixed KV budget."""
