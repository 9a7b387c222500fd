"""Threads run one at a time, and go on together once all of them wait."""

import threading

import pytest

from kvlocal.llama.scheduler import Scheduler, Stopped


class Party:
    """Threads that each wait for some requests, one after another, and the rounds that were carried out."""

    def __init__(self, *counts):
        self.rounds_of_requests, self.inside, self.crowd, self.ended = [], 0, 0, []
        self.scheduler = Scheduler(lambda requests: self.rounds_of_requests.append(sorted(requests)))
        self.threads = [threading.Thread(target=self.run, args=(name, count)) for name, count in zip("abc", counts, strict=False)]

    def run(self, name, count):
        try:
            with self.scheduler.turn():
                for i in range(count):
                    self.inside += 1
                    self.crowd = max(self.crowd, self.inside)
                    self.inside -= 1
                    self.scheduler.wait((name, i))
        except Stopped:
            self.ended.append(name)

    def start(self):
        """All threads wait before the first round."""
        for n, thread in enumerate(self.threads, 1):
            thread.start()
            while len(self.scheduler._requests) < n:
                pass
        return self


def test_every_thread_goes_on_by_one_request_a_round():
    party = Party(3, 1, 2).start()
    while any(thread.is_alive() for thread in party.threads):
        party.scheduler.advance(1)
    assert party.rounds_of_requests == [[("a", 0), ("b", 0), ("c", 0)], [("a", 1), ("c", 1)], [("a", 2)]]
    assert party.crowd == 1


def test_a_round_waits_for_a_thread_that_runs():
    party = Party(1).start()
    with party.scheduler.turn():
        party.scheduler._requests.clear()
    party.scheduler.advance(0.01)
    assert party.rounds_of_requests == []
    party.scheduler.stop()


def test_advance_ends_without_a_round_when_there_is_nobody():
    Party().scheduler.advance(0.01)


def test_stop_ends_them_all():
    party = Party(10**9, 10**9).start()
    party.scheduler.advance(1)
    party.scheduler.stop()
    for thread in party.threads:
        thread.join(5)
    assert sorted(party.ended) == ["a", "b"]
    with pytest.raises(Stopped), party.scheduler.turn():
        pass


def test_a_call_is_made_by_the_driver_and_does_not_wait_for_the_others():
    party = Party(1).start()
    callers = []

    def work():
        with party.scheduler.turn():
            callers.append(party.scheduler.call(threading.get_ident))
            with pytest.raises(ZeroDivisionError):
                party.scheduler.call(lambda: 1 / 0)
            callers.append("went on")
            party.scheduler.wait(("b", 0))

    thread = threading.Thread(target=work)
    thread.start()
    while thread.is_alive() or party.threads[0].is_alive():
        party.scheduler.advance(1)
    assert callers == [threading.get_ident(), "went on"]
    assert party.rounds_of_requests == [[("a", 0), ("b", 0)]]


def test_stop_ends_a_call_that_was_not_made():
    scheduler, ended = Scheduler(lambda requests: None), []

    def work():
        try:
            with scheduler.turn():
                scheduler.call(lambda: ended.append("called"))
        except Stopped:
            ended.append("stopped")

    thread = threading.Thread(target=work)
    thread.start()
    while not scheduler._calls:
        pass
    scheduler.stop()
    thread.join(5)
    assert ended == ["stopped"]
