"""Fixtures that more than one test module uses."""

from pathlib import Path

import pytest

from kvlocal.catalogue import resolve


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct, which `make test` has fetched."""
    return resolve("smollm2-135m")
