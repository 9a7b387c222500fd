"""/v1/embeddings."""

from __future__ import annotations

import asyncio
import base64
import json
import threading
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from starlette.requests import Request
from starlette.responses import Response

from kvlocal.errors import KvlocalError
from kvlocal.server.body import body_of, fields_of
from kvlocal.server.errors import ApiError, invalid, of_failure
from kvlocal.server.generation import unless_gone
from kvlocal.server.inputs import texts_of
from kvlocal.server.schemas import EmbeddingRequest
from kvlocal.server.service import service_of
from kvlocal.serving.embeddings import Embedded
from kvlocal.serving.request import EngineBusy


async def embeddings(request: Request) -> Response:
    """Embeds texts: vectors of length 1."""
    service = service_of(request)
    service.owner(request)
    fields = fields_of(EmbeddingRequest, await body_of(request))
    n_embd = service.model.n_embd_out
    if fields.dimensions is not None and fields.dimensions > n_embd:
        raise invalid(f"dimensions is {fields.dimensions}: the model's embeddings have {n_embd}, so give no more", "dimensions")
    texts = texts_of(fields.input, "input", service.model.n_vocab)
    gone = threading.Event()
    try:
        future = service.engine.embed(texts, gone)
        found = await unless_gone(request, asyncio.wrap_future(future))
    except EngineBusy as error:
        raise ApiError(503, str(error), code="busy", retry_after=error.retry_after) from None
    except KvlocalError as error:
        raise of_failure(error) from None
    finally:
        gone.set()
    body = await asyncio.to_thread(_body, found, service.name, fields.encoding_format == "base64", fields.dimensions)
    return Response(body, media_type="application/json")


def _body(found: Sequence[Embedded], model: str, in_base64: bool, dimensions: int | None) -> bytes:
    """The answer, written embedding by embedding, so that other threads run in between."""
    n_tokens = sum(each.n_tokens for each in found)
    parts = []
    for i, each in enumerate(found):
        vector = shortened(each.vector, dimensions)
        told = base64.b64encode(vector.astype("<f4").tobytes()).decode() if in_base64 else vector.tolist()
        parts.append(json.dumps({"object": "embedding", "index": i, "embedding": told}))
    end = {"model": model, "usage": {"prompt_tokens": n_tokens, "total_tokens": n_tokens}}
    return f'{{"object": "list", "data": [{", ".join(parts)}], {json.dumps(end)[1:]}'.encode()


def shortened(vector: npt.NDArray[np.float32], dimensions: int | None) -> npt.NDArray[np.float32]:
    """The first dimensions of a vector of length 1, float32 [dimensions], with the length 1 again; all if None."""
    if dimensions is None:
        return vector
    first = vector[:dimensions]
    length = np.linalg.norm(first)
    return first / length if length else first
