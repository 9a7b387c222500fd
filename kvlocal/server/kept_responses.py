"""KeptResponses: which conversation the id of a response stands for."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence

from kvlocal.template.markup import Message

MAX_BYTES = 64 << 20


class KeptResponses:
    """The conversations behind the newest responses, in memory; a response is found by its owner alone.

    max_bytes: of all conversations together; the oldest responses are forgotten beyond that
    """

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes, self._n_bytes = max_bytes, 0
        self._kept: OrderedDict[tuple[str, str], bytes] = OrderedDict()

    def keep(self, owner: str, identity: str, messages: Sequence[Message]) -> None:
        """A response is the end of these messages."""
        data = json.dumps([dict(message) for message in messages], ensure_ascii=False).encode("utf-8", "replace")
        self._kept[owner, identity] = data
        self._n_bytes += len(data)
        while self._n_bytes > self._max_bytes:
            _, forgotten = self._kept.popitem(last=False)
            self._n_bytes -= len(forgotten)

    def messages(self, owner: str, identity: str) -> list[Message] | None:
        """The conversation up to a response and with it; None if it is not known, or another's."""
        data = self._kept.get((owner, identity))
        if data is None:
            return None
        messages: list[Message] = json.loads(data)
        return messages
