"""A snapshot brings a conversation back bit by bit, and one that does not fit is found out before anything is done with it."""

import dataclasses
import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
from doors import write_chat_model
from random_nexus import nexus_file
from recalling import lasting, rows_of

from kvlocal.chat.config import SessionConfig, SessionError
from kvlocal.chat.session import ChatSession
from kvlocal.conversations import snapshot as module
from kvlocal.conversations.archive_file import archive_path
from kvlocal.conversations.records import Conversation
from kvlocal.conversations.replay import EXACT, read_on
from kvlocal.conversations.snapshot import VERSION, SnapshotError, Snapshots
from kvlocal.errors import KvlocalError
from kvlocal.files.atomic import staging_of
from kvlocal.llama.model import Model
from kvlocal.llama.sampling import SamplingParams
from kvlocal.nexus.tokens import NexusTokens

pytestmark = pytest.mark.device

GREEDY = SamplingParams(temperature=0, repeat_penalty=1.1)
SMALL = SessionConfig(budget=128, stride=32, n_ubatch=64, max_tokens=12, n_threads=1, sampling=GREEDY, system="Be brief.")
STORY = "The keeper of the lighthouse wrote down the weather, the ships and the birds of every single day. "
ASKED = ["Name a bird.", STORY * 5 + "What did the keeper write down?", "Name a tree.", STORY * 3 + "Who wrote?", "And when?"]


@pytest.fixture(scope="module")
def model(short_smollm2):
    with Model(short_smollm2) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def nexus(short_smollm2, model, tmp_path_factory):
    path = tmp_path_factory.mktemp("nexus") / "test.nexus.gguf"
    nexus_file(short_smollm2).save(path)
    return NexusTokens(model, path)


@pytest.fixture
def snapshots(tmp_path):
    return Snapshots(tmp_path / "one.snapshot")


def session(model, nexus=None, **changes):
    return ChatSession(model, dataclasses.replace(SMALL, **changes), nexus=nexus)


def ask(chat, texts, keep=lambda: None):
    """The answers, with all that a chat does between its turns."""
    answers = []
    for text in texts:
        answers.append("".join(chat.send(text)))
        chat.finish_turn()
        keep()
        chat.second_read()
    return answers


def check_equal(one, other):
    assert one.messages == other.messages and lasting(one.segments()) == lasting(other.segments())
    # what was recalled before, and where the archive is, is another matter
    known = {"nexus": 0.0, "recalled": 0.0, "archived": 0, "archive_bytes": (0, 0)}
    assert dataclasses.replace(one.kv, **known) == dataclasses.replace(other.kv, **known)
    arrays, others = one.snapshot(), other.snapshot()
    assert arrays.keys() == others.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, others[name], err_msg=name)
    if one.cache.archive:
        check_archives(one.cache.archive, other.cache.archive)


def check_archives(one, other):
    shape = one.key_chunks()[0].shape[:2]
    every = np.broadcast_to(np.arange(one.n_tokens), (*shape, one.n_tokens))
    np.testing.assert_array_equal(rows_of(one, every).k, rows_of(other, every).k)
    np.testing.assert_array_equal(rows_of(one, every).v, rows_of(other, every).v)
    for mark, another in zip(one.marks, other.marks, strict=True):
        np.testing.assert_array_equal(mark.data, another.data)


