"""Snapshots: the cache of a conversation in a file, with all that the answers to come depend on.

A line of JSON, the arrays that it names one after another as they are, and the SHA-256 of all that. What an archive holds is in a file of its own
(kvlocal.conversations.archive_file), of which the snapshot names the parts. Nothing in such a file is trusted: it can be foreign, outdated, cut off
or made by somebody else, and the conversation is then read again from its transcript.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

import kvlocal
from kvlocal.cache.archive import ArchivePart
from kvlocal.cache.noted_cells import Arrays, Limits
from kvlocal.chat.config import SessionError
from kvlocal.chat.session import ChatSession
from kvlocal.conversations.archive_file import N_DIGEST, ArchiveFile, Extent, archive_path
from kvlocal.errors import KvlocalError
from kvlocal.files.atomic import replace_at_leisure
from kvlocal.files.fingerprint import fingerprint
from kvlocal.llama.library import load as load_library
from kvlocal.template.markup import Message

FORMAT = "kvlocal-snapshot"
VERSION = 3

_MAX_HEADER = 2**20  # bytes
_MAX_LENGTHS = 2000  # of the conversation that a header names
_CHUNK = 2**22  # bytes that are written before the next look at whether to stop


class SnapshotError(KvlocalError):
    """A snapshot is of no use here; its text says why."""


class _Stopped(Exception):
    pass


def snapshot_path(transcript: Path) -> Path:
    """Where the snapshot of a conversation is, beside its transcript."""
    return transcript.with_name(f"{transcript.name}.snapshot")


def can_be_captured(session: ChatSession) -> bool:
    """Whether a session is certain of its cache, and between two turns."""
    return not session.cache.uncertain and bool(session.messages) and session.messages[-1]["role"] == "assistant"


@dataclass(frozen=True)
class Captured:
    """A session as it is at one time.

    key: of its conversation and its settings
    model, nexus, signature: what it depends on: the files of weights and of Nexus tokens; adapters and settings
    system, messages: the conversation
    arrays: as ChatSession.snapshot gives them
    parts: of its archive; the next answer changes them, unless they are shared
    has_archive: whether it has one
    """

    key: tuple[str, str]
    model: Path
    nexus: Path | None
    signature: Mapping[str, Any]
    system: str | None
    messages: Sequence[Message]
    arrays: Arrays
    parts: Sequence[ArchivePart]
    has_archive: bool

    @property
    def n_bytes(self) -> int:
        """What it takes besides its parts."""
        return sum(array.nbytes for array in self.arrays.values())

    @property
    def lengths(self) -> list[int]:
        """How many messages a conversation can have that goes on from it: as many as it has now, or had before each turn that can be taken back, from
        the last."""
        before: list[int] = self.arrays["marks.numbers"][1, ::-1].tolist()
        return [len(self.messages), *before][:_MAX_LENGTHS]

    @classmethod
    def of(cls, session: ChatSession, *, lasting: bool = False) -> Self:
        """A session that can_be_captured.

        lasting: it stays what it is, whatever the session does then
        """
        arrays, archive = session.snapshot(), session.cache.archive
        parts: Sequence[ArchivePart] = []
        if archive:
            parts = archive.share() if lasting else archive.parts()
        if lasting:
            arrays = {name: array.copy() for name, array in arrays.items()}
        messages = [dict(message) for message in session.messages]
        return cls(
            _key(session),
            session.model.path,
            _nexus_path(session),
            _signature(session),
            session.system,
            messages,
            arrays,
            parts,
            archive is not None,
        )

    def resume(self, session: ChatSession) -> None:
        """Brings a fresh session of the same kind to where the other one was, whose archive it shares.

        Raises:
            SessionError: it does not fit; the session is then at its beginning.
        """
        session.resume(self.messages, self.arrays, [part.data for part in self.parts], copy=False)
        if session.cache.archive:
            session.cache.archive.known_as(self.parts)

    def header(self, arrays: Arrays) -> bytes:
        """The first line of a snapshot with these arrays."""
        digests = _digests(self.system, self.messages)
        header = {
            "format": FORMAT,
            "version": VERSION,
            "made_with": _made_with(self.model, self.nexus, self.signature),
            "conversations": [[n, digests[n]] for n in self.lengths],
            "arrays": [[name, array.dtype.str, array.shape] for name, array in arrays.items()],
        }
        return json.dumps(header).encode() + b"\n"


class Stored(NamedTuple):
    """A snapshot as it was read.

    messages: those that a session has which is brought there
    n_turns: how many turns the snapshot has besides
    arrays: as ChatSession.snapshot gives them
    extents, data: of the parts of its archive
    """

    messages: Sequence[Message]
    n_turns: int
    arrays: Arrays
    extents: Sequence[Extent]
    data: Sequence[npt.NDArray[np.uint8]]


class Snapshots:
    """The snapshot of one conversation, of which a file holds the latest, and one beside it the archive, if there is one.

    path: of the snapshot; whoever writes it has the transcript locked
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._archive_file = ArchiveFile(archive_path(path))
        # what the file is known to hold
        self._kept: tuple[str, str] | None = None

    def save(self, session: ChatSession, stop: Callable[[], bool] = lambda: False) -> None:
        """Writes a snapshot, unless the file holds it already, or the conversation is empty or waits for an answer.

        stop: asked between stretches of the file; True gives it up, and what was there stays

        Raises:
            KvlocalError: it cannot be written; the older one is as it was.
        """
        if self.holds(session) or not can_be_captured(session) or stop():
            return
        captured = Captured.of(session)
        if self.write(captured, stop) and session.cache.archive and session.config.store == "disk":
            session.cache.archive.exchange(self._archive_file.mapped(captured.parts))

    def write(self, captured: Captured, stop: Callable[[], bool] = lambda: False) -> bool:
        """As `save`, for what a session was; whether it was written to the end."""
        arrays = captured.arrays
        extents = self._archive_file.write(captured.parts, stop)
        if extents is None:
            return False
        if captured.has_archive:
            arrays = arrays | _table(extents)
        try:
            replace_at_leisure(self.path, _chunks(captured.header(arrays), arrays, stop))
        except _Stopped:
            return False
        self._kept = captured.key
        self._archive_file.keep(extents)
        return True

    def holds(self, session: ChatSession) -> bool:
        """Whether the file is known to hold the conversation as it is."""
        return self._kept == _key(session)

    def lengths(self) -> list[int]:
        """As Captured.lengths, of what the file has; empty if there is nothing that could be gone on from."""
        try:
            with open(self.path, "rb") as file:
                pairs = _read_header(file)[0].get("conversations")
        except (OSError, SnapshotError):
            return []
        pairs = pairs if isinstance(pairs, list) else []
        return [pair[0] for pair in pairs if isinstance(pair, list) and pair and type(pair[0]) is int]

    def load(self, session: ChatSession, messages: Sequence[Message], *, copy: bool | None = None) -> int:
        """Puts a fresh session where the snapshot was taken, if the conversation came past that point, and returns how many of its messages it has
        then. Where the last turns of the snapshot are others than in the conversation, they are taken back, as far as it has marks.

        copy: use no archive where it is in the file; as the session's configuration says if None

        Raises:
            SnapshotError: there is none, or it does not fit; the session is at its beginning.
        """
        return self.resume(session, self.read(session, messages), copy=copy)

    def read(self, session: ChatSession, messages: Sequence[Message]) -> Stored:
        """The first part of `load`, which waits for the disk and does nothing to the session.

        Raises:
            SnapshotError: there is none, or it does not fit.
        """
        try:
            with open(self.path, "rb") as file:
                header, n_header = _read_header(file)
                _check_made_with(header.get("made_with"), session)
                n, n_turns = _common(header.get("conversations"), session.system, messages)
                limits = session.snapshot_limits(_text_limit(session.system, messages)) | _TABLE_LIMITS
                arrays = _read_arrays(file, n_header, header.get("arrays"), limits)
                extents = _extents(arrays)
                data = self._read_archive(extents)
        except FileNotFoundError:
            raise SnapshotError("there is no snapshot") from None
        except OSError as error:
            raise SnapshotError(f"the snapshot cannot be read ({error.strerror})") from error
        return Stored(messages[:n], n_turns, arrays, extents, data)

    def resume(self, session: ChatSession, stored: Stored, *, copy: bool | None = None) -> int:
        """The second part of `load`. Between the two nothing may be written.

        Raises:
            SnapshotError: it does not fit; the session is at its beginning.
        """
        n_turns, extents = stored.n_turns, stored.extents
        # the words of turns that are taken back do not matter
        turns = n_turns * [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}]
        try:
            session.resume([*stored.messages, *turns], stored.arrays, stored.data, session.config.store == "ram" if copy is None else copy)
        except SessionError as error:
            raise SnapshotError("the snapshot contradicts itself") from error
        if session.cache.archive:
            self._archive_file.take_up(session.cache.archive.parts(), extents)
        if n_turns:
            session.undo(n_turns)
        else:
            self._kept = _key(session)
        return len(stored.messages)

    def _read_archive(self, extents: Sequence[Extent]) -> list[npt.NDArray[np.uint8]]:
        try:
            return self._archive_file.read(extents)
        except KvlocalError as error:
            raise SnapshotError(str(error)) from error


