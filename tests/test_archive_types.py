"""An archive in another type than the cache's: what comes back is rounded once, however often it comes, and what stays in the cache is as it was."""

import dataclasses

import numpy as np
import pytest
from gguf_copy import Source, copy
from recalling import CONFIG, rows_of, tokens
from test_row_types import stored
from test_rows import numbers, supported
from test_snapshot import check_equal
from test_way_back import ASKED, MORE, ask, read_nothing_again, session
from tiny_model import write_tiny_model

from kvlocal.cache.budgeted import BudgetedCache, Passage
from kvlocal.cache.config import CacheConfig, CacheError
from kvlocal.conversations.archive_file import archive_path
from kvlocal.conversations.snapshot import SnapshotError, Snapshots
from kvlocal.llama.context import KV_TYPES
from kvlocal.llama.model import Model
from kvlocal.llama.rows import Rows

# bytes of a head of 64 numbers
SIZES = {"f32": 256, "f16": 128, "q8_0": 68, "q5_1": 48, "q5_0": 44, "q4_1": 40, "q4_0": 36, "iq4_nl": 36}


@pytest.fixture(scope="module")
def model(shallow_model):
    return shallow_model


def converted(rows, kind, kind_k, kind_v):
    """Rows of a type as a cache of others stores them."""
    return Rows(*(array if kind == of_cache else stored(numbers(array, kind), of_cache) for array, of_cache in ((rows.k, kind_k), (rows.v, kind_v))))


def check(cache):
    """Every cell holds what the archive's row of its token says, or what was computed, of which that row is the rounding; how many hold the first."""
    ledger, archive, config = cache.ledger, cache.archive, cache.config
    held, rows = ledger.tokens[..., : ledger.n_cells], cache.native.read_rows(np.arange(ledger.n_cells))
    known = held < archive.n_tokens
    ours = rows_of(archive, np.minimum(held, archive.n_tokens - 1))
    back, again = converted(ours, config.archive_type, config.type_k, config.type_v), cache.native.read_rows(np.arange(ledger.n_cells), archive.types)
    recalled = known.copy()
    for name in ("k", "v"):
        came_back = (getattr(rows, name) == getattr(back, name)).all(-1)
        np.testing.assert_array_equal(getattr(again, name)[known & ~came_back], getattr(ours, name)[known & ~came_back])
        recalled &= came_back
    return recalled.sum()


@pytest.mark.parametrize("kind", KV_TYPES)
@pytest.mark.parametrize("cached", [("f16", "f16"), ("q8_0", "q4_0")], ids="-".join)
def test_what_comes_back_was_rounded_once(model, kind, cached):
    if not supported(model, *cached):
        pytest.skip("this device has no attention for these types")
    config = dataclasses.replace(CONFIG, archive_type=kind, type_k=cached[0], type_v=cached[1])
    with BudgetedCache(model, config) as cache:
        cache.begin(8)
        first, n_back = None, 0
        for turn in range(4):
            cache.read([Passage("user", tokens(70, turn)), Passage("assistant", tokens(3, turn + 9))])
            for token in tokens(20, turn + 50):
                cache.append(np.array([token]), "decode")
            cache.choose_again()
            if turn:
                n_back += check(cache)
                # written once, from what was computed
                rows = rows_of(cache.archive, np.broadcast_to(np.arange(93), (4, 3, 93)))
                first = first or rows
                np.testing.assert_array_equal(rows.k, first.k)
                np.testing.assert_array_equal(rows.v, first.v)
        assert n_back and cache.compressor.lost == "" and cache.archive.n_tokens == 4 * 93
        assert cache.archive.chunk_bytes == 4 * 3 * 256 * 2 * SIZES[kind]


def test_keys_that_are_moved_are_moved_from_the_archive(shallow_file, tmp_path):
    """Past the trained context: where a key is now does not depend on where it was in between."""
    copy(Source(shallow_file), tmp_path / "short.gguf", metadata={"llama.context_length": 600})
    config = dataclasses.replace(CONFIG, archive_type="q4_0")
    with Model(tmp_path / "short.gguf") as short, BudgetedCache(short, config) as cache, BudgetedCache(short, config) as other:
        cache.begin(8)
        for turn in range(16):
            cache.read([Passage("user", tokens(80, turn)), Passage("assistant", tokens(3))])
            cache.choose_again()
        n, archive = cache.ledger.n_cells, cache.archive
        assert cache.compressor.rotations >= 2 and cache.compressor.lost == ""
        held = cache.ledger.tokens[..., :n]
        delta = cache.ledger.positions[..., :n] - archive.positions[held]
        other.native.compact(held, np.arange(n), delta, archive.chunks())
        assert (delta != 0).any()
        np.testing.assert_array_equal(cache.native.read_rows(np.arange(n)).k[delta != 0], other.native.read_rows(np.arange(n)).k[delta != 0])


