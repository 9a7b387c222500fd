"""What a body says, as what an engine is asked for; and what is wrong with it, in a sentence that names the field."""

import json

import pytest

from kvlocal.chat.messages import MessageError
from kvlocal.errors import KvlocalError
from kvlocal.llama.sampling import SamplingError, SamplingParams
from kvlocal.server.body import fields_of, json_of
from kvlocal.server.chat_request import answer_options, answer_requests
from kvlocal.server.errors import ApiError, of_failure
from kvlocal.server.schemas import ChatRequest

DEFAULTS = SamplingParams(temperature=0.7, seed=5)
HELLO = [{"role": "user", "content": "Hello"}]
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def parsed(**fields):
    return answer_requests(fields_of(ChatRequest, json.dumps({"messages": HELLO, **fields}).encode()), "me", DEFAULTS)


def one(**fields):
    (request,) = parsed(**fields)
    return request


def options_of(**fields):
    return answer_options(fields_of(ChatRequest, json.dumps({"messages": HELLO, **fields}).encode()))


def refused(**fields):
    with pytest.raises(ApiError) as caught:
        parsed(**fields)
    return caught.value


def test_what_is_not_said_is_as_the_server_has_it():
    request = one(unknown=1, temperature=None, stop=None, tools=None, n=None)
    assert (request.owner, request.messages, request.sampling) == ("me", HELLO, DEFAULTS)
    assert request.options.max_tokens is None and request.options.stop == () and request.options.top_logprobs is None


def test_sampling():
    sampling = one(temperature=1, top_p=0.5, top_k=7, min_p=0.1, repeat_penalty=1.2, presence_penalty=0.3, frequency_penalty=-0.4,
                   logit_bias={"12": -100}, seed=9).sampling  # fmt: skip
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p, sampling.repeat_penalty) == (1, 0.5, 7, 0.1, 1.2)
    assert (sampling.presence_penalty, sampling.frequency_penalty, dict(sampling.logit_bias), sampling.seed) == (0.3, -0.4, {12: -100}, 9)


def test_dry_and_xtc_under_the_names_of_llama_cpp():
    fields = {"dry_multiplier": 0.8, "dry_base": 2, "dry_allowed_length": 3, "dry_penalty_last_n": 100, "dry_sequence_breakers": ["x"],
              "xtc_probability": 0.5, "xtc_threshold": 0.2}  # fmt: skip
    sampling = one(**fields).sampling
    assert {name: getattr(sampling, name) for name in fields} == fields | {"dry_sequence_breakers": ("x",)}
    assert one(dry_penalty_last_n=-1).sampling.dry_penalty_last_n == 2**16


def test_numbers_that_others_use_for_off_and_for_any():
    assert one(top_k=-1).sampling.top_k == 0
    assert 0 < one(top_p=0).sampling.top_p < 1e-5
    assert one(max_tokens=-1).options.max_tokens is None
    assert one(seed=-1).sampling.seed == DEFAULTS.seed
    assert 0 <= one(seed=-(2**70)).sampling.seed < 2**32 - 1


def test_the_repeat_penalty_follows_the_temperature():
    assert one().sampling.repeat_penalty == 1.1
    assert one(temperature=0).sampling.repeat_penalty == 1
    assert one(temperature=0, repeat_penalty=1.3).sampling.repeat_penalty == 1.3


def test_several_answers_have_seeds_of_their_own():
    assert [request.sampling.seed for request in parsed(n=3, seed=7)] == [7, 8, 9]


@pytest.mark.parametrize("stop, wanted", [("END", ("END",)), (["a", "b"], ("a", "b")), ([], ()), (None, ())])
def test_stop(stop, wanted):
    assert one(stop=stop).options.stop == wanted


def test_the_newer_name_of_max_tokens_is_the_one_that_counts():
    assert one(max_tokens=5).options.max_tokens == 5
    assert one(max_completion_tokens=6).options.max_tokens == 6
    assert one(max_tokens=5, max_completion_tokens=6).options.max_tokens == 6


def test_response_formats():
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    assert options_of(response_format={"type": "text"}).json_schema is None
    assert options_of(response_format={"type": "json_object"}).json_schema == {"type": "object"}
    assert options_of(response_format={"type": "json_object", "schema": schema}).json_schema == schema
    assert options_of(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}).json_schema == schema