def _fingerprint(path: Path) -> str:
    """As fingerprint.

    Raises:
        SnapshotError: the file cannot be read any more.
    """
    try:
        return fingerprint(path)
    except OSError as error:
        raise SnapshotError(f"{path} cannot be read for the snapshot ({error.strerror})") from error


def _made_with(model: Path, nexus: Path | None, signature: Mapping[str, Any]) -> dict[str, Any]:
    library = load_library()
    return {
        "kvlocal": kvlocal.__version__,
        "llama.cpp": f"{library.bindings_version} {library.patch_level}",
        "model": _fingerprint(model),
        "Nexus file": _fingerprint(nexus) if nexus else None,
        **signature,
    }


def _signature(session: ChatSession) -> dict[str, Any]:
    of_template = {"tools": list(session.config.tools) or None, "way of thinking": None if session.config.thinking else "off"}
    return {**of_template, "set of LoRA adapters": session.model.changed_by or None, **session.cache.signature}


def _nexus_path(session: ChatSession) -> Path | None:
    return Path(session.nexus.path) if session.nexus else None


def _check_made_with(made_with: object, session: ChatSession) -> None:
    wanted = json.loads(json.dumps(_made_with(session.model.path, _nexus_path(session), _signature(session))))
    if not isinstance(made_with, dict):
        raise SnapshotError("the snapshot is damaged")
    for name, value in wanted.items():
        if made_with.get(name) != value:
            raise SnapshotError(f"the snapshot was made with another {name.replace('_', ' ')}")


