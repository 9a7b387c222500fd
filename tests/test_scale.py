"""Two servers behind nginx, as docs/scale.md has it: a conversation stays with one of them, and moves when that dies."""

import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from serving_process import OPTIONS, Answer, ServerProcess

NGINX = shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")
pytestmark = pytest.mark.skipif(NGINX is None, reason="nginx is not installed")

PAGE = (Path(__file__).parents[1] / "docs/scale.md").read_text()
KEYS = ("key-of-ada", "key-of-bob")
LONG = "The keeper of the lighthouse counted the ships and the gulls each day. " * 12


def examples() -> list[str]:
    """The blocks of nginx's configuration on the page."""
    blocks = re.findall(r"(?:^    .*\n|^\n(?=    ))+", PAGE, re.MULTILINE)
    return [re.sub(r"^    ", "", block, flags=re.MULTILINE) for block in blocks if "map $" in block]


def configuration(ports: Sequence[int], by_first_message: bool) -> str:
    """That of the page, with other ports."""
    whole, first_message = examples()
    if by_first_message:
        parts = whole.split("map $http_x_conversation", 1)
        whole = parts[0] + first_message + parts[1].split("}\n", 1)[1]
    for given, port in zip(("8081", "8082", "8080"), ports, strict=True):
        assert whole.count(f"127.0.0.1:{given}") == 1
        whole = whole.replace(f"127.0.0.1:{given}", f"127.0.0.1:{port}")
    return whole


class Nginx(ServerProcess):
    """An nginx with one configuration, in a directory of its own."""

    def __init__(self, directory: Path, text: str, port: int) -> None:
        directory.mkdir()
        user = "user root;" if os.geteuid() == 0 else ""
        temporary = " ".join(f"{kind}_temp_path {directory}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
        main = f"{user} daemon off; pid {directory}/pid; error_log {directory}/error.log; events {{}} http {{ access_log off; {temporary}\n{text}\n}}"
        (directory / "nginx.conf").write_text(main)
        assert NGINX is not None
        self.port = port
        self._process = subprocess.Popen([NGINX, "-p", str(directory), "-c", str(directory / "nginx.conf"), "-e", str(directory / "error.log")])
        deadline = time.monotonic() + 30
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return
            assert self._process.poll() is None and time.monotonic() < deadline, (directory / "error.log").read_text()
            time.sleep(0.05)

    def kill(self) -> None:
        """Its workers end with it, as they do not after a SIGKILL."""
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(30)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def two_servers(model: Path, directory: Path, by_first_message: bool) -> Iterator[tuple[Nginx, list[ServerProcess]]]:
    options = [*OPTIONS, *(word for key in KEYS for word in ("--api-key", key))]
    directories = [directory / name for name in ("one", "two")]
    for each in directories:
        each.mkdir()
    with (
        ServerProcess(model, *options, "--archive-dir", str(directories[0])) as one,
        ServerProcess(model, *options, "--archive-dir", str(directories[1])) as two,
    ):
        port = free_port()
        with Nginx(directory / "nginx", configuration((one.port, two.port, port), by_first_message), port) as nginx:
            yield nginx, [one, two]


def ask(server: ServerProcess, messages: list[dict], **headers: str) -> Answer:
    body = {"model": "any", "messages": messages, "max_tokens": 4}
    return server.post("/v1/chat/completions", body, **({"Authorization": f"Bearer {KEYS[0]}"} | headers))


def conversations(server: ServerProcess, key: str = KEYS[0]) -> list[dict]:
    return server.get("/conversations", Authorization=f"Bearer {key}").json["data"]


def grown(messages: list[dict], answer: Answer, text: str) -> list[dict]:
    assert answer.status == 200, answer.data
    return [*messages, answer.json["choices"][0]["message"], {"role": "user", "content": text}]


def cached(answer: Answer) -> tuple[int, int]:
    """How many tokens of the prompt were not read again, and how many there are."""
    assert answer.status == 200, answer.data
    usage = answer.json["usage"]
    return usage["prompt_tokens_details"]["cached_tokens"], usage["prompt_tokens"]


@pytest.mark.parametrize("by_first_message", [False, True])
def test_a_conversation_stays_with_its_server_and_moves_when_that_dies(short_smollm2, tmp_path, by_first_message):
    def headers(name: str) -> dict[str, str]:
        return {} if by_first_message else {"X-Conversation": name}

    with two_servers(short_smollm2, tmp_path, by_first_message) as (nginx, servers):
        chats: dict[str, list[dict]] = {}
        numbers = [0, 0]
        # where a conversation goes depends on the ports, so that the first ones may all go to one server
        while len(chats) < 4 or min(numbers) == 0:
            name = f"chat {len(chats)}"
            messages = [{"role": "user", "content": f"{name}: {LONG}"}]
            chats[name] = grown(messages, ask(nginx, messages, **headers(name)), "And then?")
            numbers = [len(conversations(server)) for server in servers]
            assert sum(numbers) == len(chats) < 20
        for name, messages in chats.items():
            answer = ask(nginx, messages, **headers(name))
            n_cached, n_prompt = cached(answer)
            assert n_cached > n_prompt / 2, "another server has read all of it again"
            chats[name] = grown(messages, answer, "Why?")
        assert [len(conversations(server)) for server in servers] == numbers

        alive, dead = servers
        dead.end(signal.SIGKILL)
        moved = 0
        for name, messages in chats.items():
            n_cached, n_prompt = cached(ask(nginx, messages, **headers(name)))
            moved += n_cached < n_prompt / 2
        # those of the server that died are read again, and no others
        assert moved == numbers[1] and len(conversations(alive)) == len(chats)


@pytest.fixture(scope="module")
def both(short_smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Nginx, list[ServerProcess]]]:
    """Two servers that stay, behind the first example."""
    with two_servers(short_smollm2, tmp_path_factory.mktemp("both"), False) as behind:
        yield behind


def test_all_conversations_of_a_key_are_on_one_server(both):
    nginx, servers = both
    for key in KEYS:
        for i in range(3):
            assert ask(nginx, [{"role": "user", "content": f"Hello {i}"}], Authorization=f"Bearer {key}").status == 200
        assert sorted(len(conversations(server, key)) for server in servers) == [0, 3]
        # which is what its page shows
        assert len(conversations(nginx, key)) == 3


def test_a_stream_comes_as_it_is_made(both):
    """Each piece by itself, and not all at the end."""
    nginx, _ = both
    body = {"model": "any", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 40, "stream": True}
    connection = http.client.HTTPConnection("127.0.0.1", nginx.port, timeout=120)
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Authorization": f"Bearer {KEYS[0]}"})
    response = connection.getresponse()
    times, n_bytes = [], 0
    while line := response.readline():
        n_bytes += len(line)
        if line.startswith(b"data: "):
            times.append(time.monotonic())
    connection.close()
    n_pieces = len(times)
    assert n_pieces > 10 and times[-1] - times[0] > 3 * (times[2] - times[0])
    # what the page calculates with
    assert 150 < n_bytes / n_pieces < 350
