"""A CUDA device that is lost in the middle of an answer: what was said is kept, and the next start goes on from it.

    python tests/measure/lost_gpu.py --model smollm2-135m

A chat runs in a process of its own, in whose CUDA context a kernel writes to an address that does not exist. CUDA refuses everything afterwards,
which is what a device that fell off its bus looks like to a program.
"""

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from kvlocal.conversations.saved_chat import load
from kvlocal_cli.main import main as kvlocal

QUESTIONS = ("The keeper wrote down the birds. Remember the word heron.", "Tell a long story about the keeper and his lamp.", "And what came next?")
SILENT_AFTER = 1.5  # seconds into the second answer

PTX = b"""
.version 7.0
.target sm_50
.address_size 64
.visible .entry fault() {
    .reg .u64 %address;
    .reg .u32 %value;
    mov.u64 %address, 64;
    mov.u32 %value, 1;
    st.global.u32 [%address], %value;
    ret;
}
\0"""


def lose_the_device() -> None:
    """Breaks the CUDA context of this process."""
    cuda = ctypes.CDLL("libcuda.so.1")
    context, module, function = (ctypes.c_void_p() for _ in range(3))
    cuda.cuInit(0)
    cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0)
    cuda.cuCtxSetCurrent(context)
    if code := cuda.cuModuleLoadData(ctypes.byref(module), PTX):
        raise SystemExit(f"the kernel cannot be loaded: CUDA error {code}")
    cuda.cuModuleGetFunction(ctypes.byref(function), module, b"fault")
    cuda.cuLaunchKernel(function, *[1] * 6, 0, None, None, None)
    print(f"the device is gone: CUDA error {cuda.cuCtxSynchronize()}", file=sys.stderr, flush=True)


def chat(arguments: list[str]) -> None:
    """The chat, which loses its device once the second answer is under way."""
    session = Path(arguments[arguments.index("--session") + 1])

    def wait_and_lose() -> None:
        while not session.exists() or session.read_text(encoding="utf-8").count('"user"') < 2:
            time.sleep(0.01)
        time.sleep(SILENT_AFTER)
        lose_the_device()

    threading.Thread(target=wait_and_lose, daemon=True).start()
    kvlocal(arguments)


def main() -> int:
    if sys.argv[1:2] == ["--chat"]:
        chat(sys.argv[2:])
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        session = Path(directory) / "lost.jsonl"
        options = ["chat", args.model, "--session", str(session), "--temp", "0", "--kv-budget", "256"]
        environment = os.environ | {"XDG_STATE_HOME": directory}
        lost = subprocess.run([sys.executable, __file__, "--chat", *options, "--max-tokens", "20000"], input="\n".join(QUESTIONS), text=True,
                              capture_output=True, env=environment)  # fmt: skip
        kept = load(session).messages
        again = subprocess.run([sys.executable, "-m", "kvlocal_cli", *options, "--max-tokens", "40"], input="Which word?\n", text=True,
                               capture_output=True, env=environment)  # fmt: skip
        after = load(session).messages
    result = {
        "lost_code": lost.returncode,
        "lost_said": lost.stderr.splitlines()[-12:],
        "first_turn_kept": kept[0]["content"] == QUESTIONS[0] and lost.stdout.startswith(kept[1]["content"]),
        "second_question_kept": kept[2]["content"] == QUESTIONS[1],
        "characters_of_its_answer_shown": len(lost.stdout) - len(kept[1]["content"]),
        "characters_of_its_answer_kept": len(kept[3]["content"]) if len(kept) > 3 else 0,
        "again_code": again.returncode,
        "again_said": again.stderr.splitlines()[-4:],
        "goes_on": after[: len(kept)] == kept and after[-2]["content"] == "Which word?",
    }
    print(json.dumps(result, indent=1))
    return int(not (lost.returncode != 0 and result["first_turn_kept"] and result["second_question_kept"] and result["goes_on"]))


if __name__ == "__main__":
    sys.exit(main())