def _digests(system: str | None, messages: Sequence[Message]) -> list[str]:
    """Of the first n messages, for every n from 0 on."""
    digests = [hashlib.sha256(json.dumps(system).encode()).hexdigest()]
    for message in messages:
        more = {name: value for name, value in message.items() if name not in ("role", "content")}
        said = [digests[-1], message["role"], message["content"], *([more] if more else [])]
        digests.append(hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest())
    return digests


def _key(session: ChatSession) -> tuple[str, str]:
    return json.dumps(session.cache.signature), _digests(session.system, session.messages)[-1]


def _chunks(header: bytes, arrays: Mapping[str, npt.NDArray[np.generic]], stop: Callable[[], bool]) -> Iterator[bytes | memoryview]:
    digest = hashlib.sha256(header)
    yield header
    for array in arrays.values():
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        for start in range(0, len(data), _CHUNK):
            if stop():
                raise _Stopped
            digest.update(data[start : start + _CHUNK])
            yield data[start : start + _CHUNK]
    yield digest.digest()


def _read_header(file: BufferedReader) -> tuple[dict[str, Any], int]:
    line = file.readline(_MAX_HEADER)
    try:
        header = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise SnapshotError("the snapshot is damaged")
    if header.get("version") != VERSION:
        raise SnapshotError("the snapshot was made by another version of kvlocal")
    return header, len(line)


