import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from kvlocal.chat.config import SessionConfig
from kvlocal.chat.session import ChatSession
from kvlocal.doctor import memory_estimate
from kvlocal.doctor.memory_estimate import MemoryEstimate, OutOfMemory, check, largest_budget
from kvlocal.doctor.memory_limits import left_of_cgroups
from kvlocal.gguf.container import Container
from kvlocal.llama.model import Model
from kvlocal_cli.main import main


@pytest.mark.parametrize(("type_k", "type_v"), [("f16", "f16"), ("q8_0", "f16")])
@pytest.mark.parametrize(("policy", "archive", "copies"), [("gkv", "off", 2), ("full", "off", 1), ("recall", "ram", 2)])
def test_a_cell_takes_what_llama_cpp_allocates(smollm2: Path, type_k: str, type_v: str, policy: str, archive: str, copies: int) -> None:
    """And as much again for undo, or in an archive."""
    config = SessionConfig(budget=512, policy=policy, archive=archive, type_k=type_k, type_v=type_v)
    with Model(smollm2) as model, ChatSession(model, config) as session:
        allocated = session.cache.context.kv_bytes()
    n_cells = -(-memory_estimate.allocation(config, 8192).n_cells // 256) * 256
    with_copy, without = (MemoryEstimate.of(Container(smollm2), config, undo) for undo in (True, False))
    # llama.cpp tells sizes in hundredths of a MiB
    assert with_copy.host.cache(n_cells) == pytest.approx(allocated, rel=0.002)
    noted = memory_estimate._NOTED * 30 * 3 * n_cells
    both = with_copy.total(n_cells)[0] - with_copy.host.total(n_cells) - memory_estimate._PROCESS - noted + allocated
    assert both == pytest.approx(copies * allocated, rel=0.002)
    assert (without.total(n_cells) == with_copy.total(n_cells)) == (policy != "gkv")


def test_an_archive_takes_no_more_than_it_may(smollm2: Path) -> None:
    small, large = (MemoryEstimate.of(Container(smollm2), SessionConfig(archive_ram=ram)).total(4096)[0] for ram in (10**6, 2**40))
    assert large - small == 4096 * 30 * 3 * 64 * 2 * 2 - 10**6


def test_a_sliding_window_takes_its_window(gemma3: Path) -> None:
    config = SessionConfig(budget=2048)
    with Model(gemma3) as model, ChatSession(model, config) as session:
        allocated, n_cells = session.cache.context.kv_bytes(), session.kv.capacity
    estimate = MemoryEstimate.of(Container(gemma3), config)
    assert estimate.host.cache(n_cells) == pytest.approx(allocated, rel=0.002)
    assert estimate.least_cells == 512 + config.n_ubatch
    # and so does the copy of the cells for undo
    copy = estimate.total(2176)[0] - MemoryEstimate.of(Container(gemma3), config, undo=False).total(2176)[0]
    assert copy == estimate.host.cache(2176)


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
    estimate = MemoryEstimate.of(Container(smollm2), SessionConfig()).total(4096 + 128)[0]
    # not all cells have been used, so not all pages are there
    assert 0.6 * estimate < resident < 1.1 * estimate


def test_a_budget_that_does_not_fit(smollm2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = SessionConfig(budget=4096)
    need = MemoryEstimate.of(Container(smollm2), config).total(4096 + config.stride)[0]
    monkeypatch.setattr(memory_estimate, "available_memory", lambda: need)
    check(smollm2, config)
    assert largest_budget(smollm2, config) >= 4096
    monkeypatch.setattr(memory_estimate, "available_memory", lambda: need - 1)
    with pytest.raises(OutOfMemory, match="a budget of 4096 cells .* give --kv-budget 3968 or less"):
        check(smollm2, config)
    assert largest_budget(smollm2, config) == 3968
    check(smollm2, SessionConfig(budget=3968))
    monkeypatch.setattr(memory_estimate, "available_memory", lambda: 2**20)
    with pytest.raises(OutOfMemory, match="too little for any budget"):
        check(smollm2, SessionConfig(budget=64))
    assert largest_budget(smollm2, config) == 0
    monkeypatch.setattr(memory_estimate, "available_memory", lambda: None)
    check(smollm2, config)
    assert largest_budget(smollm2, config) is None


def test_the_largest_budget_is_within_the_trained_context(smollm2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_estimate, "available_memory", lambda: 2**50)
    config = SessionConfig()
    assert largest_budget(smollm2, config) == 8192 - config.stride


V1, V2 = ("memory.limit_in_bytes", "memory.usage_in_bytes"), ("memory.max", "memory.current")


def limits(folder: Path, names: tuple[str, str], limit: str, used: int, cached: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    total = "total_" if names == V1 else ""
    (folder / "memory.stat").write_text(f"anon 1\n{total}inactive_file {cached}\n{total}active_file 0\n")


@pytest.fixture
def process(tmp_path: Path) -> Path:
    """A process in /user.slice/run-1.scope, as /proc has it, under both versions of cgroups; the mount point has a space in it."""
    folder = tmp_path / "self"
    folder.mkdir()
    (folder / "cgroup").write_text("4:memory,hugetlb:/batch/job\n2:cpu:/\n0::/user.slice/run-1.scope\n")
    unified, memory = (str(tmp_path / name).replace(" ", "\\040") for name in ("the unified", "memory"))
    (folder / "mountinfo").write_text(
        f"31 23 0:28 / {tmp_path} rw - tmpfs tmpfs rw\n"
        f"32 31 0:29 / {tmp_path / 'cpu'} rw,relatime - cgroup cgroup rw,cpu\n"
        f"35 31 0:32 / {memory} rw,relatime - cgroup cgroup rw,memory\n"
        f"41 31 0:38 / {unified} rw,relatime shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
        "nonsense\n"
    )
    return folder


def test_the_limit_of_its_own_cgroup_counts_and_of_all_above(process: Path, tmp_path: Path) -> None:
    """MemoryMax of a systemd unit lies in the unit's cgroup; that of the root is none."""
    assert left_of_cgroups(process) is None
    top = tmp_path / "the unified"
    limits(top / "user.slice" / "run-1.scope", V2, "max", 300)
    assert left_of_cgroups(process) is None
    limits(top / "user.slice" / "run-1.scope", V2, "1000", 300)
    assert left_of_cgroups(process) == 700
    limits(top / "user.slice", V2, "900", 800, cached=500)
    assert left_of_cgroups(process) == 600
    limits(top / "user.slice", V2, "900", 950)
    assert left_of_cgroups(process) == 0
    limits(top / "other.slice", V2, "1", 1)
    limits(top / "user.slice", V2, "nonsense", 950)
    assert left_of_cgroups(process) == 700


def test_limits_of_the_first_version_of_cgroups(process: Path, tmp_path: Path) -> None:
    limits(tmp_path / "memory" / "batch", V1, "9223372036854771712", 5)
    limits(tmp_path / "memory" / "batch" / "job", V1, "9223372036854771712", 5)
    assert left_of_cgroups(process) is None
    limits(tmp_path / "memory" / "batch", V1, "1000", 400, cached=100)
    assert left_of_cgroups(process) == 700
    limits(tmp_path / "memory" / "batch" / "job", V1, "500", 400)
    assert left_of_cgroups(process) == 100


@pytest.mark.parametrize("place", ["/docker/abc", "/docker", "/", "/elsewhere"])
def test_a_container_sees_a_part_of_the_tree(tmp_path: Path, place: str) -> None:
    """Its own cgroup is the root of what is mounted, whatever the path that the kernel tells."""
    (tmp_path / "cgroup").write_text(f"0::{place}\n")
    (tmp_path / "mountinfo").write_text(f"41 31 0:38 /docker/abc {tmp_path / 'top'} rw - cgroup2 cgroup2 rw\n")
    limits(tmp_path / "top", V2, "1000", 1)
    assert left_of_cgroups(tmp_path) == 999


def test_a_real_limit_of_a_cgroup() -> None:
    """A process in a cgroup with a limit of 64 MB has less than that left."""
    root = Path("/sys/fs/cgroup")
    names, top = (V1, root / "memory") if (root / "memory").is_dir() else (V2, root)
    group = top / f"kvlocal-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError:
        pytest.skip("no cgroup can be made here")
    try:
        try:
            (group / names[0]).write_text(str(64 * 2**20))
        except OSError:
            pytest.skip("the memory of a cgroup cannot be limited here")
        command = "from kvlocal.doctor.memory_limits import available_memory; print(available_memory())"
        join = f"echo $$ > {group}/cgroup.procs && exec {sys.executable} -c '{command}'"
        found = subprocess.run(["sh", "-c", join], capture_output=True, text=True, check=True)
        assert 2**20 < int(found.stdout) < 64 * 2**20
    finally:
        group.rmdir()


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
from kvlocal.doctor import memory_estimate
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
