"""/v1/completions and /v1/embeddings of a running server, with OpenAI's client and without."""

import http.client
import json
import socket
import threading

import numpy as np
import pytest
from serving_process import OPTIONS, ServerProcess, until

from kvlocal.llama.model import Model

openai = pytest.importorskip("openai")

SHORT = "The capital of France is"
LONG = "The keeper of the lighthouse wrote down the weather, the ships and the birds of every single day. "


@pytest.fixture(scope="module")
def server(short_smollm2):
    with ServerProcess(short_smollm2, *OPTIONS, "--parallel", "2", "--waiting", "3", "--forget") as running:
        yield running
        assert running.running
        assert "Traceback" not in running.log


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.address}/v1", api_key="any", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def model(short_smollm2):
    with Model(short_smollm2) as loaded:
        yield loaded


def complete(client, prompt=SHORT, **options):
    return client.completions.create(model="any", prompt=prompt, **options)


def test_a_text_is_gone_on_with(client, model):
    answer = complete(client)
    (choice,) = answer.choices
    tokens = model.tokenize(SHORT, parse_special=True)
    assert answer.object == "text_completion" and choice.text and choice.finish_reason == "length" and choice.logprobs is None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(tokens), 16)  # OpenAI's default
    assert complete(client, tokens.tolist()).choices[0].text == choice.text
    assert complete(client, max_tokens=3).usage.completion_tokens == 3


@pytest.mark.parametrize("as_tokens", [False, True])
def test_several_texts_each_as_if_alone(client, model, as_tokens):
    """More than wait at once, and several choices for each."""
    texts = [f"{i}. {SHORT}" for i in range(5)]
    alone = [complete(client, text, max_tokens=4).choices[0].text for text in texts]
    given = [model.tokenize(text, parse_special=True).tolist() for text in texts] if as_tokens else texts
    answer = complete(client, given, max_tokens=4, n=2, best_of=2)
    assert [choice.index for choice in answer.choices] == list(range(10))
    assert [choice.text for choice in answer.choices] == [text for text in alone for _ in range(2)]
    assert answer.usage.completion_tokens == 4 * 10
    assert answer.usage.prompt_tokens == sum(len(model.tokenize(text, parse_special=True)) for text in texts)


