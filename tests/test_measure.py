"""The arithmetic of tests/measure."""

import pytest
from measure.batch_stock import BATCH, PARALLEL, SEPARATE, Turn, summary, table, together


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
