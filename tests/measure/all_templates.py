"""Tries every chat template of llama.cpp's source tree: four turns, with and without a system prompt, fed turn by turn against the full rendering.

Prints how many are equal, and each difference with its reason; the exit code is 1 if one of them is ours.
"""

from __future__ import annotations

import argparse
import collections
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from templates import SYSTEM, compare, source_tree, templates

REASONS = {
    "history": "the template itself writes earlier turns otherwise later on; what the model has read stays",
    "refused": "the template refuses the conversation",
    "wrong": "wrong",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("llama_cpp_dir", nargs="?", type=Path, help="the source tree of llama.cpp; by default the one under build/")
    tree = parser.parse_args().llama_cpp_dir or source_tree()
    if tree is None:
        print("all_templates: there is no source tree of llama.cpp under build/; run `make setup` or name one", file=sys.stderr)
        return 2
    found = templates(tree)
    counts: collections.Counter[str] = collections.Counter()
    started = time.monotonic()
    for name, source in found.items():
        for system in (None, SYSTEM):
            kind, why = compare(source, system)
            counts[kind] += 1
            if kind != "equal":
                print(f"{name}, {'with a' if system else 'without'} system prompt: {REASONS[kind]}: {why}", flush=True)
    seconds = time.monotonic() - started
    print(f"{len(found)} templates, {sum(counts.values())} conversations in {seconds:.0f} s: {counts['equal']} equal, {counts['history']} where the "
          f"template changes earlier turns, {counts['refused']} refused, {counts['wrong']} wrong")  # fmt: skip
    return 1 if counts["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
