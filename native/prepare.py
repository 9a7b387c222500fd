"""Puts the llama.cpp source tree that is compiled, and the llama_cpp bindings, into a build directory.

CMake runs this at configure time. The source is the llama-cpp-python sdist, pinned by version and hash and fetched through pip, or a local
llama.cpp tree. The patches are applied to the copy; the origin is never modified. Files that come out the same keep their time stamps, so that a
changed patch recompiles only what it touches. Afterwards WORK/llama.cpp and WORK/llama_cpp are ready.
"""

from __future__ import annotations

import argparse
import filecmp
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

# What configuring and compiling libllama and libkvlocal-chat reads of llama.cpp, and the chat templates that our tests try; the rest (tools,
# tests, models, converters) stays in the archive.
LLAMA_CPP_PARTS = (
    "CMakeLists.txt", "LICENSE", "AUTHORS", "cmake", "common", "ggml", "include", "src", "vendor", "models/templates", "tests/test-chat-template.cpp"
)  # fmt: skip


class PrepareError(Exception):
    """One sentence that says why the source tree could not be made."""


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch_sdist(version: str, digest: str, into: Path) -> Path:
    """Downloads the sdist through pip into the directory, unless it is there; returns its path."""
    archive = into / f"llama_cpp_python-{version}.tar.gz"
    if archive.exists() and sha256(archive) == digest:
        return archive
    into.mkdir(parents=True, exist_ok=True)
    requirement = into / "requirements.txt"
    requirement.write_text(f"llama-cpp-python=={version} --hash=sha256:{digest}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "llama-cpp-python", "--require-hashes",
               "--progress-bar", "off", "--disable-pip-version-check", "--dest", str(into), "-r", str(requirement)]
    # pip asks the sdist's build backend for metadata. It is the backend of this build too: where it can be imported, no second one is installed.
    if subprocess.run([sys.executable, "-c", "import scikit_build_core"], capture_output=True).returncode == 0:
        command.append("--no-build-isolation")
    environment = os.environ | {"CMAKE_ARGS": ""}
    result = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode != 0 or not archive.exists():
        sys.stderr.write(result.stdout)
        raise PrepareError(f"pip could not fetch the source of llama-cpp-python {version} (its output is above); check the network and pip's"
                           " settings, or unpack that sdist yourself and configure with -DKVLOCAL_LLAMA_CPP_DIR=SDIST/vendor/llama.cpp")
    if sha256(archive) != digest:
        raise PrepareError(f"{archive.name} does not have the expected sha256 {digest}; delete it and build again")
    return archive


def unpack_sdist(archive: Path, into: Path, *, llama_cpp: bool) -> None:
    """Extracts the bindings and, where asked for, llama.cpp: into/llama_cpp and into/llama.cpp."""
    root = archive.name.removesuffix(".tar.gz")
    moves = {f"{root}/llama_cpp/": "llama_cpp/", f"{root}/LICENSE.md": "llama_cpp/LICENSE.md"}
    if llama_cpp:
        for part in LLAMA_CPP_PARTS:
            suffix = "" if "." in part or part.isupper() else "/"
            moves[f"{root}/vendor/llama.cpp/{part}{suffix}"] = f"llama.cpp/{part}{suffix}"
    with tarfile.open(archive) as tar:
        for member in tar:
            for prefix, target in moves.items():
                if member.name.startswith(prefix) and member.isfile():
                    path = into / (target + member.name.removeprefix(prefix))
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with tar.extractfile(member) as source, path.open("wb") as file:
                        shutil.copyfileobj(source, file)
                    break


def copy_tree(llama_cpp_dir: Path, version: str, into: Path) -> bool:
    """Copies a local llama.cpp, and the bindings if it sits inside an unpacked sdist of this version; tells whether the bindings came along."""
    if not (llama_cpp_dir / "src" / "llama-context.cpp").exists():
        raise PrepareError(f"KVLOCAL_LLAMA_CPP_DIR={llama_cpp_dir} is not a llama.cpp source tree")
    for part in LLAMA_CPP_PARTS:
        source = llama_cpp_dir / part
        if source.is_dir():
            shutil.copytree(source, into / "llama.cpp" / part)
        elif source.exists():
            (into / "llama.cpp" / part).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, into / "llama.cpp" / part)
    sdist = llama_cpp_dir.parent.parent
    init = sdist / "llama_cpp" / "__init__.py"
    if not init.exists() or f'__version__ = "{version}"' not in init.read_text():
        return False
    shutil.copytree(sdist / "llama_cpp", into / "llama_cpp", ignore=shutil.ignore_patterns("__pycache__", "lib"))
    shutil.copy2(sdist / "LICENSE.md", into / "llama_cpp" / "LICENSE.md")
    return True


