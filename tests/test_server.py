"""The server as programs see it: a process of its own with a real model, asked over HTTP."""

import http.client
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from gguf_copy import Source, copy
from serving_process import OPTIONS, ServerProcess, until

openai = pytest.importorskip("openai")

KEYS = {"KVLOCAL_API_KEY": "first-key second-key"}
HELLO = [{"role": "user", "content": "Say hello."}]


@pytest.fixture(scope="module")
def server(short_smollm2):
    with ServerProcess(short_smollm2, *OPTIONS, "--parallel", "2", "--forget") as running:
        yield running
        assert running.running
        assert "Traceback" not in running.log


@pytest.fixture(scope="module")
def locked(short_smollm2):
    with ServerProcess(short_smollm2, *OPTIONS, "--forget", environment=KEYS) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.address}/v1", api_key="any", max_retries=0) as made:
        yield made


def chat(server, messages=HELLO, **fields):
    return server.post("/v1/chat/completions", {"messages": messages, **fields})


@pytest.fixture(scope="module")
def caller(smollm2, tmp_path_factory):
    """A client of a model whose template has tools."""
    path = tmp_path_factory.mktemp("tools") / "tools.gguf"
    copy(Source(smollm2), path, metadata={"tokenizer.chat_template": (Path(__file__).parent / "chatml_tools.jinja").read_text()})
    with ServerProcess(path, *OPTIONS, "--forget") as running, openai.OpenAI(base_url=f"{running.address}/v1", api_key="any", max_retries=0) as made:
        yield made


# OpenAI's client


