"""Every template of llama.cpp's source tree: what is fed turn by turn is the template's own text of the whole."""

import pytest
from templates import SYSTEM, compare, source_tree, templates

TREE = source_tree()
SOURCES = templates(TREE) if TREE else {}
# those that put the system text in front of the last user turn, wherever that is
MOVING = ("mistralai-Mistral-Nemo-Instruct-2407", "inline: Mistral-Large-Instruct-2407", "inline: Mistral-Nemo-Instruct-2407")

pytestmark = pytest.mark.skipif(TREE is None, reason="the source tree of llama.cpp is not under build/")


def test_there_are_as_many_as_there_should_be() -> None:
    assert len(SOURCES) > 95 and sum(name.startswith("inline: ") for name in SOURCES) > 25


@pytest.mark.parametrize("name", SOURCES)
def test_turn_by_turn_is_the_whole(name: str) -> None:
    for system in (None, SYSTEM):
        kind, why = compare(SOURCES[name], system)
        moves = system is not None and name.startswith(MOVING)
        assert kind == ("history" if moves else "equal"), why
