"""Fixtures that more than one test module uses, and the signals of all."""

import signal
from pathlib import Path

import pytest

from kvlocal.hub.catalogue import resolve
from kvlocal.hub.pull import pull

# nohup and background jobs are started with these ignored, and so would be all that the tests start and interrupt
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGQUIT, signal.SIG_DFL)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct, which `make test` has fetched."""
    return resolve("smollm2-135m")


@pytest.fixture(scope="session")
def gemma3() -> Path:
    """Gemma-3-270M, a model with a sliding window; fetched on first use."""
    return pull("gemma3-270m")