KINDS = {
    "default": {},
    "q8_0": {"type_k": "q8_0", "type_v": "q8_0", "policy": "gkv"},
    "sums": {"policy": "h2o", "positions": "cache"},
    "blocks": {"policy": "dynsplit"},
    "ratio": {"ratio": 0.6, "budget": 400},
    "nexus": {"policy": "hybrid", "budget": 192},
    "archive": {"policy": "recall", "archive": "ram"},
    "archive, nexus": {"policy": "recall", "policy_args": {"share": 0.05}, "archive": "ram"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_answers_after_a_restore_are_those_without_the_interruption(model, nexus, snapshots, kind):
    """Also over compressions, before and after it, with a second read and with Nexus tokens."""
    tokens = nexus if "nexus" in kind else None
    with session(model, tokens, **KINDS[kind]) as through, session(model, tokens, **KINDS[kind]) as back:
        ask(through, ASKED[:3], lambda: snapshots.save(through))
        before = through.kv
        assert before.compressions > 0 or kind in ("ratio", "nexus")
        assert Snapshots(snapshots.path).load(back, through.messages) == 6
        back.second_read()
        check_equal(through, back)
        assert ask(through, ASKED[3:]) == ask(back, ASKED[3:])
        assert through.kv.compressions > before.compressions
        check_equal(through, back)


@pytest.mark.parametrize("kept", [True, False])
def test_sampled_answers_after_a_restore_are_those_without_the_interruption(model, snapshots, kept):
    """From a snapshot or read again from a transcript; also where an answer was given anew, before it and after it."""
    drawn = SamplingParams(temperature=1.0, seed=5)
    changes = {"sampling": drawn, "max_tokens": 12, "idle": False}
    with session(model, **changes) as through, session(model, **changes) as back:
        tokens = {}
        for i, text in ((1, ASKED[0]), (3, ASKED[2])):
            given_up = ask(through, [text])
            assert ["".join(through.regenerate())] != given_up
            tokens[i] = through.last.drawn
        conversation = Conversation(through.messages, drawn=tokens, n_answers=4)
        if kept:
            snapshots.save(through)
            snapshots.load(back, through.messages)
            check_equal(through, back)
        read_on(back, conversation)
        assert "".join(through.regenerate()) == "".join(back.regenerate())
        assert ask(through, ASKED[3:]) == ask(back, ASKED[3:])
        if kept:
            check_equal(through, back)


def test_a_sliding_window_comes_back(short_gemma3, snapshots):
    settings = {"n_ubatch": 128, "budget": 256, "max_tokens": 6}
    with Model(short_gemma3) as model, session(model, **settings) as through, session(model, **settings) as back:
        ask(through, [STORY * 20, "Go on."], lambda: snapshots.save(through))
        snapshots.load(back, through.messages)
        back.second_read()
        assert ask(through, ASKED[3:]) == ask(back, ASKED[3:])
        check_equal(through, back)


@pytest.mark.parametrize("turn", ["Name a tree.", STORY * 6])
def test_the_last_turn_can_be_taken_back_after_a_restore(model, snapshots, turn):
    """Whether something was removed in it or not, and nothing is read again."""
    with session(model) as through, session(model) as back:
        ask(through, [*ASKED[:2], turn], lambda: snapshots.save(through))
        snapshots.load(back, through.messages)
        back.second_read()
        back._begin = back.restore = None
        assert through.undo() == back.undo()
        check_equal(through, back)
        assert ask(through, ASKED[3:]) == ask(back, ASKED[3:])


def test_turns_behind_a_snapshot_are_read_as_they_were_drawn(model, snapshots):
    """The cache becomes what it was, bit by bit; without the tokens, or with others, the words are read."""
    with session(model) as through, session(model) as back, session(model) as other:
        drawn = {}
        for i, text in enumerate(ASKED):
            ask(through, [text], lambda i=i: snapshots.save(through) if i < 3 else None)
            drawn[2 * i + 1] = through.last.drawn
        conversation = Conversation(through.messages, drawn=drawn, n_answers=len(ASKED))
        assert snapshots.load(back, through.messages) == 6
        read_on(back, conversation)
        back.second_read()
        check_equal(through, back)
        for wrong in ({9: [5, 6]}, {9: [2**31]}, {9: [-1]}, {9: through.last.drawn * EXACT}, {}):
            assert snapshots.load(other, through.messages) == 6
            read_on(other, dataclasses.replace(conversation, drawn=wrong))
            assert other.messages == through.messages


def test_another_last_turn_gives_the_one_before(model, snapshots):
    """A process that died while it answered a turn anew has a snapshot with the answer that was given up."""
    plain = SamplingParams(temperature=0)
    with session(model, sampling=plain) as through, session(model, sampling=plain) as back:
        ask(through, ASKED[:3], lambda: snapshots.save(through))
        messages = [*through.messages[:-1], {"role": "assistant", "content": "An o"}]
        assert snapshots.load(back, messages) == 4
        assert back.messages == through.messages[:4]
        read_on(back, Conversation(messages))
        assert back.messages == messages
        assert "".join(back.regenerate()) == through.messages[-1]["content"]


@pytest.fixture
def kept(model, snapshots):
    """A conversation of two turns with a snapshot."""
    with session(model, budget=64) as chat:
        ask(chat, ["Name a bird.", "Name a tree."])
        snapshots.save(chat)
        return list(chat.messages)


def check_refused(model, snapshots, messages, match, **changes):
    with session(model, **{"budget": 64, **changes}) as chat:
        with pytest.raises(SnapshotError, match=match):
            snapshots.load(chat, messages)
        assert chat.messages == [] and chat.kv.history_tokens == chat.segments()[0].n_tokens
        assert "".join(chat.send("Hello!"))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"budget": 80}, "another budget"),
        ({"stride": 33}, "another stride"),
        ({"window": 8}, "another window"),
        ({"policy": "kvzip"}, "another policy"),
        ({"policy_args": {"recent": 0.6}}, "another policy args"),
        ({"type_k": "q8_0"}, "another type k"),
        ({"positions": "cache"}, "another positions"),
        ({"n_ubatch": 32}, "another n ubatch"),
        ({"system": "Be kind."}, "another conversation"),
    ],
)
def test_other_settings_are_found_out(model, snapshots, kept, changes, match):
    check_refused(model, snapshots, kept, match, **changes)


