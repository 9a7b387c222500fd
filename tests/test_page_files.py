"""The page at `/` as files, and what it asks the server for: that needs no browser."""

import json
import re
import threading
from pathlib import Path

import pytest
from serving_process import OPTIONS, ServerProcess, until

import kvlocal.server

FILES = sorted(path.name for path in (Path(kvlocal.server.__file__).parent / "page").iterdir())
LONG = "The keeper of the lighthouse wrote down the weather, the ships and the birds of every single day. "


@pytest.fixture(scope="module")
def server(short_smollm2):
    with ServerProcess(short_smollm2, *OPTIONS, "--kv-budget", "256", "--stride", "64", "--forget", "--parallel", "2") as running:
        yield running
        assert "Traceback" not in running.log


@pytest.fixture(scope="module")
def locked(short_smollm2):
    with ServerProcess(short_smollm2, *OPTIONS, "--forget", environment={"KVLOCAL_API_KEY": "the-key"}) as running:
        yield running


def chat(server, *texts, conversation=None, **fields):
    """A conversation that says these texts; what the last answer came with."""
    messages = []
    for text in texts:
        messages.append({"role": "user", "content": text})
        found = server.post("/v1/chat/completions", {"messages": messages, "conversation": conversation, **fields}).json
        messages.append(found["choices"][0]["message"])
    return messages, found["conversation"]


def test_the_page_needs_no_key_and_no_other_host(locked):
    page = locked.get("/")
    assert page.status == 200 and page.headers["content-type"] == "text/html; charset=utf-8"
    loaded = re.findall(r'(?:src|href)="([^"#]+)"', page.data.decode())
    assert loaded and all(locked.get(f"/{path}").status == 200 for path in loaded)
    assert "<style" not in page.data.decode() and not re.search(r"\son\w+=", page.data.decode())


@pytest.mark.parametrize("name", FILES)
def test_each_file_of_the_page(server, name):
    kinds = {"html": "text/html; charset=utf-8", "css": "text/css; charset=utf-8", "js": "text/javascript; charset=utf-8", "svg": "image/svg+xml"}
    found = server.get(f"/page/{name}")
    assert (found.status, found.headers["content-type"]) == (200, kinds[name.rsplit(".", 1)[1]])
    assert found.headers["x-content-type-options"] == "nosniff" and found.headers["referrer-policy"] == "no-referrer"
    policy = dict(each.strip().split(" ", 1) for each in found.headers["content-security-policy"].split(";"))
    assert policy.pop("default-src") == policy.pop("frame-ancestors") == "'none'" and set(policy.values()) == {"'self'", "'none'"}
    # nothing of another host, and no text that becomes HTML
    text = found.data.decode()
    assert not re.search(r"https?://(?!www\.w3\.org/)[\w-]", text)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text)
    again = server.get(f"/page/{name}", If_None_Match=found.headers["etag"])
    assert (again.status, again.data, again.headers["etag"]) == (304, b"", found.headers["etag"])
    assert server.get(f"/page/{name}", If_None_Match='"other"').status == 200


def test_modules_load_only_files_that_there_are():
    directory = Path(kvlocal.server.__file__).parent / "page"
    imported = {name for path in directory.glob("*.js") for name in re.findall(r'from "\./([^"]+)"', path.read_text())}
    assert imported and imported <= set(FILES)


@pytest.mark.parametrize("path", ["/page/", "/page/none.js", "/page/..%2fapp.py", "/page/%2e%2e/app.py", "/page/main.js/more"])
def test_nothing_else_is_a_file_of_the_page(server, path):
    assert server.get(path).status == 404


def test_the_page_is_let_in_by_whatever_address_it_has(server):
    body = json.dumps({"content": "a"})
    for host, origin, status in (("192.168.1.5:8080", "http://192.168.1.5:8080", 200), ("192.168.1.5:8080", "http://192.168.1.6:8080", 403),
                                 ("evil.example", "http://evil.example", 403)):  # fmt: skip
        assert server.request("POST", "/tokenize", body.encode(), {"Host": host, "Origin": origin}).status == status, origin


