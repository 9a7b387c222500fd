"""Keys: who may use the server, and whose conversations are whose."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

from starlette.requests import Request

from kvlocal.server.errors import ApiError

NOBODY = ""  # the owner of all conversations where no key is asked for


class Keys:
    """The keys that are taken; with none every request is.

    Conversations of different keys never meet: each key is an owner of its own, named by a digest, so that no key is written to disk.
    """

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [_digest(key) for key in dict.fromkeys(keys)]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def owner(self, request: Request) -> str:
        """Whose request this is, by the key in its header `Authorization: Bearer KEY` or `x-api-key: KEY`.

        The time it takes does not depend on how much of a wrong key is right: digests are compared, each with all.

        Raises:
            ApiError: the key is missing or wrong.
        """
        if not self._digests:
            return NOBODY
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        given = key.strip() if scheme.lower() == "bearer" else request.headers.get("x-api-key", "")
        digest = _digest(given)
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        if not any(matches):
            wrong = "is not one of this server's" if given else "is missing"
            raise ApiError(401, f"the API key {wrong}: send it as Authorization: Bearer KEY", code="invalid_api_key")
        return digest.hex()[:32]


def _digest(key: str) -> bytes:
    # starlette decodes headers as Latin-1
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
