"""Gives freed memory back to the system."""

import ctypes

# glibc keeps what was freed for later; other C libraries have no such call, and less need of it
_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)


def give_back() -> None:
    """Returns the pages that a burst of large temporary arrays has left behind, so that resident memory stays what it was before."""
    if _trim:
        _trim(0)