def test_another_model_or_version_or_conversation_is_found_out(model, snapshots, kept, monkeypatch):
    shorter, other = kept[:1], [{"role": "user", "content": "Name a fish."}, *kept[1:]]
    for messages in ([], shorter, other):
        check_refused(model, snapshots, messages, "another conversation")
    monkeypatch.setattr(module, "fingerprint", lambda path: "other")
    check_refused(model, snapshots, kept, "another model")
    monkeypatch.undo()
    monkeypatch.setattr("kvlocal.__version__", "0.0.1")
    check_refused(model, snapshots, kept, "another kvlocal")
    snapshots.path.unlink()
    check_refused(model, snapshots, kept, "there is no snapshot")
    snapshots.path.mkdir()
    check_refused(model, snapshots, kept, "cannot be read")


def test_no_part_of_the_file_can_be_lost_or_changed(model, snapshots, kept):
    """Nothing is taken from it then: neither cut off, longer, nor with a byte changed anywhere."""
    content = snapshots.path.read_bytes()
    n_header = content.index(b"\n") + 1
    rng = np.random.default_rng(0)
    with session(model, budget=64) as chat:
        chat.resume = lambda *_: pytest.fail("it was given to the cache")
        for n in (0, 1, n_header - 1, n_header, n_header + 100, len(content) - 33, len(content) - 1):
            snapshots.path.write_bytes(content[:n])
            with pytest.raises(SnapshotError):
                snapshots.load(chat, kept)
        snapshots.path.write_bytes(content + b"x")
        with pytest.raises(SnapshotError, match="incomplete"):
            snapshots.load(chat, kept)
        for at in [*rng.integers(0, n_header, 60), *rng.integers(n_header, len(content), 20), len(content) - 1]:
            changed = bytearray(content)
            changed[at] ^= 1 << int(rng.integers(8))
            snapshots.path.write_bytes(changed)
            with pytest.raises(SnapshotError):
                snapshots.load(chat, kept)
    snapshots.path.write_bytes(content)
    with session(model, budget=64) as chat:
        assert snapshots.load(chat, kept) == 4


FORGED = [
    {"format": 1}, {"version": VERSION + 1}, {"made_with": None}, {"made_with": []}, {"conversations": None}, {"conversations": [[-1, "x"]]},
    {"conversations": [[True, "x"]]}, {"conversations": [["4"]]}, {"arrays": None}, {"arrays": {}}, {"arrays": [["cache", "|u1"]]},
    {"arrays": [["cache", "|u1", [2**62]]]}, {"arrays": [["cache", "|u1", [-1]]]}, {"arrays": [["cache", "|O", [1]]]},
    {"arrays": [["cache", "|u1", 1]]}, {"arrays": [["ledger.tokens", "<i4", [30, 3, 2**40]]]}, {"arrays": [["ledger.tokens", "<i4", [2**31, 3, 1]]]},
    {"arrays": [["ledger.ids", "<i4", [2**40]]]}, {"arrays": [["cache", "|u1", [1.0]]]}, {"arrays": [["cache", "|u1", [True]]]},
    {"arrays": [["none", "|u1", [1]]]}, {"arrays": [[[], "|u1", [1]]]}, {"arrays": [["cache", "|u1", [1]]] * 2},
]  # fmt: skip


