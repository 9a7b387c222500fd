"""kvlocal.compat.Llama beside llama-cpp-python's own: the calls of its documentation, and the form of what they give."""

import gc
import inspect
import itertools
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import warnings
import weakref
from pathlib import Path

import numpy as np
import pytest
from lora_file import write_lora

from kvlocal.compat import Llama, LlamaGrammar, NotSupported
from kvlocal.compat.chat_formats import FORMATS
from kvlocal.errors import KvlocalError
from kvlocal.hub.hub_file import HubFile
from kvlocal.llama.library import load
from kvlocal.template.chat_template import ChatTemplate

SETTINGS = {"n_ctx": 256, "n_threads": 1, "seed": 4, "verbose": False}
FEW = {"max_tokens": 6}
HELLO = [{"role": "user", "content": "Say hello to the keeper of the lighthouse."}]
JSON_ONLY = [
    {"role": "system", "content": "You are a helpful assistant that outputs in JSON."},
    {"role": "user", "content": "Who won the world series in 2020"},
]
TEAM = {"type": "object", "properties": {"team_name": {"type": "string"}}, "required": ["team_name"]}
EXTRACT = {
    "messages": [
        {"role": "system", "content": "A chat with an assistant that calls functions when it has to."},
        {"role": "user", "content": "Extract Jason is 25 years old"},
    ],
    "tools": [
        {
            "type": "function",
            "function": {
                "name": "UserDetail",
                "parameters": {
                    "type": "object",
                    "title": "UserDetail",
                    # a limit that models of any quality keep
                    "properties": {"name": {"title": "Name", "type": "string", "maxLength": 6}, "age": {"type": "integer", "maximum": 120}},
                    "required": ["name", "age"],
                },
            },
        }
    ],
    "tool_choice": {"type": "function", "function": {"name": "UserDetail"}},
}


@pytest.fixture(scope="module")
def llm(short_smollm2):
    with Llama(str(short_smollm2), chat_format="chatml", **SETTINGS) as made:
        yield made


@pytest.fixture(scope="module")
def theirs(short_smollm2):
    """llama-cpp-python's own, which comes with kvlocal and needs no more than it."""
    try:
        made = load().llama_cpp.Llama(str(short_smollm2), chat_format="chatml", logits_all=True, **SETTINGS)
    except ImportError as error:
        pytest.skip(f"llama-cpp-python's Llama cannot be imported: {error}")
    yield made
    made.close()


@pytest.fixture(scope="module")
def with_tools(short_smollm2):
    with Llama(str(short_smollm2), chat_format="chatml-function-calling", **SETTINGS) as made:
        yield made


