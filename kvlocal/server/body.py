"""Bodies of requests: read within limits of size and time, and turned into the fields that are expected."""

from __future__ import annotations

import asyncio
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from starlette.requests import ClientDisconnect, Request

from kvlocal.files.text import BYTE_ORDER_MARK
from kvlocal.server.errors import ApiError, invalid, of_validation

MAX_BYTES = 16 << 20
MAX_OBJECTS = 1_000_000  # lists and objects in a body; so many are read in about a second, and nothing else is done meanwhile
PIECE_SECONDS = 20.0  # until the next piece of a body has to be there
BODY_SECONDS = 120.0  # until all of it has to be

_Fields = TypeVar("_Fields", bound=BaseModel)


async def body_of(request: Request) -> bytes:
    """The bytes of a request's body.

    Raises:
        ApiError: there are too many, or they come too slowly.
        ClientDisconnect: the client is gone.
    """
    length = request.headers.get("content-length", "")
    if length.isdecimal() and (len(length) > 12 or int(length) > MAX_BYTES):
        raise _too_large()
    pieces, size = [], 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            more = True
            while more:
                message = await asyncio.wait_for(request.receive(), PIECE_SECONDS)
                if message["type"] == "http.disconnect":
                    raise ClientDisconnect
                more = message.get("more_body", False)
                pieces.append(message.get("body", b""))
                size += len(pieces[-1])
                if size > MAX_BYTES:
                    raise _too_large()
    except TimeoutError:
        raise ApiError(408, "the request's body did not come in time: send it at once") from None
    return b"".join(pieces)


def fields_of(kind: type[_Fields], data: bytes) -> _Fields:
    """The fields of a body in JSON. A nesting deeper than 200 is refused, as are numbers that JSON does not have.

    Raises:
        ApiError: it is no JSON, or a field is of a wrong kind.
    """
    return validated(kind, json_of(data))


def json_of(data: bytes) -> Any:
    """The value that a body in JSON says.

    Raises:
        ApiError: it is no JSON, or too much of it.
    """
    if data.count(b"[") + data.count(b"{") > MAX_OBJECTS:
        raise ApiError(413, f"the body has more than {MAX_OBJECTS:,} lists and objects: send fewer")
    try:
        return from_json(data.removeprefix(BYTE_ORDER_MARK), allow_inf_nan=False)
    except ValueError as error:
        raise invalid(f"the body cannot be read as JSON ({error}): send an object in UTF-8") from None


def validated(kind: type[_Fields], value: Any) -> _Fields:
    """The fields of a JSON object.

    Raises:
        ApiError: it is none, or a field is of a wrong kind.
    """
    if not isinstance(value, dict):
        raise invalid("the body is no JSON object: send one with the fields of the request")
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise of_validation(error) from None


def _too_large() -> ApiError:
    return ApiError(413, f"the body is larger than {MAX_BYTES >> 20} MiB: send less at once")
