"""What Ray makes workers of. It travels as code, so that a machine without kvlocal, or with another version of it, can say so."""

from __future__ import annotations

from typing import Any


def worker_class() -> type:
    """What Ray makes workers of. Nothing outside of its methods is used in them, so that it goes to other machines as code."""

    class BatchWorker:
        def __init__(self) -> None:
            self._streams: Any = None

        def begin(self, version: str, job: bytes) -> dict[str, Any]:
            """Loads the model, if that has not been done: "error", a sentence, or "settings", "has_template", and "machine" in any case."""
            import platform

            told: dict[str, Any] = {"machine": platform.node()}
            try:
                import kvlocal

                found = kvlocal.__version__
            except ImportError as error:
                return told | {"error": f"kvlocal cannot be imported there ({error}): install kvlocal {version} for the Python that Ray runs with"}
            if found != version:
                return told | {"error": f"kvlocal is of version {found} there and {version} here: install the same on both"}
            from kvlocal.batch.ray_worker import streams_for
            from kvlocal.errors import KvlocalError

            try:
                self._streams = self._streams or streams_for(job)
            except KvlocalError as error:
                return told | {"error": str(error)}
            return told | {"settings": self._streams.settings, "has_template": self._streams.has_template}

        def answer(self, number: int, line: bytes) -> Any:
            """The outcome of a line; None if the process is a new one, in which nothing was begun."""
            return self._streams and self._streams.answer(number, line)

    return BatchWorker