def apply_patch(patch: Path, tree: Path, expected: str) -> None:
    """Applies one patch with git and makes sure that every file it names has changed."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    # Inside a repository git apply skips, without a word, all paths that are not below the current directory there: hide any repository around us.
    environment["GIT_CEILING_DIRECTORIES"] = str(tree.parent)
    git = ["git", "-c", "core.autocrlf=false", "apply", "--whitespace=nowarn"]
    failure = PrepareError(f"the patch {patch.name} does not apply to this llama.cpp source: it is made for the one in {expected}")

    listing = subprocess.run([*git, "--numstat", "-z", str(patch)], cwd=tree, env=environment, capture_output=True, text=True)
    names = [line.split("\t")[2] for line in listing.stdout.split("\0") if line]
    if listing.returncode != 0 or not names:
        raise failure
    before = {name: (tree / name).read_bytes() if (tree / name).exists() else None for name in names}
    applied = subprocess.run([*git, str(patch)], cwd=tree, env=environment, capture_output=True, text=True)
    if applied.returncode != 0:
        sys.stderr.write(applied.stderr)
        raise failure
    for name in names:
        if ((tree / name).read_bytes() if (tree / name).exists() else None) == before[name]:
            raise failure


def synchronise(source: Path, target: Path) -> None:
    """Makes target the same tree as source, writing only files whose bytes differ (with the present time, so that they are compiled again)."""
    wanted = {path.relative_to(source) for path in source.rglob("*") if path.is_file()}
    for path in sorted(target.rglob("*"), reverse=True):
        if path.is_file() and path.relative_to(target) not in wanted:
            path.unlink()
        elif path.is_dir() and not any(path.iterdir()):
            path.rmdir()
    for name in wanted:
        old, new = target / name, source / name
        if old.exists() and filecmp.cmp(old, new, shallow=False):
            continue
        old.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(new, old)


def origin_digest(llama_cpp_dir: Path) -> str:
    """A digest of a local tree's names, sizes and times: it changes when the tree does."""
    digest = hashlib.sha256(str(llama_cpp_dir).encode())
    for part in LLAMA_CPP_PARTS:
        root = llama_cpp_dir / part
        for path in sorted(root.rglob("*")) if root.is_dir() else [root]:
            if path.is_file():
                status = path.stat()
                digest.update(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def prepare(version: str, digest: str, work: Path, patches: list[Path], llama_cpp_dir: Path | None) -> None:
    expected = f"llama-cpp-python {version}"
    stamp = work / "stamp.json"
    state = {
        "version": version,
        "origin": origin_digest(llama_cpp_dir) if llama_cpp_dir else digest,
        "patches": {patch.name: sha256(patch) for patch in patches},
        "script": sha256(Path(__file__)),
    }
    if stamp.exists() and json.loads(stamp.read_text()) == state:
        return
    if patches and shutil.which("git") is None:
        raise PrepareError("git is needed to apply the patches to llama.cpp, but it is not on PATH; install it and build again")
    work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="unpacked-", dir=work) as temporary:
        fresh = Path(temporary).resolve()
        bindings = copy_tree(llama_cpp_dir, version, fresh) if llama_cpp_dir else False
        if not bindings:
            unpack_sdist(fetch_sdist(version, digest, work), fresh, llama_cpp=llama_cpp_dir is None)
        for patch in patches:
            apply_patch(patch.resolve(), fresh / "llama.cpp", expected)
        stamp.unlink(missing_ok=True)
        for name in ("llama.cpp", "llama_cpp"):
            synchronise(fresh / name, work / name)
    unfinished = stamp.with_suffix(".tmp")
    unfinished.write_text(json.dumps(state, indent=1))
    unfinished.replace(stamp)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", required=True, help="version of the llama-cpp-python sdist")
    parser.add_argument("--sha256", required=True, help="its hash")
    parser.add_argument("--work", required=True, type=Path, help="directory to fill")
    parser.add_argument("--llama-cpp-dir", type=Path, help="local llama.cpp tree to copy instead of the sdist's")
    parser.add_argument("patches", nargs="*", type=Path, help="patches in the order in which they apply")
    arguments = parser.parse_args()
    try:
        local = arguments.llama_cpp_dir.resolve() if arguments.llama_cpp_dir else None
        prepare(arguments.version, arguments.sha256, arguments.work, arguments.patches, local)
    except PrepareError as error:
        print(f"kvlocal: {error}.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
