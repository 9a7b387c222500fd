"""Answers in the forms of OpenAI's API, from the pieces that an engine gives."""

import math

from kvlocal.chat.answer_piece import AnswerPiece, TokenLogprob, ToolCallDelta
from kvlocal.chat.logprobs import logprobs
from kvlocal.openai_forms.chat_reply import ChatReply, Choice, usage
from kvlocal.serving.request import Finished, Usage


def finished(reason="end", **changes):
    return Finished({"role": "assistant", "content": ""}, reason, Usage(10, 4, 3), **changes)


def choice(*pieces, end=None):
    made = Choice()
    for piece in pieces:
        made.add(piece)
    made.finished = end or finished()
    return made


CALLS = (
    AnswerPiece(tool_calls=(ToolCallDelta(0, "call_1", "weather", ""),)),
    AnswerPiece(tool_calls=(ToolCallDelta(0, "", "", '{"city":'),)),
    AnswerPiece(tool_calls=(ToolCallDelta(0, "", "", '"Rome"}'), ToolCallDelta(1, "call_2", "time", "{}"))),
)


def test_a_whole_answer():
    body = ChatReply("m").whole([choice(AnswerPiece("Hel"), AnswerPiece("lo"), end=finished(conversation="c1"))])
    assert body["object"] == "chat.completion" and body["model"] == "m" and body["id"].startswith("chatcmpl-")
    (answer,) = body["choices"]
    assert answer == {"index": 0, "message": {"role": "assistant", "content": "Hello"}, "logprobs": None, "finish_reason": "stop"}
    assert body["usage"] == {"prompt_tokens": 10, "completion_tokens": 3, "total_tokens": 13, "prompt_tokens_details": {"cached_tokens": 4}}
    assert body["conversation"] == "c1"


def test_why_it_ended():
    reasons = {reason: ChatReply("m").whole([choice(end=finished(reason))])["choices"][0]["finish_reason"]
               for reason in ("end", "stop", "length", "tool_calls", "stopped")}  # fmt: skip
    assert reasons == {"end": "stop", "stop": "stop", "length": "length", "tool_calls": "tool_calls", "stopped": "stop"}


def test_a_thought_is_apart():
    message = choice(AnswerPiece(reasoning="Hm"), AnswerPiece(reasoning="m."), AnswerPiece("Yes")).message
    assert message == {"role": "assistant", "content": "Yes", "reasoning_content": "Hmm."}


def test_tool_calls_are_put_together():
    message = choice(*CALLS).message
    assert message["content"] is None
    assert message["tool_calls"] == [
        {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Rome"}'}},
        {"id": "call_2", "type": "function", "function": {"name": "time", "arguments": "{}"}},
    ]


def test_tool_calls_in_chunks():
    reply = ChatReply("m")
    first, second, third = (reply.piece(0, piece)["choices"][0]["delta"]["tool_calls"] for piece in CALLS)
    assert first == [{"index": 0, "id": "call_1", "type": "function", "function": {"name": "weather", "arguments": ""}}]
    assert second == [{"index": 0, "function": {"arguments": '{"city":'}}]
    assert [delta["index"] for delta in third] == [0, 1]


def test_chunks():
    reply = ChatReply("m", with_usage=True)
    begin, piece, end, use = reply.begin(1), reply.piece(1, AnswerPiece("a")), reply.end(1, finished("length")), reply.usage([finished()])
    assert [chunk["object"] for chunk in (begin, piece, end, use)] == ["chat.completion.chunk"] * 4
    assert len({chunk["id"] for chunk in (begin, piece, end, use)}) == 1
    assert begin["choices"] == [{"index": 1, "delta": {"role": "assistant", "content": ""}, "finish_reason": None, "logprobs": None}]
    assert piece["choices"][0]["delta"] == {"content": "a"} and piece["usage"] is None
    assert end["choices"][0]["delta"] == {} and end["choices"][0]["finish_reason"] == "length"
    assert use["choices"] == [] and use["usage"]["total_tokens"] == 13


def test_log_probabilities_of_bytes_that_are_no_text():
    (found,) = logprobs([TokenLogprob(b"\xe2\x82", -0.5, ((b"a", -math.inf),))])
    assert found == {"token": "\ufffd", "logprob": -0.5, "bytes": [0xE2, 0x82],
                     "top_logprobs": [{"token": "a", "logprob": -9999.0, "bytes": [97]}]}  # fmt: skip


def test_several_answers_read_one_conversation():
    assert usage([Usage(10, 0, 3), Usage(10, 9, 4)]) == {
        "prompt_tokens": 10, "completion_tokens": 7, "total_tokens": 17, "prompt_tokens_details": {"cached_tokens": 0},
    }  # fmt: skip
