"""Many conversations with one model at once, for programs that send the whole history each time."""
