"""How a chat outlives its program: its transcript, and in a session the snapshot beside it."""

from collections.abc import Callable, Sequence
from pathlib import Path

from kvlocal.chat.session import ChatSession
from kvlocal.conversations.named_sessions import chats_dir
from kvlocal.conversations.pruning import bound_chats
from kvlocal.conversations.records import Conversation, TranscriptError
from kvlocal.conversations.snapshot import Snapshots, snapshot_path
from kvlocal.conversations.transcript import Transcript, chat_path
from kvlocal.errors import KvlocalError
from kvlocal_cli.chat_screen import Screen

Change = Callable[[Transcript], None]


class ChatRecord:
    """Writes what happens in a chat, and says what hinders it: once, as it stays so until somebody does something about it.

    Args:
        screen: where that is said.

    Attributes:
        transcript: None if there is none, or none any more.
    """

    def __init__(self, screen: Screen) -> None:
        self.transcript: Transcript | None = None
        self._screen = screen
        self._snapshots: Snapshots | None = None
        self._left: list[Transcript] = []
        self._changes: list[Change] = []  # of a session, that are written when something is said
        # of failures to write: what is to be said, and what has been
        self._unsaid = ""
        self._said: set[str] = set()

    def begin(self, name: str, system: str | None) -> None:
        """Begin the transcript of a chat with this model."""
        try:
            self.transcript = Transcript.open(chat_path(), model=name, system=system)
        except KvlocalError as error:
            self._go_on_without(error)

    def go_on(self, transcript: Transcript, snapshots: Snapshots, changes: Sequence[Change] = ()) -> None:
        """Go on with those of a session. changes: what is otherwise from now on; until something is said, all files stay as they are."""
        self.transcript, self._snapshots, self._changes = transcript, snapshots, [*changes]

    @property
    def is_session(self) -> bool:
        """Whether the chat is kept under a name."""
        return self._snapshots is not None

    def fork(self, path: Path, model: str, conversation: Conversation) -> None:
        """Go on in a new session at that path, with all there was until now, which stays where it is kept.

        Args:
            model: the one that answers, by a name that is found from anywhere.
            conversation: what was said, for a chat without a transcript.

        Raises:
            KvlocalError: something is there already, or it cannot be written; the chat is kept where it was.
        """
        before = self.transcript
        if before is None:
            transcript = Transcript.open(path, model=model, system=conversation.system)
        else:
            transcript = before.fork(path)
        try:
            if before is None and conversation.messages:
                transcript.add_load(conversation.messages, conversation.system)
            elif self._changes:
                self._write_changes(transcript)
            elif transcript.conversation and transcript.conversation.model != model:
                transcript.add_model(model)
        except TranscriptError:
            transcript.close()
            raise
        self.go_on(transcript, Snapshots(snapshot_path(path)))
        if before is not None:
            self._left.append(before)

    def leave_others(self, session: ChatSession) -> None:
        """Nothing that the session uses lies where it was kept before a fork, so that others may go on there."""
        if not self._left:
            return
        if session.cache.archive is None or session.config.store != "disk" or (self._snapshots and self._snapshots.holds(session)):
            for transcript in self._left:
                transcript.close()
            self._left.clear()

    def add(self, add: Callable[[Transcript], None]) -> None:
        """Add to the transcript, as long as there is one. In a session, what cannot be written now is written with what comes next."""
        if self.transcript is None:
            return
        try:
            self._write_changes(self.transcript)
            add(self.transcript)
        except TranscriptError as error:
            if self._snapshots:
                self.tell(f"{error}; what was said last is lost if the chat ends before it can be written")
                return
            self.transcript.close()
            self.transcript = None
            self._go_on_without(error)

    def add_user(self, text: str) -> None:
        """Add a user turn to the transcript.

        Raises:
            KvlocalError: a session cannot keep it, so it must not be answered.
        """
        if self.transcript is None or self._snapshots is None:
            self.add(lambda transcript: transcript.add_user(text))
            return
        try:
            self._write_changes(self.transcript)
            self.transcript.add_user(text)
        except TranscriptError as error:
            raise KvlocalError(f"{error}; your turn is not taken: send it again then") from error

    def add_piece(self, text: str) -> None:
        """Add the next piece of an answer."""
        self.add(lambda transcript: transcript.add_piece(text))

    @property
    def awaits_answer(self) -> bool:
        """Whether the transcript ends with a turn that has no answer."""
        return self.transcript is not None and self.transcript.awaits_answer

    def save_snapshot(self, session: ChatSession, stop: Callable[[], bool] = lambda: False) -> None:
        """Write the snapshot of a session, until `stop` says so. What hinders it is said by `tell_unsaid`, as this may be a thread."""
        try:
            if self._snapshots and not self._changes:
                self._snapshots.save(session, stop)
                self.leave_others(session)
        except KvlocalError as error:
            self._unsaid = f"{error}; the session goes on, but the way back to it will be slow"

    def tell_unsaid(self) -> None:
        """Warn of what has hindered a snapshot."""
        self.tell(self._unsaid)

    def tell(self, problem: str) -> None:
        """Warn of something, if it is not empty and was not said before."""
        if problem and problem not in self._said:
            self._screen.warn(problem)
            self._said.add(problem)

    def close(self) -> None:
        """Close the transcript. Closing twice is harmless."""
        for transcript in (*self._left, *([self.transcript] if self.transcript else [])):
            transcript.close()
        if self.is_session and self.transcript and self.transcript.path.parent == chats_dir():
            # it has got caches now, which without a name nobody looks after
            bound_chats()

    def _write_changes(self, transcript: Transcript) -> None:
        while self._changes:
            # the transcript remembers what it cannot write now
            self._changes.pop(0)(transcript)

    def _go_on_without(self, error: KvlocalError) -> None:
        self._screen.warn(f"{error}; the chat goes on without a transcript, /save keeps it")
