"""SamplingParams and Sampler: how the next token is drawn, by llama.cpp's own sampler chain."""

import math
import secrets
import weakref
from collections import deque
from dataclasses import dataclass
from typing import Self

from kvlocal.engine import Context, EngineError, Model
from kvlocal.errors import KvlocalError
from kvlocal.library import load

# llama.cpp reads the highest 32-bit number as "choose for me"; the caller could then not repeat the run.
MAX_SEED = 2**32 - 2

REPEAT_PENALTY = 1.1


class SamplingError(KvlocalError, ValueError):
    """A sampling parameter is out of range."""


@dataclass(frozen=True)
class SamplingParams:
    """How to choose a token from the logits, in the order in which it is applied.

    The defaults are for chat. Top-k, top-p and min-p are llama.cpp's: together they cut the tail that makes small
    quantized models derail. The temperature is a little below llama.cpp's 0.8, for the same reason. The repeat penalty
    is Ollama's: without one small models fall into endless loops. Greedy decoding has none unless it is asked for.

    Attributes:
        repeat_penalty: logits of recent tokens are divided (or multiplied, when negative) by it; 1 is off. None is
            REPEAT_PENALTY, or 1 at temperature 0.
        repeat_last_n: how many recent tokens that concerns.
        top_k: keep the k most likely tokens; 0 is off.
        top_p: keep the most likely tokens that together reach this probability; 1 is off.
        min_p: drop tokens less likely than this share of the most likely one; 0 is off.
        temperature: logits are divided by it; at 0 the most likely token is taken.
        seed: of the random numbers, 0 to 2**32 - 2; None draws one, which `Sampler.seed` tells.

    Raises:
        SamplingError: a value is out of range.
    """

    temperature: float = 0.7
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float | None = None
    repeat_last_n: int = 64
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.repeat_penalty is None:
            object.__setattr__(self, "repeat_penalty", REPEAT_PENALTY if self.temperature else 1.0)
        _check(self.temperature >= 0, "temperature", self.temperature, "0 or more")
        _check(math.isfinite(self.temperature), "temperature", self.temperature, "a finite number")
        _check(0 <= self.top_k < 2**31, "top_k", self.top_k, "0 (off) or more")
        _check(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1 (off)")
        _check(0 <= self.min_p <= 1, "min_p", self.min_p, "between 0 (off) and 1")
        _check(0 < self.repeat_penalty < math.inf, "repeat_penalty", self.repeat_penalty, "above 0 (1 is off)")
        _check(0 <= self.repeat_last_n < 2**31, "repeat_last_n", self.repeat_last_n, "0 (off) or more")
        _check(self.seed is None or 0 <= self.seed <= MAX_SEED, "seed", self.seed, f"between 0 and {MAX_SEED}")


def _check(valid: bool, name: str, value: object, wanted: str) -> None:
    if not valid:
        raise SamplingError(f"{name} is {value}, but must be {wanted}")


class Sampler:
    """Draws tokens from the logits of a context and remembers them for the repeat penalty.

    Args:
        model: the model whose vocabulary is sampled.
        params: how.

    Attributes:
        seed: the seed in use, also when the parameters left it open.
        recent: the tokens that the repeat penalty looks at, the oldest first.
    """

    def __init__(self, model: Model, params: SamplingParams) -> None:
        self._lib = lib = load().llama_cpp
        self.params = params
        self.seed = secrets.randbelow(MAX_SEED + 1) if params.seed is None else params.seed

        self.recent: deque[int] = deque(maxlen=params.repeat_last_n)
        chain_params = lib.llama_sampler_chain_default_params()
        chain_params.no_perf = True
        chain = lib.llama_sampler_chain_init(chain_params)
        self._chain = chain
        # the chain owns what is added to it
        self._free = weakref.finalize(self, lib.llama_sampler_free, chain)

        if params.repeat_penalty != 1 and params.repeat_last_n:
            penalties = lib.llama_sampler_init_penalties(
                model.n_vocab, params.repeat_last_n, params.repeat_penalty, 0.0, 0.0
            )
            lib.llama_sampler_chain_add(chain, penalties)
        if params.temperature == 0:
            lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_greedy())
            return
        if params.top_k:
            lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_top_k(params.top_k))
        if params.top_p < 1:
            lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_top_p(params.top_p, 1))
        if params.min_p > 0:
            lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_min_p(params.min_p, 1))
        lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_temp(params.temperature))
        lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_dist(self.seed))

    @property
    def _open_chain(self) -> int:
        if not self._free.alive:
            raise EngineError("the sampler is closed: make a new one")
        return self._chain

    def sample(self, context: Context, i: int = -1) -> int:
        """Draw the token that follows token `i` of the last batch (-1: its last) and remember it.

        Raises:
            EngineError: that token has no logits, or some that are not finite.
        """
        # the largest is NaN if any is
        if not math.isfinite(context.logits(i).max()):
            raise EngineError(
                "the model's predictions are not numbers any more: its file is damaged or a device failed; fetch it again or use --gpu-layers 0"
            )
        token = context.sample(self._open_chain, i)
        self.recent.append(token)
        return token

    def accept(self, token: int) -> None:
        """Remember a token that was not drawn here."""
        self._lib.llama_sampler_accept(self._open_chain, token)
        self.recent.append(token)

    def reset(self) -> None:
        """Forget the tokens and start the random numbers again from the seed."""
        self._lib.llama_sampler_reset(self._open_chain)
        self.recent.clear()

    def close(self) -> None:
        """Free the chain. Closing twice is harmless."""
        self._free()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
