"""The boundary to libkvlocal-chat: requests, results and refusals."""

import json
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
from fuzzing import mutate
from templates import source_tree, templates

from kvlocal.llama.library import load_chat
from kvlocal.template.compiled import AnswerError, CompiledTemplate, TemplateError
from kvlocal.template.defaults import CHATML

ASKED = [{"role": "user", "content": "Hi {{ x }} \u00e9\u4e16\U0001f600"}]
ADD = {
    "type": "function",
    "function": {
        "name": "add", "description": "adds",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}, "required": ["a", "b"]},
    },
}  # fmt: skip


def render(source: str, **options: object) -> str:
    return CompiledTemplate(source).render(ASKED, **{"opening": False, "now": 0, **options})


def test_texts_come_back_as_they_are() -> None:
    assert render("{{ messages[0].content }}") == ASKED[0]["content"]
    assert render("{{ messages[0].content }}" + "x\0y") == ASKED[0]["content"] + "x\0y"
    assert render("{{ bos_token }}|{{ eos_token }}") == "|"
    # half a character
    assert "\ufffd" in CompiledTemplate("{{ messages[0].content[0:1] }}").render([{"role": "user", "content": "\u00e9"}], opening=False, now=0)


def test_the_time_is_the_callers() -> None:
    source = "{{ strftime_now('%Y') }} {{ date_string }}"
    assert render(source, now=86400 * 200) == "1970 20 Jul 1970"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ raise_exception('no way.') }}", "no way"),
        ("{{ messages[0].content | nope }}", "Unknown"),
        ("{{ 1 + none }}", "null"),
    ],
)
def test_a_refusal_is_one_line(source: str, reason: str) -> None:
    with pytest.raises(TemplateError, match=reason) as caught:
        render(source)
    assert "\n" not in str(caught.value) and not str(caught.value).endswith(".")


@pytest.mark.parametrize("source", ["", "{% for %}", "{{", "{% endfor %}"])
def test_broken_templates(source: str) -> None:
    with pytest.raises(TemplateError):
        CompiledTemplate(source)


def test_a_template_serves_several_threads() -> None:
    template = CompiledTemplate(CHATML)
    conversations = [[{"role": "user", "content": str(i) * 1000}] for i in range(40)]
    alone = [template.render(messages, opening=True, now=0) for messages in conversations]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda messages: template.render(messages, opening=True, now=0), conversations)) == alone


def test_an_answer_that_is_not_in_the_format() -> None:
    tree = source_tree()
    if tree is None:
        pytest.skip("the source tree of llama.cpp is not under build/")
    answers = CompiledTemplate(templates(tree)["openai-gpt-oss-120b"]).answer_format(ASKED)
    assert answers.supports_thinking
    with pytest.raises(AnswerError, match="does not match") as caught:
        answers.parse("<|channel|>nothing of the sort")
    assert "\n" not in str(caught.value)
    deep = "<|channel|>final<|message|>" + "[" * 100_000
    assert answers.parse(deep).content == "[" * 100_000


def test_mutated_answers_are_read_or_refused() -> None:
    tree = source_tree()
    if tree is None:
        pytest.skip("the source tree of llama.cpp is not under build/")
    found = templates(tree)
    read = refused = 0
    for family, answer in [
        ("openai-gpt-oss-120b", "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes, \u00e9\u4e16."),
        ("Qwen-Qwen3-0.6B", "<think>\nHm.\n</think>\n\nYes, \u00e9\u4e16."),
    ]:
        answers = CompiledTemplate(found[family]).answer_format(ASKED)
        for i in range(300):
            text = mutate(answer.encode(), random.Random(i), [b"<|end|>", b"</think>", b"<think>", b"<|start|>"]).decode("utf-8", "replace")
            try:
                answers.parse(text, is_partial=bool(i % 2))
                read += 1
            except AnswerError as error:
                assert "\n" not in str(error)
                refused += 1
    assert read > 100 and refused > 20 and read + refused == 600


