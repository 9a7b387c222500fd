"""An engine in numbers."""

from __future__ import annotations

from dataclasses import dataclass

from kvlocal.serving.request import Finished


@dataclass
class Totals:
    """What all requests so far have taken.

    answered, stopped, failed: requests that came to an end, were cancelled, or ended with an error
    prompt_tokens, cached_tokens, completion_tokens: as Usage has them
    """

    answered: int = 0
    stopped: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0

    def count(self, finished: Finished) -> None:
        """One more."""
        usage = finished.usage
        self.failed += finished.error is not None
        self.stopped += finished.error is None and finished.stop_reason == "stopped"
        self.answered += finished.error is None and finished.stop_reason != "stopped"
        self.prompt_tokens += usage.prompt_tokens
        self.cached_tokens += usage.cached_tokens
        self.completion_tokens += usage.completion_tokens


@dataclass(kw_only=True)
class EngineStats(Totals):
    """As Totals, and

    parallel: slots
    running, waiting: requests that are worked on, and that wait
    embedding: requests for embeddings that are worked on or wait
    conversations, in_slots: that are kept, and of these in slots
    kv_bytes: what the caches of all slots take on the device
    bytes_in_memory, bytes_on_disk: what they take besides cells
    """

    parallel: int
    running: int
    waiting: int
    embedding: int
    conversations: int
    in_slots: int
    kv_bytes: int
    bytes_in_memory: int
    bytes_on_disk: int