def test_a_stream_says_what_a_whole_answer_says(client):
    whole = complete(client, [SHORT, "Once upon a time"], logprobs=1, echo=True)
    chunks = list(complete(client, [SHORT, "Once upon a time"], logprobs=1, echo=True, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    for i, choice in enumerate(whole.choices):
        mine = [chunk.choices[0] for chunk in chunks[:-1] if chunk.choices[0].index == i]
        assert "".join(each.text for each in mine) == choice.text and choice.text.startswith((SHORT, "Once")[i])
        assert [each.finish_reason for each in mine] == [None] * (len(mine) - 1) + [choice.finish_reason]
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            assert [one for each in mine if each.logprobs for one in getattr(each.logprobs, name)] == getattr(choice.logprobs, name)


def test_log_probabilities_in_the_old_format(client):
    choice = complete(client, "Zwölf Köche — ", logprobs=2, echo=True, max_tokens=4).choices[0]
    told = choice.logprobs
    assert len({len(told.tokens), len(told.token_logprobs), len(told.top_logprobs), len(told.text_offset)}) == 1
    assert told.token_logprobs[0] is None and told.top_logprobs[0] is None and all(each <= 0 for each in told.token_logprobs[1:])
    for token, offset in zip(told.tokens, told.text_offset, strict=True):
        assert token.startswith("bytes:") or choice.text[offset:].startswith(token)
    for token, logprob, top in list(zip(told.tokens, told.token_logprobs, told.top_logprobs, strict=True))[1:]:
        assert top[token] == logprob and len(top) in (2, 3)
    without = complete(client, "Zwölf Köche — ", logprobs=0, max_tokens=4).choices[0].logprobs
    assert without.tokens == told.tokens[-4:] and without.text_offset == told.text_offset[-4:]
    assert [len(top) for top in without.top_logprobs] == [1] * 4


def test_the_text_alone_can_be_asked_for(client):
    """As programs do that measure how likely a text is."""
    choice = complete(client, SHORT, logprobs=1, echo=True, max_tokens=0).choices[0]
    assert choice.text == SHORT and "".join(choice.logprobs.tokens) == SHORT and choice.finish_reason == "length"


def test_what_is_asked_for_is_kept(client, model):
    text = complete(client).choices[0].text
    cut = complete(client, stop=[text[4:7], "never"]).choices[0]
    assert cut.text == text[: text.index(text[4:7])] and cut.finish_reason == "stop"
    hot = {"temperature": 1.5, "seed": 5, "n": 2}
    first, second = (complete(client, **hot).choices for _ in range(2))
    assert [one.text for one in first] == [one.text for one in second] and first[0].text != first[1].text
    (token,) = model.tokenize(" Paris", parse_special=True)
    assert complete(client, max_tokens=1, logit_bias={str(token): 100}).choices[0].text == " Paris"
    assert complete(client, extra_body={"grammar": 'root ::= "yes" | "no"'}).choices[0].text in ("yes", "no")


def test_a_text_beyond_the_budget_and_what_it_begins_with(client):
    text = (LONG * 35).strip()
    first = complete(client, text)
    assert first.usage.prompt_tokens > 640 and first.choices[0].text
    again = complete(client, text + first.choices[0].text + " And then")
    assert again.usage.prompt_tokens_details.cached_tokens > 600
    assert complete(client, text).choices[0].text == first.choices[0].text


@pytest.mark.parametrize(
    "fields, param, words",
    [
        ({}, "prompt", "is missing"),
        ({"prompt": 7}, "prompt", "has to be"),
        ({"prompt": []}, "prompt", "is empty"),
        ({"prompt": [[]]}, "prompt.0", "has no tokens"),
        ({"prompt": ["a", 7]}, "prompt.1", "has to be a string"),
        ({"prompt": [1, 2**70]}, "prompt", "is no token"),
        ({"prompt": [[1], [-1]]}, "prompt.1", "is no token"),
        ({"prompt": ["a"] * 2049}, "prompt", "at most 2048"),
        ({"prompt": "a", "suffix": "b"}, "suffix", "suffix is not possible"),
        ({"prompt": "a", "best_of": 3, "n": 2}, "best_of", "best_of is 3 and n is 2"),
        ({"prompt": "a", "best_of": 2}, "best_of", "best_of is 2 and n is 1"),
        ({"prompt": "a", "logprobs": True}, "logprobs", "whole number"),
        ({"prompt": "a", "logprobs": 21}, "logprobs", "less than or equal to 20"),
        ({"prompt": "a", "max_tokens": "x"}, "max_tokens", "whole number"),
        ({"prompt": "a", "max_tokens": -2}, "max_tokens", "greater than or equal to -1"),
        ({"prompt": "a", "stop": ""}, "stop", "empty"),
        ({"prompt": "a", "temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"prompt": "a", "grammar": "root ::= nothing"}, "grammar", "grammar"),
        ({"prompt": "a", "logit_bias": {"99999999": 1}}, "logit_bias", "a token"),
    ],
)
def test_what_is_wrong_names_its_field(server, fields, param, words):
    answer = server.post("/v1/completions", fields)
    assert answer.status == 400 and answer.error["param"] == param and words in answer.error["message"]


def test_a_token_that_is_biased_and_is_none_in_a_chat(server):
    body = {"messages": [{"role": "user", "content": "Hello"}], "logit_bias": {"99999999": 1}}
    answer = server.post("/v1/chat/completions", body)
    assert answer.status == 400 and answer.error["param"] == "logit_bias"


def test_empty_fields_are_as_good_as_absent_ones(server):
    fields = {"prompt": "", "suffix": "", "echo": None, "best_of": None, "logprobs": None, "n": None, "max_tokens": None, "user": "x"}
    assert server.post("/v1/completions", fields).status == 200
    assert server.post("/completions", {"prompt": "a", "max_tokens": -1}).json["usage"]["completion_tokens"] <= 12


def gauge(server, name):
    line = next(line for line in server.get("/metrics").data.decode().splitlines() if line.startswith(f"kvlocal_{name} "))
    return float(line.split()[1])


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_ends_its_texts(server, stream):
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    body = {"prompt": [SHORT] * 40, "max_tokens": 100_000, "stream": stream}
    connection.request("POST", "/v1/completions", json.dumps(body))
    assert until(lambda: gauge(server, "running") == 2)
    connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()
    assert until(lambda: gauge(server, "running") == 0)
    assert server.post("/v1/completions", {"prompt": SHORT, "max_tokens": 1}).status == 200


def test_many_texts_of_one_client_leave_room_for_others(server):
    found = []
    thread = threading.Thread(target=lambda: found.append(server.post("/v1/completions", {"prompt": [SHORT] * 12, "max_tokens": 8})))
    thread.start()
    assert until(lambda: gauge(server, "running") == 2)
    assert server.post("/v1/completions", {"prompt": SHORT, "max_tokens": 1}).status == 200
    assert not found
    thread.join(120)
    assert len(found[0].json["choices"]) == 12


def test_more_answers_to_a_chat_than_may_wait(client):
    answer = client.chat.completions.create(model="any", messages=[{"role": "user", "content": "Hello"}], n=8, max_tokens=2)
    assert [choice.index for choice in answer.choices] == list(range(8))


# embeddings


def test_a_client_that_goes_away_ends_its_embeddings(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    connection.request("POST", "/v1/embeddings", json.dumps({"input": [LONG * 20] * 1000}))
    assert until(lambda: gauge(server, "embedding") == 1)
    connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()
    assert until(lambda: gauge(server, "embedding") == 0)


def test_embeddings(client, model):
    texts = ["A cat sat on the mat.", "The quarterly earnings rose.", LONG * 15]
    answer = client.embeddings.create(model="any", input=texts)  # the client asks for base64
    vectors = [np.array(each.embedding) for each in answer.data]
    assert [each.index for each in answer.data] == [0, 1, 2] and answer.object == "list" and answer.data[0].object == "embedding"
    assert all(len(vector) == model.n_embd and np.linalg.norm(vector) == pytest.approx(1, abs=1e-5) for vector in vectors)
    tokens = [model.tokenize(text, parse_special=True, add_special=True).tolist() for text in texts]
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(map(len, tokens))
    for given in (tokens, texts[0], tokens[0]):
        again = client.embeddings.create(model="any", input=given, encoding_format="float")
        assert all(np.allclose(each.embedding, vector, atol=1e-6) for each, vector in zip(again.data, vectors, strict=False))
        assert len(again.data) == (3 if given is tokens else 1)


def test_embeddings_of_fewer_dimensions(client):
    whole = np.array(client.embeddings.create(model="any", input="A cat sat on the mat.").data[0].embedding)
    short = np.array(client.embeddings.create(model="any", input="A cat sat on the mat.", dimensions=64).data[0].embedding)
    assert short.shape == (64,) and np.allclose(short, whole[:64] / np.linalg.norm(whole[:64]), atol=1e-5)


@pytest.mark.parametrize(
    "fields, param, words",
    [
        ({}, "input", "is missing"),
        ({"input": []}, "input", "is empty"),
        ({"input": ""}, "input", "empty text"),
        ({"input": ["a", ""]}, "input", "empty text"),
        ({"input": [[1], []]}, "input.1", "has no tokens"),
        ({"input": [1, 10**9]}, "input", "is no token"),
        ({"input": ["a"] * 2049}, "input", "at most 2048"),
        ({"input": {"text": "a"}}, "input", "has to be"),
        ({"input": LONG * 1000}, "input", "too long to be embedded, 8192 are the most"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format", "base64"),
        ({"input": "a", "dimensions": 0}, "dimensions", "greater than or equal to 1"),
        ({"input": "a", "dimensions": 10_000}, "dimensions", "give no more"),
    ],
)
def test_what_is_wrong_with_embeddings_names_its_field(server, fields, param, words):
    answer = server.post("/v1/embeddings", fields)
    assert answer.status == 400 and answer.error["param"] == param and words in answer.error["message"]
