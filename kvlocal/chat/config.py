"""SessionConfig: how a conversation is kept and answered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvlocal.cache.config import CacheConfig, CacheError
from kvlocal.llama.sampling import SamplingParams


class SessionError(CacheError):
    """The session cannot do this, now or with this configuration."""


@dataclass(frozen=True)
class SessionConfig(CacheConfig):
    """How a conversation is kept: what CacheConfig says, in which the system prompt always stays, and

    idle: read finished turns a second time, for the policies that need it
    system: system prompt; None for the template's own default
    sampling: how the next token is drawn
    max_tokens: the longest answer, in tokens
    tools: the tools that the model is told of, as OpenAI's chat completions have them; they stand before the first turn
    thinking: let a model think that can; False has its template ask for answers without a thought, if it knows how to

    Raises:
        CacheError: a value is out of range.
    """

    idle: bool = True
    system: str | None = None
    sampling: SamplingParams = SamplingParams()
    max_tokens: int = 1024
    tools: Sequence[Mapping[str, Any]] = ()
    thinking: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "tools", tuple(self.tools))
        check_tools(self.tools)
        if self.max_tokens < 1:
            raise SessionError(f"max_tokens is {self.max_tokens}: it must be at least 1")


def check_tools(tools: Sequence[Any]) -> None:
    """Whether these are tools, each of another name.

    Raises:
        SessionError: they are not.
    """
    names = set()
    for i, tool in enumerate(tools, 1):
        function = tool.get("function") if isinstance(tool, Mapping) and tool.get("type") == "function" else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(name, str) or not name:
            raise SessionError(f'tool {i} is no function: write {{"type": "function", "function": {{"name": ..., "parameters": ...}}}}')
        if not isinstance(function.get("description", ""), str) or not isinstance(function.get("parameters", {}), Mapping):
            raise SessionError(f"the tool {name} has a description that is no text, or parameters that are no JSON schema: correct them")
        if name in names:
            raise SessionError(f"there are two tools of the name {name}: rename one of them")
        names.add(name)
