"""Which file a MODEL argument means, and what is said when there is none."""

import json
import os
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from kvlocal.errors import KvlocalError
from kvlocal.files.atomic import atomic_write
from kvlocal.files.places import models_dir
from kvlocal.hub.catalogue import DEFAULT_MODEL, Catalogue, resolve
from kvlocal.hub.hub_file import HubFile
from kvlocal_cli.models import models_command


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty models directory."""
    folder = tmp_path / "models"
    folder.mkdir()
    monkeypatch.setenv("KVLOCAL_MODELS_DIR", str(folder))
    return folder


def put_gguf(path: Path, size: int = 64) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"GGUF")
    os.truncate(path, size)
    return path


def test_models_dir_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("KVLOCAL_MODELS_DIR", str(tmp_path))
    assert models_dir() == tmp_path
    monkeypatch.delenv("KVLOCAL_MODELS_DIR")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert models_dir() == tmp_path / "kvlocal" / "models"
    monkeypatch.setenv("HOME", str(tmp_path))
    for useless in ("", "relative/path"):
        monkeypatch.setenv("XDG_DATA_HOME", useless)
        assert models_dir() == tmp_path / ".local" / "share" / "kvlocal" / "models"


def test_models_dir_is_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KVLOCAL_MODELS_DIR", "here")
    assert models_dir() == tmp_path / "here"


def test_catalogue_pins_every_byte():
    catalogue = Catalogue.load()
    assert catalogue.default == DEFAULT_MODEL == "smollm2-135m"
    assert DEFAULT_MODEL in catalogue.entries
    for entry in catalogue.entries.values():
        # of a file on the hub the hub itself tells the digest
        digests = [] if entry.place else [entry.sha256, *(part.wheel_sha256 for part in entry.parts)]
        assert all(len(digest) == 64 and int(digest, 16) for digest in digests)
        assert entry.size > 0 and bool(entry.parts) != bool(entry.place) and entry.licence and entry.trained_context > 0


def test_name_resolves_to_the_whole_file_only(models):
    entry = Catalogue.load().entries[DEFAULT_MODEL]
    with pytest.raises(KvlocalError, match=f"run `kvlocal pull {DEFAULT_MODEL}`"):
        resolve(DEFAULT_MODEL)
    put_gguf(entry.path, entry.size)
    assert resolve(DEFAULT_MODEL) == entry.path == models / f"{DEFAULT_MODEL}.gguf"
    os.truncate(entry.path, entry.size - 1)
    with pytest.raises(KvlocalError, match="damaged: run `kvlocal pull --force"):
        resolve(DEFAULT_MODEL)


def test_path_resolves_when_it_is_a_gguf(models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = put_gguf(tmp_path / "some model.gguf")
    assert resolve(file) == file
    assert resolve("some model.gguf") == Path("some model.gguf")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/some model.gguf") == file


def test_catalogue_name_wins_over_a_file_of_that_name(models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    put_gguf(tmp_path / DEFAULT_MODEL)
    with pytest.raises(KvlocalError, match="kvlocal pull"):
        resolve(DEFAULT_MODEL)
    assert resolve(f"./{DEFAULT_MODEL}") == Path(DEFAULT_MODEL)


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        ("smolm2-135", "did you mean smollm2-135m?"),
        ("Gemma3-270M", "did you mean gemma3-270m?"),
        ("zzz", "`kvlocal models` lists those there are"),
        ("Qwen3:8B", "did you mean qwen3-8b?"),
        ("", "no model is called"),
        ("missing.gguf", "there is no file missing.gguf"),
        ("no/such/model", "there is no file no/such/model"),
        ("x" * 100_000, "no model is called"),
        ("nul\0", "no model is called"),
        (".", "is a directory"),
        ("hf:owner/repo/file.gguf", "run `kvlocal pull hf:owner/repo/file.gguf`"),
        ("hf:owner/repo:Q4_K_M", "run `kvlocal pull hf:owner/repo:Q4_K_M`"),
        ("hf:owner/repo", "write hf:owner/repo/file.gguf"),
    ],
)
def test_unusable_arguments_say_what_to_do(models, tmp_path, monkeypatch, argument, sentence):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(KvlocalError) as caught:
        resolve(argument)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"GGU", b"PK\3\4 not a model"])
def test_files_that_are_no_gguf_are_refused(models, tmp_path, content):
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    with pytest.raises(KvlocalError, match="is not a GGUF file"):
        resolve(file)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("hf:owner/repo/file.gguf", "owner/repo/file.gguf"),
        ("hf:o.w-n_er/re.po/deep/er/File.GGUF", "o.w-n_er/re.po/deep/er/File.GGUF"),
        ("hf:owner/repo/file.gguf@v1.0", "owner/repo/@v1.0/file.gguf"),
        ("hf:owner/repo/file.gguf@refs/pr/1", "owner/repo/@refs%2Fpr%2F1/file.gguf"),
    ],
)
def test_hub_names_round_trip_through_the_disk(models, name, place):
    hub_file = HubFile.parse(name)
    assert hub_file.name == name
    assert hub_file.path == models / "hf" / place
    put_gguf(hub_file.path)
    assert list(HubFile.pulled()) == [hub_file]
    assert resolve(name) == hub_file.path


@pytest.mark.parametrize(
    "name",
    [
        "hf:",
        "hf:owner/file.gguf",
        "hf:owner/repo/file.bin",
        "hf:owner/repo/../../../../file.gguf",
        "hf:../repo/file.gguf",
        "hf:owner/../file.gguf",
        "hf:owner/repo//file.gguf",
        "hf:owner/repo/file.gguf@",
        "hf:owner/repo/@x/file.gguf",
        "hf:owner/repo/file.gguf\n",
    ],
)
def test_names_that_leave_the_models_directory_or_mean_nothing_are_refused(name):
    with pytest.raises(KvlocalError, match=r"write hf:owner/repo/file.gguf\[@revision\]"):
        HubFile.parse(name)


def test_models_command_lists_what_is_there(models):
    entry = Catalogue.load().entries[DEFAULT_MODEL]
    put_gguf(entry.path, entry.size)
    hub_file = HubFile("owner", "repo", "file.gguf")
    put_gguf(hub_file.path, 1000)
    runner = CliRunner()

    report = json.loads(runner.invoke(models_command, ["--json"]).stdout)
    assert report["directory"] == str(models)
    assert report["default"] == DEFAULT_MODEL
    listed = {model["name"]: model for model in report["models"]}
    assert listed[DEFAULT_MODEL]["status"] == "present"
    assert listed[DEFAULT_MODEL]["path"] == str(entry.path)
    assert listed[DEFAULT_MODEL]["bytes"] == entry.size
    assert listed["gemma3-270m"]["status"] == "absent"
    assert listed["gemma3-270m"]["path"] is None
    assert listed[hub_file.name]["bytes"] == 1000

    lines = runner.invoke(models_command, []).stdout.splitlines()
    assert len(lines) == 1 + len(report["models"])
    row = next(line for line in lines if line.startswith(DEFAULT_MODEL))
    assert "98.4 MB" in row and "Apache-2.0" in row and f"present  {entry.path}" in row and "(the default)" in row
    assert any(line.startswith(hub_file.name) for line in lines)


def test_models_command_needs_no_models_directory(models):
    shutil.rmtree(models)
    result = CliRunner().invoke(models_command, [])
    assert result.exit_code == 0
    assert result.stdout.count("absent") == len(Catalogue.load().entries)


def test_damaged_files_are_listed_as_such(models):
    entry = Catalogue.load().entries[DEFAULT_MODEL]
    put_gguf(entry.path, 100)
    assert "damaged" in CliRunner().invoke(models_command, []).stdout


def test_atomic_write_replaces_and_keeps_mode_and_link(tmp_path):
    file = tmp_path / "notes.txt"
    atomic_write(file, "één\n")
    assert file.read_bytes() == "één\n".encode()
    file.chmod(0o640)
    link = tmp_path / "link"
    link.symlink_to(file)
    atomic_write(link, b"\0\1")
    assert link.is_symlink() and file.read_bytes() == b"\0\1"
    assert file.stat().st_mode & 0o777 == 0o640
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "notes.txt"]


def test_atomic_write_failure_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    file = tmp_path / "notes.txt"
    file.write_text("old")

    def fail(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(KvlocalError, match=r"cannot write .*notes.txt \(No space left on device\): make room"):
        atomic_write(file, "new")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    assert file.read_text() == "old"


def test_atomic_write_into_a_missing_directory_says_so(tmp_path):
    with pytest.raises(KvlocalError, match="No such file or directory"):
        atomic_write(tmp_path / "no" / "notes.txt", "text")
