"""SamplingParams and Sampler: how the next token is drawn, by llama.cpp's own sampler chain."""

import ctypes
import math
import random
import secrets
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from kvlocal.errors import KvlocalError
from kvlocal.llama.errors import EngineError
from kvlocal.llama.grammar import Grammar, token_data_array
from kvlocal.llama.library import load
from kvlocal.llama.model import Model
from kvlocal.llama.sequence_decoder import SequenceDecoder

# llama.cpp reads the highest 32-bit number as "choose for me"; the caller could then not repeat the run.
MAX_SEED = 2**32 - 2

REPEAT_PENALTY = 1.1

# tokens that DRY looks at, which it does again and again
MAX_DRY_TOKENS = 2**16
# llama.cpp cuts off what is longer
_MAX_BREAKER = 40  # bytes


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
        presence_penalty: subtracted from the logits of recent tokens; 0 is off.
        frequency_penalty: subtracted from the logits of recent tokens, each as often as it came; 0 is off.
        logit_bias: added to the logits of these tokens, first of all.
        dry_multiplier: DRY (https://github.com/oobabooga/text-generation-webui/pull/5677): how much is subtracted from the logit of a token that
            would go on with a repetition; 0 is off.
        dry_base: by how much more with every token that is repeated: dry_multiplier * dry_base ** (length - dry_allowed_length).
        dry_allowed_length: how many tokens may be repeated for nothing.
        dry_penalty_last_n: among how many recent tokens repetitions are looked for; 0 is off.
        dry_sequence_breakers: texts that a repetition does not go past, at most 40 bytes each.
        xtc_probability: XTC (https://github.com/oobabooga/text-generation-webui/pull/6335): how often all tokens that reach the threshold are dropped
            but the least likely of them; 0 is off.
        xtc_threshold: the probability that such tokens have; above 0.5 is off.

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
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_penalty_last_n: int = 64
    dry_sequence_breakers: Sequence[str] = ("\n", ":", '"', "*")
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1

    def __post_init__(self) -> None:
        if self.repeat_penalty is None:
            object.__setattr__(self, "repeat_penalty", REPEAT_PENALTY if self.temperature else 1.0)
        assert self.repeat_penalty is not None
        _check(self.temperature >= 0, "temperature", self.temperature, "0 or more")
        _check(math.isfinite(self.temperature), "temperature", self.temperature, "a finite number")
        _check(0 <= self.top_k < 2**31, "top_k", self.top_k, "0 (off) or more")
        _check(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1 (off)")
        _check(0 <= self.min_p <= 1, "min_p", self.min_p, "between 0 (off) and 1")
        _check(0 < self.repeat_penalty < math.inf, "repeat_penalty", self.repeat_penalty, "above 0 (1 is off)")
        _check(0 <= self.repeat_last_n < 2**31, "repeat_last_n", self.repeat_last_n, "0 (off) or more")
        _check(self.seed is None or 0 <= self.seed <= MAX_SEED, "seed", self.seed, f"between 0 and {MAX_SEED}")
        for name in ("presence_penalty", "frequency_penalty"):
            _check(math.isfinite(getattr(self, name)), name, getattr(self, name), "a finite number")
        for token, bias in self.logit_bias.items():
            _check(bias < math.inf, f"logit_bias of token {token}", bias, "a number below infinity")
        _check(0 <= self.dry_multiplier < math.inf, "dry_multiplier", self.dry_multiplier, "0 (off) or more")
        _check(1 <= self.dry_base < math.inf, "dry_base", self.dry_base, "1 or more")
        _check(0 <= self.dry_allowed_length < 2**31, "dry_allowed_length", self.dry_allowed_length, "0 or more")
        _check(0 <= self.dry_penalty_last_n <= MAX_DRY_TOKENS, "dry_penalty_last_n", self.dry_penalty_last_n, f"between 0 (off) and {MAX_DRY_TOKENS}")
        for text in self.dry_sequence_breakers:
            if not 0 < len(text.encode("utf-8", "replace")) <= _MAX_BREAKER or "\0" in text:
                raise SamplingError(f"dry_sequence_breakers has {text[:_MAX_BREAKER]!r}, but must have texts of 1 to {_MAX_BREAKER} bytes")
        for name in ("xtc_probability", "xtc_threshold"):
            _check(0 <= getattr(self, name) <= 1, name, getattr(self, name), "between 0 and 1")

    @property
    def with_dry(self) -> bool:
        """Whether repetitions are looked for."""
        return self.dry_multiplier > 0 and self.dry_penalty_last_n > 0

    @property
    def with_xtc(self) -> bool:
        """Whether likely tokens are dropped now and then."""
        return self.xtc_probability > 0 and self.xtc_threshold <= 0.5

    @property
    def n_recent(self) -> int:
        """How many of the last tokens are looked at."""
        return max(self.repeat_last_n, self.dry_penalty_last_n if self.with_dry else 0)


def _check(valid: bool, name: str, value: object, wanted: str) -> None:
    if not valid:
        raise SamplingError(f"{name} is {value}, but must be {wanted}")


def with_temperature(params: SamplingParams, temperature: float) -> SamplingParams:
    """The same with another temperature. The repeat penalty follows, if it is the one that goes with the temperature there is.

    Raises:
        SamplingError: it is out of range.
    """
    follows = params.repeat_penalty == SamplingParams(params.temperature).repeat_penalty
    return replace(params, temperature=temperature, repeat_penalty=None if follows else params.repeat_penalty)


class Sampler:
    """Draws tokens from the logits of a context and remembers them for the penalties and for DRY.

    Args:
        model: the model whose vocabulary is sampled.
        params: how.

    Attributes:
        seed: the seed in use, also when the parameters left it open.
        recent: the tokens that penalties and DRY look at, the oldest first; may be changed.

    Raises:
        SamplingError: a token that is biased is none of the model's.
    """

    def __init__(self, model: Model, params: SamplingParams) -> None:
        self._lib = lib = load().llama_cpp
        self.params = params
        self.seed = secrets.randbelow(MAX_SEED + 1) if params.seed is None else params.seed

        for token in params.logit_bias:
            _check(0 <= token < model.n_vocab, "logit_bias of token", token, f"a token: they go from 0 to {model.n_vocab - 1}")
        self._biased = np.array([*params.logit_bias], np.int32)
        self._biases = np.array([*params.logit_bias.values()], np.float32)
        self._grammar: Grammar | None = None

        self._ids = np.arange(model.n_vocab, dtype=np.int32)
        # llama_token_data; the chain reorders them
        self._candidates = np.zeros(model.n_vocab, [("id", np.int32), ("logit", np.float32), ("p", np.float32)])
        self.recent: deque[int] = deque(maxlen=params.n_recent)
        chain_params = lib.llama_sampler_chain_default_params()
        chain_params.no_perf = True
        chain = lib.llama_sampler_chain_init(chain_params)
        self._chain = chain
        # the chain owns what is added to it
        self._free = weakref.finalize(self, lib.llama_sampler_free, chain)

        # the likeliest token needs no chain, unless that one is dropped
        self._greedy = params.temperature == 0 and not params.with_xtc
        self._fill_chain(self.seed)
        self._dry = _dry_sampler(lib, model, params) if params.with_dry else None
        self._free_dry = None if self._dry is None else weakref.finalize(self, lib.llama_sampler_free, self._dry)
        # what it has been told of
        self._known: deque[int] = deque(maxlen=params.n_recent)

    def _fill_chain(self, seed: int) -> None:
        lib, chain, params = self._lib, self._chain, self.params
        while lib.llama_sampler_chain_n(chain):
            lib.llama_sampler_free(lib.llama_sampler_chain_remove(chain, 0))
        if self._greedy:
            return
        if params.top_k:
            lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_top_k(params.top_k))
        if params.top_p < 1:
            lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_top_p(params.top_p, 1))
        if params.min_p > 0:
            lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_min_p(params.min_p, 1))
        if params.with_xtc:
            lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_xtc(params.xtc_probability, params.xtc_threshold, 1, seed))
        lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_temp(params.temperature))
        lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_dist(seed))

    @property
    def _open_chain(self) -> int:
        if not self._free.alive:
            raise EngineError("the sampler is closed: make a new one")
        return self._chain

    def sample(self, context: SequenceDecoder, i: int = -1) -> int:
        """Draw the token that follows token `i` of the last batch (-1: its last) and remember it.

        Raises:
            EngineError: that token has no logits, or some that are not finite.
        """
        chain, logits = self._open_chain, context.logits(i)
        # the largest is NaN if any is
        if not math.isfinite(logits.max()):
            raise EngineError(
                "the model's predictions are not numbers any more: its file is damaged or a device failed; fetch it again or use --gpu-layers 0"
            )
        logits = self._adjusted(logits)
        token = self._choose(chain, logits)
        if self._grammar:
            # most tokens fit, and one is faster looked up than all
            if not self._grammar.allows(token):
                token = self._choose(chain, logits, self._grammar)
            self._grammar.accept(token)
        self._remember(token)
        return token

    def _adjusted(self, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """With biases and penalties as llama.cpp's samplers of these names, which look up all tokens of the vocabulary, not the recent ones."""
        params, penalty = self.params, self.params.repeat_penalty
        assert penalty is not None
        recent = list(self.recent)[-params.repeat_last_n :] if params.repeat_last_n else []
        penalizes = bool(recent) and (penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0)
        if not penalizes and not len(self._biased):
            return self._without_repetitions(logits)
        adjusted = logits.copy()
        adjusted[self._biased] += self._biases
        if penalizes:
            tokens, counts = np.unique(recent, return_counts=True)
            values = adjusted[tokens]
            with np.errstate(over="ignore"):
                values = np.where(values > 0, values / penalty, values * penalty)
            adjusted[tokens] = values - (counts * params.frequency_penalty + params.presence_penalty).astype(np.float32)
        return self._without_repetitions(adjusted)

    def _without_repetitions(self, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """What llama.cpp's DRY makes of them."""
        if self._dry is None:
            return logits
        lib, candidates = self._lib, self._candidates
        if self._known != self.recent:
            lib.llama_sampler_reset(self._dry)
            self._known.clear()
            for token in self.recent:
                self._tell(token)
        candidates["id"], candidates["logit"] = self._ids, logits
        array = token_data_array(lib, candidates)
        lib.llama_sampler_apply(self._dry, ctypes.byref(array))
        return candidates["logit"].copy()

    def _tell(self, token: int) -> None:
        if self._dry is not None:
            self._lib.llama_sampler_accept(self._dry, token)
            self._known.append(token)

    def _remember(self, token: int) -> None:
        if self._known == self.recent:
            self._tell(token)
        self.recent.append(token)

    def _choose(self, chain: int, logits: npt.NDArray[np.float32], grammar: Grammar | None = None) -> int:
        """A token by these logits, of those that a grammar allows if there is one."""
        if self._greedy and grammar is None:
            return int(logits.argmax())
        lib, candidates = self._lib, self._candidates
        candidates["id"], candidates["logit"] = self._ids, logits
        if grammar:
            grammar.restrict(candidates)
            if not np.isfinite(candidates["logit"].max()):
                raise EngineError("the model has no token that goes on as the grammar wants: change the grammar or use another model")
        if self._greedy:
            return int(candidates["id"][candidates["logit"].argmax()])
        array = token_data_array(lib, candidates)
        lib.llama_sampler_apply(chain, ctypes.byref(array))
        return array.data[array.selected].id

    def accept(self, token: int) -> None:
        """Remember a token that was not drawn here."""
        _ = self._open_chain
        self._remember(token)

    def begin(self, answer: int, grammar: Grammar | None = None) -> None:
        """Start the random numbers of an answer, counted from 0: they depend on the seed and this number alone. The first has those of the seed.

        grammar: what the answer follows, in its state at the beginning.
        """
        _ = self._open_chain
        if self._grammar:
            self._grammar.close()
        self._grammar = grammar
        if not self._greedy:
            self._fill_chain(random.Random(f"{self.seed}/{answer}").randint(0, MAX_SEED) if answer else self.seed)

    def reset(self) -> None:
        """Forget the tokens and start the random numbers of the first answer."""
        self.begin(0)
        self.recent.clear()

    def close(self) -> None:
        """Free the chain and the grammar. Closing twice is harmless."""
        if self._grammar:
            self._grammar.close()
        if self._free_dry:
            self._free_dry()
        self._free()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _dry_sampler(lib: Any, model: Model, params: SamplingParams) -> Any:
    texts = [text.encode("utf-8", "replace") for text in params.dry_sequence_breakers]
    return lib.llama_sampler_init_dry(
        model.vocab, params.dry_multiplier, params.dry_base, params.dry_allowed_length, params.dry_penalty_last_n,
        (ctypes.c_char_p * len(texts))(*texts), len(texts),
    )  # fmt: skip


def log_probabilities(logits: npt.NDArray[np.float32], token: int, n_top: int) -> tuple[float, list[tuple[int, float]]]:
    """How likely a token is by these logits alone, and the likeliest ones, the likeliest first: natural logarithms.

    logits: [n_vocab]
    """
    total = logits.max() + math.log(np.exp(logits - logits.max(), dtype=np.float64).sum())
    n_top = min(n_top, len(logits))
    top = np.argpartition(logits, -n_top)[-n_top:] if n_top else np.empty(0, np.int64)
    ordered = top[np.argsort(-logits[top], kind="stable")]
    return float(logits[token] - total), [(int(each), float(logits[each] - total)) for each in ordered]
