"""What the device suite and the benchmarks give on a GPU, in pieces of a few minutes each; a piece that has a result is not done again.

    make gpu-report                                 # builds with CUDA, then everything
    make gpu-report ARGS="--only suite,ring"        # some pieces
    make gpu-report ARGS="--shape llama3-8b"        # benchmarks with a model of that shape instead of the default one

Results go to build/gpu-report: a text for each piece, and report.json with the device's name, each piece's seconds and its outcome.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from shaped_model import SHAPES, write_shaped_model

from kvlocal.files.atomic import atomic_write
from kvlocal.hub.catalogue import DEFAULT_MODEL, resolve

HERE = Path(__file__).parent


def pieces(model: str, stock: str, target: Path, sizes: argparse.Namespace) -> dict[str, list[str]]:
    """The command of each piece."""
    python, tests = sys.executable, HERE.parent
    measure = ["--model", model]
    bench = [python, "-m", "kvlocal_cli", "bench", *measure, "--stock", stock, "--pairs", str(sizes.pairs)]
    with_policy = [*bench, "--policy", sizes.policy]
    return {
        "suite": [python, "-m", "pytest", "-q", "-m", "device", "--device", "gpu", "--numprocesses", "4", "--dist", "loadfile", str(tests)],
        "ring": [python, str(HERE / "ring_overhead.py"), *measure, "--stock", stock, "--gpu-layers", "-1"],
        "operations": [python, str(HERE / "cell_operations.py"), *measure, "--gpu-layers", "-1"],
        "decode": [*with_policy, "--only", "decode@8000,prefill@8000", "--json", str(target / "decode.json")],
        "chat": [*with_policy, "--only", "chat40,share", "--json", str(target / "chat.json")],
        "recall": [*bench, "--policy", "recall", "--only", "decode@8000,read@8000,chat40,share.recall", "--json", str(target / "recall.json")],
        "choices": [python, str(HERE / "recall_time.py"), *measure, "--tokens", "8000,100000", "--late", "0,4,8", "--gpu-layers", "-1"],
        "reading": [python, str(HERE / "read_time.py"), *measure, "--gpu-layers", "-1", "--again", "2"],
        "long": [python, str(HERE / "long_chat.py"), *measure, "--tokens", str(sizes.tokens), "--policy", sizes.policy, "--gpu-layers", "-1",
                 "--json", str(target / "long.json")],
        "lost": [python, str(HERE / "lost_gpu.py"), *measure],
    }  # fmt: skip


def devices() -> list[str]:
    """Name, memory and driver of each NVIDIA device; none where there is no nvidia-smi."""
    if not shutil.which("nvidia-smi"):
        return []
    command = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True).stdout.splitlines()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="NAME[,NAME]", default="", help="some of the pieces, which an unknown name lists")
    parser.add_argument("--again", action="store_true", help="also what has a result")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--shape", choices=SHAPES, help="measure a model of this shape with random weights, which is written first")
    parser.add_argument("--stock", default="build/stock/dist/lib")
    parser.add_argument("--policy", default="gkv")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=50_000, help="of the long chat")
    parser.add_argument("--minutes", type=float, default=9, help="that a piece may take")
    parser.add_argument("--target", type=Path, default=Path("build/gpu-report"))
    args = parser.parse_args()
    args.target.mkdir(parents=True, exist_ok=True)
    model = args.model
    if args.shape:
        path = args.target / f"{args.shape}.gguf"
        if not path.exists():
            write_shaped_model(resolve(DEFAULT_MODEL), path, SHAPES[args.shape])
        model = str(path)
    place = args.target / "report.json"
    report = json.loads(place.read_text()) if place.exists() else {}
    commands = pieces(model, args.stock, args.target, args)
    wanted = [name for name in args.only.split(",") if name] or list(commands)
    if unknown := set(wanted) - set(commands):
        parser.error(f"no piece is called {', '.join(sorted(unknown))}: name some of {', '.join(commands)}")
    failed = False
    for name in wanted:
        key = f"{name} {args.shape or args.model}"
        if report.get(key, {}).get("code") == 0 and not args.again:
            print(f"{key}: has a result", flush=True)
            continue
        print(f"{key}: {' '.join(commands[name][1:])}", flush=True)
        started = time.perf_counter()
        with (args.target / f"{key.replace(' ', '-').replace('/', '-')}.txt").open("w+") as said:
            try:
                code = subprocess.run(commands[name], stdout=said, stderr=subprocess.STDOUT, timeout=60 * args.minutes).returncode
            except subprocess.TimeoutExpired:
                code = 124
            said.seek(0)
            end = said.read().splitlines()[-30:]
        print("\n".join(end), flush=True)
        report[key] = {"devices": devices(), "code": code, "seconds": round(time.perf_counter() - started, 1), "end": end}
        atomic_write(place, json.dumps(report, indent=1) + "\n")
        failed |= code != 0
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