def test_a_forged_header_is_refused_before_anything_is_allocated(model, snapshots, kept, monkeypatch):
    header, _, rest = snapshots.path.read_bytes().partition(b"\n")
    with session(model, budget=64) as chat:
        assert snapshots.load(chat, kept) == 4
        # numpy without anything that allocates
        monkeypatch.setattr(module, "np", SimpleNamespace(dtype=np.dtype))
        for change in FORGED:
            snapshots.path.write_bytes(json.dumps(json.loads(header) | change).encode() + b"\n" + rest)
            with pytest.raises(SnapshotError):
                snapshots.load(chat, kept)


def test_other_files_are_refused(model, snapshots, kept):
    with session(model, budget=64) as chat:
        for line in (b"", b"\n", b"[]\n", b"{}\n", b"[" * 60_000 + b"\n", b"\xff\xfe\n", b"x" * 100_000, b'{"version": ' + b"9" * 5000 + b"}\n"):
            snapshots.path.write_bytes(line)
            with pytest.raises(SnapshotError, match="damaged"):
                snapshots.load(chat, kept)


def forged(chat, **changes):
    arrays = chat.snapshot()
    for name, array in changes.items():
        arrays[name.replace("__", ".")] = array
    return {name: array for name, array in arrays.items() if array is not None}


def test_arrays_that_contradict_each_other_are_refused(model):
    """As they could come from a forged file with the right checksum."""
    evicting = {"max_tokens": 24, "policy": "kvzip-snapkv"}
    with session(model, **evicting) as chat, session(model, **evicting) as other:
        ask(chat, ASKED[:3])
        tokens, numbers = chat.snapshot()["ledger.tokens"].copy(), chat.snapshot()["ledger.numbers"]
        backwards = tokens[..., ::-1].copy()
        ids = chat.snapshot()["ledger.ids"]
        for arrays in (
            forged(chat, ledger__tokens=backwards),
            forged(chat, ledger__tokens=tokens[..., :-1]),
            forged(chat, ledger__tokens=tokens + 2**20),
            forged(chat, ledger__numbers=numbers + 1),
            forged(chat, ledger__numbers=numbers[:2]),
            forged(chat, ledger__ids=ids[:0]),
            forged(chat, ledger__segments=np.frombuffer(b"{", np.uint8)),
            forged(chat, ledger__segments=np.frombuffer(b'[{"role": 1}]', np.uint8)),
            forged(chat, ledger__history=None),
            forged(chat, ledger__block_of=np.array([3, 1], np.int32)),
            forged(chat, numbers=np.zeros(1, np.int64)),
            forged(chat, recent=np.array([2**30], np.int32)),
            forged(chat, cache=chat.snapshot()["cache"][:1000]),
            forged(chat, cache=np.zeros(0, np.uint8)),
            forged(chat, cache=None),
            forged(chat, ring=np.zeros(8, np.uint8)),
            forged(chat, ring=np.full_like(chat.snapshot()["ring"], 77)),
            forged(chat, checkpoint__numbers=np.array([10**6, 4])),
            forged(chat, checkpoint__ledger__tokens=backwards),
        ):
            with pytest.raises(SessionError, match="no state of such a session"):
                other.resume(chat.messages, arrays)
            assert other.messages == [] and other.kv.used == other.segments()[0].n_tokens
        other.resume(chat.messages, chat.snapshot())
        chat.second_read()
        other.second_read()
        check_equal(chat, other)


