"""The chat templates of llama.cpp's source tree, as the build unpacks it, and how their increments compare with their own renderings."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from kvlocal.template.chat_template import ChatTemplate
from kvlocal.template.compiled import TemplateError

ROOT = Path(__file__).resolve().parent.parent
TURNS = [("Hello", "Hi there!"), ("What is\n\n1 + 1?", "It is **2**."), ("日本語 👍🏽, please", "はい\n- one\n- two"), ("Thanks", "You are welcome.")]
SYSTEM = "Be brief."

# a test case of test-chat-template.cpp: its name, and the C++ literal of its template
_INLINE = re.compile(r'/\* \.name= \*/ "([^"]+)",\s*/\* \.template_str=? \*/ (?:U8C\()?("(?:[^"\\\n]|\\.)*")')


def source_tree() -> Path | None:
    """The newest source tree of llama.cpp under build/."""
    found = sorted((ROOT / "build").glob("*/source/llama.cpp/models/templates"), key=lambda path: path.stat().st_mtime)
    return found[-1].parent.parent if found else None


def templates(tree: Path) -> dict[str, str]:
    """The Jinja source of each template, by name."""
    found = {path.stem: path.read_text(encoding="utf-8") for path in sorted((tree / "models/templates").glob("*.jinja"))}
    for name, literal in _INLINE.findall((tree / "tests/test-chat-template.cpp").read_text(encoding="utf-8")):
        found[f"inline: {name}"] = ast.literal_eval(literal)
    return found


def conversation(template: ChatTemplate, system: str | None) -> Iterator[tuple[str, str]]:
    """At each turn, whenever an answer is due: the text fed so far, and the template's rendering of the whole."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    fed = _text(template.prefix(system))
    for question, answer in TURNS:
        before = list(messages)
        fed += _text(template.user_turn(before, question))
        messages.append({"role": "user", "content": question})
        yield fed + _text(template.answer_start(before)), template.render(messages, opening=True)
        fed += _text(template.given_assistant(messages, answer))
        messages.append({"role": "assistant", "content": answer})


def compare(source: str, system: str | None) -> tuple[str, str]:
    """("equal", ""), ("history", where the template itself changes earlier turns later on), ("refused", its words) or ("wrong", where)."""
    try:
        template = ChatTemplate(source, bos_token="<s>", eos_token="</s>")
        pairs = list(conversation(template, system))
    except TemplateError as error:
        return "refused", str(error)
    for i, (fed, whole) in enumerate(pairs):
        if fed != whole:
            # what the model has read cannot be taken back: is it the template that does not go on where it was?
            before = pairs[i - 1][1].rpartition(TURNS[i - 1][0])[0] if i else ""
            kind = "wrong" if whole.startswith(before) else "history"
            return kind, f"turn {i + 1}: {_difference(fed, whole)}"
    return "equal", ""


def _text(pieces: list) -> str:
    return "".join(piece.text for piece in pieces)


def _difference(fed: str, whole: str) -> str:
    n = next((i for i, (a, b) in enumerate(zip(fed, whole, strict=False)) if a != b), min(len(fed), len(whole)))
    return f"fed {fed[max(n - 20, 0) : n + 40]!r}, the template has {whole[max(n - 20, 0) : n + 40]!r}"
