"""The arithmetic of tests/measure, and short forms of what takes long."""

import random
from argparse import Namespace

import pytest
from measure import serve_against_llama_server as served
from measure.batch_stock import BATCH, PARALLEL, SEPARATE, Turn, summary, table, together
from measure.fuzz_server import growth
from measure.kill_serve import Client as KilledClient
from measure.kill_serve import Kept, kill_once, on_disk


def test_processes_beside_each_other_take_as_long_as_the_slowest():
    both = together([Turn(100, 10, 2.0, 5.0, 7), Turn(100, 10, 4.0, 6.0, 7)])
    assert both == Turn(200, 20, 4.0, 6.0, 14)
    assert both.speeds == {"generation": 5, "whole": pytest.approx(220 / 6)}


def test_ratios_are_of_the_same_turn():
    """Everything is half as fast in the second turn, and a third of it in the third: that is no difference between the ways."""
    slower = (1.0, 2.0, 3.0)
    turns = {
        BATCH: [Turn(100, 10, 1 * by, 5 * by, 10) for by in slower],
        PARALLEL: [Turn(100, 10, 2 * by, 15 * by, 40) for by in slower],
        SEPARATE: [Turn(100, 10, 4 * by, 10 * by, 40) for by in slower],
    }
    found = summary(turns)
    assert [found[way]["batch_to_it_generation"] for way in turns] == [1, 2, 4]
    assert [found[way]["batch_to_it_whole"] for way in turns] == [1, 3, 2]
    assert (found[BATCH]["generation"], found[BATCH]["whole"], found[SEPARATE]["kv_bytes"]) == (5, 11, 40)
    lines = table({2: found, 8: found}).splitlines()
    assert len(lines) == 7 and lines[2].split()[:4] == ["2", "stock,", "one", "context"] and lines[2].endswith("2.00, 3.00")


def test_how_fast_memory_grows():
    rng = random.Random(0)
    samples = [(i, 10**8 + 3000 * i + rng.randrange(-9000, 9000)) for i in range(0, 1000, 50)]
    slope, error = growth(samples)
    assert abs(slope - 3000) < 3 * error < 30


def test_what_a_conversation_on_the_disk_has_of_a_history():
    def messages(*texts):
        return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]

    kept = Kept(messages("a", "b", "c", "d and more"), [4, 2])
    assert [kept.n_common(messages(*text)) for text in ("", "a", "ax", "abc", "abcde")] == [0, 1, 1, 3, 3]
    assert kept.n_ready(messages("a", "b", "x")) == 2 and kept.n_ready(messages("a", "x")) == 0
    assert kept.begins_with(messages("a", "b", "c"), "d and") and not kept.begins_with(messages("a", "b", "c"), "e")


def test_clients_find_what_was_delivered_after_their_server_was_killed(short_smollm2, tmp_path):
    rng, starts = random.Random(5), []
    clients = [KilledClient(i, rng) for i in range(3)]
    for n_pieces in (120, 60, 0):
        kill_once(short_smollm2, tmp_path, clients, n_pieces, "ram", starts)
    assert [problem for client in clients for problem in client.problems] == []
    assert sum(client.counts["answers"] for client in clients) >= 2 and len(starts) == 3
    assert sum(client.counts["first turns with a snapshot"] for client in clients) > 0
    assert sum(bool(kept.lengths) for kept in on_disk(tmp_path)) > 0


def test_clients_that_come_and_go_all_get_to_the_end(short_smollm2, tmp_path):
    args = Namespace(clients=3, away=1, stay=1, tokens=120, words=20, answer=4, slots=2, threads=1, serve_options="--kv-budget 256 --temp 0",
                     llama_server=None, python_server=None)  # fmt: skip
    ((way, (command, environment)),) = served.servers(args, short_smollm2, tmp_path).items()
    with served.Model(short_smollm2) as model, served.Server(way, command, environment) as server:
        run = served.run(server, args, model)
    assert len(run.turns) % 3 == 0 and {turn.n_answer for turn in run.turns} == {4} and run.kv_bytes > 0
    assert len(run.later) == len(run.turns) - 3 and all(turn.n_read < 60 for turn in run.turns if turn.later)
    ratios = served.compared([run, run], [run, run])
    assert ratios["KV cache"] == ratios["answer tokens a second"][0] == 1