def test_only_what_is_worth_it_is_written(model, snapshots):
    with session(model) as chat:
        snapshots.save(chat)
        chat.add_turn("user", "Name a bird.")
        snapshots.save(chat)
        assert not snapshots.path.exists()
        chat.add_turn("assistant", "An owl.")
        snapshots.save(chat, lambda: True)
        assert not snapshots.path.exists()
        asked = iter([False, False, True])
        snapshots.save(chat, lambda: next(asked))
        assert not snapshots.path.exists() and not staging_of(snapshots.path).exists()
        staging_of(snapshots.path).write_bytes(b"left behind")
        snapshots.save(chat)
        assert snapshots.path.stat().st_mode & 0o777 == 0o600 and not staging_of(snapshots.path).exists()
        first = os.stat(snapshots.path).st_ino
        snapshots.save(chat)
        assert os.stat(snapshots.path).st_ino == first


def test_what_cannot_be_written_is_an_error_and_the_older_one_stays(model, snapshots, kept, tmp_path):
    content = snapshots.path.read_bytes()
    staging_of(snapshots.path).mkdir()
    with session(model, budget=64) as chat:
        snapshots.load(chat, kept)
        "".join(chat.send("Hello!"))
        with pytest.raises(KvlocalError, match="cannot write"):
            snapshots.save(chat)
    assert snapshots.path.read_bytes() == content


def with_position(state, cell, position):
    """llama.cpp's state of a sequence with another position of a cell."""
    changed = state.copy()
    # magic, sequence, streams and number of cells; then each cell's position, number of sequences and sequence
    changed[16 + 12 * cell :][:4].view("<i4")[0] = position
    return changed


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_caches_that_are_not_what_the_ledger_says(family, tmp_path):
    """Also that of the last turn's beginning, although it is not needed before the turn is taken back."""
    write_chat_model(tmp_path / "tiny.gguf", family=family, n_layer=6)
    config = dataclasses.replace(SMALL, budget=64, stride=16, n_ubatch=32, max_tokens=4, system=None, policy="kvzip-snapkv")
    with Model(tmp_path / "tiny.gguf") as tiny, ChatSession(tiny, config) as chat:
        ask(chat, ["The keeper wrote down the birds.", "Who wrote down what?", "And when?"])
        arrays, messages = chat.snapshot(), [dict(message) for message in chat.messages]
        chat.resume(messages, arrays)
        for name in ("cache", "checkpoint.cache"):
            for cell, position in ((3, 2), (3, -1), (3, -7), (3, 2**31 - 1), (0, 1)):
                with pytest.raises(SessionError, match="no state of such a session"):
                    chat.resume(messages, arrays | {name: with_position(arrays[name], cell, position)})
                assert not chat.messages


RECALL = {"policy": "recall", "archive": "disk"}



def back_again(model, snapshots, messages, **changes):
    """Another process that finds the snapshot; returns the session and how many messages it has."""
    chat = session(model, **RECALL | changes)
    try:
        n = Snapshots(snapshots.path).load(chat, messages)
    except BaseException:
        chat.close()
        raise
    chat._begin = chat.restore = None  # nothing is read again
    return chat, n


@pytest.mark.parametrize("stores", [("ram", "ram"), ("disk", "disk"), ("ram", "disk"), ("disk", "ram")])
def test_every_turn_can_be_taken_back_after_a_restore(shallow_model, snapshots, stores):
    with session(shallow_model, **RECALL | {"archive": stores[0]}) as through:
        ask(through, ASKED, lambda: snapshots.save(through))
        chat, n = back_again(shallow_model, snapshots, through.messages, archive=stores[1])
        with chat:
            assert n == 10 and chat.messages == through.messages
            check_equal(through, chat)
            assert through.kv.archive_bytes[0] == 0 or stores[0] == "ram"
            for depth in (2, 3):
                assert chat.undo(depth) == through.undo(depth)
                check_equal(through, chat)
                assert ask(chat, ASKED[1:3]) == ask(through, ASKED[1:3])
                check_equal(through, chat)


def test_a_conversation_that_went_another_way_is_found_where_they_part(shallow_model, snapshots):
    """As after /undo 2 or /edit, and a crash before the next snapshot."""
    with session(shallow_model, **RECALL) as through:
        ask(through, ASKED, lambda: snapshots.save(through))
        through.undo(3)
        messages = list(through.messages)
        for more in ([], [{"role": "user", "content": "Another?"}, {"role": "assistant", "content": "Yes."}]):
            chat, n = back_again(shallow_model, snapshots, [*messages, *more])
            with chat:
                assert n == 4 and chat.messages == messages
                check_equal(through, chat)


