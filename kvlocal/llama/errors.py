"""What llama.cpp could not do."""

from kvlocal.errors import KvlocalError


class EngineError(KvlocalError):
    """llama.cpp could not do what was asked."""


class CacheFull(EngineError):
    """There are not enough free cells for the batch; the cache is as it was before the call."""