def test_the_map_of_a_conversation(server):
    messages, identity = chat(server, *(LONG * 6 for _ in range(4)), "Which birds?")
    found = server.get(f"/conversations/{identity}/map").json
    assert (found["id"], found["answering"], found["in_slot"]) == (identity, False, True)
    parts, cache = found["parts"], found["cache"]
    assert [(part["turn"], part["role"]) for part in parts if part["turn"]] == [(i // 2 + 1, message["role"]) for i, message in enumerate(messages)]
    texts = [part["text"] for part in parts if part["role"] == "user"]
    assert texts == [message["content"][:60] for message in messages if message["role"] == "user"]
    assert sum(part["tokens"] for part in parts) == cache["tokens"] > cache["used"] >= cache["budget"] == 256
    assert sum(part["cached"] for part in parts) == pytest.approx(cache["used"], abs=1)
    assert sum(part["archived"] for part in parts) == cache["archived"] > 0
    assert parts[0]["pinned"] and parts[0]["cached"] == parts[0]["tokens"] and parts[1]["cached"] < parts[1]["tokens"]
    looked = found["attention"]
    assert looked["beginning"] + looked["earlier"] + looked["current"] == pytest.approx(1, abs=0.01)
    assert sum(part["attention"] or 0 for part in parts) == pytest.approx(looked["earlier"], abs=0.01)


def test_a_map_that_there_is_not(server, locked):
    assert server.get("/conversations/none/map").status == server.post("/conversations/none/stop", None).status == 404
    assert locked.get("/conversations/none/map").status == locked.post("/conversations/none/stop", None).status == 401


def test_a_conversation_can_be_watched_and_stopped_while_it_answers(server):
    _, before = chat(server, LONG * 8)
    found = {}

    def listed():
        return [one for one in server.get("/conversations").json["data"] if one["answering"]]

    body = {"messages": [{"role": "user", "content": "Tell me a long story."}], "max_tokens": 100_000, "stream": True, "logit_bias": {"0": -100}}
    thread = threading.Thread(target=lambda: found.update(answer=server.post("/v1/chat/completions", body)))
    thread.start()
    try:
        assert until(listed)
        (one,) = listed()
        assert one["title"] == "Tell me a long story." and one["id"] != before
        tokens = set()
        assert until(lambda: tokens.add(map_tokens(server, one["id"])) or len(tokens - {None}) >= 3)
        # others are answered beside it
        assert chat(server, "Hello!")[1] != one["id"]
        assert server.post(f"/conversations/{one['id']}/stop", None).json["stopped"]
    finally:
        thread.join(60)
    events = found["answer"].events
    assert events[0]["conversation"] == events[-1]["conversation"] == one["id"]
    said = "".join(event["choices"][0]["delta"].get("content", "") for event in events)
    assert server.get(f"/conversations/{one['id']}").json["messages"][-1]["content"].strip() == said.strip() != ""
    assert not server.post(f"/conversations/{one['id']}/stop", None).json["stopped"]
    view = server.get(f"/conversations/{one['id']}/map").json
    assert not view["answering"] and view["cache"]["tokens"] >= max(tokens - {None})


def map_tokens(server, identity):
    cache = server.get(f"/conversations/{identity}/map").json["cache"]
    return cache and cache["tokens"]


def test_a_request_may_name_its_conversation(server):
    messages, one = chat(server, "My boat is green.")
    again, other = chat(server, "My boat is green.", conversation="")
    assert again == messages and one != other
    messages.append({"role": "user", "content": "Which colour?"})
    for wanted in (one, other):
        found = server.post("/v1/chat/completions", {"messages": messages, "conversation": wanted}).json
        assert found["conversation"] == wanted
    # both have that now, and a fork of either is a third one
    messages += [found["choices"][0]["message"], {"role": "user", "content": "Are you sure?"}]
    third = server.post("/v1/chat/completions", {"messages": messages, "conversation": ""}).json
    assert third["conversation"] not in (one, other) and third["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    # one that does not have this history is none to go on with
    assert server.post("/v1/chat/completions", {"messages": messages[:1], "conversation": one}).json["conversation"] not in (one, other)
