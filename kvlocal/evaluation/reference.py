"""What the full context predicts, computed once per chat and kept on disk."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from kvlocal.errors import KvlocalError
from kvlocal.files.atomic import atomic_write
from kvlocal.files.places import cache_dir


def references_dir() -> Path:
    """Where references are kept unless another directory is named; it need not exist.

    Raises:
        NoHome: there is no home directory.
    """
    return cache_dir() / "eval"


def log_softmax(logits: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
    """Log-probabilities, float32 [n, n_vocab]."""
    logp = np.asarray(logits, np.float32)
    logp = logp - logp.max(axis=-1, keepdims=True)
    logp -= np.log(np.exp(logp).sum(axis=-1, keepdims=True, dtype=np.float64)).astype(np.float32)
    return logp


@dataclass(frozen=True)
class Reference:
    """What was predicted for each token of an answer.

    tokens: int32 [n], the answer
    logp: float16 [n, n_vocab], log-probabilities
    top: int32 [n], the most likely token
    loss: float32 [n], cross-entropy of the answer's token, in nats
    """

    tokens: npt.NDArray[np.int32]
    logp: npt.NDArray[np.float16]
    top: npt.NDArray[np.int32]
    loss: npt.NDArray[np.float32]

    @classmethod
    def of(cls, tokens: npt.NDArray[np.int32], logits: npt.NDArray[np.float32]) -> Self:
        """From the logits of the answer's tokens, float32 [n, n_vocab]."""
        logp = log_softmax(logits)
        loss = -np.take_along_axis(logp, tokens[:, None], axis=-1)[:, 0]
        return cls(tokens, logp.astype(np.float16), logits.argmax(axis=-1).astype(np.int32), loss)


class ReferenceCache:
    """A directory of references, each in a file that is named by the hash of all it depends on."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def get(self, depends: object, tokens: npt.NDArray[np.int32], compute: Callable[[], Reference]) -> Reference:
        """The reference of these tokens, computed if it is not there or its file is damaged.

        Args:
            depends: what else it depends on, as JSON takes it.
            tokens: int32 [n], of the whole chat.
            compute: gives it.

        Raises:
            KvlocalError: the file cannot be written.
        """
        digest = hashlib.sha256(json.dumps(depends, sort_keys=True).encode() + b"\n" + tokens.astype("<i4").tobytes())
        path = self._directory / f"{digest.hexdigest()}.npz"
        found = self._load(path)
        if found is None:
            found = compute()
            data = io.BytesIO()
            np.savez(data, **vars(found))
            make_directory(self._directory)
            atomic_write(path, data.getvalue())
        return found

    @staticmethod
    def _load(path: Path) -> Reference | None:
        try:
            # the archive's checksums tell a damaged file
            with np.load(path, allow_pickle=False) as arrays:
                return Reference(**arrays)
        except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile):
            return None


def make_directory(path: Path) -> None:
    """Makes a directory of the cache.

    Raises:
        KvlocalError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise KvlocalError(f"cannot make the directory {path} ({error.strerror}): name another one with --cache") from error
