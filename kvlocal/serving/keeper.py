"""Keeper: takes conversations into slots and out of them, and keeps what they are in memory and on the disk."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from kvlocal.chat.config import SessionConfig, SessionError
from kvlocal.conversations.snapshot import Captured, SnapshotError, can_be_captured
from kvlocal.errors import KvlocalError
from kvlocal.llama.model import Model
from kvlocal.llama.slots import Slots
from kvlocal.nexus.tokens import NexusTokens
from kvlocal.serving.answering import Answering
from kvlocal.serving.chain import chain, owner_digest, turn_digest
from kvlocal.serving.conversation import Checkpoint, KeptConversation
from kvlocal.serving.conversations import Conversations, Found
from kvlocal.serving.live import LiveConversation
from kvlocal.serving.record import Directory, new_id
from kvlocal.serving.request import NEW, AnswerRequest
from kvlocal.serving.texts import Texts
from kvlocal.template.markup import Message

_CANCELLED_SECONDS = 10.0  # that an answer may take to end which was cancelled

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Assignment:
    """What is to be done for a request.

    conversation: where it belongs
    is_new: whether it begins with this request
    source: what there is already to go on from, None for nothing
    turns: all that the conversation has before the answer
    """

    conversation: KeptConversation
    is_new: bool
    source: Found | None
    turns: Sequence[Message]

    @property
    def n_known(self) -> int:
        """How many of the turns there are already."""
        return self.source.n_kept if self.source else 0


class Keeper:
    """The conversations of an engine. What computes is called in turns of the slots' scheduler.

    n: conversations that may be in slots at once
    path: where they are kept on the disk, None for in memory alone
    ram, disk: how much they may take (Conversations)

    conversations: all of them
    texts: what is gone on with without a conversation, in the same slots

    Raises:
        KvlocalError: there is no such directory to be had.
    """

    def __init__(
        self, slots: Slots, n: int, model: Model, config: SessionConfig, nexus: NexusTokens | None, path: Path | None, ram: int, disk: int
    ) -> None:
        self._slots, self._n_free, self._model, self._config, self._nexus = slots, n, model, config, nexus
        self.texts = Texts(slots, model, config, self.take_slot, self.give_slot)
        self.conversations = Conversations(ram, disk)
        self._directory = Directory(path) if path else None
        for owner, record, said, last_used in self._directory.found() if self._directory else ():
            kept = KeptConversation(record.path.stem, owner, said.system, said.tools, said.messages, record)
            kept.n_tokens, kept.last_used, kept.on_disk = said.n_tokens or 0, last_used, record.snapshots.lengths()
            self.conversations.add(kept)
        self._to_write: list[KeptConversation] = []
        self._to_do = threading.Condition()
        self._closing = False
        self._writer = threading.Thread(target=self._write, name="kvlocal-writer", daemon=True)
        self._writer.start()

    # where a request belongs

    def take(self, answering: Answering, request: AnswerRequest) -> Assignment:
        """The conversation that a request belongs to, an old one or a new one, which nobody else has until `release`."""
        system, turns = _split(request.messages)
        owner, tools = owner_digest(request.owner), tuple(request.options.tools)
        digests = chain(owner, system, tools, turns)
        with self.conversations.lock:
            found, trimmed = self._find(digests, owner, request.conversation), None
            if request.keep_trimmed:
                trimmed = self.conversations.find_trimmed(digests[0], [turn_digest(turn) for turn in turns], owner)
                trimmed = trimmed if trimmed and trimmed.n_given > (found.n_given if found else 0) else None
                found = trimmed or found
            known = found.conversation.turns[: found.n_kept] if found else []
            all_turns = [*known, *turns[found.n_given if found else 0 :]]
            goes_on = found and known and found.goes_on and found.conversation.answering is None
            is_new = not goes_on or request.conversation == NEW
            if found and not is_new:
                conversation = found.conversation
            else:
                conversation = KeptConversation(new_id(), owner, system, tools)
                conversation.record = self._directory.record(owner, conversation.id) if self._directory else None
                self.conversations.add(conversation)
            source = found if trimmed or conversation.live else self.conversations.find_source(digests, owner)
            conversation.answering = answering
            return Assignment(conversation, is_new, source, all_turns)

    def _find(self, digests: Sequence[str], owner: str, preferred: str | None) -> Found | None:
        """As Conversations.find; an answer that nobody wants any more is waited for, as it ends soon."""
        deadline = time.monotonic() + _CANCELLED_SECONDS
        while True:
            found = self.conversations.find(digests, owner, preferred)
            ending = found is not None and found.conversation.answering is not None and found.conversation.answering.cancelled
            left = deadline - time.monotonic()
            if not ending or left <= 0:
                return found
            self.conversations.released.wait(left)

    def take_up(self, checkpoint: Checkpoint, owner: str) -> None:
        """Adds a conversation to those in memory, unless there is nothing to go on from, or one that is the same and idle is there.

        owner: an owner_digest
        """
        if checkpoint.captured is None:
            return
        added = KeptConversation(
            new_id(), owner, checkpoint.system, checkpoint.tools, list(checkpoint.turns), captured=checkpoint.captured, n_tokens=checkpoint.n_tokens
        )
        with self.conversations.lock:
            found = self.conversations.find(added.chain, owner)
            if found is None or found.conversation.chain != added.chain or found.conversation.answering:
                self.conversations.add(added)

    # into a slot, and out of it

    def seat(self, assignment: Assignment) -> LiveConversation:
        """The conversation of an assignment in a slot, as far as its source goes. It takes turns by itself, as it may wait for the disk.

        Raises:
            KvlocalError: it cannot be there.
        """
        conversation = assignment.conversation
        if conversation.live is None:
            with self._slots.scheduler.turn():
                self.take_slot()
                try:
                    config = self._config_of(conversation)
                    live = conversation.live = LiveConversation(self._slots, self._model, config, self._nexus, conversation.shown)
                except BaseException:
                    self.give_slot()
                    raise
            if assignment.source:
                self._go_on_from(assignment.source.conversation, live)
            return live
        return conversation.live

    def _config_of(self, conversation: KeptConversation) -> SessionConfig:
        return replace(self._config, system=conversation.system, tools=conversation.tools)

    def _go_on_from(self, source: KeptConversation, live: LiveConversation) -> None:
        """Without anything that fits, all is read."""
        captured, record, turn = source.captured, source.record, self._slots.scheduler.turn
        try:
            if captured:
                with turn():
                    captured.resume(live.session)
            elif record:
                with record.snapshots_in_use:
                    stored = record.snapshots.read(live.session, source.turns)
                    with turn():
                        record.snapshots.resume(live.session, stored, copy=True)
        except (SnapshotError, SessionError) as error:
            _log.info("%s is read again: %s", source.id, error)
            if captured is None:
                source.on_disk = ()

    def take_slot(self) -> None:
        """One slot fewer is free; what is idle in one leaves it, texts first.

        Raises:
            SessionError: in all of them is something that is worked on.
        """
        with self.conversations.lock:
            if not self._n_free and not self.texts.leave_slot():
                leaving = self.conversations.next_to_leave_slot()
                if leaving is None:
                    raise SessionError("all slots are taken: try again")
                self._leave_slot(leaving)
            self._n_free -= 1

    def give_slot(self) -> None:
        """One slot more is free."""
        with self.conversations.lock:
            self._n_free += 1

    def _leave_slot(self, conversation: KeptConversation) -> None:
        """It goes on later from what was captured of it."""
        with self.conversations.lock:
            live, conversation.live = conversation.live, None
            if live is None:
                return
            live.close()
            self.give_slot()
            if conversation.record:
                conversation.record.close()
            elif conversation.captured is None:
                self.conversations.remove(conversation)

    # what becomes of it

    def note_turns(self, assignment: Assignment) -> None:
        """What is to be answered is on the disk. It waits for the disk, so it is not called in a turn.

        Raises:
            KvlocalError: it cannot be written.
        """
        conversation, turns = assignment.conversation, list(assignment.turns)
        if record := conversation.record:
            if assignment.is_new:
                record.begin(str(self._model.path), conversation.system, conversation.tools)
            else:
                record.open()
            record.add_turns(turns[len(conversation.turns) :])
        conversation.set_turns(turns)

    def capture(self, conversation: KeptConversation) -> None:
        """After an answer, and with all that a chat does between its turns: what the conversation is, to go on from if it is out of its slot."""
        live = conversation.live
        assert live is not None
        conversation.set_turns(live.session.messages)
        conversation.captured = None
        with suppress(KvlocalError):
            live.session.finish_turn()
            live.session.second_read()
            conversation.captured = Captured.of(live.session, lasting=True) if can_be_captured(live.session) else None
        conversation.n_tokens = live.session.kv.history_tokens
        if not live.session.cache.uncertain:
            conversation.shown.settle(live.map())

    def give_up(self, assignment: Assignment) -> None:
        """What was read for a request is of no use, and the conversation is what it was before; in a turn."""
        self._leave_slot(assignment.conversation)
        if assignment.is_new:
            self._forget(assignment.conversation)

    def release(self, conversation: KeptConversation) -> None:
        """Others may go on with the conversation; what is to be kept of it is written in a thread of its own."""
        with self.conversations.lock:
            conversation.answering = None
            conversation.shown.end()
            conversation.touch()
            self.conversations.released.notify_all()
            deleted = conversation.deleted
        if not deleted:
            with self._to_do:
                self._to_write.append(conversation)
                self._to_do.notify()

    def delete(self, conversation: KeptConversation) -> None:
        """Removes an idle conversation, in a turn.

        Raises:
            KvlocalError: it cannot be removed, or it is answering.
        """
        with self.conversations.lock:
            if conversation.answering:
                raise SessionError(f"the conversation {conversation.id} is being answered: stop that first, or wait for it")
            self.conversations.remove(conversation)
            self._leave_slot(conversation)
        if conversation.record:
            conversation.record.delete()

    def _forget(self, conversation: KeptConversation) -> None:
        self.conversations.remove(conversation)
        if conversation.record:
            with suppress(KvlocalError):
                conversation.record.delete()

    # the writer

    def _write(self) -> None:
        while conversation := self._next_to_write():
            try:
                self._write_snapshot(conversation)
                for old in self.conversations.beyond_disk():
                    self._forget(old)
                self.conversations.bound_memory()
            except KvlocalError as error:
                _log.warning("%s", error)
            except Exception:  # noqa: BLE001 - it concerns this conversation alone
                _log.exception("a conversation could not be written")

    def _next_to_write(self) -> KeptConversation | None:
        """None when there will be none any more."""
        with self._to_do:
            while not self._to_write:
                if self._closing:
                    return None
                self._to_do.wait()
            return self._to_write.pop(0)

    def _write_snapshot(self, conversation: KeptConversation) -> None:
        captured, record = conversation.captured, conversation.record
        if record is None or captured is None or captured is conversation.written or conversation.deleted:
            return
        with record.snapshots_in_use:
            written = record.snapshots.write(captured, lambda: conversation.deleted)
        if written:
            conversation.written, conversation.on_disk = captured, captured.lengths
        if conversation.deleted:
            record.delete()

    def close(self) -> None:
        """Writes what is to be written, and frees all. Nothing may be in work any more."""
        with self._to_do:
            self._closing = True
            self._to_do.notify()
        self._writer.join()
        self.texts.close()
        for conversation in self.conversations:
            self._leave_slot(conversation)
        if self._directory:
            self._directory.close()


def _split(messages: Sequence[Message]) -> tuple[str | None, list[Message]]:
    """The system prompt and the turns."""
    has_system = messages[0]["role"] == "system"
    return (messages[0]["content"] if has_system else None), list(messages[has_system:])
