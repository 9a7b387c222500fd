"""Models by name: at first use, what they are, under which names they are here, and how they go again."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_model
from click.testing import CliRunner
from gguf import GGUFWriter
from test_catalogue import put_gguf
from test_pull import GGUF, LISTINGS, Served, hub, listing, models, server  # noqa: F401

from kvlocal.cache.config import allocation
from kvlocal.chat.config import SessionConfig
from kvlocal.doctor.memory_estimate import MemoryEstimate, rough_total
from kvlocal.doctor.memory_shares import ModelSizes, shares
from kvlocal.doctor.model_facts import model_facts
from kvlocal.errors import KvlocalError
from kvlocal.files.fingerprint import fingerprint
from kvlocal.gguf.attention import Attention
from kvlocal.gguf.container import Container, ContainerError
from kvlocal.hub.aliases import add_alias, all_aliases
from kvlocal.hub.catalogue import DEFAULT_MODEL, Catalogue, is_same_model, resolve
from kvlocal.hub.hub_file import HubFile, HubQuantization, parts_of
from kvlocal.hub.pull import pull
from kvlocal.hub.removal import users_of, was_pulled
from kvlocal.llama.model import Model
from kvlocal.llama.placement import Placement
from kvlocal_cli.main import main

COMMIT = "c0ffee" * 6 + "c0de"


def kvlocal(*args: str, **options):
    return CliRunner().invoke(main, [str(arg) for arg in args], **options)


def serve(hub, files: dict[str, bytes]) -> Served:  # noqa: F811
    """Make the hub's repository owner/repo hold these files; its list."""
    for name, body in files.items():
        for revision in ("main", COMMIT):
            hub.server.files[f"/owner/repo/resolve/{revision}/{name}"] = Served(body)
    tree = Served(listing({name: len(body) for name, body in files.items()}))
    hub.server.files |= dict.fromkeys(LISTINGS, tree)
    return tree


# hf:owner/repo:quantization


@pytest.mark.parametrize(
    ("quantization", "found"),
    [
        ("Q4_K_M", "model-Q4_K_M.gguf"),
        ("q4_k", "model-Q4_K.gguf"),
        ("F16", "model.f16.gguf"),
        ("bf16", "big/bf16/model-00001-of-00002.gguf"),
        ("Q8_0", "two-q8_0-00001-of-00002.gguf"),
    ],
)
def test_a_quantization_is_a_word_of_the_name(quantization, found):
    names = ["README.md", "model-Q4_K.gguf", "model-Q4_K_M.gguf", "mmproj-model-f16.gguf", "model.f16.gguf", "two-q8_0-00001-of-00002.gguf"]
    names += ["two-q8_0-00002-of-00002.gguf", "big/bf16/model-00001-of-00002.gguf", "big/bf16/model-00002-of-00002.gguf"]
    names += ["half-q6_k-00001-of-00002.gguf"]  # the other half is missing
    assert HubQuantization("owner", "repo", quantization).among(names) == found
    for wanted in ("Q4", "Q6_K", "4_K_M"):
        with pytest.raises(KvlocalError, match=f"owner/repo has no file with the quantization {wanted}: name a file .*model-Q4_K.gguf"):
            HubQuantization("owner", "repo", wanted).among(names)
    with pytest.raises(KvlocalError, match=r"owner/repo has 2 files with the quantization Q2_K.*\(a-Q2_K.gguf, b-Q2_K.gguf\)"):
        HubQuantization("owner", "repo", "Q2_K").among(["b-Q2_K.gguf", "a-Q2_K.gguf"])


