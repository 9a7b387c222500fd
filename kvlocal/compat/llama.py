"""Llama: what llama-cpp-python's class of that name is, over an engine of kvlocal."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from kvlocal.compat import asked, embeddings, settings
from kvlocal.compat.answers import OWNER, Answers
from kvlocal.compat.chat_formats import template_of
from kvlocal.compat.embeddings import Vectors
from kvlocal.compat.errors import NotSupported
from kvlocal.compat.pretrained import fetched
from kvlocal.compat.state import LlamaState
from kvlocal.llama.adapter import Lora
from kvlocal.llama.model import Model
from kvlocal.llama.sampling import SamplingParams
from kvlocal.openai_forms.chat_fields import FieldError
from kvlocal.serving.engine import Engine
from kvlocal.serving.request import UnknownConversation, Usage

_WAITING = 64  # calls of several threads; one is answered at a time
_IDLE_RAM = 2**30  # bytes of conversations that are not the last one
_RANDOM_SEED = 2**32 - 1  # llama.cpp's number for any seed


class Llama(Answers):
    """A model and the conversations with it, called as llama-cpp-python's Llama is.

    A history that goes on one that was answered before is gone on with, so that only what is new is read, and there is no end to it: `n_ctx` is how
    many cells the cache has, beyond which it is compressed. It may be used from several threads; their calls are answered one after another.

    Arguments are those of llama-cpp-python, in its forms and with its defaults; what cannot be had is refused in one sentence.

    Args:
        model_path: the GGUF file.
        n_gpu_layers: layers on the GPU, -1 for all.
        main_gpu, split_mode, tensor_split, offload_kqv: which devices they go to, how they share the model, and whether the cells lie there, too.
        use_mmap: map the file instead of reading it.
        seed: of all that is drawn, -1 or 2**32 - 1 for any.
        n_ctx: cells of the cache for each layer and head, 0 for as many as the model was trained for; more are not taken.
        n_batch, n_ubatch: the smaller of them is how many tokens are evaluated at once.
        n_threads: by default one for each core.
        last_n_tokens_size: how many tokens the penalties look at, -1 for n_ctx.
        type_k, type_v: of the cache, as llama.cpp numbers types, or by name; f16 if None.
        embedding: it embeds texts, and does nothing else.
        pooling_type: how the vectors of tokens become one then, by llama.cpp's numbers; as the model was trained for if -1.
        lora_path, lora_scale: a LoRA adapter, as a GGUF file, and how much of it.
        chat_format: the name of a chat template in place of the model's own.
        verbose: of no effect; KVLOCAL_LOG=1 has llama.cpp say what it does.
        others: what else llama-cpp-python has; those that only change how fast it is have no effect.

    Attributes:
        model_path, chat_format, verbose: as they were given.
        metadata: of the file.
        n_batch: the most tokens of a text that is embedded.
        last_usage: what the last answer took, and how much of it was not read again.

    Raises:
        NotSupported: an argument asks for what kvlocal has not.
        KvlocalError: the model cannot be loaded, or there is not enough memory for its cache.
    """

    def __init__(
        self,
        model_path: str | os.PathLike[str],
        *,
        n_gpu_layers: int = 0,
        split_mode: int = 1,
        main_gpu: int = 0,
        tensor_split: Sequence[float] | None = None,
        offload_kqv: bool = True,
        use_mmap: bool = True,
        seed: int = _RANDOM_SEED,
        n_ctx: int = 512,
        n_batch: int = 512,
        n_ubatch: int = 512,
        n_threads: int | None = None,
        last_n_tokens_size: int = 64,
        type_k: int | str | None = None,
        type_v: int | str | None = None,
        pooling_type: int = embeddings.UNSPECIFIED,
        embedding: bool = False,
        lora_path: str | os.PathLike[str] | None = None,
        lora_scale: float = 1.0,
        chat_format: str | None = None,
        verbose: bool = True,
        **others: Any,
    ) -> None:
        settings.check_others(others)
        template = None if chat_format is None else template_of(chat_format)
        asked.check_numbers(
            n_gpu_layers=n_gpu_layers, split_mode=split_mode, main_gpu=main_gpu, n_ctx=n_ctx, n_batch=n_batch, n_ubatch=n_ubatch,
            n_threads=n_threads, last_n_tokens_size=last_n_tokens_size, pooling_type=pooling_type, lora_scale=lora_scale,
        )  # fmt: skip
        for name, path in (("model_path", model_path), ("lora_path", lora_path or "")):
            if not isinstance(path, str | os.PathLike):
                raise FieldError(f"{name} has to be the path of a GGUF file", name)
        self.model_path, self.chat_format, self.verbose = model_path, chat_format, verbose
        self.set_seed(seed)
        lora = () if lora_path is None else (Lora(Path(lora_path), lora_scale),)
        placement = settings.placement_of(
            n_gpu_layers=n_gpu_layers, main_gpu=main_gpu, split_mode=split_mode, tensor_split=tensor_split, offload_kqv=offload_kqv
        )
        model = Model(model_path, placement=placement, use_mmap=use_mmap, lora=lora)
        try:
            self.metadata = dict(model.metadata)
            if template is not None:
                model.metadata["tokenizer.chat_template"] = template
            config = settings.session_config(
                model, n_ctx=n_ctx, n_batch=n_batch, n_ubatch=n_ubatch, n_threads=n_threads or None, type_k=type_k, type_v=type_v
            )
            self._n_ctx = config.max_tokens
            self._drawn = SamplingParams(repeat_last_n=self._n_ctx if last_n_tokens_size == -1 else last_n_tokens_size)
            self.n_batch = min(n_batch, self._n_ctx)
            if embedding:
                self._worker = Vectors(model, max_tokens=self.n_batch, n_threads=n_threads or None, pooling_type=pooling_type)
            elif pooling_type != embeddings.UNSPECIFIED:
                raise NotSupported("a pooling_type is of embeddings: give it with embedding=True, or leave it out")
            else:
                self._worker = Engine(model, config, waiting=_WAITING, idle_ram=_IDLE_RAM)
        except BaseException:
            model.close()
            raise
        self._model = model
        self._last = None
        self.last_usage = Usage()
        self._free = weakref.finalize(self, _close_later, self._worker, model)

    @classmethod
    def from_pretrained(
        cls,
        repo_id: str,
        filename: str | None,
        additional_files: Sequence[str] | None = None,
        local_dir: str | os.PathLike[str] | None = None,
        local_dir_use_symlinks: bool | str = "auto",
        cache_dir: str | os.PathLike[str] | None = None,
        **arguments: Any,
    ) -> Self:
        """The model in a repository of the Hugging Face hub, which is fetched into kvlocal's models directory unless it is there.

        Args:
            repo_id: owner/repository.
            filename: a GGUF file in it, or a pattern that one fits; None for the only one.
            additional_files, local_dir, cache_dir: cannot be had.
            local_dir_use_symlinks: of no effect.
            arguments: of the constructor.

        Raises:
            KvlocalError: it cannot be fetched or loaded.
        """
        places = {"additional_files": additional_files, "local_dir": local_dir, "cache_dir": cache_dir}
        return cls(os.fspath(fetched(repo_id, filename, places)), **arguments)

    # embeddings

    def create_embedding(self, input: str | Sequence[str], model: str | None = None) -> dict[str, Any]:
        """Embeds a text, or each of several.

        model: the name that the reply has for it, its path if None

        Raises:
            NotSupported: it was made without embedding=True.
            KvlocalError: a text cannot be embedded.
        """
        vectors, n_tokens = self.embed(embeddings.texts_of(input), return_count=True)
        return embeddings.reply(vectors, n_tokens, self._name(model))

    def embed(self, input: str | Sequence[str], normalize: bool = False, truncate: bool = True, return_count: bool = False) -> Any:
        """Embeds a text, or each of several in a list: a list of numbers for each, or one for each of its tokens where the model has no pooling.

        Args:
            normalize: vectors of length 1.
            truncate: leave out what is beyond n_batch tokens.
            return_count: give how many tokens there were, too.

        Raises:
            NotSupported: it was made without embedding=True.
            KvlocalError: a text cannot be embedded.
        """
        if not isinstance(self._worker, Vectors):
            raise NotSupported("this Llama was made for answers: make another one with embedding=True for embeddings")
        texts = [self.tokenize(text.encode("utf-8", "replace")) for text in embeddings.texts_of(input)]
        if truncate:
            texts = [tokens[: self.n_batch] for tokens in texts]
        found: Any = self._worker.of(texts, normalize=normalize)
        if isinstance(input, str):
            (found,) = found
        return (found, sum(map(len, texts))) if return_count else found

    def pooling_type(self) -> int:
        """How the vectors of tokens become one, by llama.cpp's numbers."""
        return self._worker.pooling_type if isinstance(self._worker, Vectors) else embeddings.UNSPECIFIED

    # what there is

    def n_ctx(self) -> int:
        """How many tokens are in the cache at most."""
        return self._n_ctx

    @property
    def n_tokens(self) -> int:
        """Tokens of the conversation that was answered last, in the cache or not."""
        return self.last_usage.prompt_tokens + self.last_usage.completion_tokens

    def set_seed(self, seed: int) -> None:
        """What is drawn from now on has this seed, -1 or 2**32 - 1 for any."""
        asked.check_numbers(seed=seed)
        self._seed = None if seed in (None, -1, _RANDOM_SEED) else int(seed)

    def set_cache(self, cache: Any) -> None:
        """Of no effect: what was read is found again without another cache."""

    def reset(self) -> None:
        """Forgets all conversations and texts: whatever comes next is read from its beginning."""
        if isinstance(self._worker, Engine):
            self._worker.forget(OWNER)
        self._last, self.last_usage = None, Usage()

    def save_state(self) -> LlamaState:
        """The conversation that was answered last, for load_state of the same Llama. A text that was gone on with last is read again after that."""
        checkpoint = None
        if self._last and self._last.conversation:
            # one that memory had no room for is read again
            with suppress(UnknownConversation):
                checkpoint = self._engine.checkpoint(self._last.conversation, OWNER)
        return LlamaState(weakref.ref(self), self._last, checkpoint, self._seed)

    def load_state(self, state: LlamaState) -> None:
        """Goes back to a saved state: its conversation can be gone on with, without being read, also after `reset`.

        Raises:
            NotSupported: it is of another Llama.
        """
        if not isinstance(state, LlamaState) or state.llama() is not self:
            raise NotSupported("a state can only be loaded into the Llama that has saved it: send the whole conversation instead")
        if state.checkpoint is not None:
            self._engine.take_up(state.checkpoint, OWNER)
        self._last, self._seed = state.last, state.seed
        self.last_usage = state.last.usage if state.last else Usage()

    def close(self) -> None:
        """Ends what is being answered and frees the memory. Closing twice is harmless."""
        if self._free.detach():
            _close(self._worker, self._model)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"kvlocal's Llama has no {name}: use create_chat_completion or create_completion, or kvlocal's own classes")

    def __reduce__(self) -> Any:
        raise NotSupported("a Llama cannot be sent to another process: make one there")


def _close(worker: Engine | Vectors, model: Model) -> None:
    worker.close()
    model.close()


def _close_later(worker: Engine | Vectors, model: Model) -> None:
    """Frees what a Llama had that nobody has any more. It may be a thread of the engine that finds that out, which could not wait for itself."""
    if threading.current_thread() is threading.main_thread():
        _close(worker, model)
    else:
        threading.Thread(target=_close, args=(worker, model), name="kvlocal-close").start()
