"""Where keys are once positions have run out."""

import numpy as np
import pytest

from kvlocal.cache.frames import Frame, first_position, stretches


class Conversation:
    """Positions of tokens as they come: each gets the next one, and lower ones follow when they run out."""

    def __init__(self, n_pinned, n_ctx):
        self.n_pinned, self.n_ctx = n_pinned, n_ctx
        self.stored, self.next = [], 0

    def feed(self, n, room=40):
        for _ in range(n):
            if self.next == self.n_ctx:
                self.next = first_position(self.n_pinned, self.n_ctx, room, 0)
            self.stored.append(self.next)
            self.next += 1

    def now(self):
        return Frame.at(self.n_pinned, self.n_ctx, len(self.stored), self.next).positions(np.array(self.stored, np.int32))


def test_before_positions_run_out_all_keys_stay():
    chat = Conversation(8, 308)
    chat.feed(308)
    np.testing.assert_array_equal(chat.now(), np.arange(308))


@pytest.mark.parametrize("n", [309, 400, 409, 610, 3000])
def test_what_is_near_is_at_its_distance_and_what_is_far_at_one_that_is_known(n):
    chat = Conversation(8, 308)
    chat.feed(n)
    now, distance = chat.now(), n - np.arange(n)
    assert chat.next <= 308 and now.min() >= 0 and now.max() == chat.next - 1
    np.testing.assert_array_equal(now[:8], np.arange(8))
    n_near = chat.next - 108
    assert n_near >= 100
    np.testing.assert_array_equal(chat.next - now[-n_near:], distance[-n_near:])
    far = now[8:-n_near]
    assert ((far >= 8) & (far < 108)).all()
    # neighbours stay neighbours, but for where the fold is
    assert (np.diff(far) != 1).sum() <= 2 + n / 100
    # few copies of the queries stand for all of them
    starts, shifts = stretches(now - np.array(chat.stored, np.int32))
    assert len(set(shifts.tolist())) <= 5 and starts[0] == 0
    np.testing.assert_array_equal(np.repeat(shifts, np.diff([*starts, n])), now - chat.stored)


def test_within_a_frame_no_key_moves():
    chat = Conversation(8, 308)
    chat.feed(1000)
    before = chat.now()
    chat.feed(308 - chat.next)
    np.testing.assert_array_equal(chat.now()[:1000], before)


def test_room_goes_before_nearness():
    assert first_position(8, 308, 40, 0) == 208
    assert first_position(8, 308, 150, 0) == 158
    assert first_position(8, 308, 1000, 0) == 108
    assert first_position(8, 308, 40, 250) == 250
