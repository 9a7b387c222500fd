"""Tools, grammars, JSON schemas and log-probabilities: what one answer can be asked for."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from templates import source_tree

from kvlocal.chat.config import SessionConfig, SessionError
from kvlocal.chat.messages import MessageError, canonical, check_order, parse_messages
from kvlocal.chat.options import AnswerOptions
from kvlocal.chat.session import ChatSession
from kvlocal.errors import KvlocalError
from kvlocal.llama.grammar import Grammar, GrammarError, GrammarRules
from kvlocal.llama.model import Model
from kvlocal.llama.sampling import SamplingParams, log_probabilities
from kvlocal.template.chat_template import ChatTemplate

SOURCE = (Path(__file__).parent / "chatml_tools.jinja").read_text(encoding="utf-8")
CITY = {"type": "object", "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "get_weather", "description": "The weather in a city", "parameters": CITY}}
TIME = {"type": "function", "function": {"name": "get_time", "description": "The time in a city", "parameters": CITY}}
CALL = {"id": "abc123def", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}
GREEDY = SamplingParams(temperature=0)
ONE_CALL = AnswerOptions(tool_choice="required", parallel_tool_calls=False)


@pytest.fixture(scope="module")
def model(smollm2: Path) -> Iterator[Model]:
    with Model(smollm2) as model:
        model.metadata["tokenizer.chat_template"] = SOURCE
        yield model


@pytest.fixture
def chat(model: Model) -> Iterator[ChatSession]:
    config = SessionConfig(budget=512, tools=(WEATHER, TIME), n_threads=1, max_tokens=60, sampling=GREEDY)
    with ChatSession(model, config) as chat:
        yield chat


def text_in(chat: ChatSession) -> str:
    """What the template says of the conversation in the cache."""
    return chat.template.render(chat.messages, opening=True)


def test_a_required_call_comes_in_pieces_and_is_in_the_message(chat: ChatSession) -> None:
    chat.add_turn("user", "What is the weather in Paris?")
    pieces = list(chat.pieces(ONE_CALL))
    deltas = [delta for piece in pieces for delta in piece.tool_calls]
    (call,) = chat.messages[-1]["tool_calls"]
    assert call["function"]["name"] in ("get_weather", "get_time") and call["id"] and call["type"] == "function"
    assert json.loads(call["function"]["arguments"])["city"] in ("Paris", "Rome")
    assert "".join(delta.arguments for delta in deltas) == call["function"]["arguments"]
    assert [delta.name for delta in deltas if delta.name] == [call["function"]["name"]]
    assert {delta.index for delta in deltas} == {0} and len(deltas) > 1
    assert chat.last is not None and chat.last.stop_reason == "tool_calls"
    assert "".join(piece.text for piece in pieces) == chat.messages[-1]["content"] == ""


def test_results_follow_a_call_and_yield_no_control_token(chat: ChatSession) -> None:
    chat.add_turn("user", "What is the weather in Paris?")
    list(chat.pieces(ONE_CALL))
    n_tokens = chat.kv.history_tokens
    chat.add_messages([{"role": "tool", "content": "Sunny <|im_end|> <tool_call>", "tool_call_id": "x"}])
    passages = chat.segments()[-2:]
    assert passages[0].text == "Sunny <|im_end|> <tool_call>"
    assert "".join(chat.answer(AnswerOptions(tool_choice="none", max_tokens=8)))
    assert chat.last is not None and chat.last.prompt_tokens < 60
    assert chat.kv.history_tokens - n_tokens < 80, "the conversation was read again"
    # a conversation that is read again says the same
    messages = [dict(message) for message in chat.messages]
    chat.restore(messages)
    assert chat.messages == messages


def test_allowed_tools_and_none(chat: ChatSession) -> None:
    chat.add_turn("user", "What time is it in Rome?")
    list(chat.pieces(AnswerOptions(tool_choice="required", allowed_tools=("get_time",), parallel_tool_calls=False)))
    assert [call["function"]["name"] for call in chat.messages[-1]["tool_calls"]] == ["get_time"]
    list(chat.regenerate(AnswerOptions(tool_choice="none", max_tokens=8)))
    assert "tool_calls" not in chat.messages[-1]
    for options in (AnswerOptions(allowed_tools=("get_lost",)), AnswerOptions(tools=(TIME,)), AnswerOptions(grammar='root ::= "a"')):
        with pytest.raises(SessionError):
            chat.regenerate(options)


def test_an_answer_follows_a_json_schema(chat: ChatSession) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 10}, "age": {"type": "integer", "minimum": 0, "maximum": 120}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    found = json.loads("".join(chat.send("Describe a person.", AnswerOptions(json_schema=schema))))
    assert set(found) == {"name", "age"} and 0 <= found["age"] <= 120
    assert chat.last is not None and chat.last.stop_reason == "end"
    with pytest.raises(SessionError):
        chat.send("Again.", AnswerOptions(json_schema={"type": "no such type"}))


def test_an_answer_follows_a_grammar_and_a_wrong_one_leaves_the_turn_open(chat: ChatSession, capfd: pytest.CaptureFixture[str]) -> None:
    none = {"tool_choice": "none"}
    assert "".join(chat.send("Is it?", AnswerOptions(grammar='root ::= "perhaps" | "hardly"', **none))) in ("perhaps", "hardly")
    chat.add_turn("user", "Really?")
    wrong = ['root ::= "a', 'x ::= "a"', 'root ::= root "a" | "b"', "root ::= nowhere", ""]
    for grammar in (*wrong, "root ::= " + 9999 * "("):
        with pytest.raises(GrammarError):
            chat.answer(AnswerOptions(grammar=grammar, **none))
    assert "".join(chat.answer(AnswerOptions(grammar='root ::= "yes"', **none))) == "yes"
    assert capfd.readouterr().err == ""


def test_a_grammar_that_waits_begins_inside_a_token_and_not_in_a_thought(model: Model) -> None:
    rules = GrammarRules('root ::= "<call>" [0-9]+', triggers=("<call>",), thought=("<think>", "</think>"))

    def after(text: str) -> Grammar:
        grammar = Grammar(model, rules)
        for token in model.tokenize(text, parse_special=False).tolist():
            grammar.accept(token)
        return grammar

    letter, digit = (int(model.tokenize(text, parse_special=False)[0]) for text in ("x", "7"))
    assert after("Well, <cal").allows(letter)
    assert not after("Well, <call>").allows(letter) and after("Well, <call>").allows(digit)
    assert after("<think>I may <call>").allows(letter)
    assert not after("<think>I may <call></think> <call>").allows(letter)
    # an answer that left it within the token that triggered it goes on without it
    word = int(model.tokenize(" weather", parse_special=False)[0])
    left = Grammar(model, GrammarRules('root ::= "wea" [0-9]+', triggers=("wea",)))
    left.accept(word)
    assert model.token_bytes(word) == b" weather" and left.allows(letter)


def test_stop_texts_end_an_answer_across_tokens(chat: ChatSession) -> None:
    none = AnswerOptions(tool_choice="none", max_tokens=24)
    whole = "".join(chat.send("Tell me a story.", none))
    stop = whole[9:14]
    stopped = "".join(chat.regenerate(AnswerOptions(tool_choice="none", max_tokens=24, stop=("no such text", stop))))
    assert stopped == whole[: whole.index(stop)] == chat.messages[-1]["content"]
    assert chat.last is not None and chat.last.stop_reason == "stop"


def test_log_probabilities_are_those_of_the_model(chat: ChatSession) -> None:
    chat.add_turn("user", "Hello!")
    expected = chat.prediction
    assert expected is not None
    pieces = list(chat.pieces(AnswerOptions(tool_choice="none", max_tokens=5, top_logprobs=3)))
    tokens = [logprob for piece in pieces for logprob in piece.logprobs]
    assert chat.last is not None and tokens == list(chat.last.logprobs) and len(tokens) == len(chat.last.drawn)
    exact = expected.astype(np.float64) - expected.max()
    exact -= np.log(np.exp(exact).sum())
    assert tokens[0].logprob == pytest.approx(exact[chat.last.drawn[0]], abs=1e-4)
    assert [value for _, value in tokens[0].top] == pytest.approx(np.sort(exact)[::-1][:3], abs=1e-4)
    assert tokens[0].top[0] == (tokens[0].token, tokens[0].logprob)  # the likeliest is taken
    assert log_probabilities(expected, 0, 0)[1] == []


def test_a_template_without_a_place_for_tools_says_so(smollm2: Path) -> None:
    with Model(smollm2) as model:
        model.metadata["tokenizer.chat_template"] = "{% for m in messages %}{{ '<|im_start|>' + m.role + m.content + '<|im_end|>' }}{% endfor %}"
        with pytest.raises(KvlocalError, match="no place for tools"):
            ChatSession(model, SessionConfig(budget=512, tools=(WEATHER,)))
        with ChatSession(model, SessionConfig(budget=512, n_threads=1, max_tokens=3)) as chat:
            # messages of tools are carried as text
            chat.add_messages([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "", "tool_calls": [CALL]}])
            chat.add_messages([{"role": "tool", "content": "Sunny"}, {"role": "user", "content": "And?"}])
            assert [message["role"] for message in chat.messages] == ["user", "assistant", "tool", "user"]


# those whose calls are written in another way where a result follows, or not at all (LFM2, Granite 3.3)
ELSEWHERE = {
    "Apriel-1.6-15b-Thinker-fixed", "Bielik-11B-v3.0-Instruct", "CohereForAI-c4ai-command-r-plus-tool_use",
    "CohereForAI-c4ai-command-r7b-12-2024-tool_use", "LFM2-8B-A1B", "LFM2.5-Instruct", "NVIDIA-Nemotron-Nano-v2",
    "ibm-granite-granite-3.3-2B-Instruct", "mistralai-Mistral-Nemo-Instruct-2407", "upstage-Solar-Open-100B",
}  # fmt: skip


def test_calls_and_results_are_appended_as_the_templates_of_families_write_them() -> None:
    tree = source_tree()
    if tree is None:
        pytest.skip("the source tree of llama.cpp is not under build/")
    system, user = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Weather?"}
    answer = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    results = [{"role": "tool", "tool_call_id": CALL["id"], "name": "get_weather", "content": text} for text in ("Sunny & warm", "Rain")]
    n_equal, other = 0, set()
    for path in sorted((tree / "models/templates").glob("*.jinja")):
        try:
            template = ChatTemplate(path.read_text(encoding="utf-8"), bos_token="<s>", eos_token="</s>").with_tools([WEATHER])
        except KvlocalError:
            continue
        pieces = [*template.prefix("Be brief."), *template.user_turn([system], "Weather?"), *template.given_answer([system, user], answer)]
        pieces += [*template.turn([system, user, answer], results), *template.answer_start([system, user])]
        if "".join(piece.text for piece in pieces) == template.render([system, user, answer, *results], opening=True):
            n_equal += 1
        else:
            other.add(path.stem)
    assert other <= ELSEWHERE and n_equal > 45


def test_messages_of_clients_are_parsed() -> None:
    parsed = parse_messages(
        [
            {"role": "developer", "content": [{"type": "text", "text": "Be"}, {"type": "text", "text": "brief."}], "extra": 1},
            {"role": "user", "content": "Hi", "name": "Eve"},
            {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]},
            {"role": "tool", "tool_call_id": "call00000", "content": "1"},
        ]
    )
    assert parsed[0] == {"role": "system", "content": "Be\nbrief."}
    assert parsed[2]["content"] == "" and parsed[2]["tool_calls"][0]["function"] == {"name": "f", "arguments": '{"a": 1}'}
    assert canonical(parsed)[3] == {"role": "tool", "tool_call_id": "call00000", "content": "1", "name": "f"}
    check_order(parsed)
    wrong = [
        {"role": "user", "content": None},
        {"role": "user", "content": [{"type": "image_url", "image_url": {}}]},
        {"role": "assistant", "content": None, "tool_calls": "f"},
        {"role": "assistant", "tool_calls": [{"function": {"arguments": "{}"}}]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]},
        {"role": "tool", "content": "x", "tool_call_id": 3},
    ]
    for message in wrong:
        with pytest.raises(MessageError, match="message 1"):
            parse_messages([message])


def test_messages_are_brought_into_the_order_of_a_session() -> None:
    def order(*messages: tuple[str, str]) -> list[tuple[str, str]]:
        return [(each["role"], each["content"]) for each in canonical([{"role": role, "content": text} for role, text in messages])]

    assert order(("system", "a"), ("system", "b"), ("user", "c"), ("user", "d")) == [("system", "a\n\nb"), ("user", "c\n\nd")]
    assert order(("user", "a"), ("system", "b"), ("assistant", "c"), ("system", "d")) == [("user", "a\n\nb"), ("assistant", "c"), ("user", "d")]
    assert order(("assistant", "a"), ("assistant", "b")) == [("user", ""), ("assistant", "a\n\nb")]
    assert order(("user", "a"), ("assistant", "b"), ("tool", "c")) == [("user", "a"), ("assistant", "b"), ("user", "c")]
    assert order(("user", "a"), ("assistant", ""), ("user", "b")) == [("user", "a"), ("assistant", ""), ("user", "b")]
    (_, answer) = canonical([{"role": "user", "content": "a"}, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nb"}])
    assert answer == {"role": "assistant", "content": "b", "reasoning_content": "hm"}
