"""Puts what the tests on Vulkan need into the virtual environment: headers, a compiler of shaders, and Mesa's driver that computes on the CPU.

ggml's Vulkan backend wants headers of Vulkan 1.4, and a driver that is no older (lavapipe of Mesa 25). Where the system has all of it, that is used.
Otherwise the packages of a Debian system are fetched with apt and unpacked into .venv/vulkan: nothing is installed, and apt's own lists stay as they
are. Debian 12 is too old by itself; there the driver is from its backports, and the headers, which are the same for every release, from Debian 13.

What a build and a test have to be run with is written to .venv/vulkan/environment, lines for a shell. Where there is no such file in the end, a
sentence says why, and the exit code is 0 all the same: a machine that cannot have a device is not broken.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PLACE = Path(sys.prefix) / "vulkan"
ENVIRONMENT = PLACE / "environment"
NEEDED = (1, 4)  # of Vulkan

DRIVER = ("mesa-vulkan-drivers", "libvulkan1", "glslc")
HEADERS = ("libvulkan-dev", "spirv-headers")
# suites of releases that are too old by themselves: where the driver is from, and the headers
SUITES = {"bookworm": ("bookworm-backports", "trixie")}
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")


class NotToBeHad(Exception):
    """One sentence without its end: why this machine has no Vulkan device to test on."""


def header_version(prefix: Path) -> tuple[int, int]:
    """Of the Vulkan headers below it; (0, 0) without any."""
    header = prefix / "include" / "vulkan" / "vulkan_core.h"
    match = re.search(r"VK_HEADER_VERSION_COMPLETE VK_MAKE_API_VERSION\(\d+, (\d+), (\d+),", header.read_text()) if header.exists() else None
    return (int(match[1]), int(match[2])) if match else (0, 0)


def drivers(prefix: Path) -> list[Path]:
    """The manifests of lavapipe below it, for this kind of processor, that are new enough."""
    directory = prefix / "share" / "vulkan" / "icd.d"
    found = [directory / name for name in ("lvp_icd.json", f"lvp_icd.{platform.machine()}.json")]
    return [path for path in found if path.exists() and driver_version(path) >= NEEDED]


def driver_version(manifest: Path) -> tuple[int, ...]:
    """The version of Vulkan that a driver offers, as its manifest says."""
    return tuple(int(part) for part in json.loads(manifest.read_text())["ICD"]["api_version"].split("."))


def is_complete(prefix: Path) -> bool:
    """Whether all that is needed is below it."""
    tools = [prefix / "bin" / "glslc", prefix / "include" / "spirv" / "unified1" / "spirv.hpp"]
    return header_version(prefix) >= NEEDED and bool(drivers(prefix)) and all(tool.exists() for tool in tools)


def write_environment(prefix: Path) -> None:
    """Notes what is below the prefix for a shell. The directories of the system are looked through without being named."""
    values = {
        "VK_DRIVER_FILES": str(drivers(prefix)[0]),
        "GGML_VK_VISIBLE_DEVICES": "0",  # otherwise ggml leaves out a device that is a CPU
        "GALLIVM_PERF": "nopt",  # to compile the shaders takes longer than to run them, and once compiled they are kept
        "MESA_SHADER_CACHE_DIR": str(PLACE / "shaders"),
    }
    if prefix != Path("/usr"):
        libraries = [str(path.parent) for path in sorted(prefix.glob("lib/*/libvulkan.so.1"))]
        values |= {"CMAKE_PREFIX_PATH": str(prefix), "LD_LIBRARY_PATH": ":".join([*libraries, *filter(None, [os.environ.get("LD_LIBRARY_PATH")])])}
    PLACE.mkdir(exist_ok=True)
    unfinished = ENVIRONMENT.with_suffix(".tmp")
    unfinished.write_text("".join(f"export {name}={shlex.quote(value)}\n" for name, value in values.items()))
    unfinished.replace(ENVIRONMENT)


def run(command: list[str], cwd: Path) -> str:
    """What a command prints.

    Raises:
        NotToBeHad: it fails.
    """
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=os.environ | {"LC_ALL": "C"})
    if result.returncode != 0:
        reasons = [line.removeprefix("E: ") for line in result.stderr.splitlines() if line.startswith("E: ")] or result.stderr.splitlines()[-1:]
        raise NotToBeHad(f"{' '.join(command[:1])} says: {' '.join(reasons)[:300]}")
    return result.stdout


class Apt:
    """apt over some suites of Debian, with lists of its own in a directory that is thrown away; it only downloads.

    Args:
        place: the directory.
        mirror: where the system's own packages are from.
        suites: for instance "trixie"; what the last one has is preferred.
    """

    def __init__(self, place: Path, mirror: str, *suites: str) -> None:
        self._place = place
        for part in ("lists/partial", "archives/partial"):
            (place / part).mkdir(parents=True)
        sources = place / "sources.list"
        sources.write_text("".join(f"deb [signed-by={KEYRING}] {mirror} {suite} main\n" for suite in suites))
        settings = {"Dir::Etc::sourcelist": sources, "Dir::Etc::sourceparts": "-", "Dir::State::lists": place / "lists", "Dir::Cache": place,
                    "APT::Install-Recommends": "false", "APT::Default-Release": suites[-1], "Acquire::Languages": "none",
                    "APT::Sandbox::User": "root", "Acquire::Retries": "3"}  # fmt: skip
        self._command = ["apt-get", "--quiet", "--quiet", *(part for name, value in settings.items() for part in ("-o", f"{name}={value}"))]
        self._run("update", "--error-on=any")

    def _run(self, *arguments: str) -> str:
        return run([*self._command, *arguments], self._place)

    def missing(self, *names: str) -> list[str]:
        """What the system lacks, or has too old, to use these packages."""
        return re.findall(r"^Inst (\S+)", self._run("install", "--simulate", *names), re.MULTILINE)

    def unpack(self, names: list[str], target: Path) -> None:
        """Downloads packages and unpacks them there."""
        self._run("download", *names)
        for package in sorted(self._place.glob("*.deb")):
            run(["dpkg-deb", "--extract", str(package), str(target)], self._place)


def debian() -> str:
    """The code name of the Debian release that this system is.

    Raises:
        NotToBeHad: it is another system.
    """
    if shutil.which("apt-get") and KEYRING.exists():
        release = platform.freedesktop_os_release()
        if release.get("ID") == "debian" and "VERSION_CODENAME" in release:
            return release["VERSION_CODENAME"]
    raise NotToBeHad("this system has no Vulkan headers 1.4, glslc and lavapipe of Mesa 25, and is no Debian that they could be fetched for")


def mirror_of(codename: str) -> str:
    """Where apt has the release itself from, as the system's settings say.

    Raises:
        NotToBeHad: they name nothing for it.
    """
    asked = run(["apt-get", "-o", "Debug::NoLocking=true", "--print-uris", "update"], Path.cwd())  # only says what it would fetch
    if match := re.search(rf"^'(\S+)/dists/{re.escape(codename)}/InRelease'", asked, re.MULTILINE):
        return match[1]
    raise NotToBeHad(f"apt's settings name no place that {codename} is fetched from")


def fetch(target: Path) -> None:
    """Fetches and unpacks everything.

    Raises:
        NotToBeHad: it cannot be fetched.
    """
    codename = debian()
    mirror = mirror_of(codename)
    newer, with_headers = SUITES.get(codename, (codename, codename))
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        apt = Apt(place / "driver", mirror, *dict.fromkeys((codename, newer)))
        apt.unpack([*dict.fromkeys([*DRIVER, *apt.missing(*DRIVER)])], target)
        Apt(place / "headers", mirror, with_headers).unpack([*HEADERS], target)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", action="store_true", help="look and fetch again, also where there is something")
    arguments = parser.parse_args()
    if ENVIRONMENT.exists() and not arguments.again:
        return 0
    shutil.rmtree(PLACE, ignore_errors=True)
    try:
        prefix = Path("/usr")
        if not is_complete(prefix):
            print("kvlocal: fetching Vulkan's headers and Mesa's driver into .venv/vulkan ...", file=sys.stderr)
            prefix = PLACE / "usr"
            fetch(PLACE)
            if not is_complete(prefix):
                raise NotToBeHad("the packages that could be fetched are older than Vulkan 1.4")
        write_environment(prefix)
    except NotToBeHad as error:
        shutil.rmtree(PLACE, ignore_errors=True)
        print(f"kvlocal: the tests on Vulkan are left out: {error}.", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