def test_at_any_moment_the_last_snapshot_can_be_gone_on_with(shallow_model, snapshots):
    """Turns are taken back, others come, and snapshots are begun that do not come to their end: the process may end in between."""
    with session(shallow_model, **RECALL) as through, session(shallow_model, **RECALL) as twin:
        for chat in (through, twin):
            ask(chat, ASKED[:4])
        snapshots.save(through)
        kept = [list(twin.messages), snapshots.path.read_bytes()]

        def check():
            assert snapshots.path.read_bytes() == kept[1]
            chat, n = back_again(shallow_model, snapshots, kept[0])
            with chat:
                assert n == len(kept[0])
                check_equal(twin, chat)

        check()
        for depth, text in ((1, ASKED[1]), (3, ASKED[3] * 4), (2, ASKED[1] * 3)):
            through.undo(depth)
            check()
            ask(through, [text])
            check()
            for n_asked in range(1, 6):
                asked = iter([False] * n_asked)
                snapshots.save(through, lambda asked=asked: next(asked, True))
                check()
            snapshots.save(through)
            chat, _ = back_again(shallow_model, snapshots, through.messages)
            with chat:
                check_equal(through, chat)
            twin.close()
            twin = back_again(shallow_model, snapshots, through.messages)[0]
            kept = [list(through.messages), snapshots.path.read_bytes()]
        twin.close()


def test_a_conversation_that_is_kept_elsewhere_uses_nothing_of_where_it_was(shallow_model, snapshots, tmp_path):
    """As after /fork: others may go on there."""
    with session(shallow_model, **RECALL) as through, session(shallow_model, **RECALL) as twin:
        for chat in (through, twin):
            ask(chat, ASKED[:4])
        snapshots.save(through)
        Snapshots(tmp_path / "two.snapshot").save(through)
        archive_path(snapshots.path).write_bytes(bytes(archive_path(snapshots.path).stat().st_size))
        check_equal(through, twin)
        chat, n = back_again(shallow_model, Snapshots(tmp_path / "two.snapshot"), through.messages)
        with chat:
            assert n == 8
            check_equal(twin, chat)
            assert ask(chat, ASKED[4:]) == ask(through, ASKED[4:]) == ask(twin, ASKED[4:])


def test_an_archive_that_is_not_what_it_was_is_found_out(shallow_model, snapshots):
    path = archive_path(snapshots.path)
    with session(shallow_model, **RECALL) as through:
        ask(through, ASKED[:2], lambda: snapshots.save(through))
        messages = list(through.messages)
    content = path.read_bytes()
    changed = bytearray(content)
    changed[::4096] = bytes(255 - byte for byte in changed[::4096])
    for wrong, match in ((bytes(changed), "archive is damaged"), (content[:-1], "archive is incomplete"), (None, "archive is gone")):
        path.unlink() if wrong is None else path.write_bytes(wrong)
        with session(shallow_model, **RECALL) as chat:
            with pytest.raises(SnapshotError, match=match):
                snapshots.load(chat, messages)
            assert chat.messages == [] and ask(chat, ASKED[:1])
    path.write_bytes(content)
    back_again(shallow_model, snapshots, messages)[0].close()
    with session(shallow_model, **RECALL | {"archive": "off"}) as chat, pytest.raises(SnapshotError, match="another archive"):
        snapshots.load(chat, messages)
    small = RECALL | {"archive": "ram", "archive_ram": 2**19}
    with session(shallow_model, **small) as chat, pytest.raises(SnapshotError, match="contradicts itself"):
        snapshots.load(chat, messages)


