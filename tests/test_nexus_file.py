import dataclasses
import json
import os
from pathlib import Path

import gguf
import numpy as np
import pytest
from click.testing import CliRunner
from gguf import GGUFReader, GGUFWriter
from tiny_model import N_EMBD, N_FF, write_tiny_model

from kvlocal.errors import KvlocalError
from kvlocal.files import known_hashes
from kvlocal.gguf.container import Container, ContainerError
from kvlocal.nexus import base as bases
from kvlocal.nexus.allotment import n_nexus
from kvlocal.nexus.base import base_hash
from kvlocal.nexus.file import NexusError, NexusFile
from kvlocal_cli.main import main

K = 6


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "tiny.gguf"
    write_tiny_model(path, "llama")
    return path


@pytest.fixture
def nexus(base: Path) -> NexusFile:
    rng = np.random.default_rng(0)
    half = lambda *shape: rng.standard_normal(shape).astype(np.float16)  # noqa: E731
    return NexusFile(
        table=rng.standard_normal((K, N_EMBD)).astype(np.float32),
        adapter={"blk.0.ffn_up.weight": (half(3, N_EMBD), half(N_FF, 3)), "blk.1.ffn_down.weight": (half(3, N_FF), half(N_EMBD, 3))},
        alpha=4.0,
        architecture="llama",
        base_name="tiny",
        base_hash=base_hash(Container(base)),
        ratios=(0.5, 0.8),
        record={"steps": 3, "losses": [{"step": 3, "kl": 0.25}], "note": "é"},
    )


def test_the_same_file_comes_back(nexus: NexusFile, base: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.nexus.gguf"
    nexus.save(path)
    found = NexusFile.load(path)
    for field in dataclasses.fields(NexusFile):
        if field.name not in ("table", "adapter"):
            assert getattr(found, field.name) == getattr(nexus, field.name)
    assert np.array_equal(found.table, nexus.table) and found.table.dtype == np.float32
    assert found.adapter.keys() == nexus.adapter.keys()
    for name, pair in nexus.adapter.items():
        assert all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(found.adapter[name], pair, strict=True))
    assert (found.k, found.n_embd, found.rank) == (K, N_EMBD, 3)
    found.check_base(Container(base))
    assert list(tmp_path.iterdir()) == [path]


