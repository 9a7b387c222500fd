"""Brings a session to where a conversation stood when its program ended."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from kvlocal.chat.session import ChatSession
from kvlocal.conversations.records import Conversation
from kvlocal.template.markup import Message

# tokens of answers that are evaluated one by one, as when they were drawn, so that the cache becomes what it was; more would take too long
EXACT = 1024


def read_on(
    session: ChatSession, conversation: Conversation, measured: Callable[[Sequence[Message]], Iterable[Message]] = iter
) -> None:
    """Reads the messages of a conversation that a session does not have yet, with all that a chat does between its turns.

    measured: given these messages, gives them back one after another, to tell how far the reading has come

    Raises:
        KvlocalError: they do not go together with the session.
    """
    start = len(session.messages)
    exact = sum(len(conversation.drawn.get(i, ())) for i in range(start, len(conversation.messages))) <= EXACT
    turn: list[Message] = []
    for i, message in enumerate(measured(conversation.messages[start:]), start):
        turn.append(message)
        if message["role"] != "assistant":
            if i + 1 < len(conversation.messages) and conversation.messages[i + 1]["role"] != "assistant":
                # read with what follows
                continue
            session.finish_turn()
            session.second_read()
            session.add_messages(turn)
        elif exact and i in conversation.drawn:
            session.add_answer(message["content"], conversation.drawn[i], message.get("tool_calls", ()))
        else:
            session.add_messages(turn)
        turn = []
    session.n_answers = conversation.n_answers
