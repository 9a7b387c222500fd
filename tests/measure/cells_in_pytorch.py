"""Compares the cells that a policy chooses in PyTorch, and the predictions over them, with those of the engine, on one conversation.

    python tests/measure/cells_in_pytorch.py --data dialogues.jsonl --layers 4

For each policy: the share of equal cells, where PyTorch goes its own way and where each compression begins with the engine's cells; and the largest
difference of logits and the mean divergence of predictions, with each, and before the first compression.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from engine_cells import EngineReading
from shallow_model import write_shallow_model

from kvlocal import policies
from kvlocal.cache.config import CacheConfig
from kvlocal.gguf.container import Container
from kvlocal.hub.catalogue import DEFAULT_MODEL, resolve
from kvlocal.llama.model import Model
from kvlocal.training.chats import TrainingChat, read_chats
from kvlocal.training.compressed_reading import RecordedCells, SpanRead, read_compressed
from kvlocal.training.compression_times import Timetable
from kvlocal.training.decoder import Decoder
from kvlocal.training.policy_choice import PolicyChoice
from kvlocal.training.weights import Weights


class FollowingChoice(PolicyChoice):
    """Takes the engine's cells, and counts how many the policy would have taken too. shares: one for each layer and compression"""

    def __init__(self, engine: EngineReading, *args: object) -> None:
        super().__init__(*args)
        self._engine = engine
        self.shares: list[float] = []

    def _taken(self, layer: int, span: int, before: SpanRead, keep: np.ndarray) -> np.ndarray:
        there, wanted = before.held.tokens.numpy(), self._engine.tokens[span - 1][layer]
        cells = np.stack([np.searchsorted(*one) for one in zip(there, wanted, strict=True)])[None]
        self.shares.append(share(cells[0], keep[0]))
        return cells


def share(a: np.ndarray, b: np.ndarray) -> float:
    """How many of the cells of each head, int [H, n], are in both, mean over heads."""
    return float(np.mean([len(np.intersect1d(*one)) / len(one[0]) for one in zip(a, b, strict=True)]))


def chat_of(path: Path, data: Path, n_tokens: int) -> TrainingChat:
    with Model(path) as model:
        found = read_chats(model, [data], held_out=0.0)
    return found.chat(found.training, n_tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--ratio", type=float, default=0.8)
    parser.add_argument("--policies", default="gkv,snapkv,streaming,rkv,h2o")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shallow.gguf"
        write_shallow_model(resolve(asked.model), path, asked.layers)
        chat = chat_of(path, asked.data, asked.tokens)
        for name in asked.policies.split(","):
            print(name, *measure(path, chat, name, asked.ratio), sep="  ", flush=True)


@torch.no_grad()
def measure(path: Path, chat: TrainingChat, name: str, ratio: float) -> list[str]:
    n = len(chat.tokens)
    config = CacheConfig(policy=name, ratio=ratio, budget=round((1 - ratio) * n), type_k="f32", type_v="f32", n_threads=1)
    n_pinned = max(chat.n_prefix, config.n_sink)
    engine = EngineReading.of(path, config, [(turn.tokens, turn.written) for turn in chat.turns], n_pinned)
    decoder = Decoder(Weights.load(Container(path), torch.float32, "cpu"))
    timetable = Timetable.of(config, chat.lengths, n_pinned, 2 * n)
    arguments = policies.make(name), timetable, n_pinned, config.window
    x = decoder.embed(torch.from_numpy(chat.tokens))
    own, following = PolicyChoice(*arguments), FollowingChoice(engine, *arguments)
    alone = decoder.logits(read_compressed(decoder, x, own))
    with_cells = decoder.logits(read_compressed(decoder, x, following))
    recorded: RecordedCells = own.recorded()
    shares = [
        share(a.reshape(-1, a.shape[-1]), b.flatten(0, 1).numpy()) for a, b in zip(engine.tokens, recorded.tokens[1:], strict=False)
    ]
    found = [f"{len(timetable.spans) - 1} compressions", f"equal {np.mean(shares):.5f}", f"each by itself {np.mean(following.shares):.5f}"]
    expected = torch.from_numpy(engine.logits)
    before = slice(0, engine.begins[0])
    for what, logits, rows in (("own cells", alone, slice(None)), ("the engine's", with_cells, slice(None)), ("before the first", alone, before)):
        kl = (expected[rows].softmax(-1) * (expected[rows].log_softmax(-1) - logits[rows].log_softmax(-1))).sum(-1).mean().item()
        found.append(f"{what}: logits {(logits[rows] - expected[rows]).abs().max().item():.3f}, kl {kl:.1e}")
    return found


if __name__ == "__main__":
    main()
