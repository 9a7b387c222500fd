"""Messages as clients send them become the turns of a session, whatever their order is."""

import pytest

from kvlocal.chat.messages import MessageError, check_order
from kvlocal.server.messages import canonical


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def system(content):
    return {"role": "system", "content": content}


CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "sunny"}


@pytest.mark.parametrize(
    "messages, wanted",
    [
        ([user("a")], [user("a")]),
        ([{"role": "developer", "content": "s"}, user("a")], [system("s"), user("a")]),
        ([system("s"), system("t"), user("a")], [system("s\n\nt"), user("a")]),
        ([system(""), user("a")], [user("a")]),
        ([user("a"), user("b")], [user("a\n\nb")]),
        ([user("a"), assistant(""), user("b")], [user("a\n\nb")]),
        ([user("a"), assistant(None), user("b")], [user("a\n\nb")]),
        ([user("a"), assistant("x"), assistant("y"), user("b")], [user("a"), assistant("x\n\ny"), user("b")]),
        ([user("a"), assistant("x"), system("s"), user("b")], [user("a"), assistant("x"), user("s\n\nb")]),
        ([user("a"), assistant("x"), user("b"), system("s")], [user("a"), assistant("x"), user("b\n\ns")]),
        ([user("a"), assistant("x"), system("s"), assistant("y"), user("b")], [user("a"), assistant("x\n\ny"), user("s\n\nb")]),
        ([assistant("hi"), user("a")], [user(""), assistant("hi"), user("a")]),
        ([user([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])], [user("a\nb")]),
        ([user("")], [user("")]),
        ([user("a"), CALLING, RESULT], [user("a"), {**CALLING, "content": ""}, RESULT]),
        ([user("a"), CALLING, RESULT, user("b")], [user("a"), {**CALLING, "content": ""}, RESULT, user("b")]),
        ([user("a"), assistant("Wait."), CALLING, RESULT], [user("a"), {**CALLING, "content": "Wait."}, RESULT]),
        ([{"role": "user", "content": "a", "name": "Ann", "other": 1}], [user("a")]),
    ],
)
def test_what_becomes_of_them(messages, wanted):
    found = canonical(messages)
    assert found == wanted
    if not any("tool_calls" in message for message in found):
        check_order(found)


def test_the_beginning_stays_when_a_conversation_grows():
    """What was read before is the beginning of what is to be read, also where the system speaks in between."""
    messages = [system("s"), user("a"), assistant("x"), system("t"), user("b"), assistant("y"), user("c")]
    before = canonical(messages[:5])
    assert canonical(messages)[: len(before)] == before


@pytest.mark.parametrize(
    "message, words",
    [
        (7, "message 2 is not an object"),
        ({"content": "a"}, "has the role null"),
        ({"role": "king", "content": "a"}, 'has the role "king"'),
        (user(7), "neither a string nor a list"),
        (user([{"type": "image_url", "image_url": {}}]), 'a part of the type "image_url"'),
        (user([7]), "a part of the type null"),
        (RESULT, "the one before it calls none"),
        ({"role": "assistant", "content": None, "tool_calls": [{}]}, "without the name of a function"),
        ({"role": "assistant", "content": None, "tool_calls": {}}, "are no list"),
        ({"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "["}}]}, "no JSON object"),
    ],
)
def test_what_is_none(message, words):
    with pytest.raises(MessageError, match=words):
        canonical([user("a"), message])
