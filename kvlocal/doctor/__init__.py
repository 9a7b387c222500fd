"""Says what is installed, what is wrong with it, and what fits into memory."""
