"""The wheel that is installed without a compiler: its settings, what has to be in it, and how its library finds its parts."""

import ctypes
import re
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from test_library import stub_library  # noqa: F401 - a fixture

from kvlocal.llama import library

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "native"))

import wheel  # noqa: E402 - it is no package

BACKENDS = """
    #include <string.h>
    static int cpu;
    char from[4096];
    void * ggml_backend_dev_by_type(int type) { return cpu ? &cpu : 0; }
"""


def test_cibuildwheel_builds_the_portable_library_for_the_systems_that_are_promised():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["cibuildwheel"]
    assert settings["config-settings"]["cmake.define.KVLOCAL_PORTABLE"] == "ON"
    assert {"x86_64", "aarch64"} == set(settings["linux"]["archs"]) and settings["macos"]["archs"] == ["arm64"]
    assert (ROOT / settings["test-command"].split()[1].removeprefix("{project}/")).is_file()
    # neither is left to a default that somebody's environment changes
    built = (ROOT / "CMakeLists.txt").read_text().split("if (KVLOCAL_PORTABLE)")[1].split("endif()")[0]
    assert dict(re.findall(r"set\((\w+) +(ON|OFF)", built)) == {"GGML_NATIVE": "OFF", "GGML_BACKEND_DL": "ON", "GGML_CPU_ALL_VARIANTS": "ON"}


def test_what_a_wheel_has_to_contain(tmp_path: Path):
    sources = ["kvlocal/server/page/chat.js", "cli/main.py", "models/catalogue.toml", "tests/test_wheel.py"]
    names = [pattern.replace("*", "x") for pattern in wheel.BUILT]
    names += ["kvlocal/server/page/chat.js", "kvlocal_cli/main.py", "kvlocal/models/catalogue.toml"]

    def lacking(names: list[str]) -> list[str]:
        with zipfile.ZipFile(tmp_path / "a.whl", "w") as archive:
            for name in names:
                archive.writestr(name, "")
        return wheel.missing(tmp_path / "a.whl", sources)

    assert lacking(names) == []
    native = [name.replace("libggml-cpu-x", "libggml-cpu") for name in names]
    assert lacking(native) == ["kvlocal/lib/libggml-cpu-*.so"]
    assert lacking([name for name in names if not name.endswith(".js")]) == ["kvlocal/server/page/chat.js"]


def test_backends_are_loaded_from_beside_the_library(stub_library):  # noqa: F811 - the fixture
    """As in a portable build, where ggml has none before it is told where they are."""
    directory = stub_library(BACKENDS + "void ggml_backend_load_all_from_path(const char * path) { strcpy(from, path); cpu = 1; }")
    library._load_backends(directory / library._LIBRARY_NAMES[0])
    told = (ctypes.c_char * 4096).in_dll(ctypes.CDLL(str(directory / library._LIBRARY_NAMES[0])), "from")
    assert told.value == bytes(directory)


def test_nothing_is_loaded_where_the_library_is_linked_to_its_backends(stub_library):  # noqa: F811
    directory = stub_library("#include <stdlib.h>\nvoid * ggml_backend_dev_by_type(int type) { return &exit; }"
                             "void ggml_backend_load_all_from_path(const char * path) { exit(1); }")
    library._load_backends(directory / library._LIBRARY_NAMES[0])


def test_no_backend_for_this_processor(stub_library):  # noqa: F811
    directory = stub_library(BACKENDS + "void ggml_backend_load_all_from_path(const char * path) {}")
    with pytest.raises(library.LibraryError, match=f"none of the libggml-cpu files in {directory} can be loaded on this processor"):
        library._load_backends(directory / library._LIBRARY_NAMES[0])
