"""What PyTorch computes over the cells of a compressed cache, against the engine that has them."""

from pathlib import Path

import numpy as np
import pytest
from engine_cells import EngineReading
from shallow_model import write_shallow_model

from kvlocal import policies
from kvlocal.cache.config import CacheConfig
from kvlocal.errors import KvlocalError
from kvlocal.gguf.container import Container
from kvlocal.llama.model import Model

torch = pytest.importorskip("torch")

from kvlocal.training.compressed_reading import RecordedCells, Span, read_compressed  # noqa: E402
from kvlocal.training.compression_times import Timetable  # noqa: E402
from kvlocal.training.decoder import Decoder  # noqa: E402
from kvlocal.training.policy_choice import PolicyChoice  # noqa: E402
from kvlocal.training.weights import Weights  # noqa: E402

N_PINNED = 9
TURNS = (
    ("The lighthouse keeper wrote in his journal every evening, and on the last page he had drawn a map of the coast. What was on the map?\n", False),
    ("The rocks, the currents and the names of the ships that had come to grief on them. Nobody had asked him to draw it.\n", True),
    ("Who read the journal? " + "The harbour master, the priest and the teacher each had a copy of the keys to the tower. " * 6, False),
    ("Nobody but the sea ever read it, and the sea kept what it had read to itself, as it had kept the ships.\n", True),
    ("And the keys? Tell me who had copies of the keys to the tower, and who of them went up there in the winter.\n", False),
    ("The harbour master, the priest and the teacher had them; in the winter only the keeper went up, every evening.\n", True),
)


def turns_of(path: Path) -> list[tuple[np.ndarray, bool]]:
    with Model(path) as model:
        return [(model.tokenize(text, parse_special=False), written) for text, written in TURNS]


def config_of(policy: str, **settings: object) -> CacheConfig:
    return CacheConfig(policy=policy, stride=48, n_ubatch=64, type_k="f32", type_v="f32", n_threads=1, **settings)


@pytest.mark.parametrize(
    ("policy", "settings"),
    [("gkv", {"ratio": 0.7, "budget": 100}), ("snapkv", {"budget": 90}), ("streaming", {"ratio": 0.7, "budget": 100}), ("rkv", {"budget": 90}),
     ("h2o", {"budget": 90}), ("gkv", {"budget": 90, "positions": "cache"})],
)  # fmt: skip
def test_the_cells_are_those_of_the_engine(policy: str, settings: dict[str, object], three_layers: Path) -> None:
    config, turns = config_of(policy, **settings), turns_of(three_layers)
    engine = EngineReading.of(three_layers, config, turns, N_PINNED)
    tokens = torch.from_numpy(np.concatenate([tokens for tokens, _ in turns])).long()
    decoder = Decoder(Weights.load(Container(three_layers), torch.float32, "cpu"))
    timetable = Timetable.of(config, [(len(tokens), written) for tokens, written in turns], N_PINNED, 8192)
    assert [(span.begin, span.position) for span in timetable.spans[1:]] == list(zip(engine.begins, engine.positions_of_begin, strict=True))
    assert len(timetable.spans) > 3
    choice = PolicyChoice(policies.make(policy), timetable, N_PINNED, config.window)
    with torch.no_grad():
        own = decoder.logits(read_compressed(decoder, decoder.embed(tokens), choice))
    chosen = choice.recorded()
    for found, where, expected, there in zip(chosen.tokens[1:], chosen.positions[1:], engine.tokens, engine.positions, strict=True):
        # a score within rounding of another one may fall on either side of the last place
        same = found.numpy() == expected
        assert same.mean() > 0.98
        assert np.array_equal(where.numpy()[same], there[same])
    expected = torch.from_numpy(engine.logits)
    with torch.no_grad():
        recorded = decoder.logits(read_compressed(decoder, decoder.embed(tokens), recorded_of(timetable, engine)))
        full = decoder.logits(read_compressed(decoder, decoder.embed(tokens), everything(len(tokens), engine)))
    # before the first compression, where both do the same, they differ by 1.1e-3 of a probability and 0.06 of a logit
    begin = engine.begins[0]
    assert largest_difference(recorded, expected) < 4e-3
    assert largest_difference(own, expected) < 1e-2
    assert largest_difference(full[:begin], expected[:begin]) < 4e-3
    # and what is missing is noticed
    assert largest_difference(full[begin:], expected[begin:]) > 0.1