def test_tools():
    options = options_of(tools=[WEATHER], parallel_tool_calls=False)
    assert list(options.tools) == [WEATHER] and options.tool_choice == "auto" and not options.parallel_tool_calls
    named = options_of(tools=[WEATHER], tool_choice={"type": "function", "function": {"name": "weather"}})
    assert named.tool_choice == "required" and named.allowed_tools == ("weather",)


def test_log_probabilities():
    assert options_of(logprobs=True).top_logprobs == 0
    assert options_of(logprobs=True, top_logprobs=3).top_logprobs == 3
    assert options_of(logprobs=False).top_logprobs is None


def test_tools_that_are_not_to_be_called_are_no_fault():
    assert one(tools=[WEATHER], tool_choice="none").options.tool_choice == "none"


@pytest.mark.parametrize(
    "fields, param, words",
    [
        ({"messages": "hi"}, "messages", "has to be a list"),
        ({"messages": []}, "messages", "message"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages", "role"),
        ({"messages": [*HELLO, {"role": "assistant", "content": "Hi"}]}, "messages", "last message"),
        ({"temperature": "hot"}, "temperature", "has to be a number"),
        ({"temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"temperature": True}, "temperature", "has to be a number"),
        ({"top_p": 2}, "top_p", "less than or equal to 1"),
        ({"seed": 1.5}, "seed", "has to be a whole number"),
        ({"stop": 7}, "stop", "has to be"),
        ({"stop": ["a", 7]}, "stop.1", "has to be a string"),
        ({"stop": ""}, "stop", "empty"),
        ({"stop": ["x"] * 17}, "stop", "at most 16"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 1000}, "n", "less than or equal to 16"),
        ({"max_tokens": 0}, "max_tokens", "at least 1"),
        ({"logit_bias": {"cat": 1}}, "logit_bias", "numbers"),
        ({"logit_bias": {"5": 1000}}, "logit_bias.5", "less than or equal to 100"),
        ({"dry_multiplier": -1}, "dry_multiplier", "greater than or equal to 0"),
        ({"dry_base": 0.5}, "dry_base", "greater than or equal to 1"),
        ({"dry_penalty_last_n": -2}, "dry_penalty_last_n", "greater than or equal to -1"),
        ({"dry_sequence_breakers": ["x" * 41]}, "dry_sequence_breakers", "40 bytes"),
        ({"xtc_probability": 2}, "xtc_probability", "less than or equal to 1"),
        ({"top_logprobs": 2}, "top_logprobs", "set logprobs to true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "20"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "json_schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "no schema"),
        ({"response_format": {"type": "json_object"}, "grammar": 'root ::= "a"'}, "grammar", "leave one of them out"),
        ({"tools": [{"type": "function"}]}, "tools.0.function", "is missing"),
        ({"tools": [{"type": "magic", "function": {"name": "x"}}]}, "tools.0.type", "function"),
        ({"tool_choice": "required"}, "tool_choice", "no tools"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "time"}}}, "tool_choice", "weather"),
        ({"stream_options": 3}, "stream_options", "has to be an object"),
    ],
)  # fmt: skip
def test_what_is_wrong_names_its_field(fields, param, words):
    error = refused(**fields)
    assert (error.status, error.type, error.param) == (400, "invalid_request_error", param)
    assert words in error.message


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"7", b"NaN", b"\xff\xfe", b"[" * 100_000, b'{"messages": "\\ud800"}', b"null"])
def test_what_is_no_object(body):
    with pytest.raises(ApiError) as caught:
        fields_of(ChatRequest, body)
    assert caught.value.status == 400 and "body" in caught.value.message


def test_numbers_that_are_too_large():
    with pytest.raises(ApiError) as caught:
        fields_of(ChatRequest, b'{"messages": [], "temperature": 1e999}')
    assert caught.value.param == "temperature"


def test_a_body_of_nothing_but_brackets_is_not_parsed():
    with pytest.raises(ApiError) as caught:
        json_of(b"[" + b"[]," * 1_000_001 + b"0]")
    assert caught.value.status == 413


def test_a_byte_order_mark_is_no_fault():
    assert json_of(b'\xef\xbb\xbf{"a": 1}') == {"a": 1}


def test_failures_of_the_library():
    assert (of_failure(MessageError("message 2 is odd")).status, of_failure(MessageError("message 2 is odd")).param) == (400, "messages")
    assert (of_failure(SamplingError("top_k is -1, but must be 0 or more")).status, of_failure(SamplingError("top_k is -1")).param) == (400, "top_k")
    assert of_failure(KvlocalError("the disk is full: make room")).status == 500
