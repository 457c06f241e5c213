from __future__ import annotations

import threading
from datetime import datetime
from typing import Any

import pytest

from streamgen.errors import TemplateError
from streamgen.text import sandbox
from streamgen.text.chat import ChatTemplate

resource = pytest.importorskip("resource", reason="peak memory is asked from getrusage")

SECRET = "the-secret-words"
MESSAGES = [{"role": "user", "content": SECRET, "x": {"y": [1]}}]


def render(source: str, **args: Any) -> str:
    return ChatTemplate(source, special_tokens={}).render(MESSAGES, **args)


ESCAPES = [
    "{{ ''.__class__ }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''['__class__'] }}",
    "{{ (''|attr('__class__')) }}",
    "{{ messages.__class__.__base__ }}",
    "{{ messages[0].__getattribute__('keys') }}",
    "{{ raise_exception.__globals__ }}",
    "{{ raise_exception.__code__ }}",
    "{{ strftime_now.__self__ }}",
    "{{ strftime_now.__func__ }}",
    "{{ range.__init__ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ namespace(a=1).__dict__ }}",
    "{{ dict.mro() }}",
    "{{ dict.__base__ }}",
    "{{ cycler.__init__.__globals__.os }}",
    "{{ self.__init__ }}",
    "{{ self._TemplateReference__context }}",
    "{{ '{0.__class__}'.format(messages) }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}",
    "{{ ('{0.__class__}'|attr('format'))(messages) }}",
    "{{ '{x.__class__}'.format_map({'x': messages}) }}",
    "{{ ['{0.__class__}'.format]|map('call')|list }}",
    "{% set f = '{0.__class__}'.format %}{{ f(messages) }}",
    "{{ messages|map(attribute='__class__')|list|first|string }}",
    "{{ messages|map('attr', '__class__')|list|first|string }}",
    "{{ messages|groupby('__class__') }}",
    "{{ messages|selectattr('__class__')|list|first|attr('__class__') }}",
    "{{ ((messages|map)|attr('gi_frame')).f_globals }}",
    "{{ joiner.__init__.__globals__['__builtins__'] }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'a': 1}) }}",
    "{{ messages[0].clear() }}",
    "{{ messages[0].x.y.extend([2]) }}",
    "{{ messages[0].setdefault('a', 1) }}",
    "{% include 'secrets' %}",
    "{% import 'os' as os %}",
    "{% extends 'base' %}",
    "{{ lipsum.__globals__ }}",
    "{{ url_for.__globals__ }}",
    "{{ config }}{{ config.items() }}",
    "{% for x in ().__class__.__base__.__subclasses__() %}{{ x }}{% endfor %}",
    "{{ 'a'.encode('utf-8') }}",
    "{{ namespace(__class__=1).__class__ }}",
    "{{ environment.globals }}",
    "{{ context.parent }}{{ context.parent.x }}",
    "{{ pay }}{{ environment.pay.__self__ }}",
]


@pytest.mark.parametrize("source", ESCAPES)
def test_there_is_no_way_out(source: str) -> None:
    with pytest.raises(TemplateError) as caught:
        text = render(source)
        assert "class" not in text and "object at" not in text and "function" not in text, text
        raise TemplateError("it rendered, to nothing of use")
    assert SECRET not in str(caught.value)
    assert MESSAGES == [{"role": "user", "content": SECRET, "x": {"y": [1]}}]


NESTED = "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}"
SHARED = "{% set x = ['a' * 1000000] * 100000 %}"

