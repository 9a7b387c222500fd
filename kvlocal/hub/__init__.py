"""Which models there are, where they lie on disk, and how they get there."""
