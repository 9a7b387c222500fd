"""FreeCores: with how many threads to compute where other programs run."""

import contextlib
import os
from types import ModuleType
from typing import Final, Literal

resource: ModuleType | None = None
with contextlib.suppress(ImportError):  # Windows
    import resource

# one thread for each core that others leave free
AUTO: Final = "auto"
Threads = int | Literal["auto"] | None

_WINDOW = 0.1  # seconds of computing that are looked at together
_FIRST_WAIT, _LAST_WAIT = 1.0, 8.0  # seconds of computing before all cores are tried again
# Who sets one of these has threads that sleep where others would wait at work, and from those nothing can be told.
_SLEEPING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def available_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def can_be_told() -> bool:
    """Whether the threads that compute show whether they had a core each."""
    return not any(name in os.environ for name in _SLEEPING)


def disk_reads() -> int:
    """How often this process has waited for a page of memory from the disk, such as one of a model's file; 0 where the system does not tell."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt if resource else 0


class FreeCores:
    """How many threads decode, as others leave cores free.

    The threads of ggml wait for each other after every operation, hundreds of times for a token. Where another program takes one of their cores, the
    rest wait for the one that does not run, and they do so at work: each has the processor for as long as it is left to it. So the processor time of
    the process in a second says how many cores it had. With fewer threads than that nobody waits. With b threads of others beside n of ours, c cores
    are shared evenly if there are too few of them: ours have n * c / (n + b) of them, which gives b.

    n: threads to compute with from now on
    """

    def __init__(self, n_cores: int) -> None:
        self.n = self._n_cores = n_cores
        self._seconds = self._processor = 0.0
        # windows in which there were too few cores, one after the other
        self._short = 0
        # seconds with fewer threads than cores; how many there are to be
        self._since, self._wait = 0.0, _FIRST_WAIT
        # what there was before all cores were tried
        self._before: int | None = None

    def note(self, seconds: float, processor: float) -> bool:
        """Takes in that so many seconds were computed, which took so many of all processors; whether `n` is another one now."""
        self._seconds += seconds
        self._processor += processor
        if self._seconds < _WINDOW:
            return False
        elapsed, free, n = self._seconds, self._free(), self.n
        self._seconds = self._processor = 0.0
        if self._before is not None:
            self._end_trial(free)
        elif free < n:
            # once may be anything
            self._short += 1
            if self._short == 2:
                self.n, self._short = free, 0
                self._since, self._wait = 0.0, _FIRST_WAIT
        else:
            self._short = 0
            self._since += elapsed
            if n < self._n_cores and self._since >= self._wait:
                self._before, self.n = n, self._n_cores
        return self.n != n

    def _free(self) -> int:
        had = max(self._processor / self._seconds, 1e-3)
        others = self.n * (self._n_cores / had - 1)
        return max(1, min(self.n, round(self._n_cores - others)))

    def _end_trial(self, free: int) -> None:
        assert self._before is not None
        if free < self.n:
            self.n = max(free, self._before)
            self._wait = min(2 * self._wait, _LAST_WAIT)
        else:
            self._wait = _FIRST_WAIT
        self._before, self._since = None, 0.0
