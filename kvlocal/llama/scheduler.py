"""Scheduler: conversations in threads of their own take turns, and what they wait for is carried out together."""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, TypeVar

Request = Any
T = TypeVar("T")


class Stopped(BaseException):
    """The rounds are over. It ends a conversation wherever it is, and is no failure of it."""


class Scheduler:
    """Lets threads run one at a time, and carries out what they wait for once all of them wait.

    A thread runs in its turn alone and hands over when it waits, so nothing that the threads share needs a lock. One more thread, the driver,
    carries rounds out, and calls that do not wait for the others. So everything is computed from one thread: OpenMP keeps helpers for each thread
    that computes, and once they are more than the machine has cores it lets them sleep between operations, which halves the speed of decoding.
    A round holds one request of every thread, so that each goes on, whatever the others ask for.

    carry_out: gets the requests of a round, and returns those that it has put off to the next one, if there are any
    """

    def __init__(self, carry_out: Callable[[Sequence[Request]], Sequence[Request] | None]) -> None:
        self._carry_out = carry_out
        lock = threading.Lock()
        self._driver, self._handed_back = threading.Condition(lock), threading.Condition(lock)
        self._n_taking_part = 0
        self._requests: list[Request] = []
        self._calls: list[tuple[Callable[[], Any], Future[Any]]] = []
        self._stopped = False

    @property
    def busy(self) -> bool:
        """Whether threads take part now."""
        return self._n_taking_part > 0

    @contextmanager
    def turn(self) -> Iterator[None]:
        """A thread takes part inside.

        Raises:
            Stopped: the rounds are over.
        """
        with self._handed_back:
            if self._stopped:
                raise Stopped
            self._n_taking_part += 1
            try:
                yield
            finally:
                self._n_taking_part -= 1
                self._driver.notify()

    def wait(self, request: Request) -> None:
        """Hands over until a request of this thread has been carried out.

        Raises:
            Stopped: the rounds are over.
        """
        self._requests.append(request)
        if self._all_wait():
            self._driver.notify()
        self._wait_until(lambda: not any(waiting is request for waiting in self._requests))

    def call(self, function: Callable[[], T]) -> T:
        """Hands over until the driver has called a function, which it does as soon as it can, and returns or raises what that did.

        Raises:
            Stopped: the rounds are over.
        """
        future: Future[T] = Future()
        self._calls.append((function, future))
        self._driver.notify()
        self._wait_until(future.done)
        return future.result()

    def _wait_until(self, handed_back: Callable[[], bool]) -> None:
        while not handed_back() and not self._stopped:
            self._handed_back.wait()
        if self._stopped:
            raise Stopped

    def advance(self, seconds: float) -> None:
        """For the driver: makes the calls that threads wait for, and carries out a round as soon as all threads wait for one.

        It ends without either when a thread leaves, or after so many seconds.
        """
        with self._driver:
            if not self._calls and not self._all_wait():
                self._driver.wait(seconds)
            while self._calls:
                function, future = self._calls.pop(0)
                try:
                    future.set_result(function())
                except Exception as error:  # noqa: BLE001 - it is the caller's
                    future.set_exception(error)
                self._handed_back.notify_all()
            if self._all_wait():
                requests, self._requests = self._requests, []
                self._requests = list(self._carry_out(requests) or ())
                self._handed_back.notify_all()

    def stop(self) -> None:
        """For the driver: ends what the threads are doing, and returns when none takes part any more."""
        with self._driver:
            self._stopped = True
            self._handed_back.notify_all()
            while self._n_taking_part:
                self._driver.wait()

    def _all_wait(self) -> bool:
        return 0 < self._n_taking_part == len(self._requests)
