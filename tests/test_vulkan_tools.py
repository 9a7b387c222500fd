"""What the tests on Vulkan need is found, or it is said why they are left out."""

import importlib.util
import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "native" / "vulkan_tools.py"
LEFT_OUT = "kvlocal: the tests on Vulkan are left out: "


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    spec = importlib.util.spec_from_file_location("vulkan_tools", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "PLACE", tmp_path / "vulkan")
    monkeypatch.setattr(module, "ENVIRONMENT", tmp_path / "vulkan" / "environment")
    monkeypatch.setattr(sys, "argv", [str(SCRIPT)])
    return module


def write_packages(prefix: Path, *, header: str = "1, 4", driver: str = "1.4.305", manifest: str = "lvp_icd.json") -> None:
    files = {
        "bin/glslc": "",
        "include/spirv/unified1/spirv.hpp": "",
        "include/vulkan/vulkan_core.h": f"#define VK_HEADER_VERSION_COMPLETE VK_MAKE_API_VERSION(0, {header}, VK_HEADER_VERSION)\n",
        f"share/vulkan/icd.d/{manifest}": json.dumps({"ICD": {"api_version": driver, "library_path": "libvulkan_lvp.so"}}),
        "lib/some-linux-gnu/libvulkan.so.1": "",
    }
    for name, text in files.items():
        (prefix / name).parent.mkdir(parents=True, exist_ok=True)
        (prefix / name).write_text(text)


@pytest.mark.parametrize(
    ("changes", "complete"),
    [
        ({}, True),
        ({"manifest": f"lvp_icd.{platform.machine()}.json"}, True),
        ({"manifest": "lvp_icd.other.json"}, False),
        ({"header": "1, 3"}, False),  # Debian 12's
        ({"driver": "1.3.230"}, False),
        ({"header": "1, 10", "driver": "1.10.1"}, True),
    ],
)
def test_versions_are_compared_as_numbers(tools, tmp_path: Path, changes: dict[str, str], complete: bool) -> None:
    write_packages(tmp_path / "usr", **changes)
    assert tools.is_complete(tmp_path / "usr") == complete


@pytest.mark.parametrize(
    "missing", ["bin/glslc", "include/vulkan/vulkan_core.h", "share/vulkan/icd.d/lvp_icd.json", "include/spirv/unified1/spirv.hpp"]
)
def test_what_is_missing_is_noticed(tools, tmp_path: Path, missing: str) -> None:
    write_packages(tmp_path)
    (tmp_path / missing).unlink()
    assert not tools.is_complete(tmp_path)


def test_the_environment_is_for_a_shell(tools, tmp_path: Path) -> None:
    prefix = tmp_path / "a b"
    write_packages(prefix)
    tools.write_environment(prefix)
    command = ["sh", "-c", f'. "{tools.ENVIRONMENT}" && env']
    said = subprocess.run(command, capture_output=True, text=True, check=True, env={"PATH": "/bin:/usr/bin"}).stdout
    values = dict(line.split("=", 1) for line in said.splitlines())
    assert values["VK_DRIVER_FILES"] == str(prefix / "share" / "vulkan" / "icd.d" / "lvp_icd.json") and values["GGML_VK_VISIBLE_DEVICES"] == "0"
    assert values["LD_LIBRARY_PATH"] == str(prefix / "lib" / "some-linux-gnu") and values["CMAKE_PREFIX_PATH"] == str(prefix)


def test_fetched_packages_that_are_too_old_are_not_used(
    tools, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tools, "is_complete", lambda prefix, check=tools.is_complete: prefix != Path("/usr") and check(prefix))
    monkeypatch.setattr(tools, "fetch", lambda target: write_packages(target / "usr", driver="1.3.230"))
    assert tools.main() == 0 and not tools.PLACE.exists()
    assert capsys.readouterr().err.splitlines()[-1].startswith(LEFT_OUT)
    monkeypatch.setattr(tools, "fetch", lambda target: write_packages(target / "usr"))
    assert tools.main() == 0 and tools.ENVIRONMENT.exists()
    monkeypatch.setattr(tools, "fetch", lambda target: pytest.fail("what is there is not fetched again"))
    assert tools.main() == 0


def test_a_system_without_apt_leaves_them_out_in_a_sentence(tools, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(tools, "is_complete", lambda prefix: False)
    monkeypatch.setenv("PATH", "/nowhere")
    assert tools.main() == 0 and not tools.PLACE.exists()
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(LEFT_OUT) and "no Debian" in said


@pytest.mark.parametrize("codename", ["bookworm", "trixie"])
def test_packages_come_from_where_the_system_has_its_own(tools, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, codename: str) -> None:
    apt = tmp_path / "apt-get"
    apt.write_text("#!/bin/sh\n" + "".join(
        f"echo \"'http://mirror.example/{place}/InRelease' {suite} 0\"\n"
        for place, suite in (("security/dists/bookworm-security", "a"), ("debian/dists/bookworm-updates", "b"), ("debian/dists/bookworm", "c"))
    ))  # fmt: skip
    apt.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    if codename == "bookworm":
        assert tools.mirror_of(codename) == "http://mirror.example/debian"
    else:
        with pytest.raises(tools.NotToBeHad, match="trixie"):
            tools.mirror_of(codename)


def test_what_apt_cannot_fetch_is_told_with_its_reason(
    tools, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    apt = tmp_path / "apt-get"
    apt.write_text("#!/bin/sh\necho 'E: The repository is gone' >&2\nexit 100\n")
    apt.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.setattr(tools, "is_complete", lambda prefix: False)
    monkeypatch.setattr(tools, "debian", lambda: "bookworm")
    assert tools.main() == 0 and not tools.PLACE.exists()
    assert capsys.readouterr().err.splitlines()[-1] == f"{LEFT_OUT}apt-get says: The repository is gone."