def test_an_answer(client):
    answer = client.chat.completions.create(model="any", messages=HELLO)
    choice = answer.choices[0]
    assert choice.message.role == "assistant" and choice.message.content
    assert choice.finish_reason in ("stop", "length") and 0 < answer.usage.completion_tokens <= 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_stream_says_what_a_whole_answer_says(client):
    whole = client.chat.completions.create(model="any", messages=HELLO).choices[0]
    chunks = list(client.chat.completions.create(model="any", messages=HELLO, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == whole.message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == whole.finish_reason
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens > 0


def test_a_later_turn_reads_only_what_is_new(client):
    messages = [{"role": "user", "content": "My cat is called Tiger. " * 10}]
    first = client.chat.completions.create(model="any", messages=messages)
    messages += [{"role": "assistant", "content": first.choices[0].message.content}, {"role": "user", "content": "And yours?"}]
    second = client.chat.completions.create(model="any", messages=messages)
    read = second.usage.prompt_tokens - second.usage.prompt_tokens_details.cached_tokens
    assert second.usage.prompt_tokens > first.usage.total_tokens - 2
    assert read < 30


def test_several_answers(client):
    answer = client.chat.completions.create(model="any", messages=HELLO, n=2, temperature=1.5, seed=3)
    assert [choice.index for choice in answer.choices] == [0, 1]
    chunks = client.chat.completions.create(model="any", messages=HELLO, n=2, stream=True)
    assert {chunk.choices[0].index for chunk in chunks} == {0, 1}


def test_stop_texts_are_no_part_of_the_answer(client):
    text = client.chat.completions.create(model="any", messages=HELLO).choices[0].message.content
    stop = text[2:4]
    cut = client.chat.completions.create(model="any", messages=HELLO, stop=[stop, "never"])
    assert cut.choices[0].message.content == text[: text.index(stop)] and cut.choices[0].finish_reason == "stop"


def test_models(client):
    (model,) = client.models.list()
    assert client.models.retrieve(model.id).id == model.id == "short-smollm2"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_what_is_wrong_is_told_to_the_client(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="any", messages=HELLO, temperature=-1)
    assert caught.value.param == "temperature"


def test_responses(client):
    first = client.responses.create(model="any", input="Say hello.", instructions="Be brief.")
    assert first.status in ("completed", "incomplete") and first.output_text
    second = client.responses.create(model="any", input="Again.", previous_response_id=first.id, tools=[{"type": "web_search"}])
    assert second.usage.input_tokens_details.cached_tokens > 0
    with pytest.raises(openai.NotFoundError):
        client.responses.create(model="any", input="Again.", previous_response_id="resp_none")


def test_a_response_is_gone_on_with_after_a_restart(short_smollm2, tmp_path):
    options = (*OPTIONS, "--archive-dir", str(tmp_path))
    with ServerProcess(short_smollm2, *options) as server:
        first = server.post("/v1/responses", {"input": "Say hello.", "instructions": "Be brief."}).json
        stream = server.post("/v1/responses", {"input": "And now in French.", "previous_response_id": first["id"], "stream": True})
        events = [json.loads(line.removeprefix("data: ")) for line in stream.data.decode().splitlines() if line.startswith("data: ")]
        second = events[-1]["response"]
        assert events[0]["response"]["id"] == second["id"] != first["id"]
    with ServerProcess(short_smollm2, *options) as server:
        usages = []
        for name in (first["id"], second["id"]):
            answer = server.post("/v1/responses", {"input": "Again.", "previous_response_id": name})
            assert answer.status == 200, answer.json
            usages.append(answer.json["usage"])
        before = first["usage"], second["usage"]
        assert all(now["input_tokens"] > then["total_tokens"] for now, then in zip(usages, before, strict=True))
        assert all(now["input_tokens"] - now["input_tokens_details"]["cached_tokens"] < 15 for now in usages)
        conversation = server.get("/conversations").json["data"][0]["id"]
        for name in ("resp_none", f"resp_{conversation}_1", f"resp_{conversation}_99", f"resp_{conversation}_0", f"resp_{conversation}_\u0661"):
            assert server.post("/v1/responses", {"input": "Again.", "previous_response_id": name}).status == 404


def test_a_response_of_another_key_is_none(locked):
    asked = {"input": "Say hello."}
    first = locked.post("/v1/responses", asked, Authorization="Bearer first-key").json
    for key, status in (("second-key", 404), ("first-key", 200)):
        answer = locked.post("/v1/responses", {**asked, "previous_response_id": first["id"]}, Authorization=f"Bearer {key}")
        assert answer.status == status


def test_a_stream_of_a_response(client):
    with client.responses.stream(model="any", input="Say hello.") as stream:
        events = list(stream)
        final = [event.response for event in events if event.type in ("response.completed", "response.incomplete")][-1]
    assert events[0].type == "response.created" and final.id == events[0].response.id
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == final.output_text
    assert [event.sequence_number for event in events] == list(range(len(events)))


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "enum": ["Rome", "Oslo"]}}, "required": ["city"]},
    },
}


def test_a_tool_is_called_and_its_result_read(caller):
    asked = {"model": "any", "tools": [WEATHER], "max_tokens": 80}
    messages = [{"role": "user", "content": "How is the weather in Rome?"}]
    choice = caller.chat.completions.create(messages=messages, tool_choice="required", parallel_tool_calls=False, **asked).choices[0]
    (call,) = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls" and call.function.name == "weather" and "city" in json.loads(call.function.arguments)
    messages += [choice.message.model_dump(exclude_none=True), {"role": "tool", "tool_call_id": call.id, "content": "sunny, 25 degrees"}]
    answer = caller.chat.completions.create(messages=messages, tool_choice="none", **asked)
    assert answer.choices[0].message.content and answer.usage.prompt_tokens_details.cached_tokens > 0


def test_a_call_in_a_stream(caller):
    chunks = caller.chat.completions.create(model="any", tools=[WEATHER], max_tokens=80, tool_choice="required", parallel_tool_calls=False,
                                            messages=[{"role": "user", "content": "How is the weather in Rome?"}], stream=True)  # fmt: skip
    deltas = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
    assert deltas[0].function.name == "weather" and deltas[0].id
    assert "city" in json.loads("".join(delta.function.arguments for delta in deltas))


def test_tools_where_the_model_knows_none(client):
    with pytest.raises(openai.BadRequestError, match="no place for tools"):
        client.chat.completions.create(model="any", messages=HELLO, tools=[WEATHER])


