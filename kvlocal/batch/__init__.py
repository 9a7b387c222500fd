"""Files of conversations: one JSON object a line in, one a line out, several decoding together."""