def test_a_finer_type_changes_nothing(model):
    with session(model, archive_type="f32") as fine, session(model) as own:
        assert ask(fine, ASKED) == ask(own, ASKED)
        assert fine.kv.recalled > 0
        fine.undo(3), own.undo(3)
        assert ask(fine, MORE) == ask(own, MORE)
        arrays, others = fine.snapshot(), own.snapshot()
        assert arrays.keys() == others.keys()
        for name, array in arrays.items():
            np.testing.assert_array_equal(array, others[name], err_msg=name)
        n = fine.kv.used
        np.testing.assert_array_equal(fine.cache.native.read_rows(np.arange(n)).k, own.cache.native.read_rows(np.arange(n)).k)


@pytest.mark.parametrize("kind", ["q8_0", "iq4_nl"])
def test_a_chat_recalls_and_undoes(model, kind):
    with session(model, archive_type=kind) as chat:
        ask(chat, ASKED)
        assert chat.kv.recalled > 0 and not chat.kv.archive_lost and chat.kv.compressions > 4
        messages, archive = list(chat.messages), chat.cache.archive
        read_nothing_again(chat)
        assert chat.undo(2) == messages[-4:] and chat.messages == messages[:-4]
        # all cells are as the archive has them
        held = chat.cache.ledger.tokens[..., : chat.cache.ledger.n_cells]
        assert check(chat.cache) == held.size
        rows = rows_of(archive, held)
        answers = ask(chat, MORE)
        chat.undo(3)
        assert chat.messages == messages[:-4] and check(chat.cache) == held.size
        np.testing.assert_array_equal(rows_of(archive, held).k, rows.k)
        assert ask(chat, MORE) == answers


def test_a_session_comes_back_as_its_archive_has_it(model, tmp_path):
    paths = {kind: Snapshots(tmp_path / f"{kind}.snapshot") for kind in ("q4_0", "f16")}
    for kind, snapshots in paths.items():
        with session(model, archive="disk", archive_type=kind) as through:
            ask(through, ASKED)
            snapshots.save(through)
            messages, n_archived = list(through.messages), through.kv.archived
            kept = rows_of(through.cache.archive, np.broadcast_to(np.arange(n_archived), (4, 3, n_archived)))
        for store in ("disk", "ram"):
            with session(model, archive=store, archive_type=kind) as chat, session(model, archive=store, archive_type=kind) as other:
                for one in (chat, other):
                    assert Snapshots(snapshots.path).load(one, messages) == 12
                back = rows_of(chat.cache.archive, np.broadcast_to(np.arange(n_archived), (4, 3, n_archived)))
                np.testing.assert_array_equal(back.k, kept.k)
                np.testing.assert_array_equal(back.v, kept.v)
                assert check(chat.cache) == chat.cache.ledger.tokens[..., : chat.kv.used].size
                assert ask(chat, MORE) == ask(other, MORE)
                check_equal(chat, other)
                assert chat.undo(4) == other.undo(4)
                check_equal(chat, other)
    small, large = (archive_path(snapshots.path).stat().st_size for snapshots in paths.values())
    assert small < 0.6 * large
    for kind, others in (("q4_0", ("q8_0", "iq4_nl", None)), ("f16", ("q4_0",))):
        for other in others:
            with session(model, archive_type=other) as chat, pytest.raises(SnapshotError, match="another archive type"):
                paths[kind].load(chat, messages)
    # named or not, it is the cache's own
    with session(model) as chat:
        assert Snapshots(paths["f16"].path).load(chat, messages) == 12


def test_types_that_an_archive_cannot_have(tmp_path):
    with pytest.raises(CacheError, match="the archive's type is 'q9'"):
        CacheConfig(archive_type="q9")
    write_tiny_model(tmp_path / "tiny.gguf", "llama", n_layer=2)
    with Model(tmp_path / "tiny.gguf") as tiny:
        with pytest.raises(CacheError, match="an archive of the type q8_0 cannot be made: heads of 16 and 16 numbers"):
            BudgetedCache(tiny, dataclasses.replace(CONFIG, archive_type="q8_0"))
        assert not tiny.contexts
        BudgetedCache(tiny, dataclasses.replace(CONFIG, archive_type="q8_0", archive="off", policy="snapkv")).close()