def test_arrays_of_an_archive_that_contradict_each_other_are_refused(shallow_model):
    with session(shallow_model, **RECALL) as chat, session(shallow_model, **RECALL) as other:
        ask(chat, ASKED[:3])
        arrays, data = chat.snapshot(), [part.data for part in chat.cache.archive.parts()]
        marks, numbers, tokens = (arrays[name] for name in ("archive.marks", "marks.numbers", "ledger.tokens"))
        swapped = tokens.copy()
        swapped[..., 20] -= 1
        for changes in (
            {"archive.positions": arrays["archive.positions"][:-1]},
            {"archive.positions": arrays["archive.positions"] + 1},
            {"archive.marks": marks[:, ::-1]},
            {"archive.marks": marks[:3]},
            {"archive.marks": marks + 2**30},
            {"archive.pace": np.zeros(3, np.int64)},
            {"marks.numbers": numbers[:, :1]},
            {"marks.numbers": numbers + np.array([[0], [99]])},
            {"marks.n_recent": arrays["marks.n_recent"] - 1},
            {"ledger.tokens": tokens[..., :-1]},
            {"cache": None},
        ):
            if "cache" in changes:
                wrong, wrong_data = {name: array for name, array in arrays.items() if not name.startswith("archive.")}, ()
            else:
                wrong, wrong_data = arrays | changes, data
            with pytest.raises(SessionError, match="no state of such a session"):
                other.resume(chat.messages, wrong, wrong_data)
            assert other.messages == [] and other.kv.used == other.segments()[0].n_tokens
        for wrong_data in (data[:-1], data[::-1], ()):
            with pytest.raises(SessionError, match="no state of such a session"):
                other.resume(chat.messages, arrays, wrong_data)
        # a mark that lies is found out when it is gone back to, and the conversation is read again
        lying = marks.copy()
        lying[1] -= 1
        other.resume(chat.messages, arrays | {"archive.marks": lying}, data)
        other.undo(2)
        assert other.messages == chat.messages[:2] and ask(other, ASKED[1:2])
        other.resume(chat.messages, arrays, data)
        check_equal(chat, other)


def test_an_archive_that_was_given_up_stays_so(shallow_model, snapshots):
    with session(shallow_model, **RECALL | {"archive": "ram", "archive_ram": 2**20}) as through:
        ask(through, ASKED[:4], lambda: snapshots.save(through))
        assert through.cache.archive is None and not archive_path(snapshots.path).exists()
        with session(shallow_model, **RECALL) as chat:
            snapshots.load(chat, through.messages)
            assert chat.cache.archive is None and chat.kv.archive_lost
            assert ask(chat, ASKED[2:]) == ask(through, ASKED[2:])


def test_a_sliding_window_comes_back_with_its_archive(tmp_path, snapshots):
    write_chat_model(tmp_path / "tiny.gguf", family="gemma3", n_layer=12)
    changes = RECALL | {"budget": 64, "stride": 16, "n_ubatch": 32, "max_tokens": 4, "system": None}
    asked = ["The keeper wrote down the birds. " * 4, "Who wrote down what?", "And when? " * 3]
    with Model(tmp_path / "tiny.gguf") as tiny, session(tiny, **changes) as through, session(tiny, **changes) as back:
        ask(through, asked, lambda: snapshots.save(through))
        assert through.cache.archive and through.kv.evicted
        assert Snapshots(snapshots.path).load(back, through.messages) == 6
        check_equal(through, back)
        assert through.undo() == back.undo()
        assert ask(through, asked[1:]) == ask(back, asked[1:])
        check_equal(through, back)


@pytest.mark.parametrize("undo", [False, True])
def test_an_archive_that_another_program_cuts_short_is_given_up(shallow_model, snapshots, undo):
    """To read a mapped file behind its end would end the process."""
    with session(shallow_model, **RECALL) as through:
        ask(through, ASKED)
        snapshots.save(through)
        chat, _ = back_again(shallow_model, snapshots, through.messages)
        messages = through.messages
    with chat:
        assert chat.kv.archive_bytes[1] > 0
        os.truncate(archive_path(snapshots.path), 4096)
        del chat._begin, chat.restore
        if undo:
            chat.undo(2)
        ask(chat, ASKED[:1])
        assert not chat.cache.uncertain
        # turns that cannot be taken back are read again, into another archive
        assert chat.kv.archive_bytes[0] > 0 if undo else "cut short" in chat.kv.archive_lost
        assert len(chat.messages) == len(messages) + (2 - 4 * undo)
