"""ChatTemplate: the text and tokens that each step of a conversation appends, from the model's own chat template."""

from __future__ import annotations

import copy
import json
import re
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt

from kvlocal.llama.model import Model
from kvlocal.template.answer import AnswerStream, split_thought
from kvlocal.template.compiled import LIMIT_SECONDS, AnswerFormat, CompiledTemplate, TemplateError
from kvlocal.template.defaults import CHATML, GEMMA, PLAIN
from kvlocal.template.ends import found_ends, is_one_token, special_tokens, texts_of
from kvlocal.template.markup import ASSISTANT, SYSTEM, USER, USER_2, Markup, Message, UserTurn, assistant, inside, system, user, with_folded_system
from kvlocal.template.pieces import Piece, Role, pieces_of
from kvlocal.template.tokenizer import PieceTokenizer
from kvlocal.template.tool_turns import ToolTurns, as_text

_NEVER = re.compile("(?!)")
_MAX_KEPT = 32  # formats of answers, and versions with tools, of one template


class ChatTemplate:
    """A chat template as increments: each call gives only what has to be appended to the cache.

    The markup is found once by rendering conversations of at most three user turns with stand-ins for the contents,
    so no call costs more for a longer history. Appending the pieces of a conversation gives the template's own
    rendering of it whenever the template treats all later turns alike; where it does not, `history_dependent` is set
    and the markup is that of the shortest conversation with an earlier turn.

    An answer keeps its thought, also one that is given: a template that drops the thoughts of earlier answers would
    take back what the cache holds.

    Args:
        template: the Jinja source.
        source: where it comes from: "gguf", "default:chatml", "default:gemma" or "default:plain".
        bos_token, eos_token: their texts, for the template's use.
        add_bos: put BOS in front when the template does not.
        seconds: how long one rendering may take; templates take thousandths of that.

    Attributes:
        tools: those that the model is told of (with_tools).
        thinking: False if it asks for answers without a thought (without_thinking).
        system_folded: the template has no system role, so the system text opens the first user turn.
        history_dependent: the template would render earlier turns in another way later, for instance without their
            reasoning; the cache keeps what was appended.
        stop_strings: texts that end an answer, of a model that has no token for it.
        end_tokens: the tokens that end an answer: those of the model's file, and those that the template writes behind
            an answer. Empty without a model.

    Raises:
        TemplateError: the template is broken, cannot render the simplest conversation, or goes beyond the limits of
            time and memory.
    """

    def __init__(
        self,
        template: str,
        *,
        source: str = "gguf",
        bos_token: str = "",
        eos_token: str = "",
        add_bos: bool = False,
        seconds: float = LIMIT_SECONDS,
    ) -> None:
        self.source = source
        self.stop_strings: tuple[str, ...] = ()
        self.end_tokens: frozenset[int] = frozenset()
        self.tools: tuple[Mapping[str, Any], ...] = ()
        self.thinking = True
        self._bos_in_front = bos_token if add_bos else ""
        # one time for all renderings, so that they agree
        self._now = int(time.time())
        try:
            self._compiled = CompiledTemplate(template, bos_token=bos_token, eos_token=eos_token, seconds=seconds)
        except TemplateError as error:
            raise TemplateError(f"the model's chat template is broken ({error}): use another GGUF file") from error
        self._find_markup()

    def _find_markup(self) -> None:
        """Finds everything that depends on the tools, and on whether there are thoughts."""
        self._tokenizer: tuple[weakref.ref[Model], PieceTokenizer] | None = None
        self._formats: dict[str, AnswerFormat] = {}
        self._versions: dict[str, ChatTemplate] = {}
        self.system_folded = not self._supports_system()
        self._markup = Markup(self.render, lambda messages: self._format_of(messages, opening=len(messages) == 1))
        self._format = self._markup.answer_format if self._markup.thoughts else None
        self.history_dependent = self._markup.history_dependent
        self._tool_turns = ToolTurns(self._render_as_family, self._markup, (), _NEVER)
        self._tool_markup = self._example_of_tools()

    def _example_of_tools(self) -> str:
        """The text of a conversation with a call and its result, as far as the template has that."""
        call = {"id": "call00001", "type": "function", "function": {"name": "f", "arguments": "{}"}}
        result = {"role": "tool", "content": "", "tool_call_id": call["id"], "name": "f"}
        try:
            return self._render_as_family([user(USER), {**assistant(""), "tool_calls": [call]}, result], opening=True)
        except TemplateError:
            return ""

    @classmethod
    def from_model(cls, model: Model, tools: Sequence[Mapping[str, Any]] = (), thinking: bool = True) -> ChatTemplate:
        """The template in the GGUF's metadata, or a default that fits the vocabulary; the same object every time.

        tools: as OpenAI's chat completions have them; the template tells the model of them before the first turn.
        thinking: False for the version without_thinking.

        Raises:
            TemplateError: it is broken, or has no place for tools.
        """
        with _lock:
            given = model.metadata.get("tokenizer.chat_template", "")
            if model not in _of_models or _of_models[model][0] != given:
                _of_models[model] = given, cls._made_for(model, given)
            template = _of_models[model][1]
            return template if thinking and not tools else template._version(model, tools, thinking)

    def _version(self, model: Model, tools: Sequence[Mapping[str, Any]], thinking: bool) -> ChatTemplate:
        key = json.dumps([tools, thinking], sort_keys=True)
        if key not in self._versions:
            made = self if thinking else self.without_thinking()
            made = made.with_tools(tools) if tools else made
            made._find_ends(model)
            while len(self._versions) >= _MAX_KEPT:
                self._versions.pop(next(iter(self._versions)))
            self._versions[key] = made
        return self._versions[key]

    def with_tools(self, tools: Sequence[Mapping[str, Any]]) -> ChatTemplate:
        """The same template for conversations with these tools.

        Raises:
            TemplateError: it has no place for them, or refuses them.
        """
        made = copy.copy(self)
        made.tools = tuple(tools)
        made._find_markup()
        told = made._markup.all_texts()
        if not all(tool["function"]["name"] in told for tool in tools):
            raise TemplateError("the model's chat template has no place for tools: leave them out, or use another model")
        return made

    def without_thinking(self) -> ChatTemplate:
        """The same template, asking for answers without a thought; if it does not know how to, it asks as ever."""
        made = copy.copy(self)
        made.thinking = False
        made._find_markup()
        return made

    @property
    def has_thoughts(self) -> bool:
        """Whether answers may have a thought that is told apart from what they say."""
        return self._format is not None

    @property
    def can_leave_thinking_out(self) -> bool:
        """Whether the template knows how to ask for answers without a thought."""
        asked = [user(USER)]
        return self._compiled.render(asked, opening=True, now=self._now, enable_thinking=False) != self._compiled.render(
            asked, opening=True, now=self._now
        )

    @property
    def is_own(self) -> bool:
        """Whether the model's file has it. One that has none is of a model that was most likely not trained to chat."""
        return self.source == "gguf"

    @classmethod
    def _made_for(cls, model: Model, template: str) -> ChatTemplate:
        bos, eos = (
            model.token_bytes(token, special=True).decode("utf-8", "replace") if token is not None else ""
            for token in (model.bos, model.eos)
        )
        source = "gguf"
        if not template.strip():
            if is_one_token(model, "<|im_start|>") and is_one_token(model, "<|im_end|>"):
                template, source = CHATML, "default:chatml"
            elif is_one_token(model, "<start_of_turn>") and is_one_token(model, "<end_of_turn>"):
                template, source = GEMMA, "default:gemma"
            else:
                template, source = PLAIN, "default:plain"
        made = cls(template, source=source, bos_token=bos, eos_token=eos, add_bos=model.add_bos)
        made._find_ends(model)
        return made

    def render(self, messages: Sequence[Message], *, opening: bool) -> str:
        """The template's own text of a whole conversation, with the start of an answer if `opening`.

        Raises:
            TemplateError: the template refuses it.
        """
        if self.system_folded:
            messages = with_folded_system(messages)
        try:
            if self.tools:
                text = self._format_of(messages, opening=opening).prompt
            else:
                text = self._compiled.render(messages, opening=opening, now=self._now, **self._way_of_thinking())
        except TemplateError as error:
            raise TemplateError(f"the model's chat template refuses this conversation ({error}): change its roles or their order") from error
        if self._bos_in_front and not text.startswith(self._bos_in_front):
            text = self._bos_in_front + text
        return text

    def _render_as_family(self, messages: Sequence[Message], *, opening: bool) -> str:
        """As `render`, with llama.cpp's adjustments of messages for the model's family also where there are no tools."""
        return self._format_of(messages, opening=opening).prompt

    def _format_of(self, messages: Sequence[Message], *, opening: bool, **asked: object) -> AnswerFormat:
        tools = {"tools": self.tools} if self.tools else {}
        return self._compiled.answer_format(messages, opening=opening, now=self._now, **{**tools, **self._way_of_thinking(), **asked})

    def _way_of_thinking(self) -> dict[str, bool]:
        return {} if self.thinking else {"enable_thinking": False}

    def prefix(self, system_text: str | None) -> list[Piece]:
        """What comes before the first user turn: BOS, and the system block or the template's default for it."""
        found = self._markup
        if system_text is None or not self._has_system([system(system_text)]):
            return pieces_of("", ("system", found.first[False].before.removesuffix(found.first_header(False)), "markup"))
        head, content, tail = self._system_block(system_text)
        return pieces_of(
            "",
            ("system", head, "markup"),
            ("system", content, "content"),
            ("system", tail.removesuffix(found.first_header(True)), "markup"),
        )

    @property
    def own_system_prompt(self) -> str:
        """The system prompt that the template has where none is given, "" if there is none."""
        if self.system_folded:
            return ""
        head, _, tail = "".join(piece.text for piece in self.prefix(SYSTEM)).partition(SYSTEM)
        own = "".join(piece.text for piece in self.prefix(None))
        is_block = own.startswith(head) and own.endswith(tail) and len(own) > len(head) + len(tail)
        return own[len(head) : len(own) - len(tail)].strip() if is_block else ""

    def turn(self, messages: Sequence[Message], new: Sequence[Message]) -> list[Piece]:
        """What a turn appends that is no answer, as `user_turn`: one message of the user, or what tools gave back, and what the user says to that.

        Args:
            messages: the conversation so far, ending with an answer, or without any turn.
            new: the messages of the turn.
        """
        if messages and messages[-1].get("tool_calls") and new[0]["role"] == "tool":
            with suppress(TemplateError):
                return self._tool_turns.results(messages[-1], new)
        return self.user_turn(messages, "\n\n".join(message["content"] for message in new))

    def given_answer(self, messages: Sequence[Message], message: Message) -> list[Piece]:
        """As `given_assistant`, for an answer that may call tools."""
        if message.get("tool_calls"):
            in_front = self.given_assistant(messages, "") if not messages or messages[-1]["role"] == "assistant" else []
            with suppress(TemplateError):
                return in_front + self._tool_turns.calls(message)
        return self.given_assistant(messages, as_text(message))

    def user_turn(self, messages: Sequence[Message], user_text: str) -> list[Piece]:
        """What a user turn appends: the end of the answer before it, the turn, and what every answer to it begins with.

        Args:
            messages: the conversation so far, ending with an assistant turn, or without any turn.
            user_text: what the user wrote.
        """
        return self.user_start(messages, user_text) + self.user_end(messages)

    def user_start(self, messages: Sequence[Message], user_text: str) -> list[Piece]:
        """The part of a user turn up to the end of what is known of its content, which may go on; `user_end` gives the rest.

        Args:
            messages: as for `user_turn`.
            user_text: what the user wrote so far.
        """
        found, turn = self._markup, self._next_turn(messages)
        if turn is found.later:
            header, before, closing = found.user_header, ASSISTANT, found.closing
        else:
            header = found.first_header(self._has_system(messages))
            before, closing = turn.before.removesuffix(header), ""
        return pieces_of(
            before,
            ("assistant", closing, "markup"),
            ("user", header, "markup"),
            ("user", self._user_content(turn, user_text), "content"),
        )

    def user_end(self, messages: Sequence[Message]) -> list[Piece]:
        """What follows the content of a user turn: its end, and what every answer begins with.

        Args:
            messages: the conversation before that turn.
        """
        turn = self._next_turn(messages)
        return pieces_of(USER, ("user", turn.after, "markup"), ("assistant", turn.header, "markup"))

    def answer_start(self, messages: Sequence[Message]) -> list[Piece]:
        """What only answers that are generated begin with, behind a user turn: the start of a thought, in some templates.

        Args:
            messages: the conversation before that turn.
        """
        turn = self._next_turn(messages)
        return pieces_of(USER + turn.after + turn.header, ("assistant", turn.generated, "markup"))

    def given_assistant(self, messages: Sequence[Message], text: str) -> list[Piece]:
        """What an answer that is given, not generated, appends. The next `user_turn` closes it.

        Args:
            messages: the conversation so far, which `user_turn` has ended; other endings are taken as well, and get
                what an answer begins with.
            text: the answer, with its thought as kvlocal.template.answer writes it.
        """
        last = messages[-1]["role"] if messages else "system"
        found = self._markup
        is_answer = last in ("user", "tool")
        turn = self._next_turn(messages[:-1]) if is_answer else found.later
        thought, is_closed, answer = split_thought(text)
        if found.thoughts and thought:
            start, end, said = found.thoughts.before, found.thoughts.after if is_closed else "", answer
        else:
            start, end, said = turn.given, "", text
        return pieces_of(
            ASSISTANT if last == "assistant" else turn.after + turn.header,
            ("assistant", found.closing if last == "assistant" else "", "markup"),
            ("assistant", "" if is_answer else turn.header, "markup"),
            ("assistant", start, "markup"),
            ("assistant", thought if found.thoughts else "", "content"),
            ("assistant", end, "markup"),
            ("assistant", self._assistant_content(said), "content"),
        )

    def close_assistant(self, messages: Sequence[Message], text: str) -> list[Piece]:
        """What ends an answer: the first part of what the next `user_turn` appends."""
        return pieces_of(ASSISTANT, ("assistant", self._markup.closing, "markup"))

    def answer_format(self, **asked: object) -> AnswerFormat | None:
        """How an answer is written, None for one that is text and nothing else.

        Args:
            asked: "tools", those of this template that may be called, "tool_choice", "parallel_tool_calls" and "json_schema", where they are wanted.

        Raises:
            TemplateError: what is asked for cannot be had.
        """
        if not self.tools and not asked:
            return self._format
        key = json.dumps(asked, sort_keys=True)
        if key not in self._formats:
            found = self._format_of([user(USER)], opening=True, **asked)
            while len(self._formats) >= _MAX_KEPT:
                self._formats.pop(next(iter(self._formats)))
            self._formats[key] = found
        return self._formats[key]

    def answer_stream(self, model: Model, stop: Sequence[str] = (), answer_format: AnswerFormat | None = None) -> AnswerStream:
        """What makes the text of a generated answer from its tokens.

        Args:
            stop: texts that end what it says to the user.
            answer_format: how it is written, if not as every answer without tools is.
        """
        return AnswerStream(model, self.stop_strings, answer_format or self._format, self._markup.last_closing or self._markup.closing, stop)

    def tokens(self, model: Model, pieces: Sequence[Piece]) -> list[tuple[Role, npt.NDArray[np.int32]]]:
        """The tokens of each piece: one (role, [n] int32) for each, in order; n may be 0.

        Joined, they are what tokenizing the joined texts gives, except that contents never yield a control token or
        any other token that the template's markup uses. A token that spans two pieces belongs to the one that holds
        its middle.
        """
        known = self._tokenizer
        if known is None or known[0]() is not model:
            known = self._tokenizer = weakref.ref(model), PieceTokenizer(model, self._all_markup())
        return known[1].run(pieces)

    def _all_markup(self) -> str:
        return self._markup.all_texts() + self._tool_markup

    def _next_turn(self, messages: Sequence[Message]) -> UserTurn:
        return self._markup.later if _has_turns(messages) else self._markup.first[self._has_system(messages)]

    def _has_system(self, messages: Sequence[Message]) -> bool:
        # an empty system block still replaces the template's default one; folded, it is nothing at all
        return any(
            message["role"] == "system" and (message["content"] or not self.system_folded) for message in messages
        )

    def _supports_system(self) -> bool:
        self.system_folded = False
        try:
            return SYSTEM in self.render([system(SYSTEM), user(USER)], opening=False)
        except TemplateError:
            return False

    def _find_ends(self, model: Model) -> None:
        """Finds what depends on the vocabulary."""
        self.end_tokens, self.stop_strings = found_ends(model, self._markup, self._format.stops if self._format else ())
        markers = set(texts_of(model, special_tokens(model, self._all_markup())))
        pattern = "|".join(re.escape(text) for text in sorted(markers, key=len, reverse=True)) or _NEVER.pattern
        ends = texts_of(model, sorted(self.end_tokens))
        self._tool_turns = ToolTurns(self._render_as_family, self._markup, ends, re.compile(pattern))

    def _system_block(self, system_text: str) -> tuple[str, str, str]:
        """Markup before the system text, that text as rendered, and markup from there to the user's text."""

        def before_user(text: str) -> str:
            return self.render([system(text), user(USER)], opening=False).rpartition(USER)[0]

        head, _, tail = before_user(SYSTEM).partition(SYSTEM)
        return head, inside(before_user(system_text), head, tail, system_text), tail

    def _user_content(self, turn: UserTurn, text: str) -> str:
        """The user's text as the template writes it: some strip it."""
        return self._content([*turn.messages[:-1], user(text)], turn.before, turn.opened, text)

    def _assistant_content(self, text: str) -> str:
        """An answer as the template writes it in a history: some strip it."""
        head, _, tail = self._markup.later.before.partition(ASSISTANT)
        messages = [user(USER), assistant(text), user(USER_2)]
        return self._content(messages, head, tail + USER_2 + self._markup.later.opened, text)

    def _content(self, messages: Sequence[Message], head: str, tail: str, text: str) -> str:
        try:
            return inside(self.render(messages, opening=True), head, tail, text)
        except TemplateError:
            # the template interprets contents, and not this one; the markup around it is known all the same
            return text


_lock = threading.Lock()
_of_models: weakref.WeakKeyDictionary[Model, tuple[str, ChatTemplate]] = weakref.WeakKeyDictionary()


def _has_turns(messages: Sequence[Message]) -> bool:
    return any(message["role"] != "system" for message in messages)
