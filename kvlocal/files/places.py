"""Where kvlocal keeps what it keeps by itself: models, chats, and what can be computed again; and where it looks for what was set.

The places are those of the XDG base directory specification on every system. Taking `platformdirs` for them would move the models and chats of those
who use macOS, and its older versions take relative values for places.
"""

from __future__ import annotations

import os
from pathlib import Path

from kvlocal.errors import KvlocalError


class NoHome(KvlocalError):
    """There is no home directory."""


def models_dir() -> Path:
    """The absolute directory that holds the models.

    `KVLOCAL_MODELS_DIR`, else `kvlocal/models` in `XDG_DATA_HOME`, else in `~/.local/share`. It need not exist.

    Raises:
        NoHome: there is no home directory.
    """
    return _chosen("KVLOCAL_MODELS_DIR") or _base("XDG_DATA_HOME", ".local/share", "set KVLOCAL_MODELS_DIR") / "models"


def state_dir() -> Path:
    """The absolute directory of what nobody can compute again: chats and the history of lines typed.

    `KVLOCAL_STATE_DIR`, else `kvlocal` in `XDG_STATE_HOME`, else in `~/.local/state`. It need not exist.

    Raises:
        NoHome: there is no home directory.
    """
    return _chosen("KVLOCAL_STATE_DIR") or _base("XDG_STATE_HOME", ".local/state", "set KVLOCAL_STATE_DIR")


def cache_dir() -> Path:
    """The absolute directory of what can be computed again: `kvlocal` in `XDG_CACHE_HOME`, else in `~/.cache`. It need not exist.

    Raises:
        NoHome: there is no home directory.
    """
    return _base("XDG_CACHE_HOME", ".cache", "set XDG_CACHE_HOME to a directory")


def config_path() -> Path:
    """The absolute path of the config file: `KVLOCAL_CONFIG`, else `config.toml` in `config_dir()`. It need not exist.

    Raises:
        NoHome: there is no home directory.
    """
    return _chosen("KVLOCAL_CONFIG") or config_dir("set KVLOCAL_CONFIG") / "config.toml"


def prompts_dir() -> Path:
    """The absolute directory of prompts with a name: `KVLOCAL_PROMPTS_DIR`, else `prompts` in `config_dir()`. It need not exist.

    Raises:
        NoHome: there is no home directory.
    """
    return _chosen("KVLOCAL_PROMPTS_DIR") or config_dir("set KVLOCAL_PROMPTS_DIR") / "prompts"


def config_dir(advice: str = "set XDG_CONFIG_HOME to a directory") -> Path:
    """The absolute directory of what a person has set: `kvlocal` in `XDG_CONFIG_HOME`, else in `~/.config`. It need not exist.

    Raises:
        NoHome: there is no home directory; the sentence ends with this advice.
    """
    return _base("XDG_CONFIG_HOME", ".config", advice)


def _chosen(variable: str) -> Path | None:
    value = os.environ.get(variable)
    return Path(os.path.expanduser(value)).absolute() if value else None


def _base(variable: str, fallback: str, advice: str) -> Path:
    base = Path(os.environ.get(variable, ""))
    # The specification says to ignore relative paths.
    if not base.is_absolute():
        try:
            base = Path.home() / fallback
        except RuntimeError as error:
            raise NoHome(f"there is no home directory: {advice}") from error
    return base / "kvlocal"
