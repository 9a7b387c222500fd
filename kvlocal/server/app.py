"""The application: which function answers which path, and how failures are told."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvlocal.errors import KvlocalError
from kvlocal.server import anthropic_endpoint, conversation_endpoints, model_endpoints, page_endpoint
from kvlocal.server.chat_endpoint import chat_completions
from kvlocal.server.completion_endpoint import completions
from kvlocal.server.embedding_endpoint import embeddings
from kvlocal.server.errors import ApiError, of_failure
from kvlocal.server.guard import ANY, LOCAL_ORIGIN, Guard
from kvlocal.server.metrics import Metrics
from kvlocal.server.responses_endpoint import responses
from kvlocal.server.service import Service

_Endpoint = Callable[[Request], Awaitable[Response]]

# what OpenAI's and Anthropic's clients call, with and without /v1 before it, as their base addresses have it or not
_APIS: dict[str, tuple[str, _Endpoint]] = {
    "/models": ("GET", model_endpoints.models),
    "/models/{name:path}": ("GET", model_endpoints.model),
    "/chat/completions": ("POST", chat_completions),
    "/completions": ("POST", completions),
    "/embeddings": ("POST", embeddings),
    "/responses": ("POST", responses),
    "/messages": ("POST", anthropic_endpoint.messages),
}
_OTHERS: dict[str, tuple[str, _Endpoint]] = {
    "/health": ("GET", model_endpoints.health),
    "/props": ("GET", model_endpoints.props),
    "/tokenize": ("POST", model_endpoints.tokenize),
    "/detokenize": ("POST", model_endpoints.detokenize),
    "/metrics": ("GET", model_endpoints.metrics),
    "/conversations": ("GET", conversation_endpoints.conversations),
}

_log = logging.getLogger(__name__)


def make_app(service: Service) -> ASGIApp:
    """The application of a service."""
    paths = {f"{prefix}{path}": endpoint for prefix in ("/v1", "") for path, endpoint in _APIS.items()} | _OTHERS
    app = Starlette(
        routes=[
            *(Route(path, endpoint, methods=[method]) for path, (method, endpoint) in paths.items()),
            Route("/conversations/{id}", conversation_endpoints.messages, methods=["GET"]),
            Route("/conversations/{id}", conversation_endpoints.delete, methods=["DELETE"]),
            Route("/conversations/{id}/map", conversation_endpoints.cache_map, methods=["GET"]),
            Route("/conversations/{id}/stop", conversation_endpoints.stop, methods=["POST"]),
            Route("/", page_endpoint.index, methods=["GET"]),
            Route("/page/{name}", page_endpoint.file, methods=["GET"]),
        ],
        middleware=[
            Middleware(Counted, metrics=service.metrics),
            Middleware(Guard, origins=service.origins, hosts=service.hosts),
            Middleware(
                CORSMiddleware,
                allow_origins=service.origins,
                allow_origin_regex=None if ANY in service.origins else LOCAL_ORIGIN,
                allow_methods=["GET", "POST", "DELETE"],
                allow_headers=["*"],
                expose_headers=["Retry-After"],
            ),
        ],
        exception_handlers={ApiError: _api_error, KvlocalError: _failure, HTTPException: _http_error, ClientDisconnect: _gone, Exception: _fault},
    )
    app.state.service = service
    return app


class Counted:
    """Counts requests by their endpoint and the status of the answer."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        status = 0

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noting)
        finally:
            if scope["type"] == "http":
                route = scope.get("route")
                self._metrics.count_request(route.path if isinstance(route, Route) else "other", status)


async def _api_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body(), error.status, error.headers)


async def _failure(request: Request, error: Exception) -> Response:
    assert isinstance(error, KvlocalError)
    return await _api_error(request, of_failure(error))


async def _http_error(request: Request, error: Exception) -> Response:
    """Of a path that there is not, or a method that it does not have."""
    assert isinstance(error, HTTPException)
    words = {404: "there is nothing under this path", 405: "this path is not called with this method"}
    answer = ApiError(error.status_code, words.get(error.status_code, str(error.detail)))
    answer.headers.update(error.headers or {})
    return await _api_error(request, answer)


async def _gone(_request: Request, _error: Exception) -> Response:
    # nobody gets it
    return Response(status_code=499)


async def _fault(request: Request, error: Exception) -> Response:
    """A fault in the program: the log has all of it, and the client a sentence."""
    return await _api_error(request, ApiError(500, "the request failed by a fault in kvlocal: the server's log says more"))
