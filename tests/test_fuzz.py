"""A short share of tests/measure/fuzz.py: what comes in from outside is taken, or refused with one sentence."""

import copy
import random
import resource
import sys
import time
from collections.abc import Iterator

import pytest
from doors import CHATML, MESSAGES, NAMES, doors
from fuzzing import Door, attack, mutate

from kvlocal.template.chat_template import ChatTemplate
from kvlocal.template.compiled import TemplateError

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
    """Each of these ends the rendering, or gives nothing of Python; what a template adds to the messages is in its own copy."""
    before = copy.deepcopy(MESSAGES)
    try:
        template = ChatTemplate("{{ (" + expression + ") }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}")
    except TemplateError as error:
        assert "\n" not in str(error)
    else:
        text = template.render(MESSAGES, opening=False)
        assert text.removesuffix("[user]x") == "[user]Hello[assistant]Hi.[user]Who are you?"
        assert before == MESSAGES and template.render(MESSAGES, opening=False) == text


_LOOPS = "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}"
_NESTED = "{% set ns = namespace(x=[]) %}{% for i in range(300000) %}{% set ns.x = [ns.x] %}{% endfor %}"


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        pytest.param("{{ 9**(9**9) }}", "broken", id="power"),
        pytest.param("{{ 'a' * 5000000000 }}", "more than 67 MB", id="string"),
        pytest.param("{% for i in range(1000000000000) %}{% endfor %}", "more than 67 MB", id="range"),
        pytest.param("{% set a = 'a' * 100000 %}{{ a | replace('a', a) }}", "more than 67 MB", id="replace"),
        pytest.param("{{ 'a\nb' | indent(2000000000) }}", "more than 67 MB", id="indent"),
        pytest.param(_LOOPS, "more than 0.5 seconds", id="loops"),
        pytest.param("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "nested|more than", id="macro"),
        pytest.param("{% set ns = namespace() %}{% set ns.a = ns %}{{ ns | tojson }}", "nested|more than", id="circle"),
        pytest.param(_NESTED, "more than", id="deep value"),
        pytest.param("{{ " + "(" * 200000 + "1" + ")" * 200000 + " }}", "nested|more than", id="parentheses"),
        pytest.param("{{ " + "+".join(["'a'"] * 200000) + " }}", "nested|more than", id="chain"),
        pytest.param("{% if true %}" * 20000 + "{% endif %}" * 20000, "nested|more than", id="statements"),
    ],
)
def test_a_template_takes_neither_the_time_nor_the_memory_of_the_process(expression: str, reason: str) -> None:
    started = time.monotonic()
    with pytest.raises(TemplateError, match=reason) as caught:
        ChatTemplate(expression + CHATML, seconds=0.5)
    assert "\n" not in str(caught.value) and time.monotonic() - started < 10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    assert peak < 2**31
    # and the next one is not affected
    assert ChatTemplate(CHATML).render(MESSAGES, opening=False)