def _common(conversations: object, system: str | None, messages: Sequence[Message]) -> tuple[int, int]:
    """How many messages the snapshot has in common with these, and how many turns it has besides.

    Raises:
        SnapshotError: it is of another conversation.
    """
    pairs = conversations if isinstance(conversations, list) else []
    digests, longest = _digests(system, messages), None
    for pair in pairs[:_MAX_LENGTHS]:
        n = pair[0] if isinstance(pair, list) and len(pair) == 2 else None
        if type(n) is not int or not 0 <= n < 2**31:
            break
        longest = n if longest is None else longest
        if 0 < n <= len(messages) and pair[1] == digests[n]:
            n_turns, rest = divmod(longest - n, 2)
            if 0 <= n_turns <= len(pairs) and not rest:
                return n, n_turns
    raise SnapshotError("the snapshot is of another conversation")


def _table(extents: Sequence[Extent]) -> Arrays:
    """Where the parts of the archive are. archive.extents: int64 [2, n], starts and sizes; archive.digests: uint8 [16, n]"""
    places = np.array([extent[:2] for extent in extents], np.int64).reshape(-1, 2).T
    digests = np.frombuffer(b"".join(extent.digest for extent in extents), np.uint8).reshape(-1, N_DIGEST).T
    return {"archive.extents": places, "archive.digests": digests}


_TABLE_LIMITS: Limits = {"archive.extents": ("<i8", (2, 2**20)), "archive.digests": ("u1", (N_DIGEST, 2**20))}


def _extents(arrays: Mapping[str, npt.NDArray[np.generic]]) -> list[Extent]:
    """What `_table` was given, nothing without one.

    Raises:
        SnapshotError: it is damaged.
    """
    if "archive.extents" not in arrays:
        return []
    starts, sizes = arrays["archive.extents"].tolist()
    digests = arrays.get("archive.digests", np.zeros((N_DIGEST, 0), np.uint8)).T
    if len(digests) != len(starts):
        raise SnapshotError("the snapshot is damaged")
    return [Extent(start, size, digest.tobytes()) for start, size, digest in zip(starts, sizes, digests, strict=True)]


def _text_limit(system: str | None, messages: Sequence[Message]) -> int:
    """More tokens, and more bytes of notes about them, than a conversation can have."""
    n_bytes = sum(len(message["content"].encode(errors="replace")) for message in messages) + len((system or "").encode(errors="replace"))
    return 8 * n_bytes + 2**16 * (len(messages) + 3)


def _read_arrays(
    file: BufferedReader, n_header: int, names: object, limits: Mapping[str, tuple[npt.DTypeLike, tuple[int, ...]]]
) -> dict[str, npt.NDArray[np.generic]]:
    """The arrays, checked: nothing is allocated before it is known to be in the file and no larger than it may be."""
    sizes: dict[str, tuple[np.dtype, tuple[int, ...]]] = {}
    for entry in names if isinstance(names, list) else [None]:
        if not (isinstance(entry, list) and len(entry) == 3 and isinstance(entry[0], str) and entry[0] in limits and entry[0] not in sizes):
            raise SnapshotError("the snapshot is damaged")
        name, kind, shape = entry
        dtype, most = np.dtype(limits[name][0]), limits[name][1]
        fits = isinstance(shape, list) and len(shape) == len(most) and shape[:-1] == list(most[:-1]) and all(type(n) is int for n in shape)
        if kind != dtype.str or not fits or not 0 <= shape[-1] <= most[-1]:
            raise SnapshotError("the snapshot is damaged")
        sizes[name] = dtype, tuple(shape)
    n_data = sum(dtype.itemsize * math.prod(shape) for dtype, shape in sizes.values())
    if os.fstat(file.fileno()).st_size != n_header + n_data + hashlib.sha256().digest_size:
        raise SnapshotError("the snapshot is incomplete")
    file.seek(0)
    digest = hashlib.sha256(file.read(n_header))
    arrays = {}
    for name, (dtype, shape) in sizes.items():
        array = arrays[name] = np.empty(shape, dtype)
        data = array.reshape(-1).view(np.uint8).data
        if file.readinto(data) != len(data):
            raise SnapshotError("the snapshot is incomplete")
        digest.update(data)
    if file.read() != digest.digest():
        raise SnapshotError("the snapshot is damaged")
    return arrays
