"""Answers: the methods of Llama that have an engine draw tokens."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kvlocal.compat import asked
from kvlocal.compat.chat_replies import ChatAnswer
from kvlocal.compat.completion_replies import Continuation
from kvlocal.compat.embeddings import Vectors
from kvlocal.compat.errors import NotSupported
from kvlocal.compat.tokens import Tokens
from kvlocal.errors import KvlocalError
from kvlocal.llama.sampling import SamplingParams
from kvlocal.serving.engine import Engine
from kvlocal.serving.request import AnswerRequest, Event, Finished, TextRequest, Usage

OWNER = "compat"


class Answers(Tokens):
    """Answers to chats and continuations of texts. Who makes it sets what is named here.

    model_path: of the model
    last_usage: what the last answer took
    """

    model_path: str | os.PathLike[str]
    last_usage: Usage
    # what answers, or embeds
    _worker: Engine | Vectors
    _last: Finished | None
    _seed: int | None
    _drawn: SamplingParams

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
            OWNER,
            asked.messages(messages),
            asked.sampling(
                self._drawn, self._seed if seed is None else seed, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p,
                repeat_penalty=repeat_penalty, presence_penalty=presence_penalty, frequency_penalty=frequency_penalty, logit_bias=logit_bias,
            ),
            asked.chat_options(
                functions=functions, function_call=function_call, tools=tools, tool_choice=tool_choice, grammar=grammar,
                response_format=response_format, stop=stop, max_tokens=max_tokens, logprobs=logprobs, top_logprobs=top_logprobs,
            ),
        )  # fmt: skip
        answer = ChatAnswer(self._name(model), with_logprobs=bool(logprobs))
        events = self._events(self._engine, request)
        return answer.chunks(events) if stream else answer.whole(events)

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

    # texts

    def create_completion(
        self,
        prompt: str | Sequence[int],
        suffix: str | None = None,
        max_tokens: int | None = 16,
        temperature: float = 0.8,
        top_p: float = 0.95,
        min_p: float = 0.05,
        typical_p: float = 1.0,
        logprobs: int | None = None,
        echo: bool = False,
        stop: str | Sequence[str] | None = None,
        frequency_penalty: float = 0.0,
        presence_penalty: float = 0.0,
        repeat_penalty: float = 1.0,
        top_k: int = 40,
        stream: bool = False,
        seed: int | None = None,
        tfs_z: float = 1.0,
        mirostat_mode: int = 0,
        mirostat_tau: float = 5.0,
        mirostat_eta: float = 0.1,
        model: str | None = None,
        stopping_criteria: Any = None,
        logits_processor: Any = None,
        grammar: Any = None,
        logit_bias: Mapping[Any, float] | None = None,
    ) -> Any:
        """Goes on with a text as it is, without a chat template. What it has in common with the text before is not read again, and there is no end
        of it.

        Args:
            prompt: the text, in which the texts of control tokens are these tokens, or its tokens.
            suffix, typical_p, mirostat_mode, stopping_criteria, logits_processor: cannot be had.
            logprobs: how many of the likeliest tokens are told at each place, with their log-probabilities and that of the one that came.
            echo: the reply begins with the text.
            others: as create_chat_completion has them.

        Returns:
            A completion as a dict, or an iterator over its chunks if `stream`.

        Raises:
            NotSupported: an argument asks for what kvlocal has not.
            KvlocalError: it cannot be gone on with.
        """
        asked.check_others(
            suffix=suffix, typical_p=typical_p, mirostat_mode=mirostat_mode, stopping_criteria=stopping_criteria, logits_processor=logits_processor
        )
        request = TextRequest(
            OWNER,
            asked.prompt(prompt),
            asked.sampling(
                self._drawn, self._seed if seed is None else seed, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p,
                repeat_penalty=repeat_penalty, presence_penalty=presence_penalty, frequency_penalty=frequency_penalty, logit_bias=logit_bias,
            ),
            asked.text_options(grammar=grammar, stop=stop, max_tokens=max_tokens, logprobs=logprobs),
            echo=bool(echo),
        )  # fmt: skip
        n_before = None if echo else len(prompt if isinstance(prompt, str) else self.detokenize(prompt).decode("utf-8", "replace"))
        reply = Continuation(self._name(model), n_before, with_logprobs=logprobs is not None)
        events = self._events(self._engine, request)
        return reply.chunks(events) if stream else reply.whole(events)

    __call__ = create_completion

    # what they have in common

    def _events(self, engine: Engine, request: AnswerRequest | TextRequest) -> Iterator[Event]:
        """The events of an answer, which is begun when the first one is asked for; closing the iterator ends it."""
        answering = engine.submit(request)
        try:
            for event in answering.events():
                if isinstance(event, Finished):
                    if event.error is not None:
                        raise event.error
                    self._last, self.last_usage = event, event.usage
                yield event
        finally:
            answering.cancel()

    @property
    def _engine(self) -> Engine:
        """What answers.

        Raises:
            NotSupported: there is nothing but embeddings.
        """
        if not isinstance(self._worker, Engine):
            raise NotSupported("this Llama was made with embedding=True and embeds texts alone: make another one for answers")
        return self._worker

    def _name(self, model: str | None) -> str:
        return os.fspath(self.model_path) if model is None else model