def assert_same_form(ours, theirs, where="reply"):
    """The same keys everywhere, and values of the same types, or None in place of one."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        assert set(ours) == set(theirs), where
        for key in ours:
            assert_same_form(ours[key], theirs[key], f"{where}.{key}")
    elif isinstance(theirs, list) and isinstance(ours, list):
        for i, (one, other) in enumerate(itertools.product(ours, theirs[:1])):
            assert_same_form(one, other, f"{where}[{i}]")
    elif ours is not None and theirs is not None:
        assert isinstance(ours, float if isinstance(theirs, np.floating) else type(theirs)), where


def content(reply):
    return reply["choices"][0]["message"]["content"]


def text_of(chunks):
    return "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)


def went_on(llm, reply, messages, text):
    """Messages that go on a conversation."""
    return [*messages, reply["choices"][0]["message"], {"role": "user", "content": text}]


# what its documentation calls


def test_a_chat_completion(llm, theirs):
    call = {
        "messages": [
            {"role": "system", "content": "You are an assistant who perfectly describes images."},
            {"role": "user", "content": "Describe this image in detail please."},
        ]
    }
    reply = llm.create_chat_completion(**call, **FEW)
    assert_same_form(reply, theirs.create_chat_completion(**call, **FEW))
    assert content(reply) and reply["choices"][0]["finish_reason"] == "length" and reply["model"] == llm.model_path
    assert reply["id"].startswith("chatcmpl-") and reply["usage"]["completion_tokens"] == 6


def test_the_template_that_a_model_has_or_that_is_named(short_smollm2):
    with Llama(str(short_smollm2), chat_format="llama-2", **SETTINGS) as made:
        reply = made.create_chat_completion([{"role": "user", "content": "Describe this image in detail please."}], **FEW)
        assert reply["usage"]["completion_tokens"] == 6 and made.metadata["tokenizer.chat_template"].startswith("{% for")
        assert made.tokenize(b"[INST] Describe", special=True)[0] in made.tokenize(b"[INST]")
    with pytest.raises(NotSupported, match="functionary-v2.*chatml-function-calling"):
        Llama(str(short_smollm2), chat_format="functionary-v2")


def test_json(llm, theirs):
    call = {"messages": JSON_ONLY, "response_format": {"type": "json_object"}, "temperature": 0.7}
    reply = llm.create_chat_completion(**call)
    assert_same_form(reply, theirs.create_chat_completion(**call, **FEW))
    if reply["choices"][0]["finish_reason"] == "stop":
        assert isinstance(json.loads(content(reply)), dict)
    assert content(reply).startswith("{")


def test_json_of_a_schema(llm):
    call = {"messages": JSON_ONLY, "temperature": 0.7}
    schema = TEAM | {"properties": {"team_name": {"type": "string", "maxLength": 8}}, "additionalProperties": False}
    reply = llm.create_chat_completion(**call, response_format={"type": "json_object", "schema": schema})
    assert list(json.loads(content(reply))) == ["team_name"]
    other = llm.create_chat_completion(**call, response_format={"type": "json_schema", "json_schema": {"name": "team", "schema": schema}})
    third = llm.create_chat_completion(**call, grammar=LlamaGrammar.from_json_schema(json.dumps(schema)))
    assert content(reply) == content(other) == content(third)
    open_end = llm.create_chat_completion(**call, response_format={"type": "json_object", "schema": TEAM}, max_tokens=12)
    assert '"team_name"' in content(open_end)


def test_a_function_is_called(with_tools, theirs):
    reply = with_tools.create_chat_completion(**EXTRACT)
    assert_same_form(reply, theirs.create_chat_completion(**EXTRACT, max_tokens=4))
    (choice,) = reply["choices"]
    (call,) = choice["message"]["tool_calls"]
    assert choice["finish_reason"] == "tool_calls" and call["function"] == choice["message"]["function_call"]
    assert call["function"]["name"] == "UserDetail" and set(json.loads(call["function"]["arguments"])) == {"name", "age"}


def test_a_call_comes_in_chunks_and_its_result_is_answered(with_tools):
    chunks = list(with_tools.create_chat_completion(**EXTRACT, stream=True))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    calls = [delta["tool_calls"][0] for delta in deltas if delta.get("tool_calls")]
    arguments = "".join(call["function"]["arguments"] for call in calls)
    assert set(json.loads(arguments)) == {"name", "age"} and calls[0]["id"] and calls[0]["function"]["name"] == "UserDetail"
    assert {call["type"] for call in calls} == {"function"} and chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
    assert [delta["function_call"] for delta in deltas if delta.get("function_call")] == [call["function"] for call in calls]
    reply = with_tools.create_chat_completion(**EXTRACT)
    answered = [*EXTRACT["messages"], reply["choices"][0]["message"],
                {"role": "tool", "tool_call_id": reply["choices"][0]["message"]["tool_calls"][0]["id"], "content": "noted"}]  # fmt: skip
    last = with_tools.create_chat_completion(answered, tools=EXTRACT["tools"], tool_choice="none", **FEW)
    assert content(last) and "tool_calls" not in last["choices"][0]["message"]
    assert with_tools.last_usage.cached_tokens == reply["usage"]["total_tokens"]


def test_functions_by_their_older_names(with_tools):
    functions = [tool["function"] for tool in EXTRACT["tools"]]
    reply = with_tools.create_chat_completion(EXTRACT["messages"], functions=functions, function_call={"name": "UserDetail"})
    message = reply["choices"][0]["message"]
    assert message["function_call"]["name"] == "UserDetail"
    older = {"role": "assistant", "content": None, "function_call": message["function_call"]}
    messages = [*EXTRACT["messages"], older, {"role": "function", "name": "UserDetail", "content": "noted"}]
    assert content(with_tools.create_chat_completion(messages, functions=functions, function_call="none", **FEW))


def test_an_answer_comes_in_chunks(llm, theirs):
    chunks = list(llm.create_chat_completion(HELLO, stream=True, **FEW))
    whole = list(theirs.create_chat_completion(HELLO, stream=True, **FEW))
    for i in (0, 1, -1):
        assert_same_form(chunks[i], whole[i], f"chunk {i}")
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant"} and chunks[-1]["choices"][0]["delta"] == {}
    assert chunks[-1]["choices"][0]["finish_reason"] == "length" and len({chunk["id"] for chunk in chunks}) == 1
    assert text_of(chunks) == content(llm.create_chat_completion(HELLO, **FEW))


def test_log_probabilities(llm, theirs):
    call = {"logprobs": True, "top_logprobs": 2, "temperature": 0.0, **FEW}
    ours, others = llm.create_chat_completion(HELLO, **call), theirs.create_chat_completion(HELLO, **call)
    assert_same_form(ours, others)
    found = ours["choices"][0]["logprobs"]["content"]
    assert len(found) == 6 and all(len(each["top_logprobs"]) == 2 for each in found)
    assert "".join(each["token"] for each in found) == content(ours)
    streamed = [chunk["choices"][0] for chunk in llm.create_chat_completion(HELLO, stream=True, **call)]
    told = [each for choice in streamed if choice["logprobs"] for each in choice["logprobs"]["content"]]
    assert [each["logprob"] for each in told] == pytest.approx([each["logprob"] for each in found], abs=0.02)
    assert llm.create_chat_completion(HELLO, logprobs=True, **FEW)["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


def test_the_same_words_as_llama_cpp_python(llm, theirs):
    """Greedily, with the same template and all of the conversation in the cache."""
    call = {"messages": [JSON_ONLY[0], *HELLO], "temperature": 0.0, "max_tokens": 8}
    said, expected = llm.create_chat_completion(**call), theirs.create_chat_completion(**call)
    assert said["choices"] == expected["choices"] and said["usage"] == expected["usage"]


def test_objects_of_the_package_openai(llm):
    chat = pytest.importorskip("openai.types.chat")
    reply = llm.create_chat_completion_openai_v1(messages=HELLO, **FEW)
    assert isinstance(reply, chat.ChatCompletion) and reply.choices[0].message.content
    chunks = list(llm.create_chat_completion_openai_v1(messages=HELLO, stream=True, **FEW))
    assert all(isinstance(chunk, chat.ChatCompletionChunk) for chunk in chunks)


# texts as they are

PLANETS = "Q: Name the planets in the solar system? A: "


def test_a_completion(llm, theirs):
    call = {"prompt": PLANETS, "max_tokens": 8, "stop": ["Q:", "\n"], "echo": True}
    reply = llm(**call)
    assert_same_form(reply, theirs(**call))
    (choice,) = reply["choices"]
    assert choice["text"].startswith(PLANETS) and len(choice["text"]) > len(PLANETS) and reply["id"].startswith("cmpl-")
    assert llm.create_completion(**call | {"echo": False})["choices"][0]["text"] == choice["text"].removeprefix(PLANETS)
    assert llm(llm.tokenize(PLANETS.encode()), max_tokens=8, stop="Q:")["choices"][0]["text"] in choice["text"]


def test_the_same_continuation_as_llama_cpp_python(llm, theirs):
    call = {"prompt": "The keeper of the lighthouse", "max_tokens": 8, "temperature": 0.0}
    ours, others = llm(**call), theirs(**call)
    assert (ours["choices"], ours["usage"]) == (others["choices"], others["usage"])


def test_a_completion_comes_in_chunks(llm, theirs):
    call = {"prompt": PLANETS, "max_tokens": 4, "temperature": 0.0, "logprobs": 2}
    chunks, others = list(llm(stream=True, **call)), list(theirs(stream=True, **call))
    for i in (0, 1, -1):
        assert_same_form(with_names_apart(chunks[i]), with_names_apart(others[i]), f"chunk {i}")
    whole = llm(**call)["choices"][0]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole["text"] and chunks[-1]["choices"][0]["finish_reason"] == "length"
    offsets = [offset for chunk in chunks[:-1] for offset in chunk["choices"][0]["logprobs"]["text_offset"]]
    assert offsets == whole["logprobs"]["text_offset"] and offsets[0] == len(PLANETS)


def with_names_apart(reply):
    """With lists in place of objects whose names are tokens."""
    reply = json.loads(json.dumps(reply, default=float))
    for choice in reply["choices"]:
        if choice["logprobs"]:
            choice["logprobs"]["top_logprobs"] = [top and [*top.values()] for top in choice["logprobs"]["top_logprobs"]]
    return reply


def test_log_probabilities_of_a_text(llm, theirs):
    call = {"prompt": "Ships came by", "max_tokens": 3, "temperature": 0.0, "logprobs": 1, "echo": True}
    ours, others = llm(**call), theirs(**call)
    assert_same_form(with_names_apart(ours), with_names_apart(others))
    found, text = ours["choices"][0]["logprobs"], ours["choices"][0]["text"]
    # theirs leaves out the last token
    assert all(found[name][:-1] == others["choices"][0]["logprobs"][name] for name in ("tokens", "text_offset"))
    assert "".join(found["tokens"]) == text and found["token_logprobs"][0] is found["top_logprobs"][0] is None
    assert all(value < 0 for value in found["token_logprobs"][1:])


def test_what_is_in_front_of_a_text_is_not_told(short_gemma3):
    """A model that wants a token at the beginning of each text."""
    with Llama(str(short_gemma3), **SETTINGS) as made:
        found = made("Ships came by", max_tokens=2, logprobs=0, echo=True)["choices"][0]
        assert "".join(found["logprobs"]["tokens"]) == found["text"] and found["logprobs"]["text_offset"][0] == 0
        assert found["logprobs"]["token_logprobs"][0] < 0 and made.token_bos() == made.tokenize(b"Ships")[0]


def test_only_what_is_new_of_a_text_is_read(llm):
    text = "The keeper of the lighthouse wrote down the ships and the birds of every day. " * 30
    llm.reset()
    n_tokens = llm(text, max_tokens=1)["usage"]["prompt_tokens"]
    assert n_tokens > llm.n_ctx() and llm.last_usage.cached_tokens == 0
    llm(text + "One day", max_tokens=1)
    assert llm.last_usage.cached_tokens > 0.8 * n_tokens
    state = llm.save_state()
    llm.reset()
    llm.load_state(state)
    llm(text, max_tokens=1)
    assert llm.last_usage.cached_tokens == 0


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"suffix": "x"}, "suffix"),
        ({"stopping_criteria": [print]}, "stopping_criteria"),
        ({"prompt": 7}, "prompt has to be"),
        ({"prompt": ["a"]}, "prompt has to be"),
        ({"prompt": b"a"}, "prompt has to be"),
        ({"prompt": [-1]}, "no token"),
        ({"logprobs": True}, "logprobs has to be"),
        ({"logprobs": 99}, "top_logprobs is 99"),
    ],
)
def test_what_a_completion_refuses(llm, arguments, words):
    with pytest.raises(KvlocalError, match=words):
        llm(**{"prompt": "a"} | arguments)


# embeddings


def test_embeddings(short_smollm2):
    theirs = load().llama_cpp.Llama(str(short_smollm2), embedding=True, **SETTINGS)
    with Llama(str(short_smollm2), embedding=True, **SETTINGS) as made:
        ours = made.create_embedding("Hello, world!")
        expected = theirs.create_embedding("Hello, world!")
        assert_same_form(ours, expected)
        assert ours["usage"] == expected["usage"]
        one, other = (np.array(reply["data"][0]["embedding"]) for reply in (ours, expected))
        assert one.shape == other.shape and np.abs(one - other).max() < 0.02 * np.abs(other).max()
        several = made.create_embedding(["Hello, world!", "Goodbye, world!"])
        assert [each["index"] for each in several["data"]] == [0, 1] and several["data"][0] == ours["data"][0]
        vectors, n_tokens = made.embed("word " * 600, normalize=True, return_count=True)
        assert np.linalg.norm(vectors, axis=1) == pytest.approx(1) and n_tokens == len(vectors) == made.n_batch
        for wrong in (lambda: made.embed("word " * 600, truncate=False), lambda: made.embed([]), lambda: made.embed([1]), lambda: made("a")):
            with pytest.raises(KvlocalError, match="too long|list of texts|embeds texts alone"):
                wrong()
        assert made.pooling_type() == theirs.pooling_type() == 0
    theirs.close()


def test_pooled_embeddings(short_smollm2, llm):
    with Llama(str(short_smollm2), embedding=True, pooling_type=1, **SETTINGS) as made, Llama(str(short_smollm2), embedding=True, **SETTINGS) as rows:
        assert np.array(made.embed("Hello, world!")) == pytest.approx(np.mean(rows.embed("Hello, world!"), axis=0), abs=1e-3)
        assert len(made.embed(["Hello", "Goodbye"])) == 2
    with pytest.raises(NotSupported, match="pooling_type 3"):
        Llama(str(short_smollm2), embedding=True, pooling_type=3)
    with pytest.raises(NotSupported, match="embedding=True"):
        Llama(str(short_smollm2), pooling_type=1)
    with pytest.raises(NotSupported, match="embedding=True"):
        llm.embed("Hello")


# chats without end


def test_only_what_is_new_is_read(llm):
    llm.reset()
    first = llm.create_chat_completion(HELLO, **FEW)
    assert llm.last_usage.cached_tokens == 0 and llm.n_tokens == first["usage"]["total_tokens"]
    second = llm.create_chat_completion(went_on(llm, first, HELLO, "And to his cat?"), **FEW)
    assert llm.last_usage.cached_tokens == first["usage"]["total_tokens"] < second["usage"]["prompt_tokens"]


def test_a_chat_goes_on_past_its_cells(llm):
    messages, n_read = list(HELLO), []
    for i in range(10):
        reply = llm.create_chat_completion(messages, max_tokens=16)
        n_read.append(llm.last_usage.prompt_tokens - llm.last_usage.cached_tokens)
        messages = went_on(llm, reply, messages, f"And what did the keeper of lighthouse number {i} write down?")
    assert llm.n_tokens > 1.2 * llm.n_ctx() and max(n_read) < 45
    assert llm._engine.budget + 64 == llm.n_ctx() == 256


def test_a_stream_that_nobody_wants_any_more_ends(llm):
    before = llm.create_chat_completion(HELLO, stream=True)
    chunks = llm.create_chat_completion(HELLO, stream=True)
    assert [next(chunks) for _ in range(3)]
    chunks.close()
    assert content(llm.create_chat_completion(HELLO, **FEW))
    del before  # it was never begun
    assert llm._engine.stats().running == 0


def test_ctrl_c_ends_an_answer(llm):
    timer = threading.Timer(1, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        llm.create_chat_completion(HELLO, max_tokens=10**6)
    assert content(llm.create_chat_completion(HELLO, **FEW))


def test_threads_are_answered_one_after_another(llm):

    def count(i):
        return content(llm.create_chat_completion([{"role": "user", "content": f"Count to {i}."}], **FEW))

    alone, found = [count(i) for i in range(4)], {}
    threads = [threading.Thread(target=lambda i=i: found.update({i: count(i)})) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(4)] == alone


def test_states(llm, with_tools):
    llm.reset()
    first = llm.create_chat_completion(HELLO, **FEW)
    state = llm.save_state()
    assert state.n_tokens == llm.n_tokens
    messages = went_on(llm, first, HELLO, "And to his cat?")
    expected = content(llm.create_chat_completion(messages, **FEW))
    llm.reset()
    assert llm.n_tokens == 0 and llm._engine.conversations() == []
    llm.create_chat_completion(messages, **FEW)
    assert llm.last_usage.cached_tokens == 0
    llm.reset()
    llm.load_state(state)
    llm.load_state(state)
    assert llm.n_tokens == first["usage"]["total_tokens"] and len(llm._engine.conversations()) == 1
    assert content(llm.create_chat_completion(messages, **FEW)) == expected
    assert llm.last_usage.cached_tokens == first["usage"]["total_tokens"]
    for wrong in (with_tools, llm):
        with pytest.raises(NotSupported, match="state"):
            wrong.load_state(state if wrong is with_tools else "no state")
    with pytest.raises(NotSupported, match="belongs to its process"):
        pickle.dumps(state)


# how answers are drawn


def test_seeds(llm):
    call = {"messages": HELLO, "temperature": 1.5, "max_tokens": 10}
    one, other = (content(llm.create_chat_completion(**call, seed=seed)) for seed in (7, 8))
    assert one != other and content(llm.create_chat_completion(**call, seed=7)) == one
    by_default = content(llm.create_chat_completion(**call))
    assert by_default == content(llm.create_chat_completion(**call)) == content(llm.create_chat_completion(**call, seed=4))
    llm.set_seed(7)
    assert content(llm.create_chat_completion(**call)) == one
    llm.set_seed(SETTINGS["seed"])


def test_stops_biases_and_grammars(llm, tmp_path):
    assert content(llm.create_chat_completion(HELLO, temperature=0.0, top_k=-1, top_p=0, repeat_penalty=1.2, presence_penalty=0.1, **FEW))
    (newline,) = llm.tokenize(b"\n", add_bos=False)
    assert content(llm.create_chat_completion(HELLO, logit_bias={str(newline): 100}, **FEW)).strip() == ""
    (tmp_path / "one.gbnf").write_text('root ::= "perhaps"')
    for grammar in ('root ::= "perhaps"', LlamaGrammar.from_string('root ::= "perhaps"'), LlamaGrammar.from_file(tmp_path / "one.gbnf"),
                    load().llama_cpp.LlamaGrammar.from_string('root ::= "perhaps"')):  # fmt: skip
        reply = llm.create_chat_completion(HELLO, grammar=grammar)
        assert content(reply) == "perhaps" and reply["choices"][0]["finish_reason"] == "stop"
    for stop in ("hap", ["x", "hap"]):
        reply = llm.create_chat_completion(HELLO, grammar='root ::= "perhaps"', stop=stop)
        assert content(reply) == "per" and reply["choices"][0]["finish_reason"] == "stop"


def test_a_thought_stands_in_front_as_llama_cpp_python_has_it(short_smollm2):
    from kvlocal.chat.answer_piece import AnswerPiece
    from kvlocal.compat.chat_replies import ChatAnswer
    from kvlocal.serving.request import Finished, Usage

    pieces = [AnswerPiece(reasoning="Hm"), AnswerPiece(reasoning="m."), AnswerPiece("Yes"), AnswerPiece(".")]
    end = Finished({"role": "assistant", "content": ""}, "end", Usage())
    whole = content(ChatAnswer("m").whole([*pieces, end]))
    assert whole == text_of(ChatAnswer("m").chunks(iter([*pieces, end]))) == "<think>\nHmm.\n</think>\n\nYes."


# tokens and the model


@pytest.mark.parametrize("special", [False, True])
def test_tokens(llm, theirs, special):
    for text in (b"", b"Hello, world!", "日本語 👍🏽".encode(), b" <|im_start|>user\nHi<|im_end|>"):
        for add_bos in (False, True):
            tokens = llm.tokenize(text, add_bos, special)
            assert tokens == theirs.tokenize(text, add_bos, special) and all(type(token) is int for token in tokens)
            assert llm.detokenize(tokens, special=special) == theirs.detokenize(tokens, special=special)
    bos = llm.token_bos()
    assert llm.detokenize([bos, *llm.tokenize(b" a", add_bos=False)]) == theirs.detokenize([bos, *theirs.tokenize(b" a", add_bos=False)])


def test_what_the_model_is(llm, theirs):
    for name in ("n_ctx", "n_embd", "n_vocab", "token_bos", "token_eos", "token_nl"):
        assert getattr(llm, name)() == getattr(theirs, name)(), name
    assert llm.metadata == theirs.metadata and llm.model_path == theirs.model_path


def parameters_of(kind, name):
    return {key: each.default for key, each in inspect.signature(getattr(kind, name)).parameters.items()}


@pytest.mark.parametrize(
    "name",
    ["create_chat_completion", "create_completion", "__call__", "embed", "create_embedding", "tokenize", "detokenize", "from_pretrained",
     "load_state", "set_seed", "set_cache", "reset"],
)
def test_arguments_are_those_that_it_has_there(name):
    ours, theirs = (parameters_of(kind, name) for kind in (Llama, load().llama_cpp.Llama))
    rest = {"arguments": "kwargs"}
    assert [rest.get(key, key) for key in ours] == list(theirs)
    assert all(value == theirs[key] for key, value in ours.items() if key in theirs and (value or theirs[key]))


def test_every_argument_of_the_constructor_is_known(short_smollm2):
    """With the values that it has there they change nothing."""
    known = inspect.signature(load().llama_cpp.Llama.__init__).parameters
    defaults = {name: each.default for name, each in known.items() if name not in ("self", "model_path", "kwargs")}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Llama(str(short_smollm2), **defaults | {"n_threads": 1}).close()


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"rope_freq_base": 10000.0}, "rope_freq_base"),
        ({"vocab_only": True}, "vocab_only"),
        ({"tokenizer": object()}, "tokenizer"),
        ({"chat_handler": print}, "chat_handler"),
        ({"n_ctx": 16}, "n_ctx is 16: give at least 48"),
        ({"type_k": 999}, "type_k is 999"),
        ({"seed": "x"}, "seed has to be a whole number"),
        ({"n_ctx": "x"}, "n_ctx has to be a whole number"),
        ({"n_threads": -1}, "n_threads is -1"),
        ({"n_batch": 0}, "n_batch is 0"),
        ({"last_n_tokens_size": -2}, "repeat_last_n is -2"),
        ({"lora_path": 5}, "lora_path has to be the path"),
        ({"chat_format": 5}, "chat_format 5"),
    ],
)
def test_what_the_constructor_refuses(short_smollm2, arguments, words):
    with pytest.raises(KvlocalError, match=words):
        Llama(str(short_smollm2), **arguments)


def test_a_lora_adapter(short_smollm2, llm, tmp_path):
    adapter = write_lora(tmp_path / "adapter.gguf", short_smollm2, strength=2.0)
    call = {"prompt": "The keeper of the lighthouse", "max_tokens": 6, "temperature": 0.0}
    with Llama(str(short_smollm2), lora_path=str(adapter), lora_scale=0.5, **SETTINGS) as made:
        ours = made(**call)["choices"]
    theirs = load().llama_cpp.Llama(str(short_smollm2), lora_path=str(adapter), lora_scale=0.5, **SETTINGS)
    assert ours == theirs(**call)["choices"] != llm(**call)["choices"]
    theirs.close()
    with pytest.raises(KvlocalError, match="none.gguf"):
        Llama(str(short_smollm2), lora_path=str(tmp_path / "none.gguf"))


def test_no_such_model(tmp_path):
    with pytest.raises(KvlocalError, match="cannot be read"):
        Llama(str(tmp_path / "none.gguf"))


def test_settings(short_smollm2):
    q8_0 = load().llama_cpp.GGML_TYPE_Q8_0
    with pytest.warns(UserWarning, match="rows is no argument"):
        made = Llama(short_smollm2, n_ctx=512, n_threads=1, type_k=q8_0, type_v="q8_0", rows=3)
    with made:
        assert made._engine.config.type_k == made._engine.config.type_v == "q8_0" and made.n_ctx() == 512
        assert content(made.create_chat_completion(HELLO, **FEW))
    # one that guesses tokens ahead only makes it faster there
    with Llama(short_smollm2, n_ctx=48, n_batch=8, n_threads=1, chat_format="chatml", draft_model=object()) as made:
        assert content(made.create_chat_completion([{"role": "user", "content": "Hi"}], **FEW))
    with pytest.warns(UserWarning, match="was trained for"), Llama(short_smollm2, n_ctx=10**6, n_threads=1) as made:
        assert made.n_ctx() == int(made.metadata["llama.context_length"])


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"typical_p": 0.5}, "typical_p"),
        ({"mirostat_mode": 2}, "mirostat_mode"),
        ({"logits_processor": [print]}, "logits_processor"),
        ({"temperature": "hot"}, "temperature has to be a number"),
        ({"max_tokens": 1.5}, "max_tokens has to be a whole number"),
        ({"top_p": 3}, "top_p"),
        ({"stop": [""]}, "stop has to be"),
        ({"logit_bias": {"cat": 1}}, "logit_bias"),
        ({"logit_bias": {5: "much"}}, "logit_bias of 5"),
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {"type": "xml"}}, "xml.*json_object"),
        ({"tools": [{"name": "x"}]}, "tool 1"),
        ({"tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": 5}, "tools has to be a list"),
        ({"tools": [{"type": "function", "function": {"name": "x", "parameters": {"a": object()}}}]}, "tools has something in it"),
        ({"functions": "x"}, "functions has to be a list"),
        ({"stop": 5}, "stop has to be"),
        ({"logit_bias": [1]}, "logit_bias has to be a dict"),
        ({"response_format": {"type": "json_object", "schema": 5}}, "schema of response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": 5}}, "no schema"),
        ({"grammar": 7}, "grammar"),
        ({"grammar": "root ::= ("}, "grammar"),
        ({"top_logprobs": 2.5, "logprobs": True}, "top_logprobs"),
    ],
)  # fmt: skip
def test_what_a_call_refuses(llm, arguments, words):
    with pytest.raises(KvlocalError, match=words):
        llm.create_chat_completion(HELLO, **arguments)


IMAGE = {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}


@pytest.mark.parametrize(
    "messages",
    [[], "Hello", [{"role": "king", "content": "x"}], [*HELLO, {"role": "assistant", "content": "Hi"}], [7], [{"role": "user", "content": [IMAGE]}]],
)
def test_what_is_no_conversation(llm, messages):
    with pytest.raises(KvlocalError):
        llm.create_chat_completion(messages)


def test_a_model_without_tools_says_so(short_smollm2):
    with Llama(str(short_smollm2), **SETTINGS) as made, pytest.raises(KvlocalError, match="no place for tools"):
        made.create_chat_completion(**EXTRACT)


def test_what_it_has_not_is_a_sentence(llm):
    for name in ("eval", "generate", "scores", "ctx"):
        assert not hasattr(llm, name)
        with pytest.raises(AttributeError, match=f"kvlocal's Llama has no {name}: use"):
            getattr(llm, name)
    with pytest.raises(NotSupported, match="another process"):
        pickle.dumps(llm)
    llm.set_cache(None)
    for call, words in ((lambda: llm.tokenize("a"), "text has to be bytes"), (lambda: llm.set_seed("a"), "seed has to be")):
        with pytest.raises(KvlocalError, match=words):
            call()


def test_after_the_end(short_smollm2):
    made = Llama(str(short_smollm2), **SETTINGS)
    made.close()
    made.close()
    stream = made.create_chat_completion(HELLO, stream=True)
    for call in (lambda: made.create_chat_completion(HELLO), lambda: made.tokenize(b"a"), lambda: list(stream)):
        with pytest.raises(KvlocalError, match="clos"):
            call()


def test_nobody_has_to_close_it(short_smollm2):
    made = Llama(str(short_smollm2), **SETTINGS)
    made.create_chat_completion(HELLO, **FEW)
    model, engine = weakref.ref(made._model), weakref.ref(made._engine)
    del made
    gc.collect()
    assert (model() is None or model().closed) and (engine() is None or not engine()._driver.is_alive())


# where models come from


def test_pretrained_ones(short_smollm2, tmp_path, monkeypatch):
    monkeypatch.setenv("KVLOCAL_MODELS_DIR", str(tmp_path))
    for name in ("tiny-q8_0.gguf", "tiny-q4_0.gguf"):
        path = HubFile.parse(f"hf:some/models/{name}").path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(short_smollm2)
    with Llama.from_pretrained("some/models", "*q8_0.gguf", **SETTINGS) as made:
        assert Path(made.model_path).name == "tiny-q8_0.gguf"
    with Llama.from_pretrained(repo_id="some/models", filename="tiny-q4_0.gguf", **SETTINGS) as made:
        assert Path(made.model_path).name == "tiny-q4_0.gguf"
    with pytest.raises(KvlocalError, match="2 files of some/models fit"):
        Llama.from_pretrained("some/models", "*.gguf")
    with pytest.raises(NotSupported, match="local_dir"):
        Llama.from_pretrained("some/models", "*q8_0.gguf", local_dir=tmp_path)
    with pytest.raises(KvlocalError, match="GGUF file of a hub repository"):
        Llama.from_pretrained("models", "tiny.gguf")


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_named_templates(name):
    template = ChatTemplate(FORMATS[name], bos_token="<s>", eos_token="</s>")
    messages = [{"role": role, "content": text} for role, text in zip(("system", "user", "assistant", "user"), "SABC", strict=True)]
    written = {
        "chatml": "[im]system\nS[/im]\n[im]user\nA[/im]\n[im]assistant\nB[/im]\n[im]user\nC[/im]\n[im]assistant\n",
        "chatml-function-calling": "[im]system\nS[/im]\n[im]user\nA[/im]\n[im]assistant\nB[/im]\n[im]user\nC[/im]\n[im]assistant\n",
        "gemma": "<s>[gemma]user\nS\n\nA[/gemma]\n[gemma]model\nB[/gemma]\n[gemma]user\nC[/gemma]\n[gemma]model\n",
        "llama-2": "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nA [/INST] B </s><s>[INST] C [/INST]",
        "llama-3": "<s>[h]system[/h]\n\nS[eot][h]user[/h]\n\nA[eot][h]assistant[/h]\n\nB[eot][h]user[/h]\n\nC[eot][h]assistant[/h]\n\n",
        "mistral-instruct": "<s>[INST] S\n\nA [/INST]B</s>[INST] C [/INST]",
        "zephyr": "<|system|>\nS</s>\n<|user|>\nA</s>\n<|assistant|>\nB</s>\n<|user|>\nC</s>\n<|assistant|>\n",
    }[name]
    for short, marker in {"[im]": "<|im_start|>", "[/im]": "<|im_end|>", "[gemma]": "<start_of_turn>", "[/gemma]": "<end_of_turn>",
                          "[h]": "<|start_header_id|>", "[/h]": "<|end_header_id|>", "[eot]": "<|eot_id|>"}.items():  # fmt: skip
        written = written.replace(short, marker)
    assert template.render(messages, opening=True) == written


def test_the_example_of_the_documentation(short_smollm2, capsys):
    page = (Path(__file__).parents[1] / "docs/llama-cpp-python.md").read_text()
    program = "\n".join(line[4:] for line in page.splitlines() if line.startswith("    "))
    assert "n_ctx=2048" in program
    exec(compile(program.replace('"model.gguf"', repr(str(short_smollm2))).replace("max_tokens=100", "max_tokens=4"), "page", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_it_needs_nothing_of_the_web():
    """Neither the server's packages nor openai are there for a program that only has kvlocal."""
    blocked = "import sys; sys.modules.update(dict.fromkeys(['starlette', 'pydantic', 'uvicorn', 'sse_starlette', 'prometheus_client', 'openai']))"
    ran = subprocess.run([sys.executable, "-c", f"{blocked}; import kvlocal.compat"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