def recorded_of(timetable: Timetable, engine: EngineReading) -> RecordedCells:
    """What the engine had, as a choice."""
    none = torch.zeros(*engine.tokens[0].shape[:2], 0, dtype=torch.int64)
    return RecordedCells(
        timetable.spans,
        [none, *(torch.from_numpy(part.astype(np.int64)) for part in engine.tokens)],
        [none, *(torch.from_numpy(part.astype(np.int64)) for part in engine.positions)],
    )


def everything(n: int, engine: EngineReading) -> RecordedCells:
    """One span without compressions."""
    none = torch.zeros(*engine.tokens[0].shape[:2], 0, dtype=torch.int64)
    return RecordedCells([Span(0, n, 0)], [none], [none])


def largest_difference(found: "torch.Tensor", expected: "torch.Tensor") -> float:
    """Of probabilities, from logits [n, n_vocab]."""
    return (found.softmax(-1) - expected.softmax(-1)).abs().max().item()


def test_gemma3_layers_with_a_window_see_what_they_always_see(gemma3: Path, tmp_path: Path) -> None:
    path = tmp_path / "gemma3.gguf"
    write_shallow_model(gemma3, path, 6)
    for policy, positions in (("gkv", "auto"), ("gkv", "cache")):
        config, turns = config_of(policy, budget=90, positions=positions), turns_of(path)
        engine = EngineReading.of(path, config, turns, N_PINNED)
        tokens = torch.from_numpy(np.concatenate([tokens for tokens, _ in turns])).long()
        decoder = Decoder(Weights.load(Container(path), torch.float32, "cpu"))
        n_swa = decoder.hyper.windows[0]
        timetable = Timetable.of(config, [(len(tokens), written) for tokens, written in turns], N_PINNED, 8192, n_swa)
        with torch.no_grad():
            logits = decoder.logits(read_compressed(decoder, decoder.embed(tokens), recorded_of(timetable, engine)))
        assert largest_difference(logits, torch.from_numpy(engine.logits)) < 1e-2


def test_a_choice_can_be_replayed_and_gradients_flow_into_kept_cells(three_layers: Path) -> None:
    config, (tokens, _) = config_of("gkv", budget=60), turns_of(three_layers)[2]
    decoder = Decoder(Weights.load(Container(three_layers), torch.float32, "cpu"))
    timetable = Timetable.of(config, [(len(tokens), True)], N_PINNED, 8192)
    choice = PolicyChoice(policies.make("gkv"), timetable, N_PINNED, config.window)
    x = decoder.embed(torch.from_numpy(tokens).long()).requires_grad_()
    hidden = read_compressed(decoder, x, choice)
    hidden[-1].sum().backward()
    assert x.grad is not None
    with torch.no_grad():
        assert torch.allclose(read_compressed(decoder, x, choice.recorded()), hidden, atol=1e-5)
    # the last token sees what is kept, and through it what that had seen
    assert all(x.grad[token].any() for token in chosen_anywhere(choice.recorded()))


def chosen_anywhere(cells: RecordedCells) -> list[int]:
    return torch.unique(cells.tokens[-1]).tolist()


def test_spans_that_do_not_follow_each_other_are_refused() -> None:
    none = torch.zeros(1, 1, 0, dtype=torch.int64)
    with pytest.raises(ValueError, match="begins at token 5"):
        RecordedCells([Span(0, 4, 0), Span(5, 9, 5)], [none, none], [none, none])
    late = torch.full((1, 1, 1), 4)
    with pytest.raises(ValueError, match="not read before token 4"):
        RecordedCells([Span(0, 4, 0), Span(4, 9, 4)], [none, late], [none, late])


def test_a_policy_that_needs_a_second_read_is_refused() -> None:
    config = config_of("gkv", budget=60)
    timetable = Timetable.of(config, [(200, False)], N_PINNED, 8192)
    with pytest.raises(KvlocalError, match="needs reread"):
        PolicyChoice(policies.make("kvzip"), timetable, N_PINNED, config.window)
