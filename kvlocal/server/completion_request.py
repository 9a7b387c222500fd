"""A body of /v1/completions, as what an engine is asked for."""

from __future__ import annotations

from kvlocal.chat.options import AnswerOptions
from kvlocal.errors import KvlocalError
from kvlocal.llama.sampling import SamplingParams
from kvlocal.openai_forms.chat_fields import schema_of
from kvlocal.server.chat_request import limit, response_format_of, sampling, stops
from kvlocal.server.errors import invalid, of_failure
from kvlocal.server.inputs import texts_of
from kvlocal.server.schemas import CompletionRequest
from kvlocal.serving.request import TextRequest

DEFAULT_MAX_TOKENS = 16  # OpenAI's


def text_requests(fields: CompletionRequest, owner: str, defaults: SamplingParams, n_vocab: int) -> list[TextRequest]:
    """What an engine is asked for, `n` times for each text, one text after another; each time with a seed of its own.

    owner, defaults: as answer_requests has them

    Raises:
        ApiError: a field has a value that is not possible.
    """
    if fields.suffix:
        raise invalid("suffix is not possible: the model goes on with a text and cannot fill a gap, so put all it needs into the prompt", "suffix")
    if fields.best_of is not None and fields.best_of != (fields.n or 1):
        raise invalid(f"best_of is {fields.best_of} and n is {fields.n or 1}: leave best_of out, or give both the same value", "best_of")
    draws = fields.max_tokens != 0
    try:
        options = AnswerOptions(
            stop=stops(fields.stop),
            max_tokens=limit((DEFAULT_MAX_TOKENS if fields.max_tokens is None else fields.max_tokens) if draws else None),
            grammar=fields.grammar,
            json_schema=schema_of(response_format_of(fields.response_format), fields.grammar),
            top_logprobs=fields.logprobs,
        )
        params = [sampling(fields, defaults, i) for i in range(fields.n or 1)]
    except KvlocalError as error:
        raise of_failure(error) from None
    prompts = texts_of(fields.prompt, "prompt", n_vocab)
    return [TextRequest(owner, prompt, each, options, fields.echo is True, draws) for prompt in prompts for each in params]
