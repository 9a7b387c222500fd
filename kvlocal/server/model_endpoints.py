"""What is told of the model and the server: /v1/models, /props, /tokenize, /detokenize, /health, /metrics."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

import kvlocal
from kvlocal.server.body import body_of, fields_of
from kvlocal.server.errors import ApiError, invalid
from kvlocal.server.metrics import CONTENT_TYPE
from kvlocal.server.schemas import DetokenizeRequest, TokenizeRequest
from kvlocal.server.service import Service, service_of


async def health(_request: Request) -> Response:
    """That the server runs; needs no key."""
    return JSONResponse({"status": "ok"})


async def models(request: Request) -> Response:
    """The one model there is, in a list."""
    service = service_of(request)
    service.owner(request)
    return JSONResponse({"object": "list", "data": [_described(service)]})


async def model(request: Request) -> Response:
    """The same by its name."""
    service = service_of(request)
    service.owner(request)
    if request.path_params["name"] != service.name:
        raise ApiError(404, f"there is no model of that name: this server has {service.name}", param="model", code="model_not_found")
    return JSONResponse(_described(service))


async def props(request: Request) -> Response:
    """What llama.cpp's server tells under this path, and how conversations are kept."""
    service = service_of(request)
    service.owner(request)
    model, config, params = service.model, service.engine.config, service.sampling
    settings = {
        "temperature": params.temperature,
        "top_k": params.top_k,
        "top_p": params.top_p,
        "min_p": params.min_p,
        "repeat_penalty": params.repeat_penalty,
        "presence_penalty": params.presence_penalty,
        "frequency_penalty": params.frequency_penalty,
        "dry_multiplier": params.dry_multiplier,
        "dry_base": params.dry_base,
        "dry_allowed_length": params.dry_allowed_length,
        "dry_penalty_last_n": params.dry_penalty_last_n,
        "dry_sequence_breakers": list(params.dry_sequence_breakers),
        "xtc_probability": params.xtc_probability,
        "xtc_threshold": params.xtc_threshold,
        "seed": params.seed,
        "max_tokens": config.max_tokens,
    }
    stats = await asyncio.to_thread(service.engine.stats)
    return JSONResponse({
        "default_generation_settings": {"n_ctx": model.n_ctx_train, "params": settings},
        "total_slots": stats.parallel,
        "model_alias": service.name,
        "model_path": model.path.name,
        "lora_adapters": [{"path": adapter.path.name, "scale": adapter.scale} for adapter in model.adapters],
        "build_info": f"kvlocal {kvlocal.__version__}",
        "policy": config.policy,
        "kv_budget": service.engine.budget,
        "kv_bytes": stats.kv_bytes,
        "archive": config.archive,
    })


async def tokenize(request: Request) -> Response:
    """The tokens of a text."""
    service = service_of(request)
    service.owner(request)
    fields = fields_of(TokenizeRequest, await body_of(request))
    special = {"parse_special": fields.parse_special is not False, "add_special": fields.add_special is True}
    tokens = (await asyncio.to_thread(service.model.tokenize, fields.content, **special)).tolist()
    if fields.with_pieces:
        return JSONResponse({"tokens": [{"id": token, "piece": _piece(service, token)} for token in tokens]})
    return JSONResponse({"tokens": tokens})


async def detokenize(request: Request) -> Response:
    """The text of tokens."""
    service = service_of(request)
    service.owner(request)
    fields = fields_of(DetokenizeRequest, await body_of(request))
    for i, token in enumerate(fields.tokens):
        if not 0 <= token < service.model.n_vocab:
            raise invalid(f"tokens.{i} is {token}: tokens go from 0 to {service.model.n_vocab - 1}", f"tokens.{i}")
    return JSONResponse({"content": service.model.detokenize(fields.tokens, special=True)})


async def metrics(request: Request) -> Response:
    """Counters for Prometheus."""
    service = service_of(request)
    service.owner(request)
    return Response(await asyncio.to_thread(service.metrics.text), media_type=CONTENT_TYPE)


def _described(service: Service) -> dict[str, Any]:
    return {"id": service.name, "object": "model", "created": service.started, "owned_by": "kvlocal"}


def _piece(service: Service, token: int) -> str | list[int]:
    """A token's text, or its bytes where they are no whole characters."""
    data = service.model.token_bytes(token, special=True)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return list(data)
