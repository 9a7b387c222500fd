"""Reads files of long conversations with questions about them: LoCoMo's format and LongMemEval's."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kvlocal.conversations.data_file import DataError, read_data
from kvlocal.evaluation.memory_chats import Evidence, History, MemoryChat, MemoryQuestion, draw_distractors
from kvlocal.files.text import text_of

# LoCoMo (Maharana et al., ACL 2024) numbers them. Those of the last sort ask for what was never said.
_LOCOMO_CATEGORIES = {1: "multi-hop", 2: "temporal", 3: "open-domain", 4: "single-hop", 5: "adversarial"}
_UNANSWERABLE = "adversarial"
_ABSTENTION = "_abs"  # LongMemEval (Wu et al., ICLR 2025): how the id of such a question ends


class _BadConversation(Exception):
    """What is wrong with a conversation."""


@dataclass(frozen=True)
class MemoryData:
    """A file of conversations.

    chats: those that have a question with an answer
    n_unanswerable: how many questions were left out because the conversation does not answer them
    digest: SHA-256 of the file
    """

    chats: tuple[MemoryChat, ...]
    n_unanswerable: int
    digest: str


def load_memory(path: Path, seed: int = 0) -> MemoryData:
    """Reads a JSON list of conversations, each in one of two formats.

    LoCoMo: `{"conversation": {"session_1": [{"speaker", "dia_id", "text"}], "session_1_date_time", ...}, "qa": [{"question", "answer", "evidence",
    "category"}]}`. Who speaks first becomes the user, and every turn says who speaks. LongMemEval: `{"question", "question_type", "answer",
    "haystack_sessions": [[{"role", "content", "has_answer"}]], "haystack_dates", "answer_session_ids", ...}`, one question each; its evidence are the
    turns that have the answer, or the sessions that are named. A session begins with its date.

    The wrong answers to a question are answers to others of the same conversation, of the same category where there are enough, and where the
    conversation has too few, to those of the file.

    seed: chooses them

    Raises:
        DataError: the file cannot be read, or is of no such format.
    """
    content = read_data(path, "a JSON file of LoCoMo's or LongMemEval's format")
    try:
        records = json.loads(text_of(content))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON ({error}): give one JSON list of conversations, as LoCoMo and LongMemEval have it") from None
    if not isinstance(records, list):
        raise DataError(f"{path} is not a list of conversations: give one JSON list, as LoCoMo and LongMemEval have it")
    chats, n_unanswerable = [], 0
    for number, record in enumerate(records, 1):
        try:
            chat, n_left_out = _conversation(record)
        except _BadConversation as error:
            raise DataError(f"{path}, conversation {number}: {error}") from None
        n_unanswerable += n_left_out
        if chat.questions:
            chats.append(chat)
    if not chats:
        raise DataError(f"{path} holds no conversation with a question that it answers: give a file of LoCoMo's or LongMemEval's format")
    return MemoryData(_with_distractors(chats, random.Random(f"distractors {seed}")), n_unanswerable, hashlib.sha256(content).hexdigest())


def _with_distractors(chats: Sequence[MemoryChat], rng: random.Random) -> tuple[MemoryChat, ...]:
    every = [question for chat in chats for question in chat.questions]
    of_category = {name: [question.answer for question in every if question.category == name] for name in {question.category for question in every}}
    anywhere = [question.answer for question in every]

    def complete(chat: MemoryChat, question: MemoryQuestion) -> MemoryQuestion:
        same = [other.answer for other in chat.questions if other.category == question.category]
        pools = same, [other.answer for other in chat.questions], of_category[question.category], anywhere
        return replace(question, distractors=draw_distractors(rng, question.answer, pools))

    return tuple(replace(chat, questions=tuple(complete(chat, question) for question in chat.questions)) for chat in chats)


def _conversation(record: Any) -> tuple[MemoryChat, int]:
    """A conversation without distractors, and how many of its questions were left out."""
    if isinstance(record, dict) and "haystack_sessions" in record:
        return _from_longmemeval(record)
    if isinstance(record, dict) and "conversation" in record and "qa" in record:
        return _from_locomo(record)
    raise _BadConversation("it has neither conversation and qa (LoCoMo) nor haystack_sessions (LongMemEval)")


def _from_locomo(record: dict[str, Any]) -> tuple[MemoryChat, int]:
    history, turns = History(), {}
    conversation = _object(record["conversation"], "its conversation")
    names = [key for key in conversation if re.fullmatch(r"session_\d{1,9}", key)]
    user = ""
    for name in sorted(names, key=lambda name: int(name.removeprefix("session_"))):
        date = conversation.get(f"{name}_date_time")
        before = f"[{date}]\n" if date else ""
        for i, turn in enumerate(_list(conversation[name], name), 1):
            where = f"turn {i} of {name}"
            turn = _object(turn, where)
            speaker, text = _text(turn, "speaker", where), _text(turn, "text", where)
            if turn.get("blip_caption"):
                text = f"{text} [shares a picture: {turn['blip_caption']}]".strip()
            if not text.strip():
                continue
            user = user or speaker
            said = history.say("user" if speaker == user else "assistant", f"{speaker}: {text.strip()}", before)
            before = ""
            for place in _places(turn.get("dia_id")):
                turns[place] = said
    if not turns:
        raise _BadConversation("its conversation has no turns: write session_1, session_2, ... as lists of {speaker, dia_id, text}")
    questions, n_left_out = [], 0
    for i, entry in enumerate(_list(record["qa"], "its qa"), 1):
        entry = _object(entry, f"question {i}")
        category = entry.get("category")
        name = _LOCOMO_CATEGORIES.get(category, str(category)) if isinstance(category, int) else str(category)
        if name == _UNANSWERABLE or entry.get("answer") is None:
            n_left_out += 1
            continue
        evidence = [turns[place] for place in _places(entry.get("evidence")) if place in turns]
        questions.append(_question(name, _text(entry, "question", f"question {i}"), entry, f"question {i}", evidence))
    return MemoryChat(history.messages(), tuple(questions)), n_left_out


def _places(ids: Any) -> list[tuple[int, int]]:
    """Session and turn of each id as D8:6, also of several in one text."""
    texts = ids if isinstance(ids, list) else [ids]
    return [(int(session), int(turn)) for text in texts if isinstance(text, str) for session, turn in re.findall(r"D:?(\d{1,9}):(\d{1,9})", text)]


def _from_longmemeval(record: dict[str, Any]) -> tuple[MemoryChat, int]:
    history = History()
    sessions = _list(record["haystack_sessions"], "its haystack_sessions")
    dates, ids = record.get("haystack_dates") or [], record.get("haystack_session_ids") or []
    # in one of the three files they are not in order
    order = list(range(len(sessions)))
    if isinstance(dates, list) and len(dates) == len(sessions) and all(isinstance(date, str) for date in dates):
        order.sort(key=lambda i: dates[i])
    else:
        dates = []
    named = record.get("answer_session_ids") or []
    with_answer, in_named = [], []
    for i in order:
        before = f"[{dates[i]}]\n" if dates else ""
        is_named = isinstance(ids, list) and len(ids) == len(sessions) and isinstance(named, list) and ids[i] in named
        for j, turn in enumerate(_list(sessions[i], f"session {i + 1}"), 1):
            where = f"turn {j} of session {i + 1}"
            turn = _object(turn, where)
            role, text = _text(turn, "role", where), _text(turn, "content", where)
            if role not in ("user", "assistant"):
                raise _BadConversation(f"{where} has the role {role[:40]!r}: it must be user or assistant")
            if not text.strip():
                continue
            said = history.say(role, text, before)
            before = ""
            if turn.get("has_answer"):
                with_answer.append(said)
            if is_named:
                in_named.append(said)
    if not history.messages():
        raise _BadConversation("its haystack_sessions hold no turn")
    if str(record.get("question_id", "")).endswith(_ABSTENTION) or record.get("answer") is None:
        return MemoryChat(history.messages(), ()), 1
    date = record.get("question_date")
    text = (f"[{date}]\n" if date else "") + _text(record, "question", "it")
    return MemoryChat(history.messages(), (_question(_text(record, "question_type", "it"), text, record, "it", with_answer or in_named),)), 0


def _question(category: str, text: str, record: dict[str, Any], what: str, evidence: Sequence[Evidence]) -> MemoryQuestion:
    answer = record["answer"]
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        answer = str(answer)
    if not isinstance(answer, str) or not answer.strip() or not text.strip():
        raise _BadConversation(f"{what} has no text as question or answer")
    return MemoryQuestion(category, text.strip(), "", answer.strip(), (), tuple(dict.fromkeys(evidence)))


def _object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _BadConversation(f"{what} is not an object")
    return value


def _list(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise _BadConversation(f"{what} is not a list")
    return value


def _text(record: dict[str, Any], key: str, what: str) -> str:
    value = record.get(key)
    if not isinstance(value, str):
        raise _BadConversation(f"{what} has no text as {key}")
    return value
