"""Asks the hub: its client, what its refusals mean, and the lists of its repositories."""

from __future__ import annotations

import fnmatch
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

from kvlocal.errors import KvlocalError
from kvlocal.hub.hub_file import MAX_LISTED, HubFile, HubQuantization, models_among


@dataclass(frozen=True)
class Listed:
    """A GGUF file as the hub's list has it.

    size: bytes, of all files of the model; None if the hub does not say
    """

    file: HubFile
    size: int | None


def find(model: HubFile | HubQuantization) -> Listed:
    """The file that is meant, and its size, as the hub tells them.

    Raises:
        KvlocalError: there is none, or several fit, or the hub cannot be asked.
    """
    sizes = _sizes(model)
    file = HubFile(model.owner, model.repo, model.among(sizes), model.revision) if isinstance(model, HubQuantization) else model
    missing = [part for part in file.parts if part not in sizes]
    if missing:
        raise KvlocalError(f"{file.repository} has no file {missing[0]}: check the name")
    return Listed(file, sum(sizes[part] for part in file.parts) or None)


def find_in_repository(repository: str, pattern: str) -> HubFile:
    """The GGUF file of a hub repository whose path fits a pattern (fnmatch): one that is on disk, or else, by the hub's own list, one that can be
    pulled.

    Args:
        repository: owner/repository.

    Raises:
        KvlocalError: no such file or several, or the hub cannot be asked.
    """
    if not any(sign in pattern for sign in "*?["):
        return HubFile.parse(f"hf:{repository}/{pattern}")
    wanted = HubFile.parse(f"hf:{repository}/{pattern.removesuffix('.gguf')}.gguf")
    paths = [found.file for found in HubFile.pulled() if (found.owner, found.repo, found.revision) == (wanted.owner, wanted.repo, None)]
    fitting = [path for path in paths if fnmatch.fnmatch(path, pattern)]
    if not fitting:
        paths = models_among(_sizes(wanted))
        fitting = [path for path in paths if fnmatch.fnmatch(path, pattern)]
    if len(fitting) != 1:
        listed = ", ".join(sorted(fitting or paths)[:MAX_LISTED]) or "no GGUF file"
        raise KvlocalError(f"{len(fitting) or 'no'} files of {repository} fit {pattern}: name one of those there are ({listed})")
    return HubFile(wanted.owner, wanted.repo, fitting[0])


def _sizes(model: HubFile | HubQuantization) -> dict[str, int]:
    """The files of a model's repository and what they take, in bytes; 0 where the hub does not say.

    Asked once: a machine without a network says so at once.
    """
    huggingface_hub = hub_client()
    with hub_errors(model), quiet_hub():
        info = huggingface_hub.HfApi().model_info(model.repository, revision=model.revision, files_metadata=True)
        return {file.rfilename: file.size or 0 for file in info.siblings or ()}


def hub_client() -> ModuleType:
    """huggingface_hub.

    Raises:
        KvlocalError: it is not installed.
    """
    try:
        import huggingface_hub
    except ImportError as error:
        raise KvlocalError(
            f"hf: models need huggingface_hub: run `{sys.executable} -m pip install huggingface_hub`"
        ) from error
    return huggingface_hub


@contextmanager
def quiet_hub() -> Iterator[None]:
    """Keeps huggingface_hub from drawing bars and telling of its retries between the lines of the program."""
    from huggingface_hub import utils

    level = utils.logging.get_verbosity()
    had_bars = not utils.are_progress_bars_disabled()
    utils.logging.set_verbosity(utils.logging.CRITICAL)
    if had_bars:
        utils.disable_progress_bars()
    try:
        yield
    finally:
        utils.logging.set_verbosity(level)
        if had_bars:
            utils.enable_progress_bars()


@contextmanager
def hub_errors(model: HubFile | HubQuantization) -> Iterator[None]:
    """Turns whatever huggingface_hub raises into one sentence; errors of the disk pass."""
    from huggingface_hub import errors

    repository = model.repository
    try:
        yield
    except errors.GatedRepoError as error:
        raise KvlocalError(
            f"{repository} is gated: accept its terms on its page, then set HF_TOKEN to a token of that account"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise KvlocalError(
            f"there is no repository {repository}, or it is private: check the name, or set HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise KvlocalError(f"{repository} has no revision {model.revision}: check the part after the @") from error
    except errors.OfflineModeIsEnabled as error:
        raise KvlocalError(f"HF_HUB_OFFLINE forbids fetching {model.name}: unset it and pull again") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status == 404:
            what = f"no file {model.file}" if isinstance(model, HubFile) else "no list of files"
            raise KvlocalError(f"{repository} has {what}: check the name") from error
        if status in (401, 403):
            raise KvlocalError(f"the hub refuses {model.name}: set HF_TOKEN to a token that may read it") from error
        raise KvlocalError(f"the hub answered {status} to {model.name}: pull again later") from error
    except Exception as error:
        if is_disk_error(error):
            raise
        # The exceptions for network failures come from the HTTP library, which differs between versions.
        reason = (str(error.__cause__ or error).splitlines() or [type(error).__name__])[0]
        raise KvlocalError(f"fetching {model.name} failed: check the network and pull again ({reason})") from error


def is_disk_error(error: Exception) -> bool:
    # Network failures may be OSErrors too.
    network = isinstance(error, ConnectionError | TimeoutError | socket.gaierror)
    return isinstance(error, OSError) and error.errno is not None and not network
