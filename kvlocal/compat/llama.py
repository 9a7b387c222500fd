"""Llama: what llama-cpp-python's class of that name is, over an engine of kvlocal."""

from __future__ import annotations

import os
import sys
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from kvlocal.compat import asked, settings
from kvlocal.compat.chat_formats import template_of
from kvlocal.compat.chat_replies import ChatAnswer
from kvlocal.compat.errors import NotSupported
from kvlocal.compat.pretrained import fetched
from kvlocal.errors import KvlocalError
from kvlocal.llama.model import Model
from kvlocal.openai_forms.chat_reply import Choice
from kvlocal.serving.conversation import Checkpoint
from kvlocal.serving.engine import Engine
from kvlocal.serving.request import AnswerRequest, Event, Finished, Usage

_OWNER = "compat"
_WAITING = 64  # calls of several threads; one is answered at a time
_IDLE_RAM = 2**30  # bytes of conversations that are not the last one
_RANDOM_SEED = 2**32 - 1  # llama.cpp's number for any seed


class Llama:
    """A model and the conversations with it, called as llama-cpp-python's Llama is.

    A history that goes on one that was answered before is gone on with, so that only what is new is read, and there is no end to it: `n_ctx` is how
    many cells the cache has, beyond which it is compressed. It may be used from several threads; their calls are answered one after another.

    Arguments are those of llama-cpp-python, in its forms and with its defaults; what cannot be had is refused in one sentence.

    Args:
        model_path: the GGUF file.
        n_gpu_layers: layers on the GPU, -1 for all.
        use_mmap: map the file instead of reading it.
        seed: of all that is drawn, -1 or 2**32 - 1 for any.
        n_ctx: cells of the cache for each layer and head, 0 for as many as the model was trained for; more are not taken.
        n_batch, n_ubatch: the smaller of them is how many tokens are evaluated at once.
        n_threads: by default one for each core.
        last_n_tokens_size: how many tokens the penalties look at.
        type_k, type_v: of the cache, as llama.cpp numbers types, or by name; f16 if None.
        chat_format: the name of a chat template in place of the model's own.
        verbose: of no effect; KVLOCAL_LOG=1 has llama.cpp say what it does.
        others: what else llama-cpp-python has; those that only change how fast it is have no effect.

    Attributes:
        model_path, chat_format, verbose: as they were given.
        metadata: of the file.
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
        use_mmap: bool = True,
        seed: int = _RANDOM_SEED,
        n_ctx: int = 512,
        n_batch: int = 512,
        n_ubatch: int = 512,
        n_threads: int | None = None,
        last_n_tokens_size: int = 64,
        type_k: int | str | None = None,
        type_v: int | str | None = None,
        chat_format: str | None = None,
        verbose: bool = True,
        **others: Any,
    ) -> None:
        settings.check_others(others)
        template = None if chat_format is None else template_of(chat_format)
        asked.check_numbers(seed=seed)
        self.model_path, self.chat_format, self.verbose = model_path, chat_format, verbose
        self._repeat_last_n = last_n_tokens_size
        self.set_seed(seed)
        model = Model(model_path, n_gpu_layers=n_gpu_layers, use_mmap=use_mmap)
        try:
            self.metadata = dict(model.metadata)
            if template is not None:
                model.metadata["tokenizer.chat_template"] = template
            config = settings.session_config(
                model, n_ctx=n_ctx, n_batch=n_batch, n_ubatch=n_ubatch, n_threads=n_threads, type_k=type_k, type_v=type_v
            )
            self._engine = Engine(model, config, waiting=_WAITING, idle_ram=_IDLE_RAM)
        except BaseException:
            model.close()
            raise
        self._model = model
        self._n_ctx, self.n_batch = config.max_tokens, config.n_ubatch
        self._last: Finished | None = None
        self.last_usage = Usage()
        self._free = weakref.finalize(self, _close_later, self._engine, model)

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
            additional_files, local_dir, local_dir_use_symlinks, cache_dir: cannot be had.
            arguments: of the constructor.

        Raises:
            KvlocalError: it cannot be fetched or loaded.
        """
        places = {
            "additional_files": additional_files,
            "local_dir": local_dir,
            "local_dir_use_symlinks": local_dir_use_symlinks,
            "cache_dir": cache_dir,
        }
        return cls(os.fspath(fetched(repo_id, filename, places)), **arguments)

    # chats

    def create_chat_completion(
        self,
        messages: Sequence[Mapping[str, Any]],
        functions: Sequence[Mapping[str, Any]] | None = None,
        function_call: str | Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] | None = None,
        temperature: float = 0.2,
        top_p: float = 0.95,
        top_k: int = 40,
        min_p: float = 0.05,
        typical_p: float = 1.0,
        stream: bool = False,
        stop: str | Sequence[str] | None = None,
        seed: int | None = None,
        response_format: Mapping[str, Any] | None = None,
        max_tokens: int | None = None,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        repeat_penalty: float = 1.0,
        tfs_z: float = 1.0,
        mirostat_mode: int = 0,
        mirostat_tau: float = 5.0,
        mirostat_eta: float = 0.1,
        model: str | None = None,
        logits_processor: Any = None,
        grammar: Any = None,
        logit_bias: Mapping[Any, float] | None = None,
        logprobs: bool | None = None,
        top_logprobs: int | None = None,
    ) -> Any:
        """Answers the last message of a conversation.

        Args:
            messages: the whole conversation, as OpenAI's chat completions have it.
            functions, function_call: tools and the choice of one by their older names.
            tools, tool_choice: the functions that may be called, and whether one is.
            temperature, top_p, top_k, min_p: as SamplingParams has them; a top_k of 0 or less is off.
            typical_p, mirostat_mode, logits_processor: cannot be had.
            stream: give the answer as it comes.
            stop: texts that end the answer and are not part of it.
            seed: that of the constructor if None.
            response_format: {"type": "json_object"}, with a "schema" if there is one.
            max_tokens: the longest answer; as many tokens as there are cells if it is None or not above 0.
            presence_penalty, frequency_penalty, repeat_penalty: as SamplingParams has them.
            tfs_z, mirostat_tau, mirostat_eta: of no effect.
            model: the name that the reply has for it, its path if None.
            grammar: a LlamaGrammar, or a text in GBNF.
            logit_bias: what is added to the logits of tokens.
            logprobs, top_logprobs: whether log-probabilities are told, and how many of others at each place.

        Returns:
            A chat completion as a dict, or an iterator over its chunks if `stream`.

        Raises:
            NotSupported: an argument asks for what kvlocal has not.
            KvlocalError: it cannot be answered.
        """
        asked.check_others(typical_p=typical_p, mirostat_mode=mirostat_mode, logits_processor=logits_processor)
        request = AnswerRequest(
            _OWNER,
            asked.messages(messages),
            asked.sampling(
                self._repeat_last_n, self._seed if seed is None else seed, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p,
                repeat_penalty=repeat_penalty, presence_penalty=presence_penalty, frequency_penalty=frequency_penalty, logit_bias=logit_bias,
            ),
            asked.chat_options(
                functions=functions, function_call=function_call, tools=tools, tool_choice=tool_choice, grammar=grammar,
                response_format=response_format, stop=stop, max_tokens=max_tokens, logprobs=logprobs, top_logprobs=top_logprobs,
            ),
        )  # fmt: skip
        answer = ChatAnswer(self._name(model), with_logprobs=bool(logprobs))
        if stream:
            return answer.chunks(self._events(request))
        choice = Choice()
        for event in self._events(request):
            if isinstance(event, Finished):
                return answer.whole(choice, event)
            choice.add(event)
        raise AssertionError("an answer ends")

    def create_chat_completion_openai_v1(self, *args: Any, **kwargs: Any) -> Any:
        """As create_chat_completion, with objects of the package openai in place of dicts.

        Raises:
            KvlocalError: as create_chat_completion, or the package is not installed.
        """
        try:
            from openai.types.chat import ChatCompletion, ChatCompletionChunk
        except ImportError as error:
            raise KvlocalError(f"create_chat_completion_openai_v1 needs openai: run `{sys.executable} -m pip install openai`") from error
        reply = self.create_chat_completion(*args, **kwargs)
        return ChatCompletion(**reply) if isinstance(reply, dict) else (ChatCompletionChunk(**chunk) for chunk in reply)

    def _events(self, request: AnswerRequest) -> Iterator[Event]:
        """The events of an answer, which is begun when the first one is asked for; closing the iterator ends it."""
        answering = self._engine.submit(request)
        try:
            for event in answering.events():
                if isinstance(event, Finished):
                    if event.error is not None:
                        raise event.error
                    self._last, self.last_usage = event, event.usage
                yield event
        finally:
            answering.cancel()

    def _name(self, model: str | None) -> str:
        return os.fspath(self.model_path) if model is None else model

    # texts and tokens

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = False) -> list[int]:
        """The tokens of a text in UTF-8.

        Args:
            add_bos: put the tokens around it that the model wants around texts.
            special: turn the texts of control tokens into these tokens.
        """
        tokens: list[int] = self._model.tokenize(text.decode("utf-8", "replace"), add_special=add_bos, parse_special=special).tolist()
        return tokens

    def detokenize(self, tokens: Sequence[int], prev_tokens: Sequence[int] | None = None, special: bool = False) -> bytes:
        """The bytes of tokens.

        Args:
            prev_tokens: of no effect.
            special: also spell out control tokens.
        """
        data = b"".join(self._model.token_bytes(int(token), special) for token in tokens)
        starts = len(tokens) > 0 and tokens[0] == self._model.bos
        return data.removeprefix(b" ") if starts else data

    def n_ctx(self) -> int:
        """How many tokens are in the cache at most."""
        return self._n_ctx

    def n_embd(self) -> int:
        """Numbers in an embedding."""
        return self._model.n_embd

    def n_vocab(self) -> int:
        """Tokens of the vocabulary."""
        return self._model.n_vocab

    def token_bos(self) -> int:
        """The token that texts begin with, -1 if there is none."""
        return -1 if self._model.bos is None else self._model.bos

    def token_eos(self) -> int:
        """The token that texts end with, -1 if there is none."""
        return -1 if self._model.eos is None else self._model.eos

    def token_nl(self) -> int:
        """The token of a new line, -1 if there is none."""
        return -1 if self._model.newline is None else self._model.newline

    # what there is

    @property
    def n_tokens(self) -> int:
        """Tokens of the conversation that was answered last, in the cache or not."""
        return self.last_usage.prompt_tokens + self.last_usage.completion_tokens

    def set_seed(self, seed: int) -> None:
        """What is drawn from now on has this seed, -1 or 2**32 - 1 for any."""
        self._seed = None if seed in (-1, _RANDOM_SEED) else seed

    def set_cache(self, cache: Any) -> None:
        """Of no effect: what was read is found again without another cache."""

    def reset(self) -> None:
        """Forgets all conversations: whatever comes next is read from its beginning."""
        for info in self._engine.conversations(_OWNER):
            self._engine.delete(info.id, _OWNER)
        self._last, self.last_usage = None, Usage()

    def save_state(self) -> LlamaState:
        """The conversation that was answered last, for load_state of the same Llama."""
        checkpoint = self._engine.checkpoint(self._last.conversation, _OWNER) if self._last else None
        return LlamaState(weakref.ref(self), self._last, checkpoint, self._seed)

    def load_state(self, state: LlamaState) -> None:
        """Goes back to a saved state: its conversation can be gone on with, without being read, also after `reset`.

        Raises:
            NotSupported: it is of another Llama.
        """
        if not isinstance(state, LlamaState) or state.llama() is not self:
            raise NotSupported("a state can only be loaded into the Llama that has saved it: send the whole conversation instead")
        if state.checkpoint is not None:
            self._engine.take_up(state.checkpoint, _OWNER)
        self._last, self._seed = state.last, state.seed
        self.last_usage = state.last.usage if state.last else Usage()

    def close(self) -> None:
        """Ends what is being answered and frees the memory. Closing twice is harmless."""
        if self._free.detach():
            _close(self._engine, self._model)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"kvlocal's Llama has no {name}: use create_chat_completion or create_completion, or kvlocal's own classes")

    def __reduce__(self) -> Any:
        raise NotSupported("a Llama cannot be sent to another process: make one there")


@dataclass(frozen=True)
class LlamaState:
    """A conversation as it was, in the memory of its process.

    llama: whose it is
    last: the answer that it ends with, None if there was none
    checkpoint: what is needed to go on from it
    seed: of the Llama
    """

    llama: weakref.ref[Llama]
    last: Finished | None
    checkpoint: Checkpoint | None
    seed: int | None

    @property
    def n_tokens(self) -> int:
        """Tokens of the conversation."""
        used = self.last.usage if self.last else Usage()
        return used.prompt_tokens + used.completion_tokens

    def __reduce__(self) -> Any:
        raise NotSupported("a state belongs to its process: keep the messages of the conversation instead")


def _close(engine: Engine, model: Model) -> None:
    engine.close()
    model.close()


def _close_later(engine: Engine, model: Model) -> None:
    """Frees what a Llama had that nobody has any more. It may be a thread of the engine that finds that out, which could not wait for itself."""
    if threading.current_thread() is threading.main_thread():
        _close(engine, model)
    else:
        threading.Thread(target=_close, args=(engine, model), name="kvlocal-close").start()
