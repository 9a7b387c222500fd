"""NativeLog: what llama.cpp says while a file is loaded or a context is made."""

import ctypes
import re
from typing import Any, Self

from kvlocal.interrupts import CtrlCWaits

_KV_SIZE = re.compile(r"llama_kv_cache: size = +([\d.]+) MiB")
_STATE_SIZE = re.compile(r"llama_memory_recurrent: size = +([\d.]+) MiB")
_ERROR_LEVEL = 4  # GGML_LOG_LEVEL_ERROR


class NativeLog:
    """What llama.cpp says in a `with` block; besides, its messages go where they went before.

    Its log is the only place that tells why a file or a context is refused, and how large a cache is.
    """

    def __init__(self, llama_cpp: Any) -> None:
        self._lib = llama_cpp
        self._previous, self._user_data = llama_cpp.llama_log_callback(), ctypes.c_void_p()
        self._lines: list[tuple[int, str]] = []

    def _take(self, level: int, text: bytes, _: Any) -> None:
        self._lines.append((level, text.decode("utf-8", "replace").strip()))
        if self._previous:
            self._previous(level, text, self._user_data)

    def __enter__(self) -> Self:
        # an exception in a callback is lost
        self._ctrl_c = CtrlCWaits().__enter__()
        self._lib.llama_log_get(ctypes.byref(self._previous), ctypes.byref(self._user_data))
        # an attribute, because llama.cpp keeps no reference; for as long as it is used, because it keeps this object
        self._callback = self._lib.llama_log_callback(self._take)
        self._lib.llama_log_set(self._callback, ctypes.c_void_p())
        return self

    def __exit__(self, *_: object) -> None:
        self._lib.llama_log_set(self._previous, self._user_data)
        del self._callback
        self._ctrl_c.__exit__()

    @property
    def reason(self) -> str:
        """The first error as " (message)", without the name of the function it comes from; "" if there is none."""
        error = next((text for level, text in self._lines if level == _ERROR_LEVEL), "")
        # it may quote from a damaged file
        error = "".join(c if c.isprintable() else "?" for c in error.partition(": ")[2] or error)
        return f" ({error.rstrip('.')})" if error else ""

    @property
    def kv_bytes(self) -> int:
        """The sum of the caches reported, in bytes, which llama.cpp rounds to hundredths of a MiB."""
        return self._bytes_of(_KV_SIZE)

    @property
    def state_bytes(self) -> int:
        """The same for the states of recurrent layers."""
        return self._bytes_of(_STATE_SIZE)

    def _bytes_of(self, pattern: re.Pattern[str]) -> int:
        sizes = (pattern.match(text) for _, text in self._lines)
        return int(sum(float(size[1]) for size in sizes if size) * 2**20)
