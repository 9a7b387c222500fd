"""What an answer has to follow, and how it is read: from what is asked for to llama.cpp's grammars and parsers."""

from __future__ import annotations

import re
from dataclasses import replace

from kvlocal.chat.config import SessionError
from kvlocal.chat.options import AnswerOptions
from kvlocal.llama.grammar import GrammarRules
from kvlocal.template.chat_template import ChatTemplate
from kvlocal.template.compiled import AnswerFormat, CompiledTemplate, TemplateError

# Text in front of calls, in the grammars that llama.cpp makes. A call that has to come comes at once: small models would talk until they are cut off.
_TALK_BEFORE = re.compile(r"^(root ::= .*?)\buntil-\d+\? ", re.MULTILINE)

# What an answer as a whole is, in these grammars: a value in the fences of a block of code, too.
_WHOLE = re.compile(r"^root ::= .*$", re.MULTILINE)

# Stands for a template where there is none: the grammar of a JSON schema does not depend on it.
_NO_TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"

# Several calls that are written one after another, which llama.cpp also allows where there is to be one.
_SEVERAL = re.compile(r"^(tool-calls ::= )\((tool-call space)\)\+$", re.MULTILINE)


def answer_rules(template: ChatTemplate, options: AnswerOptions) -> tuple[AnswerFormat | None, GrammarRules | None]:
    """How an answer with these options is written (ChatTemplate.answer_format), and what it has to follow, None for nothing.

    Raises:
        SessionError: the options do not go together with the conversation, or cannot be had.
    """
    if options.tools and options.tools != template.tools:
        raise SessionError("the conversation was begun with other tools: begin another one with these")
    names = [tool["function"]["name"] for tool in template.tools]
    unknown = [name for name in options.allowed_tools if name not in names]
    if unknown:
        raise SessionError(f"there is no tool {unknown[0]}: give it with the tools, or allow another one")
    calls = bool(names) and options.tool_choice != "none"
    if options.tool_choice == "required" and not names:
        raise SessionError("a tool has to be called, and there is none: give tools, or leave the choice out")
    if options.grammar is not None and calls:
        raise SessionError("calls of tools have a grammar of their own: leave out the tools or the grammar")
    asked: dict[str, object] = {}
    if names:
        allowed = [tool for tool in template.tools if not options.allowed_tools or tool["function"]["name"] in options.allowed_tools]
        asked = {"tools": allowed, "tool_choice": options.tool_choice, "parallel_tool_calls": options.parallel_tool_calls}
    if options.json_schema is not None:
        asked["json_schema"] = _schema(options)
    try:
        found = template.answer_format(**asked)
    except TemplateError as error:
        what = "JSON schema" if options.json_schema is not None else "tools"
        raise SessionError(f"the {what} cannot be followed ({error}): correct it or leave it out") from error
    if options.grammar is not None:
        return found, GrammarRules(options.grammar)
    if found is None or not asked:
        return found, None
    if found.grammar is None and options.tool_choice == "required":
        raise SessionError("the model's chat template has no calls of tools that could be required: let the model choose")
    if found.grammar is None:
        return found, None
    text = found.grammar.text
    if options.tool_choice == "required":
        text = _TALK_BEFORE.sub(r"\1", text)
    if not options.parallel_tool_calls:
        text = _SEVERAL.sub(r"\1\2", text)
    return found, replace(found.grammar, text=text)


def text_rules(options: AnswerOptions) -> GrammarRules | None:
    """What the continuation of a text with these options has to follow, None for nothing.

    Raises:
        SessionError: they are of a chat, or cannot be had.
    """
    if options.tools or options.tool_choice == "required":
        raise SessionError("tools are called in chats alone: leave them out, or begin a chat")
    if options.grammar is not None:
        return GrammarRules(options.grammar)
    if options.json_schema is None:
        return None
    try:
        found = CompiledTemplate(_NO_TEMPLATE).answer_format([{"role": "user", "content": "a"}], json_schema=_schema(options))
    except TemplateError as error:
        raise SessionError(f"the JSON schema cannot be followed ({error}): correct it or leave it out") from error
    if found.grammar is None:
        raise SessionError("the JSON schema cannot be followed: correct it or leave it out")
    return GrammarRules(_WHOLE.sub("root ::= response-format", found.grammar.text))


def _schema(options: AnswerOptions) -> dict[str, object]:
    """llama.cpp takes an empty schema for none."""
    return dict(options.json_schema or {}) or {"type": "object"}
