"""What a command writes to replaces only what the command wrote, unless it is told otherwise, and that before it computes anything."""

import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from kvlocal.errors import KvlocalError
from kvlocal.files.replaceable import check_replaceable, holds_results
from kvlocal_cli.main import main

RESULTS = {"rows": [], "settings": {"task": "recall"}}
FOREIGN = [
    b"precious",
    b"{}",
    b"[]",
    b'{"rows": ',
    b'{"rows": [' + b"[" * 100_000,
    b"\xff\xfe\0",
    json.dumps({"rows": []}).encode(),
    json.dumps({"rows": [], "settings": "task"}).encode(),
    json.dumps({"rows": [1, 2], "settings": {"of": "another program"}}).encode(),
    json.dumps({"text": "precious"} | RESULTS).encode(),
]


def is_ours(path: Path) -> bool:
    return holds_results(path, "task")


@pytest.mark.parametrize("content", FOREIGN)
def test_something_else_is_refused(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(KvlocalError, match=r"a\.json holds something else than results: name another file or replace it with --force"):
        check_replaceable(path, is_ours, "results", force=False)
    check_replaceable(path, is_ours, "results", force=True)
    assert path.read_bytes() == content


@pytest.mark.parametrize("content", [b"", json.dumps(RESULTS).encode(), json.dumps(RESULTS, indent=2).encode(), None])
def test_what_may_be_replaced(tmp_path, content):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    check_replaceable(path, is_ours, "results", force=False)


def test_what_is_no_regular_file_is_written_to(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    check_replaceable(tmp_path / "pipe", is_ours, "results", force=False)
    check_replaceable(Path(os.devnull), is_ours, "results", force=False)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_what_cannot_be_read_is_not_replaced(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("precious")
    path.chmod(0)
    with pytest.raises(KvlocalError, match="cannot write"):
        check_replaceable(path, is_ours, "results", force=False)


@pytest.mark.parametrize(
    ("command", "option"),
    [
        (["bench", "--stock", "."], "--json"),
        (["eval", "recall", "--policy", "streaming"], "--json"),
        (["eval", "recall", "--policy", "streaming"], "--plot"),
        (["bench", "--stock", "."], "--plot"),
    ],
)
def test_commands_refuse_before_they_measure(smollm2, tmp_path, command, option):
    if option == "--plot":
        pytest.importorskip("matplotlib")
    path = tmp_path / "a.png"
    path.write_text("precious")
    result = CliRunner().invoke(main, [*command, "-m", str(smollm2), option, str(path)])
    assert result.exit_code == 1 and result.stdout == "" and path.read_text() == "precious"
    assert "name another file or replace it with --force" in result.stderr and result.stderr.count("\n") == 1
