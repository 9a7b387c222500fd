"""What is asked of an engine, and what comes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from kvlocal.chat.answer_piece import AnswerPiece
from kvlocal.chat.options import AnswerOptions
from kvlocal.chat.text_session import Prompt
from kvlocal.errors import KvlocalError
from kvlocal.llama.sampling import SamplingParams
from kvlocal.template.markup import Message

NEW = ""  # in the place of a conversation's ID


class EngineBusy(KvlocalError):
    """So many requests wait already that this one was not taken.

    retry_after: seconds after which there may be room
    """

    def __init__(self, retry_after: float) -> None:
        super().__init__(f"too many requests are waiting: try again in {retry_after:.0f} seconds")
        self.retry_after = retry_after


class EngineClosed(KvlocalError):
    """The engine takes no more requests, or has ended before this one was answered."""


class UnknownConversation(KvlocalError):
    """There is no such conversation, or not for this owner."""


@dataclass(frozen=True)
class AnswerRequest:
    """A conversation whose last turn is to be answered.

    owner: who may see the conversation; those of different owners never meet
    messages: the whole conversation, in an order that a session can have (kvlocal.chat.messages)
    sampling: how tokens are drawn, None as the engine's configuration says
    options: what the answer may be
    conversation: the one to go on with where several have this history; NEW for one of its own, whatever there is, and None leaves it open
    keep_trimmed: where a client has left out the oldest turns, go on with the conversation that has them
    """

    owner: str
    messages: Sequence[Message]
    sampling: SamplingParams | None = None
    options: AnswerOptions = field(default_factory=AnswerOptions)
    conversation: str | None = None
    keep_trimmed: bool = False


@dataclass(frozen=True)
class TextRequest:
    """A text that is to be gone on with as it is, without a chat template (kvlocal.chat.text_session); no conversation is kept of it.

    owner: whose it is; what is in the cells of another owner's text is not used for it
    prompt: the text, or its tokens
    sampling, options: as AnswerRequest has them
    echo: the text comes first, as a piece with the log-probabilities of its tokens if any are asked for
    draws: whether it is gone on with, and not only read
    """

    owner: str
    prompt: Prompt
    sampling: SamplingParams | None = None
    options: AnswerOptions = field(default_factory=AnswerOptions)
    echo: bool = False
    draws: bool = True


@dataclass(frozen=True)
class Usage:
    """How many tokens a request took.

    prompt_tokens: of the whole conversation before the answer, or of the text
    cached_tokens: of these, those that were not read again
    completion_tokens: of the answer
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True)
class Finished:
    """The last event of a request.

    message: the answer as it is in the conversation, or what goes on with the text; without content if there is none
    stop_reason: why it ended, as TurnStats says; "stopped" if it was cancelled, "error" after an error
    usage: what it took
    conversation: the conversation it is in, "" for a text, or if it did not come so far
    n_messages: how many messages that has with it, the system prompt not counted
    error: what went wrong, None if nothing did
    """

    message: Message
    stop_reason: str
    usage: Usage
    conversation: str = ""
    n_messages: int = 0
    error: KvlocalError | None = None


Event = AnswerPiece | Finished
