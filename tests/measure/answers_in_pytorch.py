"""How far the probabilities of drawn answers in PyTorch, over the cells that they had, are from those that llama.cpp drew them with.

    python tests/measure/answers_in_pytorch.py --layers 4 --policies gkv,full

With --layers the first layers of the model in float32 with a float32 cache, else the model as it is with a float16 cache.
"""

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from shallow_model import write_shallow_model

from kvlocal.chat.config import SessionConfig
from kvlocal.gguf.container import Container
from kvlocal.hub.catalogue import resolve
from kvlocal.llama.model import Model
from kvlocal.training.decoder import Decoder
from kvlocal.training.grpo import Packed, difference, token_logprobs
from kvlocal.training.rollouts import Rollouts, exact_cache
from kvlocal.training.task_maker import make_tasks
from kvlocal.training.weights import Weights

TEMPERATURE = 0.8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--policies", default="gkv,full")
    parser.add_argument("--tasks", type=int, default=2)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        path, kind = resolve(asked.model), "f16"
        if asked.layers:
            write_shallow_model(path, Path(directory, "shallow.gguf"), asked.layers)
            path, kind = Path(directory, "shallow.gguf"), "f32"
        decoder = Decoder(Weights.load(Container(path), getattr(torch, asked.dtype), "cpu"))
        for policy in asked.policies.split(","):
            config = SessionConfig(
                policy=policy, ratio=None if policy == "full" else 0.8, stride=16, budget=1024, n_threads=1, type_k=kind, type_v=kind, archive="off"
            )
            with Model(path) as model, Rollouts(model, exact_cache(config), parallel=8, temperature=TEMPERATURE, max_tokens=40) as rollouts:
                groups = rollouts.groups(make_tasks(asked.tasks, 0, "training", (80, 180)), [[0, i] for i in range(asked.tasks)], 4)
            for group in groups:
                blind = replace(group, changes=[], answers=[replace(answer, changes=[]) for answer in group.answers])
                found = []
                for one in (group, blind):
                    packed = Packed.of(one, decoder.hyper)
                    with torch.no_grad():
                        found.append(difference(token_logprobs(decoder, packed, None, TEMPERATURE), packed))
                n_changes = max(len(answer.changes) for answer in group.answers)
                print(f"{policy}: {found[0].n} tokens, at most {n_changes} compressions, largest {found[0].largest:.4f}, mean {found[0].mean:.5f}; "
                      f"as if nothing had been compressed: largest {found[1].largest:.4f}, mean {found[1].mean:.5f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
