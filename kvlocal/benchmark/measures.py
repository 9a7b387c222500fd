"""The measurements: each opens its readers, lets them work in turn and gives rows."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field

import numpy as np
import numpy.typing as npt

from kvlocal.benchmark.comparison import Comparison, of_amounts, of_pairs, of_speeds, of_totals
from kvlocal.benchmark.process import BenchmarkError, Worker
from kvlocal.benchmark.settings import BenchSettings

# (what is being measured, steps done, steps in all)
Progress = Callable[[str, int, int], None]

OURS, STOCK = "kvlocal's library", "stock llama.cpp"

_CHUNK = 1024  # tokens read between two looks at the progress


@dataclass
class Bench:
    """What every measurement works with.

    versions: of the libraries and the model, once both have been loaded
    """

    settings: BenchSettings
    progress: Progress
    versions: dict[str, str] = field(default_factory=dict)

    def workers(self, stack: ExitStack, n_ours: int = 1, n_stock: int = 1) -> list[Worker]:
        """New processes, first with our library and then with the stock one, which end with the stack.

        Each reader whose speed is compared gets its own: a process that waits less between its slices may run them faster.
        """
        settings = self.settings
        host = {"model": str(settings.model), "n_answer": settings.answer, "placement": asdict(settings.placement)}
        ours = [stack.enter_context(Worker(OURS, stock=None, nexus=settings.nexus, **host)) for _ in range(n_ours)]
        stock = [stack.enter_context(Worker(STOCK, stock=str(settings.stock), **host)) for _ in range(n_stock)]
        self.versions = ours[0].call("version")
        if stock[0].call("version")["llama_cpp"] != self.versions["llama_cpp"]:
            raise BenchmarkError(f"the stock library in {settings.stock} is another version of llama.cpp: run `make stock` again")
        return [*ours, *stock]


@dataclass(frozen=True)
class Side:
    """One side of a comparison: a reader, and what it decodes in a slice. n: tokens; at_once: how many of them in one batch."""

    worker: Worker
    reader: str
    n: int
    at_once: int = 1

    def extend(self, history: int, label: str, progress: Progress) -> None:
        """Reads the script up to that many tokens."""
        done = 0
        while done < history:
            progress(f"{label}: {self.worker.name} reads", done, history)
            done = self.worker.call("extend", reader=self.reader, history=history, at_most=_CHUNK)

    def slice(self, n: int) -> float:
        return self.worker.call("slice", reader=self.reader, n=n, at_once=self.at_once) if n else 0.0

    def align(self) -> None:
        """Decodes up to the next compression, so that every slice of stride tokens holds exactly one."""
        self.slice(int(self.figures()["until_compression"]))

    def figures(self) -> dict[str, float]:
        return self.worker.call("figures", reader=self.reader)


def alternate(sides: Sequence[Side], n_pairs: int, n_parts: int, label: str, progress: Progress) -> npt.NDArray[np.float64]:
    """Seconds of each side's slice, [n_pairs, n_sides].

    A slice is done in parts, the sides by turns and in changing order, so that whatever else the machine does hits all of them.
    """
    seconds = np.zeros((n_pairs, len(sides)))
    order = list(range(len(sides)))
    for pair in range(n_pairs):
        for part in range(n_parts):
            progress(label, pair * n_parts + part, n_pairs * n_parts)
            for i in order:
                begin, end = (sides[i].n * step // n_parts for step in (part, part + 1))
                seconds[pair, i] += sides[i].slice(end - begin)
            order = order[1:] + order[:1]
    return seconds


def history_names(settings: BenchSettings) -> list[str]:
    return [*(f"{kind}@{n}" for n in settings.histories for kind in ("prefill", "decode")), f"decode@{max(settings.histories)}-snapkv"]


def measure_history(bench: Bench, wanted: Collection[str]) -> Iterator[Comparison]:
    """Speed with a conversation of N tokens behind it: the session with (1 - ratio) * N cells, stock llama.cpp with all N.

    prefill: a micro-batch of tokens, after which the session compresses once. decode: the session decodes whole strides from one
    compression to the next, so each slice holds one; stock llama.cpp decodes a few tokens and takes them back. The last row of the longest history
    holds the session against one with the policy snapkv, which only evicts, and as many cells.
    """
    settings = bench.settings
    with ExitStack() as stack:
        longest = max(settings.histories)
        ours, *evicting, stock = bench.workers(stack, 1 + (f"decode@{longest}-snapkv" in wanted))
        stock.call("open_plain", reader="full", context=settings.context(longest + settings.n_ubatch))
        for n in settings.histories:
            against = f"decode@{n}-snapkv"
            if not {f"prefill@{n}", f"decode@{n}", against} & set(wanted):
                continue
            ours.call("open_session", reader="session", config=settings.session(settings.budget(n), settings.ratio))
            batch = settings.n_ubatch
            prefill = [Side(ours, "session", batch, batch), Side(stock, "full", batch, batch)]
            decode = [Side(ours, "session", settings.stride), Side(stock, "full", settings.parts * settings.piece)]
            for side in decode:
                side.extend(n, f"history of {n}", bench.progress)
            decode[0].align()
            for sides, n_parts, name in ((prefill, 1, f"prefill@{n}"), (decode, settings.parts, f"decode@{n}")):
                if name in wanted:
                    seconds = alternate(sides, settings.pairs, n_parts, name, bench.progress)
                    speeds = np.array([side.n for side in sides]) / seconds
                    yield of_pairs(name, speeds[:, 0], speeds[:, 1], "tokens/s")
            if against in wanted:
                config = settings.session(settings.budget(n), settings.ratio) | {"policy": "snapkv", "policy_args": {}}
                evicting[0].call("open_session", reader="session", config=config)
                other = Side(evicting[0], "session", settings.stride)
                other.extend(n, against, bench.progress)
                for side in (decode[0], other):
                    side.align()
                speeds = settings.stride / alternate([decode[0], other], settings.pairs, settings.parts, against, bench.progress)
                yield of_pairs(against, speeds[:, 0], speeds[:, 1], "tokens/s")
            ours.call("close", reader="session")


def reading_names(settings: BenchSettings) -> list[str]:
    return [f"read@{max(settings.histories)}"]


def measure_reading(bench: Bench, wanted: Collection[str]) -> Iterator[Comparison]:
    """One long text of the user's, from the first token to the last, piece by piece in alternation: the session and stock llama.cpp."""
    settings = bench.settings
    (name,) = wanted
    n = max(settings.histories)
    with ExitStack() as stack:
        ours, stock = bench.workers(stack)
        ours.call("open_session", reader="session", config=settings.session(settings.budget(n), None))
        stock.call("open_plain", reader="full", context=settings.context(n + settings.n_ubatch))
        order, seconds = [(ours, "session"), (stock, "full")], np.zeros((n // settings.n_ubatch, 2))
        for piece in range(len(seconds)):
            bench.progress(name, piece, len(seconds))
            for worker, reader in order:
                seconds[piece, int(worker is stock)] = worker.call("read_text", reader=reader, n=settings.n_ubatch)
            order.reverse()
    yield of_speeds(name, seconds.shape[0] * settings.n_ubatch, seconds[:, 0], seconds[:, 1])


def cells_names(settings: BenchSettings) -> list[str]:
    return ["decode@equal-cells", "decode@equal-cells-no-ring", "decode@control", "share.ring"]


def measure_cells(bench: Bench, wanted: Collection[str]) -> Iterator[Comparison]:
    """Decoding with as many cells on average, all in one alternation: the session, our library that only records queries, our library that
    does not do that either, stock llama.cpp, and stock llama.cpp once more.

    decode@control is stock llama.cpp over itself: how far from one it is, is what the machine adds to the others. share.ring is what
    recording costs, of the time decoding takes.
    """
    settings = bench.settings
    cells, n_plain = settings.cells, settings.parts * settings.piece
    with ExitStack() as stack:
        ours, recording, bare, stock, control = bench.workers(stack, 3, 2)
        # between two compressions a session has budget .. budget + stride cells
        config = settings.session(cells - settings.stride // 2, None)
        ours.call("open_session", reader="session", config=config)
        window = ours.call("figures", reader="session")["window"]
        context = settings.context(cells + settings.n_ubatch)
        plain = [Side(worker, "full", n_plain) for worker in (recording, bare, stock, control)]
        for side in plain:
            side.worker.call("open_plain", reader="full", context=context, window=window if side.worker is recording else 0)
        session = Side(ours, "session", settings.stride)
        session.extend(cells + settings.stride, f"{cells} cells", bench.progress)
        session.align()
        for side in plain:
            side.extend(cells - settings.piece // 2, f"{cells} cells", bench.progress)
            side.slice(settings.piece)
        sides = [session, *plain]
        seconds = alternate(sides, 2 * settings.pairs, settings.parts, f"decode at {cells} cells", bench.progress)
        speeds = np.array([side.n for side in sides]) / seconds
        if "decode@equal-cells" in wanted:
            yield of_pairs("decode@equal-cells", speeds[:, 0], speeds[:, 3], "tokens/s")
        if "decode@equal-cells-no-ring" in wanted:
            yield of_pairs("decode@equal-cells-no-ring", speeds[:, 2], speeds[:, 3], "tokens/s")
        if "decode@control" in wanted:
            yield of_pairs("decode@control", speeds[:, 4], speeds[:, 3], "tokens/s")
        if "share.ring" in wanted:
            with_ring, without = (1000 * seconds[:, i] / n_plain for i in (1, 2))
            yield of_pairs("share.ring", with_ring - without, with_ring, "ms/token")


def chat_names(settings: BenchSettings) -> list[str]:
    name = f"chat{settings.turns}"
    return [name, f"{name}@context-shift", "share.score", "share.plan", "share.compact", "share.recall", "share.nexus", "share.reread"]


def measure_chat(bench: Bench, wanted: Collection[str]) -> Iterator[Comparison]:
    """A whole chat, turn by turn in alternation: the session, stock llama.cpp with room for everything, and stock llama.cpp with a context
    as large as the session's, which throws away the older half of what comes after the system prompt whenever it is full.

    share.score, .plan, .compact and .recall are of the session's time for the chat. Nexus tokens and a second read come between the turns and are not
    in that time; share.nexus and share.reread say how long they take in comparison, if the policy wants them.
    """
    settings = bench.settings
    chat, shift, *shares = chat_names(settings)
    with ExitStack() as stack:
        ours, stock, shifting = bench.workers(stack, 1, 2)
        n_tokens = ours.call("n_tokens", n_turns=settings.turns)
        ours.call("open_session", reader="session", config=settings.session(settings.budget(n_tokens), settings.ratio))
        capacity = ours.call("figures", reader="session")["capacity"]
        sides = {"session": ours}
        if chat in wanted:
            sides["full"] = stock
            stock.call("open_plain", reader="full", context=settings.context(n_tokens))
        if shift in wanted:
            sides["shift"] = shifting
            shifting.call("open_plain", reader="shift", context=settings.context(capacity), shift=True)
        order = list(sides)
        turns: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
        for turn in range(settings.turns):
            bench.progress(chat, turn, settings.turns)
            for side in order:
                turns[side].append(sides[side].call("turn", reader=side))
            order = order[1:] + order[:1]
    seconds = {side: [turn["seconds"] for turn in done] for side, done in turns.items()}
    n_read = sum(int(turn["tokens"]) for turn in turns["session"])
    if chat in wanted:
        yield of_speeds(chat, n_read, seconds["session"], seconds["full"])
    if shift in wanted:
        yield of_speeds(shift, n_read, seconds["session"], seconds["shift"])
    for name in shares:
        parts = [turn[name.removeprefix("share.")] for turn in turns["session"]]
        if name in wanted and (any(parts) or name not in ("share.recall", "share.nexus", "share.reread")):
            yield of_totals(name, parts, seconds["session"], "s")


def memory_names(settings: BenchSettings) -> list[str]:
    longest = max(settings.histories)
    return [f"kv-bytes@{longest}", f"kv-used@{longest}", f"rss@{longest}"]


def measure_memory(bench: Bench, wanted: Collection[str]) -> Iterator[Comparison]:
    """Memory at the end of a conversation of N tokens, each side in a process that did nothing else.

    kv-bytes: allocated for the cache and, beside it, the recorded queries. kv-used: of that, what the most cells ever in use take.
    rss: the peak of all that is resident, the model and a session's copy of the cache (see ChatSession) included.
    """
    settings = bench.settings
    n = max(settings.histories)
    allocated, used, resident = memory_names(settings)
    with ExitStack() as stack:
        ours, stock = bench.workers(stack)
        ours.call("open_session", reader="session", config=settings.session(settings.budget(n), settings.ratio))
        stock.call("open_plain", reader="full", context=settings.context(n))
        sides = [Side(ours, "session", 0), Side(stock, "full", 0)]
        for side in sides:
            side.extend(n, "memory", bench.progress)
        mine, theirs = (side.figures() for side in sides)
        if allocated in wanted:
            yield of_amounts(allocated, mine["kv_bytes"], theirs["kv_bytes"], "bytes")
        if used in wanted:
            my_cells, their_cells = (figures["kv_bytes"] * figures["peak_cells"] / figures["capacity"] for figures in (mine, theirs))
            yield of_amounts(used, my_cells, their_cells, "bytes")
        if resident in wanted:
            yield of_amounts(resident, ours.call("peak_rss"), stock.call("peak_rss"), "bytes")
