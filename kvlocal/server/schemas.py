"""The fields of requests. Those that are not named here are ignored, and null is as good as absent."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from kvlocal.llama.sampling import MAX_DRY_TOKENS

Penalty = Annotated[float, Field(ge=-2, le=2)]
Tokens = Annotated[int, Field(ge=-1)]

MAX_CHOICES = 16
MAX_STOPS = 16
MAX_TOP_LOGPROBS = 20
MAX_INPUTS = 2048  # texts of one request, as OpenAI has it

# a text, several, the tokens of one, or those of several
Texts = str | list[str] | list[int] | list[list[int]]


class Fields(BaseModel):
    """A JSON object whose values have to be of the kinds that are named: a number in quotes is no number."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)


class StreamOptions(Fields):
    include_usage: bool | None = None


class Sampled(Fields):
    """What all requests for generated text have in common.

    stop: texts that end the answer and are not part of it
    top_k: 0 and -1 are off
    seed: any number; -1 is a random one
    dry_penalty_last_n: -1 is as many as possible
    """

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repeat_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    dry_multiplier: Annotated[float, Field(ge=0, le=100)] | None = None
    dry_base: Annotated[float, Field(ge=1, le=100)] | None = None
    dry_allowed_length: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    dry_penalty_last_n: Annotated[int, Field(ge=-1, le=MAX_DRY_TOKENS)] | None = None
    dry_sequence_breakers: Annotated[list[str], Field(max_length=MAX_STOPS)] | None = None
    xtc_probability: Annotated[float, Field(ge=0, le=1)] | None = None
    xtc_threshold: Annotated[float, Field(ge=0, le=1)] | None = None
    max_tokens: Tokens | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with what it took."""
        return self.stream_options is not None and self.stream_options.include_usage is True


class JsonSchemaFormat(Fields):
    name: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")


class ResponseFormat(Fields):
    """schema: llama.cpp's servers take it beside json_object too."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")


class Function(Fields):
    name: Annotated[str, Field(min_length=1)]
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(Fields):
    type: Literal["function"]
    function: Function


class NamedFunction(Fields):
    name: str


class NamedTool(Fields):
    type: Literal["function"]
    function: NamedFunction


class ChatRequest(Sampled):
    """The body of /v1/chat/completions. Messages have a parser of their own (kvlocal.chat.messages).

    conversation: as AnswerRequest has it; not OpenAI's
    """

    messages: list[Any]
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    grammar: str | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    conversation: str | None = None


class CompletionRequest(Sampled):
    """The body of /v1/completions.

    logprobs: for how many of the likeliest tokens besides the one that was drawn
    suffix: what comes behind what is to be said; models of texts do not know it
    best_of: of how many answers the n likeliest are wanted
    """

    prompt: Texts
    echo: bool | None = None
    suffix: str | None = None
    best_of: Annotated[int, Field(ge=1)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    grammar: str | None = None


class EmbeddingRequest(Fields):
    """The body of /v1/embeddings.

    dimensions: so many of the first are told, as a vector of length 1
    """

    input: Texts
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1)] | None = None


class TokenizeRequest(Fields):
    """The body of /tokenize, as llama.cpp's server has it."""

    content: str
    add_special: bool | None = None
    parse_special: bool | None = None
    with_pieces: bool | None = None


class DetokenizeRequest(Fields):
    """The body of /detokenize."""

    tokens: list[int]
