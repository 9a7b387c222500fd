"""Contexts whose device fails, by llama.cpp's own abort callback: on the CPU there is nothing nearer to a device that is lost."""

import pytest

from kvlocal.llama.context import Context
from kvlocal.llama.library import load


class LosableDevice:
    """The device of all contexts that are made from now on.

    left: how many decodes there are before it fails, whatever it is asked then; None for no end
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left: int | None = None
        lib = load().llama_cpp
        # an attribute, because llama.cpp keeps no reference
        self._callback = lib.ggml_abort_callback(lambda _: self.left == 0)
        init, run = Context.__init__, Context._run

        def init_on_this(context: Context, *args: object, **options: object) -> None:
            init(context, *args, **options)
            lib.llama_set_abort_callback(context.pointer, self._callback, None)

        def count(context: Context, n: int) -> None:
            run(context, n)
            if self.left:
                self.left -= 1

        monkeypatch.setattr(Context, "__init__", init_on_this)
        monkeypatch.setattr(Context, "_run", count)
