"""Which file of a hub repository `Llama.from_pretrained` means, and where it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvlocal.compat.errors import NotSupported
from kvlocal.hub.client import find_in_repository
from kvlocal.hub.pull import pull


def fetched(repo_id: str, filename: str | None, places: dict[str, Any]) -> Path:
    """The file, which is fetched into kvlocal's models directory unless it is there.

    Args:
        repo_id: owner/repository.
        filename: its path in it, or a pattern as fnmatch has it that fits one file.
        places: arguments that say where else it is to be.

    Raises:
        NotSupported: it is to be somewhere else, or to come with others.
        KvlocalError: there is none, or it cannot be fetched.
    """
    for name, value in places.items():
        if value not in (None, []):
            raise NotSupported(f"kvlocal keeps models in its own directory, KVLOCAL_MODELS_DIR, and one file each: leave {name} out")
    return pull(find_in_repository(repo_id, filename or "*.gguf"))
