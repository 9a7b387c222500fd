"""Chat: a conversation on a terminal or through a pipe, with its transcript."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Self

from kvlocal.chat.answer_piece import AnswerPiece
from kvlocal.chat.config import SessionConfig
from kvlocal.chat.opening import checked_template
from kvlocal.chat.options import AnswerOptions
from kvlocal.chat.session import ChatSession
from kvlocal.conversations.records import Conversation
from kvlocal.conversations.replay import read_on
from kvlocal.conversations.snapshot import SnapshotError, Snapshots, snapshot_path
from kvlocal.conversations.transcript import Transcript
from kvlocal.errors import KvlocalError
from kvlocal.hub.catalogue import Catalogue
from kvlocal.template.markup import Message
from kvlocal_cli import chat_commands
from kvlocal_cli.answer_view import AnswerView
from kvlocal_cli.chat_input import Lines, PipedLines, TypedLines, read_turn
from kvlocal_cli.chat_record import ChatRecord
from kvlocal_cli.chat_screen import Screen, last_exchange, status_line
from kvlocal_cli.idle import Idle
from kvlocal_cli.options import Loaded, Loading
from kvlocal_cli.terminal import Interruptible, ReadingBar, archive_lost

# the next characters of an answer as a transcript keeps them, and the same with its thought apart
Told = tuple[str, AnswerPiece]


class Chat:
    """A running chat: the session, its transcript and its screen.

    Attributes:
        record: how it is kept
        view: where the pieces of answers go
        failed: whether a command failed; on a terminal the user has seen it, a script needs the exit code.
    """

    def __init__(
        self, name: str, loaded: Loaded, screen: Screen, view: AnswerView, loading: Loading, asked: AnswerOptions = AnswerOptions()
    ) -> None:
        self.name = name
        self.screen = screen
        self.view = view
        self.failed = False
        self._model, self._nexus, self._loading, self._asked = loaded.model, loaded.nexus, loading, asked
        self._bar = ReadingBar()
        self._before: Conversation | None = None  # what was cleared or replaced last
        self._told_lost = ""  # why the archive was given up, once that was said
        self.record = ChatRecord(screen)
        self._idle = Idle(lambda stop: self.record.save_snapshot(self.session, stop))
        self.session = self._open(loaded.config)
        self.config = self.session.config

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._idle.end()
        self.session.close()
        self.record.close()

    def keep_session(self, transcript: Transcript) -> None:
        """Keep this chat in a session, and first take up what was said there before.

        Raises:
            KvlocalError: that does not go together with the model or the configuration, or nothing can be written.
        """
        snapshots, earlier = Snapshots(snapshot_path(transcript.path)), transcript.conversation
        changes: list[Callable[[Transcript], None]] = []
        model = self._lasting_name
        if earlier is None:
            transcript.begin(model=model, system=self.config.system)
        else:
            if earlier.model != model:
                earlier.drawn.clear()
            self._take_up(earlier, snapshots)
            self._before = earlier.before
            if earlier.model != model:
                changes.append(lambda transcript: transcript.add_model(model))
            if (system := self.config.system) != earlier.system:
                changes.append(lambda transcript: transcript.add_system(system))
            if earlier.messages:
                self.screen.note(f"back in {transcript.path.stem}: {len(earlier.messages)} messages{chat_commands.open_end(earlier)}")
                if self.screen.interactive:
                    self.screen.note(last_exchange(earlier), is_prose=True)
        self.record.go_on(transcript, snapshots, changes)

    @property
    def _lasting_name(self) -> str:
        """The model by a name that is found from anywhere, and that means it for good, as an alias does not."""
        name = Catalogue.load().meant(self.name)
        return str(Path(name).absolute()) if Path(name).is_file() else name

    def _take_up(self, earlier: Conversation, snapshots: Snapshots) -> None:
        try:
            if earlier.messages:
                snapshots.load(self.session, earlier.messages)
        except SnapshotError as error:
            say = self.screen.note if self.screen.interactive else self.screen.warn
            say(f"{error}: {len(earlier.messages)} messages are read again")
        self._bar.lines = True
        try:
            read_on(self.session, earlier, self._measured)
        finally:
            self._bar.lines = False
            self._bar.close()

    def run(self) -> None:
        """Read and answer turns to the end of the input."""
        screen = self.screen
        lines: Lines
        if screen.interactive:
            lines = TypedLines(screen.terminal, chat_commands.completer())
            kept = f"kept in {self.record.transcript.path}" if self.record.transcript else "not kept in a file"
            changed = "".join(f" with {adapter}" for adapter in self._model.adapters)
            screen.note(f"{self.name}{changed}, {self.config.policy}, {self.session.kv.budget} cells. This chat is {kept}.")
            screen.note("/help lists the commands, Ctrl-D leaves.")
        else:
            lines = PipedLines()
        while True:
            try:
                if screen.interactive:
                    with self._idle.working(self.session):
                        text, literal = read_turn(lines)
                else:
                    self._work_between_turns()
                    text, literal = read_turn(lines)
                self.record.tell_unsaid()
                self.record.tell(self._idle.problem)
                if not text.strip():
                    continue
                if text.startswith("/") and not literal:
                    chat_commands.execute(self, text)
                else:
                    self.ask(text)
            except EOFError:
                self.record.save_snapshot(self.session)
                self.record.tell_unsaid()
                return
            except KeyboardInterrupt:
                if not screen.interactive:
                    raise
                screen.note("Ctrl-D or /bye leaves.")
            except KvlocalError as error:
                screen.warn(str(error))
                self.failed = not screen.interactive

    def _work_between_turns(self) -> None:
        """As Idle does on a terminal, to its end. The next turn is read also if it fails."""
        try:
            self.session.finish_turn()
            self.record.save_snapshot(self.session)
            self.session.second_read()
        except KvlocalError as error:
            self.screen.warn(str(error))
            self.failed = True

    def ask(self, text: str) -> None:
        """Send a user turn and show the answer.

        Raises:
            KvlocalError: it cannot be read or answered; on a terminal also when Ctrl-C came while it was read.
        """
        session = self.session
        if session.messages and session.messages[-1]["role"] == "user":
            # one that was loaded without an answer; turns alternate
            session.add_turn("assistant", "")
            self.record.add(lambda transcript: transcript.end_answer("stopped"))
        compressions = session.kv.compressions

        def begin() -> Iterator[Told]:
            self.record.add_user(text)
            session.add_turn("user", text)
            return session.told(self._asked)

        with self._interruptible() as turn:
            self._show(self._read(begin, n_messages=len(session.messages) + 1), turn)
        self._show_status(compressions)

    def regenerate(self) -> None:
        """Show another answer to the last user turn, or the first if it has none.

        Raises:
            KvlocalError: as `ask` does, and if there is no user turn.
        """
        session = self.session
        compressions = session.kv.compressions

        def begin() -> Iterator[Told]:
            if session.messages:
                self.record.add(Transcript.add_regen)
            session.take_answer_back()
            return session.told(self._asked)

        with self._interruptible() as turn:
            if session.messages and session.messages[-1]["role"] == "user":
                pieces = session.told(self._asked)
            else:
                pieces = self._read(begin, n_messages=len(session.messages) - 1)
            self._show(pieces, turn)
        self._show_status(compressions)

    def undo(self, n_turns: int = 1) -> list[dict[str, str]]:
        """Take the last user turns and their answers back, and return them.

        Raises:
            KvlocalError: there are not so many.
        """
        messages = list(self.session.messages)
        try:
            taken = self.session.undo(n_turns)
        except BaseException:
            self.session.owe(messages)
            raise
        finally:
            self._bar.close()
        self.record.add(lambda transcript: transcript.add_undo(n_turns))
        return taken

    def clear(self) -> None:
        """Forget everything but the system prompt; it can be brought back."""
        before = self._put_aside()
        self.session.clear()
        self._before = before
        self.record.add(Transcript.add_clear)

    def load(self, conversation: Conversation) -> None:
        """Go on with another conversation; what was said until now can be brought back.

        Raises:
            KvlocalError: as `replace` does.
        """
        system, messages, before = conversation.system, conversation.messages, self._put_aside()
        self.replace(replace(self.config, system=system), messages)
        self._before = before
        self.record.add(lambda transcript: transcript.add_load(messages, system))

    def bring_back(self) -> int:
        """Where nothing was said since, bring back what was cleared or replaced last. Returns how many messages that are, 0 if there is nothing.

        Raises:
            KvlocalError: as `replace` does.
        """
        before = self._before
        if before is None or self.session.messages:
            return 0
        self.replace(replace(self.config, system=before.system), before.messages)
        self._before = before.before
        self.record.add(Transcript.add_undo)
        return len(before.messages)

    def _put_aside(self) -> Conversation | None:
        messages = [dict(message) for message in self.session.messages]
        return Conversation(messages, self.config.system, before=self._before).put_aside()

    def edit(self, turn: int, text: str) -> None:
        """Send this in the place of a user turn, as if all that came from there on had not been, and show the answer.

        Args:
            turn: the number of the user turn, from 1 on.

        Raises:
            KvlocalError: as `ask` does, and if there is no such turn.
        """
        n_turns = sum(message["role"] == "user" for message in self.session.messages)
        if not 1 <= turn <= n_turns:
            raise KvlocalError(f"there is no turn {turn}: " + (f"give 1 to {n_turns}, as /kv numbers them" if n_turns else "nothing was said yet"))
        self.undo(n_turns - turn + 1)
        self.ask(text)

    def fork(self, path: Path) -> None:
        """Go on in a new session; what was said is there too, and where it was kept until now it stays as it is.

        Raises:
            KvlocalError: it cannot be kept there.
        """
        messages = [dict(message) for message in self.session.messages]
        self.record.fork(path, self._lasting_name, Conversation(messages, self.config.system))
        self.record.leave_others(self.session)

    def replace(self, config: SessionConfig, messages: Sequence[Message]) -> None:
        """Read this conversation under this configuration. If that fails, the chat stays as it was, and its conversation is read again: there is
        never memory for more than one session.

        Raises:
            KvlocalError: they do not go together, or not with the model, or not with the memory there is.
        """
        before, n_answers = [dict(message) for message in self.session.messages], self.session.n_answers
        messages = [dict(message) for message in messages]
        checked_template(self._model, config, self._nexus)
        self._loading.check(self._model.path, config, instead_of=self.config, placement=self._model.placement)
        self.session.close()
        try:
            self.session = self._open(config)
            for message in self._measured(messages):
                self.session.add_turn(message["role"], message["content"])
        except BaseException:
            self.session.close()
            self.session = self._open(self.config)
            self.session.owe(before)
            # whoever does not want to wait for that waits when the chat goes on
            with suppress(KvlocalError, KeyboardInterrupt):
                self.session.settle()
            raise
        finally:
            self.session.n_answers = n_answers
            self._bar.close()
        self.config = self.session.config

    def _open(self, config: SessionConfig) -> ChatSession:
        return ChatSession(self._model, config, progress=self._bar.show, nexus=self._nexus)

    def _measured(self, messages: Sequence[Message]) -> Iterator[Message]:
        """These messages one after another; the bar tells how far the reading of them has come."""
        total = sum(len(message["content"]) for message in messages) or 1
        done = 0
        for message in messages:
            self._bar.begin, done = done / total, done + len(message["content"])
            self._bar.end = done / total
            yield message
            self._bar.show(1, 1)

    def _interruptible(self) -> AbstractContextManager[Interruptible | None]:
        return Interruptible(self.session) if self.screen.interactive else nullcontext()

    def _read(self, begin: Callable[[], Iterator[Told]], *, n_messages: int) -> Iterator[Told]:
        """The answer that `begin` begins once it has read the user turn; there are `n_messages` then."""
        try:
            return begin()
        except BaseException as error:
            if len(self.session.messages) < n_messages and self.record.awaits_answer:
                self.record.add(Transcript.add_undo)
            if isinstance(error, KeyboardInterrupt) and self.screen.interactive:
                raise KvlocalError("stopped while your turn was read: it is taken back, send it again") from None
            raise
        finally:
            self._bar.close()

    def _show(self, pieces: Iterator[Told], turn: Interruptible | None) -> None:
        reason = "error"
        drawn: Sequence[int] = []
        try:
            for text, piece in turn.answering(pieces) if turn else pieces:
                # first what outlives the program
                if text:
                    self.record.add_piece(text)
                self.view.write(text, piece)
            if last := self.session.last:
                reason, drawn = last.stop_reason, last.drawn
        except KeyboardInterrupt:
            reason = "stopped"
            raise
        finally:
            self.record.add(lambda transcript: transcript.end_answer(reason, drawn, self.session.kv.history_tokens))
            self.view.end()

    def _show_status(self, compressions: int) -> None:
        last, kv = self.session.last, self.session.kv
        assert last is not None  # after an answer
        self.screen.note(status_line(last, kv, compressions), is_prose=True)
        if kv.archive_lost and kv.archive_lost != self._told_lost:
            self.screen.warn(archive_lost(kv.archive_lost))
        self._told_lost = kv.archive_lost
