"""Service: what all endpoints share."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from starlette.requests import Request

from kvlocal.llama.model import Model
from kvlocal.llama.sampling import SamplingParams
from kvlocal.server.keys import Keys
from kvlocal.server.metrics import Metrics
from kvlocal.serving.engine import Engine


@dataclass(frozen=True)
class Service:
    """A model that is served.

    name: by which clients know it
    engine: answers; whoever made it closes it
    keys: who may use it
    keep_trimmed: as AnswerRequest has it
    origins: web pages that may use it, "*" for all, beside those of this machine
    hosts: names by which it may be called; None for all
    """

    name: str
    model: Model
    engine: Engine
    keys: Keys
    metrics: Metrics
    keep_trimmed: bool = False
    origins: tuple[str, ...] = ()
    hosts: tuple[str, ...] | None = None
    started: int = field(default_factory=lambda: int(time.time()))

    @property
    def sampling(self) -> SamplingParams:
        """How tokens are drawn where a request does not say it."""
        return self.engine.config.sampling

    def owner(self, request: Request) -> str:
        """Whose request this is.

        Raises:
            ApiError: nobody's who may use the server.
        """
        return self.keys.owner(request)


def service_of(request: Request) -> Service:
    """The service that a request came to."""
    service: Service = request.app.state.service
    return service