BOMBS = [
    "{{ 'a' * 10**9 }}",
    "{{ 10**9 * 'a' }}",
    "{{ [0] * 10**9 }}",
    "{{ 10 ** (10 ** 10) }}",
    "{% set ns = namespace(x=2) %}{% for i in range(100) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "{% set ns = namespace(x='aaaa') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "{% set ns = namespace(x='aaaa') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    NESTED + "{{ ns.x }}",
    NESTED + "{{ ns.x | tojson }}",
    NESTED + "{{ ns.x | string | length }}",
    NESTED + "{{ ns.x ~ '' }}",
    NESTED + "{{ '%s' % ns.x }}",
    NESTED + "{{ '{}'.format(ns.x) }}",
    NESTED + "{{ ns.x | join }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%*d' % (1000000000, 1) }}",
    "{{ '%1000000000d' | format(1) }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{{ '{:{}}'.format(1, 1000000000) }}",
    "{{ '{x:{y}}'.format_map({'x': 1, 'y': 10**9}) }}",
    "{{ '%(a)s%(a)s' * 1000 % {'a': 'a' * 100000} }}",
    "{{ 'a'.ljust(10**9) }}",
    "{{ 'a'.rjust(10**9) }}",
    "{{ 'a'.center(10**9) }}",
    "{{ 'a'.zfill(10**9) }}",
    "{{ ('\\t' * 1000).expandtabs(10**8) }}",
    "{{ (1).to_bytes(10**9, 'big') }}",
    "{{ 'a' | center(10**9) }}",
    "{{ 'a' | indent(10**9, first=true) }}",
    "{{ ('\\n' * 100000) | indent(9999) }}",
    "{{ 2.5 | round(10**9) }}",
    "{{ [1] | batch(10**9, 'x') | list }}",
    "{{ [1] | slice(10**9) | list }}",
    "{{ {'a': 1} | tojson(indent=10**9) }}",
    "{{ [1] | tojson(indent='x' * 1000000) }}",
    "{{ strftime_now('%1000000000Y') }}",
    "{{ ('a' * 1000) | replace('a', 'b' * 1000) | replace('b', 'c' * 1000) }}",
    "{{ ('a' * 1000).replace('a', 'b' * 1000).replace('b', 'c' * 1000) }}",
    SHARED + "{{ x | join }}",
    SHARED + "{{ ''.join(x) }}",
    SHARED + "{{ x | map('upper') | list | length }}",
    "{% set x = [[1] * 100000] * 100000 %}{{ x | sum(start=[]) | length }}",
    "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}",
    "{% for x in [1] recursive %}{{ loop([1]) }}{{ loop([1]) }}{% endfor %}",
    "{% for i in range(10**9) %}{% endfor %}",
    "{% set b = 'a' * 1000000 %}{% set x %}{% for i in range(100000) %}{{ b }}{% endfor %}{% endset %}",
    "{% for i in range(100000) %}{{ 'a' * 1000 }}{% endfor %}",
    "{% filter upper %}{% for i in range(100000) %}" + "b" * 10000 + "{% endfor %}{% endfilter %}",
    "{% macro m() %}"
    + "b" * 100000
    + "{% endmacro %}{% set x %}{% for i in range(9999) %}{{ m() }}{% endfor %}{% endset %}",
    "{% set b = 'a' * 10000000 %}{% set l = [" + "b[1:]," * 5000 + "] %}",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "{% if 1 %}" * 3000,
    "{{1}}" * 51000,
    "a" * 300_000,
]


def peak_bytes() -> int:
    """The most memory that this process ever held."""
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * 1024


@pytest.mark.parametrize("source", BOMBS, ids=lambda s: s[:60])
def test_bombs_are_stopped_before_they_take_memory(source: str) -> None:
    before = peak_bytes()
    with pytest.raises(TemplateError) as caught:
        render(source)
    assert peak_bytes() - before < 300 * 2**20
    assert SECRET not in str(caught.value)


ENDLESS = [
    "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "{% for i in range(100000) if range(100000) | select('odd') | list | length > 99999 %}{% endfor %}",
    "{% for i in range(100000) %}{% for j in range(100000) if 'x' in 'y' %}{% endfor %}{% endfor %}",
]


@pytest.mark.parametrize("source", ENDLESS)
def test_endless_templates_are_stopped(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MAX_STEPS", 20_000)
    with pytest.raises(TemplateError, match="over a limit: more than"):
        render(source)


def test_the_clock_stops_a_template() -> None:
    budget = sandbox.Budget(seconds=0.0)
    with pytest.raises(sandbox.LimitExceeded, match="seconds"):
        budget.step()
        budget.step()


def test_a_budget_is_for_one_rendering(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MAX_STEPS", 2_000)
    template = ChatTemplate("{% for i in range(500) %}{% endfor %}", special_tokens={})
    failed: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(20):
                template.render(MESSAGES)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_a_long_honest_chat_is_well_within_the_limits() -> None:
    source = (
        "{% set ns = namespace(seen=0) %}{% for m in messages %}{% set ns.seen = ns.seen + 1 %}"
        "{{ '<' + m.role + '>' ~ m.content | trim }}{% if not loop.last %}{{ '\n' }}{% endif %}{% endfor %}"
        "{{ ns.seen }}"
    )
    messages = [{"role": "user", "content": "word " * 200}] * 2000
    text = ChatTemplate(source, special_tokens={}).render(messages)
    assert len(text) > 2_000_000 and text.endswith("2000")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ raise_exception('Only user messages') }}", "refused the messages: Only user messages"),
        ("{{ raise_exception('Not: ' + messages[0].content) }}", "refused the messages: Not: ..."),
        ("{{ raise_exception(messages[0].content) }}", "a reason that quotes the messages"),
        ("{{ messages[0].nope.nope }}", "UndefinedError, line 1"),
        ("{{ 'x' }}\n\n{{ messages[0].content + 1 }}", "TypeError, line 3"),
        ("{{ messages[messages[0].content].x }}", "UndefinedError"),
        ("{{ {}[messages[0].content].x }}", "UndefinedError"),
        ("{% if %}", "is not valid, line 1"),
        ("x\n{{ 'a' | nosuchfilter }}", "is not valid, line 2: No filter named 'nosuchfilter'"),
        ("{{ ''.__class__.x }}", "may not do"),
    ],
)
def test_errors_say_what_and_where_but_quote_no_message(source: str, words: str) -> None:
    with pytest.raises(TemplateError) as caught:
        render(source)
    assert words in str(caught.value)
    assert SECRET not in str(caught.value)
    assert caught.value.__suppress_context__


def test_only_plain_data_reaches_a_template() -> None:
    class Text(str):
        def leak(self) -> str:
            return "leaked"

    template = ChatTemplate("{{ messages[0].content }}{{ messages[0].content.leak is defined }}", special_tokens={})
    assert template.render([{"role": "user", "content": Text("x")}]) == "xFalse"


def test_the_clock_is_the_caller_s() -> None:
    template = ChatTemplate("{{ strftime_now('%d %b') }}", special_tokens={}, now=lambda: datetime(2024, 7, 26))
    assert template.render(MESSAGES) == "26 Jul"