def test_an_answer_that_follows_a_schema(client):
    age = {"type": "integer", "minimum": 0, "maximum": 99}
    schema = {"type": "object", "properties": {"age": age}, "required": ["age"], "additionalProperties": False}
    answer = client.chat.completions.create(model="any", messages=HELLO, max_tokens=200, temperature=1,
                                            response_format={"type": "json_schema", "json_schema": {"name": "person", "schema": schema}})  # fmt: skip
    assert 0 <= json.loads(answer.choices[0].message.content)["age"] <= 99
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="any", messages=HELLO, extra_body={"grammar": "root ::= nothing"})
    assert "grammar" in caught.value.message


def test_log_probabilities(client):
    answer = client.chat.completions.create(model="any", messages=HELLO, logprobs=True, top_logprobs=2)
    tokens = answer.choices[0].logprobs.content
    assert "".join(token.token for token in tokens).startswith(answer.choices[0].message.content[:3])
    assert all(len(token.top_logprobs) == 2 and token.logprob <= 0 for token in tokens)


@pytest.mark.parametrize("module", ["uvicorn", "sse_starlette", "prometheus_client"])
def test_without_the_packages_of_a_server_it_says_what_to_install(module):
    script = f"import sys; sys.modules[{module!r}] = None; from kvlocal_cli.main import main; main(['serve', 'no-such-model'])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and not done.stdout
    assert done.stderr == f"kvlocal: kvlocal serve needs {module}, which is not installed: pip install 'kvlocal[serve]'\n"


# Other forms


def test_what_the_caches_take_is_told(server):
    """2 slots, each with 512 cells at least of keys and values, 3 heads of 64 numbers in 2 bytes, in each layer."""
    (line,) = [line for line in server.get("/metrics").data.decode().splitlines() if line.startswith("kvlocal_kv_bytes ")]
    told = server.get("/props").json["kv_bytes"]
    assert told == float(line.split()[1]) >= 2 * 512 * 2 * 3 * 64 * 2


def test_anthropics_form(server):
    body = {"model": "any", "max_tokens": 8, "system": "Be brief.", "messages": [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]}
    answer = server.post("/v1/messages", body).json
    assert answer["type"] == "message" and answer["content"][0]["text"] and answer["usage"]["output_tokens"] <= 8
    stream = server.post("/v1/messages", {**body, "stream": True}).data.decode()
    kinds = [line.removeprefix("event: ") for line in stream.splitlines() if line.startswith("event: ")]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    refused = server.post("/v1/messages", {"messages": []})
    assert refused.status == 400 and refused.json["type"] == "error" and "max_tokens" in refused.json["error"]["message"]


def test_messages_as_clients_send_them(server):
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hello"}, {"type": "text", "text": "there"}]},
        {"role": "user", "content": ""},
        {"role": "user", "content": "again"},
        {"role": "assistant", "content": None},
        {"role": "system", "content": "Now in French."},
        {"role": "user", "content": "Bye"},
    ]
    assert chat(server, messages).status == 200
    assert chat(server, [{"role": "assistant", "content": "Welcome!"}, {"role": "user", "content": "Hi"}]).status == 200


def test_tokens_there_and_back(server):
    tokens = server.post("/tokenize", {"content": "Hello, wörld"}).json["tokens"]
    assert server.post("/detokenize", {"tokens": tokens}).json["content"] == "Hello, wörld"
    assert server.post("/tokenize", {"content": "a", "with_pieces": True}).json["tokens"][0]["piece"] == "a"
    assert server.post("/detokenize", {"tokens": [10**9]}).error["param"] == "tokens.0"


def test_what_is_told_of_the_server(server):
    chat(server)
    assert server.get("/health").json == {"status": "ok"}
    assert server.get("/props").json["total_slots"] == 2
    metrics = server.get("/metrics").data.decode()
    assert 'kvlocal_requests_total{path="/v1/chat/completions",status="200"}' in metrics
    assert "kvlocal_completion_tokens_total" in metrics and "kvlocal_running" in metrics


