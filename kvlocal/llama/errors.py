"""What llama.cpp, and what is added to it, could not do."""

from kvlocal.errors import KvlocalError
from kvlocal.llama.library import load


class EngineError(KvlocalError):
    """llama.cpp could not do what was asked."""


class CacheFull(EngineError):
    """There are not enough free cells for the batch; the cache is as it was before the call."""


class NativeError(KvlocalError):
    """A call of the native layer was refused or failed.

    code: the kvl_status of kvlocal.h, below zero
    """

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code

    @property
    def unsupported(self) -> bool:
        """Whether the model, the cache or the device cannot do it at all."""
        return self.code == load().lib.KVL_ERR_UNSUPPORTED


def checked(code: int) -> int:
    """What a function of kvlocal.h returned in this thread; NativeError if it failed."""
    if code < 0:
        library = load()
        raise NativeError(library.ffi.string(library.lib.kvl_last_error()).decode(errors="replace"), code)
    return code
