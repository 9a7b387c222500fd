"""Fixtures that more than one test module uses."""

from pathlib import Path

import pytest

from kvlocal.catalogue import resolve
from kvlocal.pull import pull


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct, which `make test` has fetched."""
    return resolve("smollm2-135m")


@pytest.fixture(scope="session")
def gemma3() -> Path:
    """Gemma-3-270M, a model with a sliding window; fetched on first use."""
    return pull("gemma3-270m")
