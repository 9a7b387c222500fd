"""kvlocal.llama.library: which library is loaded, and what is said when it is the wrong one."""

import ctypes
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kvlocal.llama import library

LOAD = "from kvlocal.llama.library import LibraryError, load\n"
LOAD_AND_PRINT_ERROR = LOAD + "try:\n    load()\nexcept LibraryError as error:\n    print(error)\n"


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a fresh interpreter: what is loaded into a process stays in it."""
    result = subprocess.run([sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result


@pytest.fixture
def stub_library(tmp_path: Path):
    """Compiles C code to a libllama.so in a directory of its own and returns the directory."""

    def compile(code: str) -> Path:
        source = tmp_path / "stub.c"
        source.write_text(code)
        directory = tmp_path / "lib"
        directory.mkdir()
        subprocess.run(["cc", "-shared", "-fPIC", "-o", str(directory / library._LIBRARY_NAMES[0]), str(source)], check=True)
        return directory

    return compile


@pytest.fixture
def fake_llama_cpp(tmp_path: Path):
    """Writes a package `llama_cpp` of another version or bound to another library; returns the directory to put on the path."""

    def write(version: str, library_path: Path) -> Path:
        package = tmp_path / "other" / "llama_cpp"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(f"from . import llama_cpp\n__version__ = {version!r}\n")
        (package / "llama_cpp.py").write_text(f"class _lib:\n    _name = {str(library_path)!r}\n")
        return package.parent

    return write


def test_both_bindings_use_the_one_library():
    loaded = library.load()
    by_ctypes = ctypes.cast(loaded.llama_cpp.llama_cpp._lib.kvl_api_version, ctypes.c_void_p).value
    by_cffi = int(loaded.ffi.cast("uintptr_t", loaded.ffi.addressof(loaded.lib, "kvl_api_version")))
    assert by_ctypes == by_cffi
    assert loaded.lib.kvl_api_version() == loaded.lib.KVL_API_VERSION
    assert loaded.bindings_version == loaded.llama_cpp.__version__
    assert loaded.bindings_version in loaded.patch_level


def test_the_chat_library_is_the_one_beside_it(tmp_path: Path):
    loaded = library.load_chat()
    assert loaded is library.load_chat() and loaded.lib.kvl_chat_api_version() == loaded.lib.KVL_CHAT_API_VERSION
    for file in library.load().lib_dir.iterdir():
        if "kvlocal-chat" not in file.name:
            shutil.copy(file, tmp_path)
    code = "from kvlocal.llama.library import LibraryError, load_chat\ntry:\n    load_chat()\nexcept LibraryError as error:\n    print(error)\n"
    message = python(code, KVLOCAL_LIB_DIR=str(tmp_path)).stdout
    assert "kvlocal-chat" in message and "is missing: run `make setup`" in message and message.count("\n") == 1


def test_load_is_the_same_object_from_every_thread():
    code = LOAD + (
        "from concurrent.futures import ThreadPoolExecutor\n"
        "with ThreadPoolExecutor(8) as pool:\n"
        "    print(len({id(library) for library in pool.map(lambda _: load(), range(32))}))\n"
    )
    assert python(code).stdout == "1\n"


def test_loading_leaves_the_process_as_it_was():
    code = (
        "import os, sys\n"
        "environment, path = dict(os.environ), list(sys.path)\n" + LOAD + "load()\n"
        "import llama_cpp\n"
        "assert load().llama_cpp is llama_cpp\n"
        "print(dict(os.environ) == environment, sys.path == path)\n"
    )
    assert python(code).stdout == "True True\n"
    assert python(code, LLAMA_CPP_LIB_PATH="/nowhere").stdout == "True True\n"


def test_messages_of_llama_cpp_are_dropped_unless_asked_for():
    code = LOAD + "l = load().llama_cpp\nl.llama_model_load_from_file(b'no-such-file.gguf', l.llama_model_default_params())\n"
    assert python(code).stderr == ""
    assert "no-such-file.gguf" in python(code, KVLOCAL_LOG="1").stderr


@pytest.mark.skipif(sys.platform != "linux", reason="LD_LIBRARY_PATH is Linux's")
def test_another_ggml_on_the_library_path_is_not_taken(stub_library, tmp_path):
    directory = stub_library("int nothing;")
    for name in ("libggml.so", "libggml-base.so", "libggml-cpu.so"):
        (directory / name).write_bytes((directory / "libllama.so").read_bytes())
    code = LOAD + "load()\nprint([line.split()[-1] for line in open('/proc/self/maps') if 'libggml' in line])"
    mapped = python(code, LD_LIBRARY_PATH=str(directory)).stdout
    assert "libggml-cpu" in mapped
    assert str(directory) not in mapped


def test_no_library(tmp_path):
    message = python(LOAD_AND_PRINT_ERROR, KVLOCAL_LIB_DIR=str(tmp_path)).stdout
    assert str(tmp_path) in message and "libllama" in message


def test_a_file_that_is_no_library(tmp_path):
    (tmp_path / library._LIBRARY_NAMES[0]).write_text("not a library")
    message = python(LOAD_AND_PRINT_ERROR, KVLOCAL_LIB_DIR=str(tmp_path)).stdout
    assert "cannot load" in message and "make setup" in message


def test_a_library_without_the_patches(stub_library):
    directory = stub_library("int llama_max_devices(void) { return 1; }")
    message = python(LOAD_AND_PRINT_ERROR, KVLOCAL_LIB_DIR=str(directory)).stdout
    assert "without kvlocal's patches" in message and str(directory) in message


def test_a_library_of_another_version(stub_library):
    directory = stub_library("int kvl_api_version(void) { return 4711; }")
    message = python(LOAD_AND_PRINT_ERROR, KVLOCAL_LIB_DIR=str(directory)).stdout
    assert "version 4711" in message and "make setup" in message


def test_llama_cpp_with_another_library_first(fake_llama_cpp, tmp_path):
    bindings_version = library.load().bindings_version
    other = fake_llama_cpp(bindings_version, tmp_path / "libllama.so")
    message = python("import llama_cpp\n" + LOAD_AND_PRINT_ERROR, PYTHONPATH=str(other)).stdout
    assert str(tmp_path / "libllama.so") in message and "import kvlocal first" in message


def test_llama_cpp_of_another_version_first(fake_llama_cpp):
    loaded = library.load()
    other = fake_llama_cpp("0.2.1", Path(loaded.llama_cpp.llama_cpp._lib._name))
    message = python("import llama_cpp\n" + LOAD_AND_PRINT_ERROR, PYTHONPATH=str(other)).stdout
    assert "0.2.1" in message and loaded.bindings_version in message


def test_another_llama_cpp_that_is_not_imported_does_not_matter(fake_llama_cpp, tmp_path):
    other = fake_llama_cpp("0.2.1", tmp_path / "libllama.so")
    code = LOAD + "print(load().llama_cpp.__version__)"
    assert python(code, PYTHONPATH=str(other)).stdout.strip() == library.load().bindings_version


def test_the_error_is_raised_again_after_a_failure(tmp_path):
    code = LOAD + (
        "import os\n"
        "for attempt in range(2):\n"
        "    try:\n"
        "        load()\n"
        "    except LibraryError:\n"
        "        print('no')\n"
        "del os.environ['KVLOCAL_LIB_DIR']\n"
        "load()\n"
        "print('yes')\n"
    )
    assert python(code, KVLOCAL_LIB_DIR=str(tmp_path)).stdout == "no\nno\nyes\n"


def test_where_ggml_gives_up_there_is_one_sentence() -> None:
    """A device that is lost ends the process: no way back from there, but no backtrace either."""
    code = LOAD + "import ctypes\nctypes.CDLL(str(load().lib_dir / 'libggml-base.so')).ggml_abort(b'a.c', 7, b'no device any more')\n"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == -signal.SIGABRT
    assert result.stderr.startswith("kvlocal: llama.cpp had to stop (no device any more); what was said is kept") and result.stderr.count("\n") == 1
