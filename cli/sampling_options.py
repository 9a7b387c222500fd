"""The options of penalties, biases, DRY and XTC, under the names that llama.cpp's programs have for them."""

import re
from collections.abc import Iterable
from typing import Any

import click

from kvlocal.errors import KvlocalError
from kvlocal.llama.sampling import SamplingParams

_DEFAULT = SamplingParams()
_NO_BREAKER = "none"


def _parse_biases(_ctx: click.Context, _param: click.Parameter, values: tuple[str, ...]) -> dict[int, float]:
    try:
        return biases_of(values)
    except KvlocalError as error:
        raise click.BadParameter(str(error)) from None


def biases_of(texts: Iterable[str]) -> dict[int, float]:
    """Texts such as 17-100, a token and what is added to its logit.

    Raises:
        KvlocalError: one is something else.
    """
    biases = {}
    for text in texts:
        found = re.fullmatch(r"(\d+)([+-](?:\d+\.?\d*|\.\d+|inf))", text.strip(), re.ASCII)
        if found is None:
            raise KvlocalError(f"{text[:40]!r} is no bias: write a token's number and what is added, such as 17-100, 17+1.5 or 17-inf")
        biases[int(found[1])] = float(found[2])
    return biases


def _parse_breakers(_ctx: click.Context, _param: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    if not values:
        return tuple(_DEFAULT.dry_sequence_breakers)
    return tuple(value.replace("\\n", "\n") for value in values if value != _NO_BREAKER)


# the fields of SamplingParams, each with its option
SAMPLING_OPTIONS = (
    click.option(
        "--presence-penalty", type=float, default=_DEFAULT.presence_penalty, show_default=True, metavar="X",
        help="Subtract this from the logits of recent tokens; 0 is off.",
    ),
    click.option(
        "--frequency-penalty", type=float, default=_DEFAULT.frequency_penalty, show_default=True, metavar="X",
        help="Subtract this from the logits of recent tokens as often as each of them came; 0 is off.",
    ),
    click.option(
        "--logit-bias", multiple=True, callback=_parse_biases, metavar="TOKEN+X",
        help="Add to the logit of a token, such as 17+1.5 or 17-100; can be repeated.",
    ),
    click.option(
        "--dry-multiplier", type=float, default=_DEFAULT.dry_multiplier, show_default=True, metavar="X",
        help="DRY: how much less likely what goes on with a repetition becomes; 0 is off.",
    ),
    click.option(
        "--dry-base", type=float, default=_DEFAULT.dry_base, show_default=True, metavar="X",
        help="DRY: how many times as much with every token more that is repeated.",
    ),
    click.option(
        "--dry-allowed-length", type=int, default=_DEFAULT.dry_allowed_length, show_default=True, metavar="N",
        help="DRY: how many tokens may be repeated.",
    ),
    click.option(
        "--dry-penalty-last-n", type=int, default=_DEFAULT.dry_penalty_last_n, show_default=True, metavar="N",
        help="DRY: among how many recent tokens repetitions are looked for; 0 is off.",
    ),
    click.option(
        "--dry-sequence-breaker", "dry_sequence_breakers", multiple=True, callback=_parse_breakers, metavar="TEXT",
        help="DRY: a text that no repetition goes past, or none; can be repeated.  [default: a line break, a colon, a quotation mark and a star]",
    ),
    click.option(
        "--xtc-probability", type=float, default=_DEFAULT.xtc_probability, show_default=True, metavar="X",
        help="XTC: how often the likely tokens are left out but for the least likely of them; 0 is off.",
    ),
    click.option(
        "--xtc-threshold", type=float, default=_DEFAULT.xtc_threshold, show_default=True, metavar="X",
        help="XTC: how likely such tokens are at least; more than 0.5 is off.",
    ),
)  # fmt: skip

_NAMES = (
    "presence_penalty", "frequency_penalty", "logit_bias", "dry_multiplier", "dry_base", "dry_allowed_length", "dry_penalty_last_n",
    "dry_sequence_breakers", "xtc_probability", "xtc_threshold",
)  # fmt: skip


def take_sampling(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of these options, taken out of those of a command."""
    return {name: arguments.pop(name) for name in _NAMES}
