"""ApiError: what a client is told when something is wrong, in OpenAI's error format."""

from __future__ import annotations

import math
import re
from typing import Any

from pydantic import ValidationError

from kvlocal.chat.config import SessionError
from kvlocal.chat.messages import MessageError
from kvlocal.errors import KvlocalError
from kvlocal.llama.embedding import EmbeddingError
from kvlocal.llama.grammar import GrammarError
from kvlocal.llama.sampling import SamplingError
from kvlocal.openai_forms.chat_fields import FieldError
from kvlocal.serving.request import EngineClosed
from kvlocal.template.compiled import TemplateError

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}

# What pydantic finds, and how a person says it. What is not here has pydantic's own words.
_WORDS = {
    "missing": "is missing",
    "string_type": "has to be a string",
    "bool_type": "has to be true or false",
    "int_type": "has to be a whole number",
    "int_from_float": "has to be a whole number",
    "float_type": "has to be a number",
    "finite_number": "has to be a finite number",
    "list_type": "has to be a list",
    "dict_type": "has to be an object",
    "model_type": "has to be an object",
    "model_attributes_type": "has to be an object",
}


# the name that pydantic has for one of the forms of a field: a type, or one of our classes
_BRANCH = re.compile(r"[^\w-]|^(str|int|list|dict|bool|float|[A-Z]\w+)$")


class ApiError(Exception):
    """An answer to a request that cannot be served.

    Args:
        status: of HTTP.
        message: one sentence, for a person.
        param: the field of the request that it is about, such as "messages" or "tools.0.type".
        code: a word for programs, such as "context_length_exceeded".
        retry_after: seconds after which the same request may succeed.
    """

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers: dict[str, str] = {}
        if retry_after is not None:
            self.headers["Retry-After"] = str(max(1, math.ceil(retry_after)))
        if status in (408, 413):
            # the rest of the body is not waited for
            self.headers["Connection"] = "close"
        if status == 401:
            self.headers["WWW-Authenticate"] = "Bearer"

    @property
    def type(self) -> str:
        """OpenAI's and Anthropic's word for this kind of error."""
        return _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")

    def body(self) -> dict[str, Any]:
        """The object that is sent."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


def invalid(message: str, param: str | None = None) -> ApiError:
    """A request that cannot be served as it is."""
    return ApiError(400, message, param=param)


def of_validation(error: ValidationError) -> ApiError:
    """What is wrong with the fields of a request: the first of them that pydantic found wrong."""
    found = error.errors(include_url=False, include_input=False)
    # of the forms that a field may have, the one that the value comes nearest to is wrong deepest inside
    first = max((each for each in found if each["loc"][:1] == found[0]["loc"][:1]), key=lambda each: len(each["loc"]))
    # their names are those of pydantic's branches, and no parts of the request
    path = [str(part) for part in first["loc"] if not (isinstance(part, str) and _BRANCH.search(part))]
    param = ".".join(path) or None
    wrong = _WORDS.get(first["type"]) or first["msg"][:1].lower() + first["msg"][1:].removeprefix("alue error, ")
    return invalid(f"{param or 'the body'} {wrong}" if first["type"] in _WORDS else f"{param or 'the body'}: {wrong}", param)


def of_failure(error: KvlocalError) -> ApiError:
    """A failure of the library: of the request where it is about messages or sampling, else of the server."""
    if isinstance(error, MessageError):
        return invalid(str(error), "messages")
    if isinstance(error, FieldError):
        return invalid(str(error), error.field)
    if isinstance(error, EngineClosed):
        return ApiError(503, str(error), code="closing", retry_after=5)
    if isinstance(error, GrammarError):
        return invalid(str(error), "grammar")
    if isinstance(error, EmbeddingError):
        return invalid(str(error), "input")
    if isinstance(error, SessionError):
        return invalid(str(error))
    if isinstance(error, TemplateError):
        return invalid(f"the conversation cannot be put into the model's words ({error})", "messages")
    if isinstance(error, SamplingError):
        name = str(error).split(" ", 1)[0]
        return invalid(str(error), name if name.replace("_", "").isalnum() else None)
    return ApiError(500, str(error))
