"""NotSupported: what kvlocal's Llama does not do."""

from kvlocal.errors import KvlocalError


class NotSupported(KvlocalError, NotImplementedError):
    """llama-cpp-python's Llama can do this, and kvlocal's cannot."""
