"""Builds llama.cpp's own server, without our patches, from the source that our library is compiled from: build/stock-server/bin/llama-server.

It is there to compare with, and has the compiler's options of our library.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tarfile

from pack import ROOT, pinned
from prepare import PrepareError, fetch_sdist

TARGET = ROOT / "build" / "stock-server"
OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release", "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF", "-DLLAMA_BUILD_APP=OFF", "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF", "-DLLAMA_OPENSSL=OFF", "-DLLAMA_BUILD_TOOLS=ON", "-DLLAMA_BUILD_SERVER=ON",
)  # fmt: skip
# as CMakeLists.txt has it for our library: ggml's AMX code crashes on machines that announce AMX and do not let every process use it
NO_AMX = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"


def build() -> None:
    """Unpacks the source, configures and compiles.

    Raises:
        PrepareError: the source could not be fetched, or not be built.
    """
    version = pinned("KVLOCAL_LLAMA_CPP_PYTHON_VERSION")
    archive = fetch_sdist(version, pinned("KVLOCAL_LLAMA_CPP_PYTHON_SHA256"), TARGET)
    source = TARGET / archive.name.removesuffix(".tar.gz") / "vendor" / "llama.cpp"
    if not source.exists():
        with tarfile.open(archive) as tar:
            tar.extractall(TARGET, filter="data")
    flags = NO_AMX if platform.machine() in ("x86_64", "AMD64") else ""
    options = [*OPTIONS, f"-DCMAKE_C_FLAGS={flags}", f"-DCMAKE_CXX_FLAGS={flags}", *os.environ.get("CMAKE_ARGS", "").split()]
    for command in (["cmake", "-S", str(source), "-B", str(TARGET), *options], ["cmake", "--build", str(TARGET), "--target", "llama-server"]):
        if subprocess.run(command, stdin=subprocess.DEVNULL, stdout=sys.stderr).returncode != 0:
            raise PrepareError("llama.cpp's server could not be built (the output is above)")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    try:
        build()
    except PrepareError as error:
        print(f"kvlocal: {error}.", file=sys.stderr)
        return 1
    print(f"kvlocal: {TARGET}/bin/llama-server is built", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
