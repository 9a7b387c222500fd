"""Finds and loads the patched libllama, and binds the llama_cpp bindings and cffi to that one library."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.metadata
import importlib.util
import os
import re
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import cffi

import kvlocal
from kvlocal.errors import KvlocalError

_LIBRARY_NAMES = {"darwin": ("libllama.dylib",), "win32": ("llama.dll", "libllama.dll")}.get(sys.platform, ("libllama.so",))
_CHAT_LIBRARY_NAME = {"darwin": "libkvlocal-chat.dylib", "win32": "kvlocal-chat.dll"}.get(sys.platform, "libkvlocal-chat.so")
_CFFI_PART = re.compile(r"/\* cffi: begin \*/(.*?)/\* cffi: end \*/", re.DOTALL)
_VERSION = re.compile(r"^__version__ = \"(.+?)\"", re.MULTILINE)
_CPU = 0  # GGML_BACKEND_DEVICE_TYPE_CPU
_REPAIR = "run `make setup` in the source tree or reinstall kvlocal"

_lock = threading.Lock()
_library: Library | None = None
_log_callback: Any = None  # the library keeps its address, so it must stay alive


class LibraryError(KvlocalError):
    """The patched llama.cpp library is missing, is another one than this kvlocal was made for, or was loaded too late."""


@dataclass(frozen=True)
class Library:
    """The loaded library, the same one behind both bindings.

    llama_cpp: the llama-cpp-python module; llama.cpp's own functions
    ffi, lib: cffi in ABI mode; the functions of kvlocal.h as `lib.kvl_...`
    lib_dir: the directory that libllama and its ggml libraries were loaded from
    bindings_version: the version of llama_cpp, hence of the llama.cpp source
    patch_level: what `kvl_patch_level()` says
    """

    llama_cpp: ModuleType
    ffi: cffi.FFI
    lib: Any
    lib_dir: Path
    bindings_version: str
    patch_level: str


@dataclass(frozen=True)
class ChatLibrary:
    """libkvlocal-chat, beside libllama: chat templates and the parsers of answers, as the functions of kvlocal-chat.h.

    ffi, lib: cffi in ABI mode; the functions are `lib.kvl_chat_...`
    """

    ffi: cffi.FFI
    lib: Any


def load() -> Library:
    """Loads the library on the first call and returns the same object on every later one, from any thread.

    KVLOCAL_LIB_DIR names another directory to load libllama from. llama.cpp's messages are dropped unless KVLOCAL_LOG=1, which sends them to
    standard error.

    Raises LibraryError, with what to do, if files are missing, if `llama_cpp` was imported before with another library or in another version,
    or if the library is not this kvlocal's.
    """
    global _library  # noqa: PLW0603 - one for a process, behind the lock
    with _lock:
        if _library is None:
            _library = _load()
        return _library


def load_stock(lib_dir: str | os.PathLike[str]) -> Library:
    """Loads an unpatched llama.cpp (`make stock`) instead, for the rest of the process and to compare with.

    What only needs `llama_cpp` works with it, as kvlocal.llama.context and kvlocal.template.chat_template do; `ffi` and `lib` are None.
    llama.cpp's messages go to standard error.

    Raises LibraryError if there is none in the directory, if it has the patches, or if another library is loaded already.
    """
    global _library  # noqa: PLW0603 - one for a process, behind the lock
    with _lock:
        libllama = _libllama_in(Path(lib_dir))
        if libllama is None:
            raise LibraryError(f"{lib_dir} holds no {_LIBRARY_NAMES[0]}: run `make stock` in the source tree, or name another directory")
        package = _find("bindings/llama_cpp/__init__.py", libllama)
        version = _search(_VERSION, package)
        llama_cpp = _bind_llama_cpp(libllama, package, version)
        if hasattr(llama_cpp.llama_cpp._lib, "kvl_api_version"):
            raise LibraryError(f"{libllama} has kvlocal's patches: name the directory that `make stock` fills")
        _load_backends(libllama)
        _library = Library(llama_cpp, None, None, libllama.parent, version, "")
        return _library


@functools.cache
def load_chat() -> ChatLibrary:
    """As `load`, libkvlocal-chat from the same directory.

    Raises LibraryError if it is missing or is not this kvlocal's.
    """
    path = load().lib_dir / _CHAT_LIBRARY_NAME
    if not path.is_file():
        raise LibraryError(f"{path} is missing: {_REPAIR}")
    ffi = _declare(_find("include/kvlocal-chat.h", path))
    lib = _open(ffi, path)
    if lib.kvl_chat_api_version() != lib.KVL_CHAT_API_VERSION:
        raise LibraryError(f"{path} is not the one that this kvlocal was made with: {_REPAIR}")
    return ChatLibrary(ffi, lib)


def _load() -> Library:
    libllama = _find_libllama()
    header = _find("include/kvlocal.h", libllama)
    package = _find("bindings/llama_cpp/__init__.py", libllama)
    version = _search(_VERSION, package)

    # Before the bindings: they are imported for good, and what they would say about a wrong library is less clear.
    ffi, lib = _bind_cffi(libllama, header)
    llama_cpp = _bind_llama_cpp(libllama, package, version)
    _route_log(llama_cpp, ffi, lib)
    _load_backends(libllama)
    return Library(llama_cpp, ffi, lib, libllama.parent, version, ffi.string(lib.kvl_patch_level()).decode())


def _search(pattern: re.Pattern[str], path: Path) -> str:
    """The group of a pattern in a file of the installation.

    Raises:
        LibraryError: it is not there.
    """
    found = pattern.search(path.read_text(encoding="utf-8"))
    if found is None:
        raise LibraryError(f"{path} is not what kvlocal has installed there: {_REPAIR}")
    return found[1]


def _roots() -> list[Path]:
    """Directories that may hold lib/, include/ and bindings/: the package, which in an editable install is two directories."""
    roots = [Path(path) for path in kvlocal.__path__]
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        roots.append(Path(str(importlib.metadata.distribution("kvlocal").locate_file("kvlocal"))))
    return roots


def _find_libllama() -> Path:
    chosen = os.environ.get("KVLOCAL_LIB_DIR")
    directories = [Path(chosen)] if chosen else [root / "lib" for root in _roots()]
    for directory in directories:
        if libllama := _libllama_in(directory):
            return libllama
    if chosen:
        raise LibraryError(f"KVLOCAL_LIB_DIR={chosen} holds no {_LIBRARY_NAMES[0]}: unset it or name the directory that does")
    raise LibraryError(f"the patched llama.cpp library {_LIBRARY_NAMES[0]} is not installed: {_REPAIR}")


def _libllama_in(directory: Path) -> Path | None:
    return next(((directory / name).resolve() for name in _LIBRARY_NAMES if (directory / name).is_file()), None)


def _find(name: str, libllama: Path) -> Path:
    """A file that is installed along with the library: beside it if it is there, else in the package."""
    for root in [libllama.parent.parent, *_roots()]:
        if (root / name).is_file():
            return root / name
    raise LibraryError(f"kvlocal is incomplete, {name} is missing: {_REPAIR}")


def _declare(header: Path) -> cffi.FFI:
    ffi = cffi.FFI()
    ffi.cdef("struct llama_context; struct llama_vocab; struct kvl_queries;" + _search(_CFFI_PART, header))
    return ffi


def _open(ffi: cffi.FFI, path: Path) -> Any:
    try:
        return ffi.dlopen(str(path))
    except OSError as error:
        raise LibraryError(f"the system cannot load {path} ({error}): {_REPAIR}") from None


def _bind_cffi(libllama: Path, header: Path) -> tuple[cffi.FFI, Any]:
    ffi = _declare(header)
    lib = _open(ffi, libllama)
    try:
        version = lib.kvl_api_version()
    except AttributeError:
        raise LibraryError(f"{libllama} is a llama.cpp without kvlocal's patches: {_REPAIR}") from None
    if version != lib.KVL_API_VERSION:
        raise LibraryError(f"{libllama} has version {version} of kvlocal's C interface and this kvlocal needs {lib.KVL_API_VERSION}: {_REPAIR}")
    return ffi, lib


def _load_backends(libllama: Path) -> None:
    """Loads the ggml backends of a portable build, which are files beside libllama: of those for processors the one that suits this one best.

    In other builds libllama is linked to them, and they are there. llama.cpp itself would look for them beside the program, which is Python.

    Raises:
        LibraryError: there is none for this processor.
    """
    ffi = cffi.FFI()
    # libllama links ggml, so these are found through its handle
    ffi.cdef("void ggml_backend_load_all_from_path(const char * path); void * ggml_backend_dev_by_type(int type);")
    ggml = _open(ffi, libllama)
    if not ggml.ggml_backend_dev_by_type(_CPU):
        ggml.ggml_backend_load_all_from_path(os.fsencode(libllama.parent))
        if not ggml.ggml_backend_dev_by_type(_CPU):
            raise LibraryError(f"none of the libggml-cpu files in {libllama.parent} can be loaded on this processor: {_REPAIR}")


def _bind_llama_cpp(libllama: Path, package: Path, version: str) -> ModuleType:
    """Imports our copy of the bindings as the top-level module `llama_cpp`, bound to our library, or checks the one that is imported already."""
    present = sys.modules.get("llama_cpp")
    if present is not None:
        _check_imported(present, libllama, version)
        return present

    spec = importlib.util.spec_from_file_location("llama_cpp", package, submodule_search_locations=[str(package.parent)])
    if spec is None or spec.loader is None:
        raise LibraryError(f"{package} is not a Python module: {_REPAIR}")
    module = importlib.util.module_from_spec(spec)
    before = os.environ.get("LLAMA_CPP_LIB_PATH")
    os.environ["LLAMA_CPP_LIB_PATH"] = str(libllama.parent)
    sys.modules["llama_cpp"] = module
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        for name in [name for name in sys.modules if name.partition(".")[0] == "llama_cpp"]:
            del sys.modules[name]
        if isinstance(error, Exception):
            raise LibraryError(f"the llama_cpp bindings in {package.parent} cannot be imported ({error}): {_REPAIR}") from error
        raise
    finally:
        if before is None:
            del os.environ["LLAMA_CPP_LIB_PATH"]
        else:
            os.environ["LLAMA_CPP_LIB_PATH"] = before
    return module


def _check_imported(module: ModuleType, libllama: Path, version: str) -> None:
    advice = "import kvlocal first and let it bring llama_cpp"
    library = getattr(getattr(sys.modules.get("llama_cpp.llama_cpp"), "_lib", None), "_name", None)
    if library is None or Path(library).resolve() != libllama:
        bound = library or "no library that kvlocal knows of"
        raise LibraryError(f"llama_cpp was imported before kvlocal and is bound to {bound}, not to {libllama}: {advice}")
    found = getattr(module, "__version__", "unknown")
    if found != version:
        raise LibraryError(f"llama_cpp was imported before kvlocal in version {found}, but kvlocal is built for {version}: {advice}")


def _route_log(llama_cpp: ModuleType, ffi: cffi.FFI, lib: Any) -> None:
    global _log_callback  # noqa: PLW0603 - as long as the library
    if os.environ.get("KVLOCAL_LOG") == "1":

        @llama_cpp.llama_log_callback
        def callback(level: int, text: bytes, user_data: ctypes.c_void_p) -> None:
            sys.stderr.write(text.decode("utf-8", errors="replace"))
            sys.stderr.flush()

    else:
        lib.kvl_abort_in_a_sentence()
        # not a Python function: Ctrl-C that arrives inside one is lost
        callback = llama_cpp.llama_log_callback(int(ffi.cast("uintptr_t", ffi.addressof(lib, "kvl_log_discard"))))
    llama_cpp.llama_log_set(callback, None)
    _log_callback = callback