def test_conversations_are_listed_read_and_deleted(server):
    identity = chat(server, [{"role": "user", "content": "Remember the number 4711."}]).json["conversation"]
    assert identity in [found["id"] for found in server.get("/conversations").json["data"]]
    assert server.get(f"/conversations/{identity}").json["messages"][0]["content"] == "Remember the number 4711."
    assert server.request("DELETE", f"/conversations/{identity}").json["deleted"]
    assert server.request("DELETE", f"/conversations/{identity}").status == 404
    assert identity not in [found["id"] for found in server.get("/conversations").json["data"]]


# What is not served


@pytest.mark.parametrize(
    "method, path, status", [("GET", "/nothing", 404), ("GET", "/v1/chat/completions", 405), ("DELETE", "/conversations/none", 404)]
)
def test_paths_that_there_are_not(server, method, path, status):
    answer = server.request(method, path)
    assert answer.status == status and answer.error["message"]


@pytest.mark.parametrize("body", [b"", b"{", b"[1, 2]", b"\xff", b"[" * 100_000, b'{"messages": 1}', b'{"messages": [{"role": "user"}], "n": "x"}'])
def test_bodies_that_say_nothing(server, body):
    answer = server.request("POST", "/v1/chat/completions", body)
    assert answer.status == 400 and answer.error["type"] == "invalid_request_error"