def test_arguments_are_checked_at_the_boundary() -> None:
    chat = load_chat()
    ffi, lib = chat.ffi, chat.lib
    out, text, form = ffi.new("struct kvl_chat **"), ffi.new("struct kvl_chat_text **"), ffi.new("struct kvl_chat_format **")
    source = CHATML.encode()

    def compiled(source: object, n: int, seconds: float = 1.0, n_bytes: int = 1 << 26, out: object = out) -> int:
        return lib.kvl_chat_compile(source, n, ffi.NULL, 0, ffi.NULL, 0, seconds, n_bytes, out)

    for arguments in [(ffi.NULL, 5), (b"", 0), (source, len(source), 0.0), (source, len(source), float("nan")), (source, len(source), 1.0, 0),
                      (source, len(source), 1.0, 1 << 40), (source, len(source), 1.0, 1 << 26, ffi.NULL)]:  # fmt: skip
        assert compiled(*arguments) == lib.KVL_CHAT_ERR_ARGUMENT
        assert lib.kvl_chat_last_error() != ffi.NULL and ffi.string(lib.kvl_chat_last_error())
    assert compiled(source, len(source)) == lib.KVL_CHAT_OK and not ffi.string(lib.kvl_chat_last_error())
    handle = ffi.gc(out[0], lib.kvl_chat_free)
    for request in (b"", b"{", b"[]", b"{}", b"\xff", b"[" * 100_000):
        assert lib.kvl_chat_render(handle, request, len(request), text) == lib.KVL_CHAT_ERR_ARGUMENT
        assert lib.kvl_chat_apply(handle, request, len(request), form, text) == lib.KVL_CHAT_ERR_ARGUMENT
        assert text[0] == form[0] == ffi.NULL
    good = b'{"messages": []}'
    for call in (
        lambda: lib.kvl_chat_render(ffi.NULL, good, len(good), text),
        lambda: lib.kvl_chat_render(handle, ffi.NULL, 3, text),
        lambda: lib.kvl_chat_render(handle, good, len(good), ffi.NULL),
        lambda: lib.kvl_chat_apply(handle, good, len(good), ffi.NULL, text),
        lambda: lib.kvl_chat_parse(ffi.NULL, good, len(good), 0, text),
    ):
        assert call() == lib.KVL_CHAT_ERR_ARGUMENT
    for free in (lib.kvl_chat_free, lib.kvl_chat_format_free, lib.kvl_chat_text_free):
        free(ffi.NULL)
    assert lib.kvl_chat_text_size(ffi.NULL) == 0 and lib.kvl_chat_text_data(ffi.NULL) == ffi.NULL


def test_tools_and_their_calls() -> None:
    """What a server needs of the boundary: the grammar of tool calls, when it begins, and calls read from an answer."""
    tree = source_tree()
    if tree is None:
        pytest.skip("the source tree of llama.cpp is not under build/")
    chat = load_chat()
    ffi, lib = chat.ffi, chat.lib

    def taken(out: object) -> dict:
        found = json.loads(bytes(ffi.buffer(lib.kvl_chat_text_data(out[0]), lib.kvl_chat_text_size(out[0]))))
        lib.kvl_chat_text_free(out[0])
        return found

    template = CompiledTemplate(templates(tree)["Qwen-Qwen2.5-7B-Instruct"])
    request = json.dumps({"messages": ASKED, "tools": [ADD], "add_generation_prompt": True}).encode()
    form, text = ffi.new("struct kvl_chat_format **"), ffi.new("struct kvl_chat_text **")
    assert lib.kvl_chat_apply(template._pointer, request, len(request), form, text) == lib.KVL_CHAT_OK
    answers = ffi.gc(form[0], lib.kvl_chat_format_free)
    found = taken(text)
    assert "adds" in found["prompt"] and found["grammar_lazy"] and "<tool_call>" in str(found["grammar_triggers"])
    assert "root ::=" in found["grammar"]
    raw = b'One moment.\n<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'
    assert lib.kvl_chat_parse(answers, raw, len(raw), 0, text) == lib.KVL_CHAT_OK
    (call,) = taken(text)["tool_calls"]
    assert call["name"] == "add" and json.loads(call["arguments"]) == {"a": 1, "b": 2}
