"""A short share of tests/measure/fuzz.py: what comes in from outside is taken, or refused with one sentence."""

import random
import sys
import time
from collections.abc import Iterator

import pytest
from doors import CHATML, MESSAGES, NAMES, doors
from fuzzing import Door, attack, mutate

import kvlocal.template.chat_template
from kvlocal.template.chat_template import ChatTemplate, TemplateError

SHARE = {"model": 60, "snapshot": 40, "window snapshot": 40}


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Door]]:
    with doors(tmp_path_factory.mktemp("doors")) as found:
        yield {door.name: door for door in found}


def test_every_door_is_tried(opened: dict[str, Door]) -> None:
    assert tuple(opened) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_mutated_inputs_are_taken_or_refused(opened: dict[str, Door], name: str) -> None:
    n = SHARE.get(name, 200)
    found = attack(opened[name], n)
    assert found.wrong == [] and found.accepted + found.refused == n and found.refused > n // 20


def test_mutations_are_those_of_the_seed() -> None:
    data = bytes(range(256)) * 4
    mutants = [mutate(data, random.Random(i), [b"word"]) for i in range(50)]
    assert mutants == [mutate(data, random.Random(i), [b"word"]) for i in range(50)]
    assert len(set(mutants)) > 40


@pytest.mark.parametrize(
    "expression",
    [
        "''.__class__.__mro__[1].__subclasses__()",
        "messages.__class__.__base__",
        "cycler.__init__.__globals__.os.system('true')",
        "lipsum.__globals__['os'].popen('id').read()",
        "raise_exception.__globals__['__builtins__']",
        "raise_exception.__closure__",
        "strftime_now.__globals__",
        "messages|attr('__class__')",
        "messages|map(attribute='__class__')|first",
        "self._TemplateReference__context",
        "'%s'.__mod__.__self__.__class__",
        "'{0.__class__.__mro__}'.format(messages)",
        "'{0.__class__}'.format_map({'0': messages})",
        "namespace.__init__.__globals__",
        "joiner.__init__.__globals__",
        "range.__self__",
        "range(99999999)|list",
        "messages.append({'role': 'user', 'content': 'x'})",
        "messages[0].update(role='system')",
    ],
)
def test_a_template_does_not_reach_python(expression: str) -> None:
    """Each of these ends the rendering, or gives nothing."""
    try:
        template = ChatTemplate("{{ (" + expression + ") }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}")
    except TemplateError as error:
        assert "\n" not in str(error)
    else:
        assert template.render(MESSAGES, opening=False) == "[user]Hello[assistant]Hi.[user]Who are you?"


def test_a_template_does_not_run_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kvlocal.template.chat_template, "_LIMIT_SECONDS", 0.5)
    loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    started, before = time.monotonic(), sys.gettrace()
    with pytest.raises(TemplateError, match="it takes more than 0.5 seconds"):
        ChatTemplate(loops + CHATML)
    assert time.monotonic() - started < 10 and sys.gettrace() is before
