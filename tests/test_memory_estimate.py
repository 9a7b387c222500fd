import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from kvlocal.chat.config import SessionConfig
from kvlocal.chat.session import ChatSession
from kvlocal.doctor import memory_estimate as footprint
from kvlocal.doctor.memory_estimate import Footprint, OutOfMemory, check, largest_budget
from kvlocal.gguf.container import Container
from kvlocal.llama.model import Model
from kvlocal_cli.main import main


@pytest.mark.parametrize(("type_k", "type_v"), [("f16", "f16"), ("q8_0", "f16")])
@pytest.mark.parametrize(("policy", "copies"), [("gkv", 2), ("full", 1)])
def test_a_cell_takes_what_llama_cpp_allocates(smollm2: Path, type_k: str, type_v: str, policy: str, copies: int) -> None:
    config = SessionConfig(budget=512, policy=policy, type_k=type_k, type_v=type_v)
    with Model(smollm2) as model, ChatSession(model, config) as session:
        allocated = session.cache.context.kv_bytes()
    n_cells = -(-footprint.allocation(config, 8192).n_cells // 256) * 256
    # llama.cpp tells sizes in hundredths of a MiB
    assert Footprint.of(Container(smollm2), config).cell * n_cells == pytest.approx(copies * allocated, rel=0.002)
    assert Footprint.of(Container(smollm2), config, undo=False).cell * n_cells == pytest.approx(allocated, rel=0.002)


def test_a_sliding_window_is_counted_as_if_it_were_none(gemma3: Path) -> None:
    config = SessionConfig(budget=2048)
    with Model(gemma3) as model, ChatSession(model, config) as session:
        assert Footprint.of(Container(gemma3), config).cell * 2176 > session.cache.context.kv_bytes()


MEASURE = """
import sys
from pathlib import Path
from kvlocal.llama.model import Model
from kvlocal.chat.config import SessionConfig
from kvlocal.chat.session import ChatSession
with Model(Path(sys.argv[1])) as model, ChatSession(model, SessionConfig(budget=4096)) as session:
    session.add_turn("user", "Tell me about rivers. " * 100)
    print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM:")))
"""


def test_it_is_close_to_what_a_session_takes(smollm2: Path) -> None:
    found = subprocess.run([sys.executable, "-c", MEASURE, str(smollm2)], capture_output=True, text=True, check=True)
    resident = int(found.stdout) * 1024
    estimate = Footprint.of(Container(smollm2), SessionConfig()).total(4096 + 128)
    # not all cells have been used, so not all pages are there
    assert 0.6 * estimate < resident < 1.1 * estimate


def test_a_budget_that_does_not_fit(smollm2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = SessionConfig(budget=4096)
    need = Footprint.of(Container(smollm2), config).total(4096 + config.stride)
    monkeypatch.setattr(footprint, "available_memory", lambda: need)
    check(smollm2, config)
    assert largest_budget(smollm2, config) >= 4096
    monkeypatch.setattr(footprint, "available_memory", lambda: need - 1)
    with pytest.raises(OutOfMemory, match="a budget of 4096 cells .* give --kv-budget 3968 or less"):
        check(smollm2, config)
    assert largest_budget(smollm2, config) == 3968
    check(smollm2, SessionConfig(budget=3968))
    monkeypatch.setattr(footprint, "available_memory", lambda: 2**20)
    with pytest.raises(OutOfMemory, match="too little for any budget"):
        check(smollm2, SessionConfig(budget=64))
    assert largest_budget(smollm2, config) == 0
    monkeypatch.setattr(footprint, "available_memory", lambda: None)
    check(smollm2, config)
    assert largest_budget(smollm2, config) is None


def test_the_largest_budget_is_within_the_trained_context(smollm2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(footprint, "available_memory", lambda: 2**50)
    config = SessionConfig()
    assert largest_budget(smollm2, config) == 8192 - config.stride


def test_limits_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(footprint, "_CGROUP", tmp_path)
    unlimited = footprint.available_memory()
    (tmp_path / "memory.current").write_text("3000000\n")
    for limit, expected in (("max", unlimited), ("5000000", 2000000), ("1000", 0)):
        (tmp_path / "memory.max").write_text(limit + "\n")
        found = footprint.available_memory()
        assert found == expected or limit == "max" and found > 2**26


def test_the_command_says_it_before_it_loads_the_model(smollm2: Path) -> None:
    """With a real limit on the process; what it names as the largest budget is let through."""

    def run(budget: int) -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", LIMITED, str(smollm2), str(budget)]
        return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})

    found = run(8000)
    assert found.returncode == 1 and "Traceback" not in found.stderr
    assert found.stderr.startswith("kvlocal: a budget of 8000 cells with ") and found.stderr.count("\n") == 1
    most = int(found.stderr.rpartition("--kv-budget ")[2].split()[0])
    assert 64 < most < 8000
    again = run(most)
    assert "a budget of" not in again.stderr


# the interpreter needs address space of its own, so the limit is above what it has when all is imported
LIMITED = """
import resource, sys
from kvlocal.doctor import memory_estimate as footprint
from kvlocal.llama.library import load
from kvlocal_cli.main import main
load()
size = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize:")) * 1024
resource.setrlimit(resource.RLIMIT_AS, (size + 450 * 10**6,) * 2)
main(["run", sys.argv[1], "--kv-budget", sys.argv[2], "--max-tokens", "2", "--threads", "1", "Hello"])
"""


def test_doctor_tells_the_largest_budget(smollm2: Path) -> None:
    result = CliRunner().invoke(main, ["doctor", str(smollm2), "--json"])
    assert json.loads(result.stdout)["model"]["largest_budget"] == 8192 - SessionConfig().stride
    assert "largest budget  8,064 cells" in CliRunner().invoke(main, ["doctor", str(smollm2)]).stdout