def test_a_body_that_is_too_large_is_refused_before_it_is_sent(server):
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999\r\n\r\n{"
    assert b" 413 " in server.raw(head, half_close=False, timeout=20).split(b"\r\n", 1)[0]


def test_what_is_no_http_gets_an_answer_or_a_closed_connection(server):
    assert server.raw(b"\x16\x03\x01\x02\x00 hello\r\n\r\n").startswith((b"HTTP/1.1 400", b""))
    server.raw(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{", half_close=True)
    assert server.get("/health").status == 200


def test_a_client_that_goes_away_ends_its_answer(server):
    def running():
        line = next(line for line in server.get("/metrics").data.decode().splitlines() if line.startswith("kvlocal_running "))
        return float(line.split()[1])

    for stream in (True, False):
        connection = http.client.HTTPConnection("127.0.0.1", server.port)
        body = {"messages": [{"role": "user", "content": "Tell me a long story."}], "max_tokens": 100_000, "stream": stream, "logit_bias": None}
        connection.request("POST", "/v1/chat/completions", json.dumps(body))
        assert until(lambda: running() == 1)
        connection.sock.shutdown(socket.SHUT_RDWR)
        connection.close()
        assert until(lambda: running() == 0)


# Who may use it


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic first-key"}, {"x-api-key": "first-kez"}])
def test_without_a_key_nothing_is_told(locked, headers):
    gets, posts = ("/v1/models", "/metrics", "/conversations", "/props"), ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")
    for method, path in (*(("GET", path) for path in gets), *(("POST", path) for path in posts)):
        answer = locked.request(method, path, None, headers)
        assert answer.status == 401 and answer.error["code"] == "invalid_api_key"
    assert locked.get("/health").status == 200


def test_conversations_of_different_keys_never_meet(locked):
    body = {"messages": [{"role": "user", "content": "My secret is a blue door. " * 8}], "max_tokens": 4}
    first = locked.post("/v1/chat/completions", body, Authorization="Bearer first-key").json
    again = locked.post("/v1/chat/completions", body, Authorization="Bearer first-key").json
    other = locked.post("/v1/chat/completions", body, **{"x-api-key": "second-key"}).json
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    assert other["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert locked.get(f"/conversations/{first['conversation']}", Authorization="Bearer second-key").status == 404
    assert first["conversation"] not in locked.get("/conversations", Authorization="Bearer second-key").data.decode()


def test_web_pages(server, locked):
    for origin, status in (("http://localhost:3000", 200), ("https://example.org", 403), ("null", 403)):
        assert server.get("/v1/models", Origin=origin).status == status
    assert server.get("/v1/models", Host="rebound.example.org").status == 403
    preflight = server.request("OPTIONS", "/v1/chat/completions", None,
                               {"Origin": "http://localhost:3000", "Access-Control-Request-Method": "POST",
                                "Access-Control-Request-Headers": "authorization,content-type"})  # fmt: skip
    assert preflight.status == 200 and preflight.headers["access-control-allow-origin"] == "http://localhost:3000"
    assert locked.get("/health", Origin="https://example.org").headers["access-control-allow-origin"] == "*"


# Beginning and end


def test_too_many_requests_are_told_to_come_back(short_smollm2):
    with ServerProcess(short_smollm2, *OPTIONS, "--parallel", "1", "--waiting", "0", "--forget") as server:
        streams = []
        for _ in range(2):
            connection = http.client.HTTPConnection("127.0.0.1", server.port)
            connection.request("POST", "/v1/chat/completions", json.dumps({"messages": HELLO, "stream": True, "max_tokens": 100_000}))
            response = connection.getresponse()
            streams.append((connection, response))
            if response.status == 503:
                break
        assert streams[-1][1].status == 503 and int(streams[-1][1].getheader("Retry-After")) >= 1
        for connection, _ in streams:
            connection.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_end_lets_answers_end(short_smollm2, number):
    with ServerProcess(short_smollm2, *OPTIONS, "--forget") as server:
        answers = []
        thread = threading.Thread(target=lambda: answers.append(chat(server, stream=True, max_tokens=40)))
        thread.start()
        assert until(lambda: "kvlocal_running 1.0" in server.get("/metrics").data.decode(), 10) or answers
        assert server.end(number) == 0
        thread.join(10)
        assert answers[0].events[-1]["choices"][0]["finish_reason"] in ("stop", "length")
        assert "Traceback" not in server.log and "the server has ended" in server.log


def test_conversations_leave_the_disk_beyond_what_they_may_take(short_smollm2, tmp_path):
    with ServerProcess(short_smollm2, *OPTIONS, "--parallel", "1", "--disk", "1", "--archive-dir", str(tmp_path)) as server:
        ids = []
        for text in ("Hello!", "Good morning!"):
            answer = server.post("/v1/chat/completions", {"model": "any", "messages": [{"role": "user", "content": text}]})
            ids.append(answer.json["conversation"])
        assert until(lambda: [one["id"] for one in server.get("/conversations").json["data"]] == ids[1:])


def test_after_a_kill_conversations_are_gone_on_with(short_smollm2, tmp_path):
    messages = [{"role": "user", "content": "The password is swordfish. " * 6}]
    with ServerProcess(short_smollm2, *OPTIONS, "--archive-dir", str(tmp_path)) as server:
        first = chat(server, messages).json
        server.end(signal.SIGKILL)
    messages += [first["choices"][0]["message"], {"role": "user", "content": "What is it?"}]
    with ServerProcess(short_smollm2, *OPTIONS, "--archive-dir", str(tmp_path)) as server:
        kept = server.get(f"/conversations/{first['conversation']}").json["messages"]
        assert kept == messages[:2]
        assert chat(server, messages).json["conversation"] == first["conversation"]


def command(*arguments):
    return subprocess.run([sys.executable, "-m", "kvlocal_cli", "serve", *map(str, arguments)], capture_output=True, text=True, timeout=60)


def test_where_it_cannot_listen(short_smollm2):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = command(short_smollm2, "--port", taken.getsockname()[1])
    assert result.returncode == 1 and "choose another --port" in result.stderr and "Traceback" not in result.stderr
    result = command(short_smollm2, "--host", "no.such.host.invalid")
    assert result.returncode == 1 and "is no address of this machine" in result.stderr


def test_an_empty_key_is_no_key(short_smollm2):
    result = command(short_smollm2, "--api-key", "")
    assert result.returncode == 2 and "an API key is empty" in result.stderr


def test_everybody_may_use_it_without_a_key_and_a_warning_says_so(short_smollm2):
    with ServerProcess(short_smollm2, *OPTIONS, "--host", "0.0.0.0", "--forget") as server:
        assert server.log.count("everybody who reaches 0.0.0.0 can use the server") == 1
        started = time.monotonic()
    assert time.monotonic() - started < 20
