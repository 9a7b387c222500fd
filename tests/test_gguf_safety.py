"""What llama.cpp would end the process for is found in a file before, and nothing that it can load."""

import struct
from pathlib import Path

import numpy as np
import pytest
from doors import write_chat_model
from gguf import GGUFWriter

from kvlocal.gguf.container import Container, Header
from kvlocal.gguf.safety import examine
from kvlocal.llama.context import Context
from kvlocal.llama.errors import EngineError
from kvlocal.llama.model import Model


def header(path: Path, *, architecture: str = "llama", tokenizer: str = "gpt2", tokens: list[str] = (), **numbers: object) -> Header:
    """Of a file with these metadata and no tensors; a key has __ for each dot."""
    writer = GGUFWriter(path, architecture)
    writer.add_tokenizer_model(tokenizer)
    writer.add_token_list(tokens)
    for key, value in {"block_count": 2, **numbers}.items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}[type(value)]
        add(f"{architecture}.{key.replace('__', '.')}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return Header(path)


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"tokens": ["a", "b", "A"]},
        {"tokens": ["", "", "a"]},
        {"tokens": ["a", "a"], "tokenizer": "no_vocab"},
        {"block_count": 512, "nextn_predict_layers": 512},
        {"expert_count": 8, "expert_used_count": 2},
        {"expert_count": 8, "expert_used_count": [2, 4]},
        {"expert_count": 8, "expert_used_count": 2, "expert_group_count": 4, "expert_group_used_count": 2},
        {"architecture": "hunyuan-dense", "expert_count": 1},
        {"attention__sliding_window": 24, "attention__sliding_window_pattern": 2},
        {"attention__sliding_window": 24, "attention__sliding_window_pattern": [False, True]},
        {"attention__sliding_window": 0, "attention__sliding_window_pattern": 1},
        {"rope__dimension_count": 64, "attention__key_length": 64},
        {"rope__scaling__type": "yarn", "attention__layer_norm_rms_epsilon": 0.0},
        # llama.cpp refuses these
        {"block_count": "many"},
        {"block_count": [1, 2]},
    ],
)
def test_sound(metadata: dict, tmp_path: Path) -> None:
    assert examine(header(tmp_path / "a.gguf", **metadata))[0] is None


@pytest.mark.parametrize(
    ("metadata", "told"),
    [
        ({"tokens": ["a", "b", "a"]}, "twice"),
        ({"tokens": ["", "[EMPTY_0]"]}, "twice"),
        ({"tokens": ["a\0b", "a\0c"]}, "twice"),
        ({"block_count": 0}, "0 layers"),
        ({"block_count": 513}, "513 layers"),
        ({"nextn_predict_layers": 3}, "predict"),
        ({"expert_count": 8}, "0 of 8 experts"),
        ({"expert_used_count": 2}, "2 of 0 experts"),
        ({"expert_count": 2, "expert_used_count": [2, 4]}, "4 of 2 experts"),
        ({"expert_count": 1025, "expert_used_count": 2}, "1025 experts"),
        ({"expert_count": 8, "expert_used_count": 2, "expert_group_count": 3, "expert_group_used_count": 2}, "3 groups"),
        ({"expert_count": 8, "expert_used_count": 2, "expert_group_count": 4, "expert_group_used_count": 4}, "4 groups"),
        ({"attention__sliding_window": 24, "attention__sliding_window_pattern": 1}, "window"),
        ({"attention__sliding_window": 24, "attention__sliding_window_pattern": [False, False, True]}, "window"),
        ({"rope__dimension_count": 0}, "0 rotated"),
        ({"rope__dimension_count_swa": 7}, "7 rotated"),
        ({"rope__dimension_count": 66, "attention__key_length": 64}, "66 rotated"),
        ({"rope__dimension_count_swa": 66, "attention__key_length": 64}, "66 rotated"),
        ({"rope__dimension_count": 34, "attention__head_count": 4, "embedding_length": 128}, "34 rotated"),
        ({"rope__scaling__type": "x"}, "scaling"),
        ({"attention__layer_norm_rms_epsilon": -1.0}, "epsilon"),
        ({"attention__layer_norm_epsilon": float("nan")}, "epsilon"),
    ],
)
def test_unsound(metadata: dict, told: str, tmp_path: Path) -> None:
    assert told in examine(header(tmp_path / "a.gguf", **metadata))[0]


def changed(path: Path, old: bytes, new: bytes) -> Path:
    assert path.read_bytes().count(old) == 1 and len(old) == len(new)
    path.write_bytes(path.read_bytes().replace(old, new))
    return path


def text(data: bytes) -> bytes:
    return struct.pack("<Q", len(data)) + data


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_chat_model(tmp_path / "model.gguf")
    return tmp_path / "model.gguf"


def test_a_token_twice_is_told_in_a_sentence(path: Path) -> None:
    changed(path, text(b"c") + text(b"d"), text(b"c") + text(b"c"))
    with pytest.raises(EngineError, match=r"model\.gguf cannot be loaded \(a token twice in its vocabulary\): fetch"):
        Model(path)


def test_a_model_without_vocabulary(path: Path) -> None:
    changed(path, text(b"gpt2"), text(b"none"))
    with Model(path) as model:
        for ask in (lambda: model.tokenize("a", parse_special=False), lambda: model.token_bytes(3), lambda: model.token_attributes(3)):
            with pytest.raises(EngineError, match="has no vocabulary"):
                ask()


def test_a_tokenizer_that_needs_a_token_for_each_byte(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_chat_model(path, "llama")
    with Model(path) as model, pytest.raises(EngineError, match="no token for '▁': leave"):
        model.tokenize("", parse_special=False)
    changed(path, text(b"<s>"), text("▁".encode()))
    with Model(path) as model:
        assert model.detokenize(model.tokenize("aß?", parse_special=False)) == "aß?"
        with pytest.raises(EngineError, match="no token for '日': leave"):
            model.tokenize("a 日", parse_special=False)


def test_tensors_with_a_small_alignment(path: Path) -> None:
    """They are read instead of mapped."""
    whole = path.read_bytes()
    begin = Container(path)._at
    (n_keys,) = struct.unpack_from("<Q", whole, 16)
    alignment = text(b"general.alignment") + struct.pack("<II", 4, 2)
    data = whole[:16] + struct.pack("<Q", n_keys + 1) + alignment + whole[24:begin]
    data += bytes(len(data) % 2)
    path.with_name("small.gguf").write_bytes(data + whole[-(-begin // 32) * 32 :])
    logits = []
    for name in ("model.gguf", "small.gguf"):
        with Model(path.with_name(name)) as model, Context(model, n_cells=256, n_ubatch=16, n_threads=1) as context:
            context.decode([1, 2, 3], 0)
            logits.append(context.logits())
    assert len(data) % 32 and np.array_equal(*logits)
