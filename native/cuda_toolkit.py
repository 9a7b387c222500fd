"""Puts what compiles ggml's CUDA backend into the virtual environment, from PyPI's wheels, for machines that have no CUDA toolkit.

The wheels hold the compiler, the headers and the libraries, as they are needed to run. What compiling needs besides are the plain names of the
libraries (libcublas.so for libcublas.so.13) and a directory lib64, which this adds as links. CMakeLists.txt finds the toolkit there when a CUDA
build is asked for and the system has none. The driver comes with the system and is not among them.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

# One release of CUDA; cublas counts its versions by itself, and 13.1 came with CUDA 13.0.
REQUIREMENTS = (
    *(f"{name}>=13.0,<13.1" for name in ("nvidia-cuda-nvcc", "nvidia-nvvm", "nvidia-cuda-crt", "nvidia-cuda-runtime", "nvidia-cuda-cccl")),
    "nvidia-cublas>=13.0,<13.2",
)

_VERSIONED = re.compile(r"(lib[\w+-]+\.so)\.\d+")


def toolkit() -> Path:
    """Where the wheels put their files."""
    return Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13"


def add_links(root: Path) -> None:
    """Adds to an unpacked toolkit the names that compilers and CMake look for; those that are there stay."""
    for library in (root / "lib").iterdir():
        if match := _VERSIONED.fullmatch(library.name):
            _link(library.with_name(match[1]), library.name)
    _link(root / "lib64", "lib")


def _link(path: Path, target: str) -> None:
    if not path.exists():
        path.unlink(missing_ok=True)  # a link whose target is gone
        path.symlink_to(target)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar", "off", *REQUIREMENTS]
    if subprocess.run(command, stdout=sys.stderr).returncode != 0:
        print("kvlocal: pip could not install the CUDA toolkit (its output is above); check the network and pip's settings,"
              " or install NVIDIA's toolkit and set CUDACXX to its nvcc.", file=sys.stderr)
        return 1
    add_links(toolkit())
    print(f"kvlocal: the CUDA toolkit is in {toolkit()}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
