"""How much memory this process can still get: what the machine has, and what the limits on it leave."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")
_UNLIMITED = 2**60  # bytes; cgroup v1 writes the largest number of pages for no limit


def available_memory() -> int | None:
    """Bytes that this process can still get without swapping: what the machine has, and what limits leave. None where the system does not tell."""
    found = [_available_of_machine(), left_of_cgroups(), _left_of_address_space()]
    known = [size for size in found if size is not None]
    return min(known) if known else None


def _available_of_machine() -> int | None:
    """Only Linux tells."""
    size = _fields(_PROC / "meminfo").get("MemAvailable")
    return None if size is None else int(size.split()[0]) * 1024


@dataclass(frozen=True)
class _Version:
    """How a version of cgroups tells its memory: the names of files, and of the reclaimable parts in memory.stat, with all that is below."""

    limit: str
    used: str
    reclaimable: tuple[str, ...]


_V1 = _Version("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_active_file", "total_inactive_file"))
_V2 = _Version("memory.max", "memory.current", ("active_file", "inactive_file"))


def left_of_cgroups(process: Path = _PROC / "self") -> int | None:
    """What the memory controller leaves, as of a container, a systemd unit with MemoryMax or a batch system. None without a limit.

    A limit holds for all that is below, so that the least counts of those of the process's own cgroup and of all above it, as far as they can be
    seen. Cached files, which the kernel drops first, count as free.

    Args:
        process: its directory in /proc.

    Source: cgroups(7), the kernel's documentation of cgroup v1 (memory.txt) and v2 (cgroup-v2.rst).
    """
    found = [_left_of(group, version) for group, version in _groups(process)]
    return min((size for size in found if size is not None), default=None)


def _groups(process: Path) -> Iterator[tuple[Path, _Version]]:
    """The directories of the cgroups that limit the memory of a process, its own first."""
    memberships = [line.split(":", 2) for line in _lines(process / "cgroup") if line.count(":") >= 2]
    mounts = [_mount(line) for line in _lines(process / "mountinfo")]
    for number, controllers, path in memberships:
        unified = number == "0" and not controllers
        if not unified and "memory" not in controllers.split(","):
            continue
        for kind, options, root, point in mounts:
            if kind != ("cgroup2" if unified else "cgroup") or not (unified or "memory" in options):
                continue
            # a mount may show a part of the tree, in a container often the process's own cgroup as its root
            below = os.path.relpath(path, root)
            group = point if below.startswith("..") else Path(os.path.normpath(point / below))
            version = _V2 if unified else _V1
            yield group, version
            while group != point:
                group = group.parent
                yield group, version


def _mount(line: str) -> tuple[str, list[str], str, Path]:
    """Type, options of the file system, root and mount point of a line of /proc/PID/mountinfo; empty ones if it is another kind of line."""
    place, _, system = line.partition(" - ")
    places, systems = place.split(), system.split()
    if len(places) < 5 or len(systems) < 3:
        return "", [], "", Path()
    root, point = (re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text) for text in places[3:5])
    return systems[0], systems[2].split(","), root, Path(point)


def _left_of(group: Path, version: _Version) -> int | None:
    """None where there is no limit, or no memory controller."""
    try:
        limit, used = ((group / name).read_text(encoding="ascii").strip() for name in (version.limit, version.used))
        if limit == "max" or int(limit) >= _UNLIMITED:
            return None
        parts = dict(line.split(maxsplit=1) for line in _lines(group / "memory.stat") if " " in line)
        cached = sum(int(parts.get(name, 0)) for name in version.reclaimable)
        return max(0, int(limit) - max(0, int(used) - cached))
    except (OSError, ValueError):
        return None


def _left_of_address_space() -> int | None:
    """What `ulimit -v` leaves."""
    try:
        import resource
    except ImportError:
        return None
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    used = _fields(_PROC / "self" / "status").get("VmSize")
    if limit == resource.RLIM_INFINITY or used is None:
        return None
    return max(0, limit - int(used.split()[0]) * 1024)


def _fields(path: Path) -> dict[str, str]:
    """Lines of the form "name: value" of a file in /proc; none if it is not there."""
    return dict(line.split(":", 1) for line in _lines(path) if ":" in line)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