def test_parts():
    assert parts_of("a/b-00002-of-00003.gguf") == [f"a/b-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    assert parts_of("b-00004-of-00003.gguf") == ["b-00004-of-00003.gguf"]
    assert HubFile.parse("hf:owner/repo/b-00002-of-00003.gguf") == HubFile("owner", "repo", "b-00001-of-00003.gguf")


def test_a_quantization_is_found_on_the_hub_and_then_on_the_disk(hub, models, monkeypatch):  # noqa: F811
    tree = serve(hub, {"m-Q4_K_M.gguf": GGUF, "m-Q8_0.gguf": GGUF + b"8", "README.md": b"#"})
    with pytest.raises(KvlocalError, match="run `kvlocal pull hf:owner/repo:Q8_0`"):
        resolve("hf:owner/repo:Q8_0")
    result = hub.run("hf:owner/repo:Q8_0", "--json")
    path = models / "hf" / "owner" / "repo" / "m-Q8_0.gguf"
    assert json.loads(result.out) == {"name": "hf:owner/repo:Q8_0", "path": str(path), "bytes": len(GGUF) + 1, "fetched": True}, result.err
    assert path.read_bytes() == GGUF + b"8" and resolve("hf:owner/repo:q8_0") == path and is_same_model("hf:owner/repo:Q8_0", str(path))
    seen = len(tree.requests)
    again = hub.run("hf:owner/repo:Q8_0")
    assert again.out == f"{path}\n" and len(tree.requests) == seen
    missing = hub.run("hf:owner/repo:Q5_0")
    assert missing.code == 1
    assert "no file with the quantization Q5_0: name a file as hf:owner/repo/file.gguf (m-Q4_K_M.gguf, m-Q8_0.gguf)" in missing.err


def test_a_model_in_several_files_comes_whole_or_not_at_all(hub, models):  # noqa: F811
    names = [f"m-q4_0-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    serve(hub, {name: GGUF + name.encode() for name in names})
    broken = hub.server.files[f"/owner/repo/resolve/{COMMIT}/{names[2]}"]
    broken.body = b"<html>moved</html>" * 1000
    assert "is not a GGUF file" in hub.run("hf:owner/repo:Q4_0").err
    folder = models / "hf" / "owner" / "repo"
    assert not list(folder.iterdir())
    broken.body = GGUF + names[2].encode()
    result = hub.run("hf:owner/repo:Q4_0", "--json")
    assert json.loads(result.out)["bytes"] == sum(len(GGUF + name.encode()) for name in names), result.err
    assert sorted(path.name for path in folder.iterdir()) == names
    assert list(HubFile.pulled()) == [HubFile("owner", "repo", names[0])] and resolve("hf:owner/repo:Q4_0") == folder / names[0]
    (folder / names[1]).unlink()
    with pytest.raises(KvlocalError, match=f"damaged: run `kvlocal pull --force hf:owner/repo/{names[0]}`"):
        resolve("hf:owner/repo:Q4_0")
    assert kvlocal("rm", "--yes", "hf:owner/repo:Q4_0").exit_code == 0
    assert not folder.exists() and (models / "hf").exists()


@pytest.fixture(scope="module")
def split_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny model in one file, and in several."""
    folder = tmp_path_factory.mktemp("split")
    tiny_model.write_tiny_model(folder / "whole.gguf", "llama")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_model, "GGUFWriter", functools.partial(GGUFWriter, split_max_tensors=8))
        tiny_model.write_tiny_model(folder / "tiny.gguf", "llama")
    first, *_ = sorted(folder.glob("tiny-*.gguf"))
    assert len(list(folder.glob("tiny-*.gguf"))) == len(parts_of(first.name)) > 1
    return folder / "whole.gguf", first


def test_a_model_in_several_files_is_read_as_one(split_model, tmp_path):
    whole, first = split_model
    one, several = Container(whole), Container(first)
    assert set(one.tensors) == set(several.tensors) and Attention.of(one) == Attention.of(several)
    assert all(np.array_equal(one.tensors[name].data, several.tensors[name].data) for name in one.tensors)
    with Model(whole) as expected, Model(first) as model:
        assert model.n_params == expected.n_params == model_facts(first)["parameters"]
        assert model.size_bytes == sum(tensor.data.nbytes for tensor in several.tensors.values())
    parts = [first.with_name(name) for name in parts_of(first.name)]
    assert model_facts(first)["bytes"] == sum(part.stat().st_size for part in parts)
    # what only a later file holds makes another model
    copies = [tmp_path / part.name for part in parts]
    for part, copy in zip(parts, copies, strict=True):
        copy.write_bytes(part.read_bytes())
    assert fingerprint(copies[0]) == fingerprint(first)
    changed = bytearray(copies[-1].read_bytes())
    changed[-1] ^= 1
    copies[-1].write_bytes(changed)
    assert fingerprint(copies[0]) != fingerprint(first)
    copies[-1].unlink()
    with pytest.raises(ContainerError, match=f"{copies[-1].name} cannot be read"):
        Container(copies[0])


# First use


@pytest.fixture
def talking_hub(hub, short_smollm2):  # noqa: F811
    """The hub with a model that can talk; how many requests for files there were."""
    serve(hub, {"m-Q4_1.gguf": short_smollm2.read_bytes()})
    return lambda: len(hub.server.files[f"/owner/repo/resolve/{COMMIT}/m-Q4_1.gguf"].requests)


RUN = ("run", "-m", "hf:owner/repo:Q4_1", "--max-tokens", "3", "--threads", "1")


def test_a_model_is_pulled_at_first_use_without_a_question_if_that_is_said(talking_hub, tmp_path):
    def run(*args):
        return subprocess.run([sys.executable, "-m", "kvlocal_cli", *RUN, *args, "hi"], stdin=subprocess.DEVNULL, capture_output=True, text=True)

    refused = run()
    assert (refused.returncode, refused.stdout, talking_hub()) == (1, "", 0)
    assert refused.stderr == "kvlocal: hf:owner/repo:Q4_1 is not on this machine yet: run `kvlocal pull hf:owner/repo:Q4_1`, or give --yes\n"
    done = run("--yes")
    assert done.returncode == 0 and done.stdout.strip(), done.stderr
    assert "pulling hf:owner/repo:Q4_1 into" in done.stderr and talking_hub() > 0


def test_a_person_is_asked_before_a_model_is_pulled(talking_hub, models):  # noqa: F811
    from terminal import Terminal

    with Terminal(*RUN, "hi", env=os.environ) as terminal:
        assert "m-Q4_1.gguf (" in terminal.wait_for(r"\? \[Y/n\]: ", 90)
        assert talking_hub() == 0
        terminal.type("n\n")
        assert terminal.wait_for_end() != 0
    assert not list(models.glob("hf/**/*.gguf"))
    with Terminal(*RUN, "hi", env=os.environ) as terminal:
        terminal.wait_for(r"\? \[Y/n\]: ", 90)
        terminal.type("\n")
        assert terminal.wait_for_end(120) == 0, terminal.output
    assert (models / "hf" / "owner" / "repo" / "m-Q4_1.gguf").is_file()


@pytest.mark.parametrize("command", [("chat", "gemma3-270m"), ("serve", "gemma3-270m", "--port", "0"), ("batch", "-m", "gemma3-270m", "-")])
def test_every_command_says_how_to_get_a_model(models, command):  # noqa: F811
    result = kvlocal(*command)
    assert result.exit_code == 1
    assert "kvlocal: gemma3-270m is not on this machine yet: run `kvlocal pull gemma3-270m`, or give --yes\n" in result.stderr
    assert not models.exists()


# show


def test_show(smollm2):
    report = json.loads(kvlocal("show", smollm2, "--json").stdout)
    with Model(smollm2) as model:
        assert (report["parameters"], report["layers"], report["trained_context"]) == (model.n_params, model.n_layer, model.n_ctx_train)
    assert (report["architecture"], report["quantization"], report["licence"]) == ("llama", "Q4_1", "apache-2.0")
    assert (report["heads"], report["kv_heads"], report["bytes"], report["path"]) == (9, 3, smollm2.stat().st_size, str(smollm2))
    assert report["template"] and report["compressible"] and report["recalls"] and report["why_not"] is None
    # llama.cpp's own sizes, as the doctor tells them of a loaded model
    assert report["kv_bytes_per_token"]["f16"] == 30 * 3 * 2 * 64 * 2
    text = kvlocal("show", smollm2).stdout
    for shown in ("135 M", "Q4_1", "30, 9 heads, 3 KV heads of 64", "8,192 tokens", "f16 23.0 kB", "in the file", str(smollm2), "98.4 MB"):
        assert shown in text


def test_show_says_why_not(tmp_path):
    tiny_model.write_tiny_model(tmp_path / "base.gguf", "llama")
    facts = model_facts(tmp_path / "base.gguf")
    assert facts["compressible"] and facts["recalls"] and not facts["template"] and facts["licence"] is None
    text = kvlocal("show", tmp_path / "base.gguf").stdout
    assert "most likely not trained to chat" in text and "the file does not say" in text
    tiny_model.write_tiny_model(tmp_path / "capped.gguf", "gemma2")
    facts = model_facts(tmp_path / "capped.gguf")
    assert facts["compressible"] and not facts["recalls"] and "soft cap" in facts["why_not"]
    writer = GGUFWriter(tmp_path / "other.gguf", "mamba")
    writer.add_uint32("mamba.ssm.state_size", 16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert "something else than a plain attention cache" in model_facts(tmp_path / "other.gguf")["why_not"]
    assert "compressible    no: it has something else" in kvlocal("show", tmp_path / "other.gguf").stdout


def test_show_of_a_model_that_is_not_here(models):  # noqa: F811
    report = json.loads(kvlocal("show", "qwen3-8b", "--json").stdout)
    assert (report["present"], report["place"], report["licence"]) == (False, "hf:Qwen/Qwen3-8B-GGUF:Q4_K_M", "Apache-2.0")
    assert "run `kvlocal pull qwen3-8b`" in kvlocal("show", "qwen3-8b").stdout
    assert "did you mean qwen3-8b?" in kvlocal("show", "qwen3:8b").stderr
    assert kvlocal("show", "hf:owner/repo:Q4_0").exit_code == 1


# cp and rm


def test_an_alias_is_a_name_and_no_copy(models, tmp_path):  # noqa: F811
    entry = Catalogue.load().entries[DEFAULT_MODEL]
    put_gguf(entry.path, entry.size)
    file = put_gguf(tmp_path / "mine.gguf")
    assert kvlocal("cp", DEFAULT_MODEL, "best:latest").exit_code == 0
    assert kvlocal("cp", "best:latest", "again").exit_code == kvlocal("cp", file, "mine").exit_code == 0
    assert dict(all_aliases()) == {"again": DEFAULT_MODEL, "best:latest": DEFAULT_MODEL, "mine": str(file)}
    assert resolve("best:latest") == resolve("again") == entry.path and resolve("mine") == file
    assert is_same_model("again", DEFAULT_MODEL) and not is_same_model("mine", DEFAULT_MODEL) and Catalogue.load().is_name("mine")
    assert pull("best:latest") == entry.path
    listed = json.loads(kvlocal("models", "--json").stdout)
    assert listed["aliases"]["mine"] == str(file)
    assert f"another name for {DEFAULT_MODEL}" in kvlocal("models").stdout

    assert "is another name for" in kvlocal("cp", file, "again").stderr  # which it stays
    assert "a name of the catalogue" in kvlocal("cp", file, "qwen3-8b").stderr
    for wrong in ("a/b", "x.gguf", "hf:a", "-x", "two words", ".."):
        assert kvlocal("cp", "--", file, wrong).exit_code == 1, wrong
    assert "no model is called" in kvlocal("cp", "nothing", "name").stderr

    result = kvlocal("rm", "again", "mine")  # nothing is lost, so nobody is asked
    assert result.exit_code == 0 and entry.path.is_file() and file.is_file()
    with pytest.raises(KvlocalError, match="no model is called 'again'"):
        resolve("again")
    result = kvlocal("rm", "--yes", DEFAULT_MODEL)
    assert "best:latest still means it" in result.stdout and not entry.path.exists()
    with pytest.raises(KvlocalError, match=f"{DEFAULT_MODEL} is not on this machine yet"):
        resolve("best:latest")
    assert is_same_model("best:latest", DEFAULT_MODEL)


def test_rm_asks_and_removes_only_what_was_pulled(models, tmp_path):  # noqa: F811
    hub_file = HubFile("owner", "repo", "deep/m-Q4_0.gguf")
    put_gguf(hub_file.path, 1000)
    result = kvlocal("rm", hub_file.name)
    assert result.exit_code == 1 and "give --yes" in result.stderr and hub_file.present
    assert "nothing to remove" in kvlocal("rm", "--yes", hub_file.name, "qwen3-8b").stderr and hub_file.present  # all names are checked first

    own = put_gguf(tmp_path / "own.gguf")
    assert "has not put there" in kvlocal("rm", "--yes", own).stderr and own.is_file() and not was_pulled(own)
    link = models / "linked.gguf"
    link.symlink_to(own)
    assert "is a link that kvlocal has not put there" in kvlocal("rm", "--yes", link).stderr and link.is_symlink()
    assert kvlocal("rm", "--yes", "--force", link).exit_code == 0 and not link.is_symlink() and own.is_file()
    assert kvlocal("rm", "--yes", "--force", own).exit_code == 0 and not own.exists()

    # by its path a pulled model is one too
    assert was_pulled(hub_file.path)
    assert kvlocal("rm", "--yes", hub_file.path).exit_code == 0
    assert not hub_file.path.exists() and not (models / "hf" / "owner").exists()


def test_rm_on_a_terminal(models):  # noqa: F811
    from terminal import Terminal

    hub_file = HubFile("owner", "repo", "m.gguf")
    put_gguf(hub_file.path, 1000)
    for answer, stays in (("n", True), ("y", False)):
        with Terminal("rm", hub_file.name, env=os.environ) as terminal:
            assert str(hub_file.path) in terminal.wait_for(r"\? \[y/N\]: ", 60).replace("\n", "")
            terminal.type(answer + "\n")
            assert terminal.wait_for_end() == 0
        assert hub_file.path.exists() == stays


HOLD = """
import mmap, sys
with open(sys.argv[1], "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as held:
    print(len(held), flush=True)
    input()
"""


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux tells who has a file mapped")
def test_a_model_in_use_stays(models):  # noqa: F811
    hub_file = HubFile("owner", "repo", "m.gguf")
    put_gguf(hub_file.path, 1000)
    holder = subprocess.Popen([sys.executable, "-c", HOLD, hub_file.path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() and users_of(hub_file.path) == [holder.pid]
        assert f"is in use by process {holder.pid}" in kvlocal("rm", "--yes", hub_file.name).stderr and hub_file.present
    finally:
        holder.communicate(b"\n")
    assert users_of(hub_file.path) == []
    assert kvlocal("rm", "--yes", hub_file.name).exit_code == 0


def test_an_alias_is_the_same_model_in_every_command(smollm2, models):  # noqa: F811
    add_alias("mine", str(smollm2))
    result = kvlocal("run", "mine", "hi", "--max-tokens", "2", "--threads", "1", "--json")
    assert json.loads(result.stdout)["model"] == "mine", result.stderr


def test_a_session_stays_with_the_model_that_an_alias_meant(short_smollm2, models, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("KVLOCAL_STATE_DIR", str(tmp_path / "state"))
    add_alias("mine", str(short_smollm2))
    said = ("chat", "--session", "talk", "--max-tokens", "2", "--threads", "1")
    assert kvlocal(*said, "mine", input="Hello\n").exit_code == 0
    assert kvlocal("rm", "mine").exit_code == 0
    result = kvlocal(*said, input="And?\n")
    assert result.exit_code == 0 and result.stdout.strip(), result.stderr


# The catalogue and what fits


def test_places_of_the_catalogue():
    entries = Catalogue.load().entries
    placed = [entry for entry in entries.values() if entry.place]
    assert len(placed) >= 12
    for entry in placed:
        assert HubQuantization.parse(entry.place.name) == entry.place and not entry.parts
        assert 5e8 < entry.size < 13e9 and entry.licence and entry.trained_context >= 8192 and not entry.tried
        assert "not tried" in kvlocal("show", entry.name).stdout or "not with kvlocal" in kvlocal("show", entry.name).stdout


def test_a_place_of_the_catalogue_is_pulled_and_known_by_both_names(hub, models, monkeypatch):  # noqa: F811
    entry = Catalogue.load().entries["qwen3-8b"]
    file = HubFile(entry.place.owner, entry.place.repo, "Qwen3-8B-Q4_K_M.gguf")
    assert not entry.present and entry.path is None
    put_gguf(file.path, 1000)
    assert entry.present and resolve("qwen3-8b") == resolve(file.name) == resolve(entry.place.name) == file.path
    listed = [model for model in json.loads(kvlocal("models", "--json").stdout)["models"] if model["status"] == "present"]
    assert [(model["name"], model["bytes"]) for model in listed] == [("qwen3-8b", 1000)]
    assert kvlocal("rm", "--yes", "qwen3-8b").exit_code == 0 and not file.path.exists()


def test_no_path_is_wrapped_on_a_terminal(tmp_path, monkeypatch):
    from terminal import Terminal

    monkeypatch.setenv("KVLOCAL_MODELS_DIR", str(tmp_path / ("deep" * 30) / "models"))
    hub_file, entry = HubFile("owner", "r" * 40, f"{'m' * 40}-Q4_0.gguf"), Catalogue.load().entries[DEFAULT_MODEL]
    put_gguf(hub_file.path, 1000)
    put_gguf(entry.path, entry.size)
    with Terminal("models", env=os.environ) as terminal:
        assert terminal.wait_for_end() == 0
    lines = terminal.output.replace("\r", "").splitlines()
    assert {str(hub_file.path), str(entry.path), DEFAULT_MODEL} <= {*lines} and f"{hub_file.name} (1.0 kB, fits: yes)" in lines
    assert any("qwen3-14b " in line and "9.0 GB" in line for line in lines)


def test_what_fits_is_told_by_the_size(models, monkeypatch):  # noqa: F811
    monkeypatch.setattr("kvlocal_cli.models.available_memory", lambda: 8 * 10**9)
    fits = {model["name"]: model["fits"] for model in json.loads(kvlocal("models", "--json").stdout)["models"]}
    assert fits["qwen3-4b"] is True and fits["qwen3-14b"] is False
    monkeypatch.setattr("kvlocal_cli.models.available_memory", lambda: None)
    assert {model["fits"] for model in json.loads(kvlocal("models", "--json").stdout)["models"]} == {None}


@pytest.mark.parametrize(
    ("size", "n_layer", "n_head", "n_ff"),
    [(639446688, 28, 16, 3072), (2497280256, 36, 32, 9728), (5027783488, 36, 32, 12288), (9001752960, 40, 40, 17408)],
)
def test_the_rough_size_is_near_the_estimate(size, n_layer, n_head, n_ff):
    """Of Qwen3 of 0.6, 4, 8 and 14 B, whose shapes these are, with the cache of the default budget and its archive."""
    config, n_head_kv, head = SessionConfig(), 8, 128
    sizes = ModelSizes(
        layers=(size // n_layer,) * n_layer,
        output=size % n_layer,
        embeddings=0,
        shared=0,
        cells=(n_head_kv * 2 * head * 2,) * n_layer,
        rings=(0,) * n_layer,
        windows=(0,) * n_layer,
        token=4 * (2 * n_ff + 9 * n_head * head),
        n_ubatch=config.n_ubatch,
    )
    host, _ = shares(sizes, Placement(), [])
    estimate = MemoryEstimate(host, (), (), 64 * n_layer * n_head_kv, False, sum(sizes.cells), config.archive_ram, 0)
    assert rough_total(size) == pytest.approx(estimate.total(allocation(config, 32768).n_cells)[0], rel=0.1)
