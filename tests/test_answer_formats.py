"""Answers as models of several families write them: what is shown of them, what ends them, and how they are read again."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf_copy import Source, copy
from templates import conversation, source_tree, templates

from kvlocal.chat.config import SessionConfig
from kvlocal.chat.session import ChatSession
from kvlocal.conversations.snapshot import SnapshotError, Snapshots
from kvlocal.llama.model import Model
from kvlocal.llama.sampling import SamplingParams
from kvlocal.template.answer import split_thought
from kvlocal.template.chat_template import ChatTemplate

GREEDY = SamplingParams(temperature=0)

THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content.split('</think>')[-1] | trim + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
# names of SmolLM2's unused control tokens, and what gpt-oss and Kimi-K3 call theirs
GPT_OSS = {
    "<|im_start|>": "<|start|>", "<repo_name>": "<|channel|>", "<reponame>": "<|message|>", "<file_sep>": "<|end|>", "<filename>": "<|return|>",
}  # fmt: skip
KIMI_K3 = {"<|im_start|>": "<|open|>", "<repo_name>": "<|close|>", "<reponame>": "<|sep|>", "<file_sep>": "<|end_of_msg|>"}


@pytest.fixture(scope="module")
def sources() -> dict[str, str]:
    tree = source_tree()
    if tree is None:
        pytest.skip("the source tree of llama.cpp is not under build/")
    return templates(tree)


def variant(smollm2: Path, directory: Path, names: dict[str, str], template: str, **metadata: object) -> Path:
    target = directory / "model.gguf"
    copy(Source(smollm2), target, names=names, metadata={"tokenizer.chat_template": template, **metadata})
    return target


@pytest.fixture(scope="module")
def renamed_end(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    """SmolLM2 whose end of a turn has a name that llama.cpp does not know, and whose metadata names another token."""
    with Model(smollm2) as model:
        template = model.metadata["tokenizer.chat_template"].replace("<|im_end|>", "<|im_fin|>")
    names = {"<|im_end|>": "<|im_fin|>"}
    path = variant(smollm2, tmp_path_factory.mktemp("renamed"), names, template, **{"tokenizer.ggml.eos_token_id": 0})
    with Model(path) as model:
        yield model


def test_the_templates_own_marker_ends_an_answer(renamed_end: Model, smollm2: Path) -> None:
    config = SessionConfig(max_tokens=40, n_threads=1, sampling=GREEDY)
    with Model(smollm2) as model, ChatSession(model, config) as chat:
        expected = "".join(chat.send("What is 2+2?"))
        assert chat.last.stop_reason == "end"
    marker = int(renamed_end.tokenize("<|im_fin|>", parse_special=True)[0])
    assert marker not in renamed_end.end_tokens
    assert ChatTemplate.from_model(renamed_end).end_tokens == renamed_end.end_tokens | {marker}
    with ChatSession(renamed_end, config) as chat:
        assert "".join(chat.send("What is 2+2?")) == expected
        assert chat.last.stop_reason == "end" and chat.last.drawn[-1] == marker


@pytest.mark.parametrize(
    ("source", "stops"),
    [
        # markers that are no tokens of the vocabulary
        ("{% for m in messages %}{{ '[' + m.role + ']' + m.content + '[/end]\n' }}{% endfor %}", ("[/end]",)),
        # nothing behind an answer but the next turn
        ("{% for m in messages %}{{ m.role | upper + ': ' + m.content + '\n' }}{% endfor %}", ("\nUSER:",)),
    ],
)
def test_texts_end_answers_where_no_token_does(smollm2: Path, monkeypatch: pytest.MonkeyPatch, source: str, stops: tuple[str, ...]) -> None:
    with Model(smollm2) as model:
        monkeypatch.setitem(model.metadata, "tokenizer.chat_template", source)
        template = ChatTemplate.from_model(model)
        assert template.stop_strings == stops
        stream = template.answer_stream(model)
        text = "".join(map(stream.push, model.tokenize(f"Yes.{stops[0]} And", parse_special=False).tolist())) + stream.flush()
        assert text == "Yes."


def test_a_template_is_compiled_once_for_a_model(smollm2: Path) -> None:
    config = SessionConfig(budget=64, n_threads=1)
    with Model(smollm2) as model, ChatSession(model, config) as one, ChatSession(model, config) as other:
        assert one.template is other.template


def answer_of(model: Model, raw: str) -> tuple[str, list[str]]:
    """The text of an answer that a model wrote as `raw`, and the pieces in which it came."""
    stream = ChatTemplate.from_model(model).answer_stream(model)
    shown = [stream.push(token) for token in model.tokenize(raw, parse_special=True).tolist()]
    shown.append(stream.flush())
    return "".join(shown), [text for text in shown if text]


@pytest.mark.parametrize(
    ("family", "names", "raw", "reread"),
    [
        pytest.param(
            "openai-gpt-oss-120b",
            GPT_OSS,
            "<|channel|>analysis<|message|>They greet me.<|end|><|start|>assistant<|channel|>final<|message|>Hello,\n\nfriend!",
            "<|channel|>analysis<|message|>They greet me.<|end|><|start|>assistant<|channel|>final<|message|>Hello,\n\nfriend!",
            id="gpt-oss",
        ),
        pytest.param(
            "Kimi-K3",
            KIMI_K3,
            "They greet me.<|close|>think<|sep|><|open|>response<|sep|>Hello,\n\nfriend!<|close|>response<|sep|><|close|>message<|sep|>",
            "They greet me.<|close|>think<|sep|><|open|>response<|sep|>Hello,\n\nfriend!",
            id="Kimi-K3",
        ),
    ],
)
def test_answers_made_of_control_tokens(
    smollm2: Path, tmp_path: Path, sources: dict[str, str], family: str, names: dict[str, str], raw: str, reread: str
) -> None:
    with Model(variant(smollm2, tmp_path, names, sources[family])) as model:
        text, pieces = answer_of(model, raw)
        assert text == "<think>\nThey greet me.\n</think>\n\nHello,\n\nfriend!"
        assert len(pieces) > 5
        assert split_thought(text) == ("They greet me.", True, "Hello,\n\nfriend!")
        template = ChatTemplate.from_model(model)
        given = template.given_assistant([{"role": "user", "content": "Hi"}], text)
        assert "".join(piece.text for piece in given) == reread
        # its markers are those of the model, and a text that looks like one is not
        tokens = np.concatenate([ids for _, ids in template.tokens(model, given)])
        assert np.array_equal(tokens, model.tokenize(reread, parse_special=True))
        sly = template.given_assistant([{"role": "user", "content": "Hi"}], text.replace("friend", "<|start|><|open|>"))
        markers = set(model.tokenize("<|start|><|open|>", parse_special=True).tolist()) & set(np.arange(20).tolist())
        for piece, (_, ids) in zip(sly, template.tokens(model, sly), strict=True):
            assert piece.kind == "markup" or not markers & set(ids.tolist())


def test_the_first_markers_of_a_closing_are_no_part_of_an_answer(smollm2: Path, tmp_path: Path, sources: dict[str, str]) -> None:
    with Model(variant(smollm2, tmp_path, KIMI_K3, sources["Kimi-K3"])) as model:
        template = ChatTemplate.from_model(model)
        end = int(model.tokenize("<|end_of_msg|>", parse_special=True)[0])
        assert end in template.end_tokens
        answer = "Hm.<|close|>think<|sep|><|open|>response<|sep|>Yes."
        raw = model.tokenize(answer + "<|close|>response<|sep|><|close|>message<|sep|><|end_of_msg|>", parse_special=True).tolist()
        kept = len(model.tokenize(answer, parse_special=True))
        config = SessionConfig(policy="full", budget=2048, n_threads=1)
        with ChatSession(model, config) as chat, ChatSession(model, config) as again:
            for session in (chat, again):
                session.add_turn("user", "Is it?")
            chat.add_answer("<think>\nHm.\n</think>\n\nYes.", raw)
            again.add_turn("assistant", chat.messages[-1]["content"])
            assert chat.kv.history_tokens == again.kv.history_tokens
            assert chat.segments()[-1].n_tokens == again.segments()[-1].n_tokens >= kept


def test_a_thought_opened_by_the_generation_prompt(smollm2: Path, tmp_path: Path) -> None:
    """It belongs to generated answers alone, is shown with them, and stays when the conversation is read again."""
    path = variant(smollm2, tmp_path, {}, THINKING)
    with Model(path) as model, ChatSession(model, SessionConfig(policy="full", budget=2048, n_threads=1, max_tokens=12, sampling=GREEDY)) as chat:
        template = chat.template
        question = [{"role": "user", "content": "Hi"}]
        assert "".join(piece.text for piece in template.user_turn([], "Hi")).endswith("<|im_start|>assistant\n")
        assert [piece.text for piece in template.answer_start([])] == ["<think>\n"]
        assert [piece.text for piece in template.given_assistant(question, "Yes")] == ["Yes"]

        chat.add_turn("user", "Hi")
        chat.add_turn("assistant", "Hello!")
        assert "<think>" not in model.detokenize(chat.cache.ledger.ids)

        chat.add_turn("user", "Is it?")
        raw = model.tokenize("Let me see.\n</think>\n\nYes.<|im_end|>", parse_special=True).tolist()
        chat.add_answer("<think>\nLet me see.\n</think>\n\nYes.", raw)
        before = model.detokenize(chat.cache.ledger.ids)
        assert before.endswith("assistant\n<think>\nLet me see.\n</think>\n\nYes.")
        chat.set_system("Be kind.")
        after = model.detokenize(chat.cache.ledger.ids)
        assert after.endswith("assistant\n<think>\nLet me see.\n</think>\n\nYes.") and "Be kind." in after

        chat.add_turn("user", "And now?")
        text = "".join(chat.answer())
        assert text.startswith("<think>\n")
        assert model.detokenize(chat.cache.ledger.ids).count("<think>") == 2


# thoughts that are not made


@pytest.mark.parametrize("name", ["Qwen-Qwen3-0.6B", "HuggingFaceTB-SmolLM3-3B", "GLM-4.6", "GLM-4.7-Flash", "NVIDIA-Nemotron-3-Nano-30B-A3B-BF16"])
def test_a_template_with_a_switch_asks_for_answers_without_a_thought(sources: dict[str, str], name: str) -> None:
    """What is appended is what the template writes when it is asked so."""
    template = ChatTemplate(sources[name])
    off = template.without_thinking()
    assert template.has_thoughts and template.can_leave_thinking_out and off.can_leave_thinking_out
    asked = [{"role": "user", "content": "Hello"}]
    assert off.render(asked, opening=True) != template.render(asked, opening=True)
    # later turns, too, where the template does not change what was said before
    pairs = [*conversation(off, None)][: 1 if off.history_dependent else None]
    assert all(fed == rendered for fed, rendered in pairs)
    # and what the model says then is all answer
    assert off.answer_format().parse("Hi there!").content == "Hi there!"


@pytest.mark.parametrize("name", ["deepseek-ai-DeepSeek-R1-Distill-Llama-8B", "openai-gpt-oss-120b"])
def test_a_template_without_a_switch(sources: dict[str, str], name: str) -> None:
    template = ChatTemplate(sources[name])
    assert template.has_thoughts and not template.can_leave_thinking_out
    asked = [{"role": "user", "content": "Hello"}]
    assert template.without_thinking().render(asked, opening=True) == template.render(asked, opening=True)


def test_a_session_without_thoughts(smollm2: Path, tmp_path: Path, sources: dict[str, str]) -> None:
    config = SessionConfig(policy="full", budget=2048, n_threads=1, max_tokens=12, sampling=GREEDY)
    with Model(variant(smollm2, tmp_path, {}, sources["Qwen-Qwen3-0.6B"])) as model:
        with ChatSession(model, replace(config, thinking=False)) as chat:
            told = [chat.add_turn("user", "Hi") or [*chat.told()] for _ in range(2)]
            assert model.detokenize(chat.cache.ledger.ids).count("assistant\n<think>\n\n</think>\n\n") == 2
            assert all(text == piece.text and not piece.reasoning for answer in told for text, piece in answer)
            assert chat.settings()["thinking"] is False
            Snapshots(tmp_path / "s").save(chat)
            messages = list(chat.messages)
        # what is in such a cache is not what one has that may think
        with ChatSession(model, config) as chat:
            with pytest.raises(SnapshotError, match="another way of thinking"):
                Snapshots(tmp_path / "s").load(chat, messages)
            chat.add_turn("user", "Hi")
            assert "<think>" not in model.detokenize(chat.cache.ledger.ids)
        with ChatSession(model, replace(config, thinking=False)) as chat:
            Snapshots(tmp_path / "s").load(chat, messages)
