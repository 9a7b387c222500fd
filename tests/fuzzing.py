"""Feeds mutated inputs to the places where data from outside come in.

Each door has seeds, which are good inputs, and a function that takes the bytes of one input. A clean error is a KvlocalError of one line, or
what click says of wrong arguments; anything else is a finding.
"""

import random
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kvlocal.errors import KvlocalError

SLOW = 20.0  # seconds for one input that count as hanging

_NUMBERS = (0, 1, 2, 7, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1)


@dataclass(frozen=True)
class Door:
    """A place where data come in.

    name: for reports
    seeds: good inputs
    enter: takes one input; what it raises is the answer
    words: pieces that mutations put in, such as keywords of the format
    whole: whether good inputs must be let in, which is tried first
    focus: stretches of the only seed where every other input is changed, each like an input of its own
    """

    name: str
    seeds: Sequence[bytes]
    enter: Callable[[bytes], None]
    words: Sequence[bytes] = ()
    whole: bool = True
    focus: Sequence[range] = ()


@dataclass
class Findings:
    """accepted, refused: how many inputs; wrong: (what happened, the input) of the others"""

    accepted: int = 0
    refused: int = 0
    wrong: list[tuple[str, bytes]] = field(default_factory=list)


def mutate(data: bytes, rng: random.Random, words: Sequence[bytes]) -> bytes:
    """The input with one to eight changes: flipped bits, other bytes and numbers, pieces cut out, doubled, moved or put in, the end cut off."""
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        at = rng.randrange(len(found) + 1)
        size = min(rng.choice((1, 1, 2, 4, 8, 16, 64, 1024)), len(found) - at)
        way = rng.randrange(8)
        if way == 0 and at < len(found):
            found[at] ^= 1 << rng.randrange(8)
        elif way == 1:
            found[at : at + size] = rng.randbytes(size)
        elif way == 2:
            form = rng.choice(("<I", "<Q"))
            found[at : at + struct.calcsize(form)] = struct.pack(form, rng.choice(_NUMBERS) % 2 ** (8 * struct.calcsize(form)))
        elif way == 3:
            del found[at : at + size]
        elif way == 4:
            found[at:at] = found[at : at + size] * rng.choice((1, 1, 2, 50))
        elif way == 5:
            del found[at:]
        elif way == 6 and words:
            found[at:at] = rng.choice(words)
        elif found:
            start = rng.randrange(len(found))
            found[at:at] = found[start : start + size]
    return bytes(found)


def attack(door: Door, n: int, seed: int = 0) -> Findings:
    """Feeds n mutated inputs to a door; the same ones for the same seed."""
    found = Findings()
    for data in door.seeds if door.whole else ():
        door.enter(data)
    for i in range(n):
        rng = random.Random(f"{door.name} {seed} {i}")
        data = rng.choice(door.seeds)
        part = rng.choice(door.focus) if door.focus and i % 2 else range(len(data))
        data = data[: part.start] + mutate(data[part.start : part.stop], rng, door.words) + data[part.stop :]
        started = time.monotonic()
        try:
            door.enter(data)
            found.accepted += 1
        except KvlocalError as error:
            found.refused += 1
            if "\n" in str(error) or not str(error):
                found.wrong.append((f"not one line: {error!r}", data))
        except Exception as error:  # noqa: BLE001 - anything else is what is looked for
            found.wrong.append((f"{type(error).__name__}: {error}", data))
        if time.monotonic() - started > SLOW:
            found.wrong.append((f"took {time.monotonic() - started:.0f} s", data))
    return found