def test_embeddings_without_an_adapter(nexus: NexusFile, base: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    dataclasses.replace(nexus, adapter={}).save(path)
    found = NexusFile.load(path)
    assert found.adapter == {} and found.rank == 0
    found.check_base(Container(base))


def test_the_gguf_package_reads_it(nexus: NexusFile, tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    nexus.save(path)
    reader = GGUFReader(path)
    assert reader.fields["general.type"].contents() == "adapter" and reader.fields["adapter.type"].contents() == "lora"
    assert reader.fields["kvlocal.nexus.table"].contents() == pytest.approx(nexus.table.ravel().tolist())
    assert {tensor.name for tensor in reader.tensors} == {name + end for name in nexus.adapter for end in (".lora_a", ".lora_b")}


# Refusals


def test_another_model_is_refused(nexus: NexusFile, tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "other.gguf", "llama", seed=1)
    with pytest.raises(NexusError, match="trained for tiny, not for other.gguf"):
        nexus.check_base(Container(tmp_path / "other.gguf"))


@pytest.mark.parametrize(
    "change",
    [
        {"adapter": {"blk.9.ffn_up.weight": (np.ones((3, N_EMBD), np.float32), np.ones((N_FF, 3), np.float32))}},
        {"adapter": {"blk.0.ffn_up.weight": (np.ones((3, N_FF), np.float32), np.ones((N_FF, 3), np.float32))}},
        {"table": np.ones((K, N_EMBD + 1), np.float32)},
    ],
)
def test_what_does_not_fit_the_model_is_refused(nexus: NexusFile, base: Path, change: dict) -> None:
    with pytest.raises(NexusError, match="does not fit|trained for"):
        dataclasses.replace(nexus, **change).check_base(Container(base))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["table", "adapter", "alpha"])
def test_values_that_are_not_finite_are_refused(nexus: NexusFile, tmp_path: Path, where: str, value: float) -> None:
    path = tmp_path / "a.gguf"
    nexus.save(path)
    before = path.read_bytes()
    if where == "alpha":
        broken = dataclasses.replace(nexus, alpha=value)
    else:
        broken = nexus
        (nexus.table if where == "table" else nexus.adapter["blk.1.ffn_down.weight"][1])[2, 1] = value
    with pytest.raises(NexusError, match="not finite|weights its adapter"):
        broken.save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    broken._write(path)
    with pytest.raises(NexusError, match="not finite|weights its adapter"):
        NexusFile.load(path)


def test_wherever_it_is_cut_off_it_is_refused(nexus: NexusFile, tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    nexus.save(path)
    content = path.read_bytes()
    for n in [*range(0, len(content) - 31, 37), len(content) - 32]:
        path.write_bytes(content[:n])
        with pytest.raises(NexusError, match="damaged or cut off|not a GGUF file"):
            NexusFile.load(path)


def test_flipped_header_bytes_never_do_more_than_be_refused(nexus: NexusFile, tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    nexus.save(path)
    content = path.read_bytes()
    for i in range(0, 1200, 7):
        path.write_bytes(content[:i] + bytes([content[i] ^ 0x5A]) + content[i + 1 :])
        try:
            NexusFile.load(path)
        except KvlocalError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("kvlocal.nexus.version", 2, "version 2 of the format"),
        ("kvlocal.nexus.k", K + 1, "lacks a part"),
        ("kvlocal.nexus.n_embd", N_EMBD - 1, "lacks a part"),
        ("kvlocal.nexus.base_hash", 5, "lacks a part"),
        ("kvlocal.nexus.record", "{", "lacks a part"),
        ("kvlocal.nexus.record", "[]", "lacks a part"),
        ("kvlocal.nexus.segment_rule", "paragraph", "segments of the kind 'paragraph'"),
        ("kvlocal.nexus.table", None, "lacks a part"),
        ("adapter.lora.alpha", None, "lacks a part"),
        ("general.type", "model", "not a Nexus file"),
        ("kvlocal.nexus.version", None, "not a Nexus file"),
    ],
)
def test_wrong_metadata_are_refused(nexus: NexusFile, tmp_path: Path, key: str, value: object, sentence: str) -> None:
    path = tmp_path / "a.gguf"
    nexus.save(path)
    container = Container(path)
    metadata = {**container.metadata, key: value}
    writer = GGUFWriter(path.with_name("b.gguf"), "llama")
    for name, content in metadata.items():
        if content is None or name == "general.architecture":
            continue
        kinds = {str: "string", float: "float32", int: "uint32", np.ndarray: "array"}
        getattr(writer, f"add_{kinds[type(content)]}")(name, content.tolist() if isinstance(content, np.ndarray) else content)
    for tensor in container.tensors.values():
        writer.add_tensor(tensor.name, tensor.values().astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(NexusError, match=sentence):
        NexusFile.load(path.with_name("b.gguf"))


@pytest.mark.parametrize("pair", [((3, N_EMBD), (N_FF, 4)), ((3, N_EMBD, 1), (N_FF, 3)), ((4, N_EMBD), (N_FF, 4))])
def test_wrong_shapes_are_refused(nexus: NexusFile, tmp_path: Path, pair: tuple) -> None:
    # the other part of the adapter has rank 3
    halves = tuple(np.ones(shape, np.float32) for shape in pair)
    broken = dataclasses.replace(nexus, adapter={"blk.1.ffn_down.weight": nexus.adapter["blk.1.ffn_down.weight"], "blk.0.ffn_up.weight": halves})
    with pytest.raises(NexusError, match="adapter for blk.0.ffn_up.weight of the shapes"):
        broken.save(tmp_path / "a.gguf")
    broken._write(tmp_path / "a.gguf")
    with pytest.raises(NexusError, match="adapter for blk.0.ffn_up.weight of the shapes"):
        NexusFile.load(tmp_path / "a.gguf")


def test_a_model_is_no_nexus_file(base: Path, tmp_path: Path) -> None:
    with pytest.raises(NexusError, match="not a Nexus file"):
        NexusFile.load(base)
    with pytest.raises(NexusError, match="cannot be read"):
        NexusFile.load(tmp_path / "none.gguf")
    (tmp_path / "text.gguf").write_text("no")
    with pytest.raises(NexusError, match="not a GGUF file"):
        NexusFile.load(tmp_path / "text.gguf")


def test_a_directory_that_is_not_there(nexus: NexusFile, tmp_path: Path) -> None:
    with pytest.raises(KvlocalError, match="cannot write"):
        nexus.save(tmp_path / "none" / "a.gguf")


# The base model


def test_a_container_is_what_the_gguf_package_reads(base: Path) -> None:
    container, reader = Container(base), GGUFReader(base)
    assert container.metadata == {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert list(container.tensors) == [tensor.name for tensor in reader.tensors]
    for tensor in reader.tensors:
        found = container.tensors[tensor.name]
        assert found.shape == tuple(int(n) for n in reversed(tensor.shape))
        assert np.array_equal(found.values(), tensor.data)


def test_quantised_tensors(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((4, 3, 64)).astype(np.float32)
    packed = gguf.quantize(values, gguf.GGMLQuantizationType.Q8_0)
    writer = GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_array("tokens", ["a", "", "ß"])
    writer.add_array("numbers", [1, 2, 3])
    writer.add_tensor("x", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    container = Container(tmp_path / "a.gguf")
    assert container.metadata["numbers"].tolist() == [1, 2, 3] and "tokens" not in container.metadata
    assert container.tensors["x"].shape == (4, 3, 64)
    assert np.array_equal(container.tensors["x"].values(), gguf.dequantize(packed, gguf.GGMLQuantizationType.Q8_0))


def test_the_hash_follows_the_tensors(base: Path, tmp_path: Path) -> None:
    found = base_hash(Container(base))
    renamed = tmp_path / "renamed.gguf"
    renamed.write_bytes(base.read_bytes().replace(b"no_vocab", b"nO_vocab"))
    assert base_hash(Container(renamed)) == found
    content = bytearray(base.read_bytes())
    content[-40] ^= 1
    renamed.write_bytes(content)
    assert base_hash(Container(renamed)) != found


def test_the_weights_are_hashed_once(tmp_path, base, monkeypatch):
    """Until the file is another one in any way; a record that is damaged, or could be of another file, is not used."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = tmp_path / "model.gguf"
    model.write_bytes(base.read_bytes())
    hashed = []
    compute = bases._hash
    monkeypatch.setattr(bases, "_hash", lambda container: hashed.append(container.path) or compute(container))

    def n_hashed() -> int:
        hashed.clear()
        assert base_hash(Container(model)) == right
        return len(hashed)

    right = compute(Container(model))
    # written this moment: it could change once more without another time
    assert n_hashed() == n_hashed() == 1
    monkeypatch.setattr(known_hashes, "_SETTLED", 0)
    assert (n_hashed(), n_hashed()) == (1, 0)
    (record,) = (tmp_path / "cache" / "kvlocal" / "hashes").iterdir()
    assert record.stat().st_mode & 0o777 == 0o600
    whole = record.read_bytes()
    for spoiled in (b"", whole[:-5], whole.replace(right.encode(), b"0" * 63), b"[]", b'{"state": 1}', b"\xff"):
        record.write_bytes(spoiled)
        assert (n_hashed(), n_hashed()) == (1, 0)
    # another file of the same size and time
    status = model.stat()
    container = Container(model)
    (tmp_path / "other.gguf").write_bytes(base.read_bytes()[:-4] + b"\1\2\3\4")
    (tmp_path / "other.gguf").replace(model)
    os.utime(model, ns=(status.st_atime_ns, status.st_mtime_ns))
    right = compute(Container(model))
    assert (n_hashed(), n_hashed()) == (1, 0)
    # what was opened before is not what has its name now
    hashed.clear()
    base_hash(container)
    assert len(hashed) == 1 and n_hashed() == 0
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    assert n_hashed() == n_hashed() == 1


def test_a_broken_model_is_one_sentence(base: Path, tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(base.read_bytes()[:-100])
    with pytest.raises(ContainerError, match="cut off"):
        Container(tmp_path / "a.gguf")


# How many


@pytest.mark.parametrize(
    ("n_tokens", "ratio", "share", "expected"),
    [(100, 0.8, 1.0, 20), (100, 0.8, 0.5, 10), (101, 0.8, 0.5, 11), (10, 0.7, 1.0, 3), (3, 0.9, 0.1, 1), (0, 0.5, 1.0, 1), (1000, 0.5, 1.0, 64)],
)
def test_n_nexus(n_tokens: int, ratio: float, share: float, expected: int) -> None:
    assert n_nexus(n_tokens, ratio, share, 64) == expected


# The command


def test_info(nexus: NexusFile, base: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    dataclasses.replace(nexus, record={"steps": 3, "evaluations": [{"step": 3, "nexus@0.8": 0.25}]}).save(path)
    result = CliRunner().invoke(main, ["nexus", "info", str(path), "-m", str(base)])
    assert result.exit_code == 0, result.stderr
    assert "base name     tiny" in result.stdout and "nexus@0.8 0.2500" in result.stdout
    document = json.loads(CliRunner().invoke(main, ["nexus", "info", str(path), "--json"]).stdout)
    assert (document["k"], document["rank"], document["ratios"], document["record"]["steps"]) == (K, 3, [0.5, 0.8], 3)
    write_tiny_model(tmp_path / "other.gguf", "llama", seed=1)
    result = CliRunner().invoke(main, ["nexus", "info", str(path), "-m", str(tmp_path / "other.gguf")])
    assert result.exit_code == 1 and result.stderr.startswith("kvlocal: the Nexus file was trained for tiny")
