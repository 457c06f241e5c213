"""The jinja environment that chat templates run in: sandboxed, and bounded in time, memory and output.

A template comes with a checkpoint, that is, from a stranger. Jinja's sandbox keeps it from Python's internals, but lets
`{{ 'a' * 10**9 }}` or three nested loops take all memory and time. Here every step pays into a `Budget`:

- a loop's turn, a macro's call, a filter, a test and a function call count as steps and look at the clock;
- text that a template writes or builds (output, `~`, `+`, `*`, `%`, slices, results of filters and methods) counts by
  its length *before* it is made where a short expression could make a long one, else right after;
- a single value and the whole output have limits of their own.

Filters and methods whose result cannot be told beforehand, and which chat templates do not use, are left out.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from functools import wraps
from typing import TYPE_CHECKING, Any

import jinja2
from jinja2 import ext, nodes, pass_context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

if TYPE_CHECKING:
    from jinja2.runtime import Context

MAX_SOURCE_CHARS = 256 * 1024
MAX_AST_NODES = 50_000
MAX_STEPS = 2_000_000
MAX_WORK_CHARS = 128 * 2**20
MAX_VALUE_CHARS = 16 * 2**20
MAX_OUTPUT_CHARS = 16 * 2**20
MAX_SECONDS = 5.0
MAX_WIDTH = 999  # of a padded or rounded value
MAX_INDENT = 16  # of JSON
MAX_INT_BITS = 4096

_ITEM_CHARS = 64  # what an item of a container counts for, beside its own text: about its memory
_REMOVED_FILTERS = (
    "batch center filesizeformat pprint random slice striptags urlize wordwrap xmlattr".split()
)  # fmt: skip
_REMOVED_GLOBALS = ("lipsum",)
_REMOVED_METHODS = frozenset({"encode", "expandtabs", "maketrans", "translate", "to_bytes", "from_bytes"})
_WIDE_PERCENT = re.compile(r"%[^A-Za-z%]*(?:[0-9]{4}|\*)")
_WIDE_BRACES = re.compile(r"\{[^{}]*(?:[0-9]{4}|\{)")
_PADDED_METHODS = ("center", "ljust", "rjust", "zfill")


class LimitExceeded(Exception):
    """A template went over one of the limits; the text names it."""


class Budget:
    """What one rendering may still use."""

    def __init__(self, *, seconds: float = MAX_SECONDS) -> None:
        self._steps = MAX_STEPS
        self._chars = MAX_WORK_CHARS
        self._deadline = time.monotonic() + seconds
        self._seconds = seconds

    def step(self, chars: int = 0) -> None:
        """Pay for one step that makes `chars` characters."""
        self._steps -= 1
        self._chars -= chars
        if self._steps < 0:
            raise LimitExceeded(f"more than {MAX_STEPS} steps")
        if self._chars < 0:
            raise LimitExceeded(f"more than {MAX_WORK_CHARS} characters of text built")
        if time.monotonic() > self._deadline:
            raise LimitExceeded(f"more than {self._seconds:g} seconds")


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """Jinja as chat templates expect it (trimmed blocks, loop controls, `tojson`, `raise_exception`), with a budget."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, *, now: Callable[[], datetime] = datetime.now) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # constant folding would run filters at compile time, outside any budget
            extensions=[ext.loopcontrols, _GenerationTag],
            finalize=_count_output,
        )
        self._local = threading.local()
        self._now = now
        self._set_up_names()

    def _set_up_names(self) -> None:
        for name in _REMOVED_FILTERS:
            del self.filters[name]
        for name in _REMOVED_GLOBALS:
            del self.globals[name]
        self.filters.update(tojson=_to_json)
        self.filters = {name: self._guard_filter(name, run) for name, run in self.filters.items()}
        tests: dict[str, Any] = self.tests  # typed as `function`, which nothing can be passed on as
        self.tests = {name: self._guard_test(run) for name, run in tests.items()}
        self.globals["dict"] = _make_dict
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = self._strftime_now

    def compile_template(self, source: str) -> tuple[jinja2.Template, frozenset[str]]:
        """Compile a template with the budget's hooks in it; returns it and the text literals in it."""
        if len(source) > MAX_SOURCE_CHARS:
            raise LimitExceeded(f"more than {MAX_SOURCE_CHARS} characters of source")
        tree = self.parse(source)
        num_nodes = sum(1 for _ in tree.find_all(nodes.Node))
        if num_nodes > MAX_AST_NODES:
            raise LimitExceeded(f"more than {MAX_AST_NODES} syntax nodes")
        literals = frozenset(n.value for n in tree.find_all(nodes.Const) if isinstance(n.value, str))
        bounded = _Hooks().visit(tree)
        bounded.set_environment(self)
        return jinja2.Template.from_code(self, self.compile(bounded), self.make_globals(None)), literals

    @contextmanager
    def spending(self, budget: Budget) -> Iterator[None]:
        """Renderings of this thread pay into `budget`."""
        before = getattr(self._local, "budget", None)
        self._local.budget = budget
        try:
            yield
        finally:
            self._local.budget = before

    # ---- called from compiled templates ---------------------------------------------------------------------------

    def pay(self, chars: int = 0) -> bool:
        """Count a step that makes `chars` characters. Returns True, so that it can stand in conditions."""
        if chars > MAX_VALUE_CHARS:
            raise LimitExceeded(f"a value of more than {MAX_VALUE_CHARS} characters")
        budget: Budget | None = getattr(self._local, "budget", None)
        if budget is not None:
            budget.step(chars)
        return True

    def bounded_concat(self, *values: Any) -> str:
        """`a ~ b`."""
        self.pay(weigh_deep(values))
        return "".join(map(str, values))

    def bounded_slice(self, value: Any, start: Any, stop: Any, step: Any) -> Any:
        """`a[start:stop:step]`."""
        self.pay(_weigh(value))
        return value[start:stop:step]

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """`str.format`, counted."""
        run = super().wrap_str_format(value)
        if run is None:
            return None

        def counted(*args: Any, **kwargs: Any) -> str:
            self.pay(_weigh_format(value.__self__, (*args, *kwargs.values()), "{"))
            return run(*args, **kwargs)

        return counted

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a function or method from a template."""
        if __obj == __self.pay:  # our own hook in a loop or macro: not to be counted twice
            return __self.pay(*args)
        __self.pay(_weigh_call(__obj, args, kwargs))
        result = super().call(__context, __obj, *args, **kwargs)
        __self.pay(_weigh(result))
        return result

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Run an operator whose result can be far longer than its operands."""
        self.pay(_weigh_binop(operator, left, right))
        return super().call_binop(context, operator, left, right)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Besides Python's internals, methods without a bound are out of reach."""
        return attr not in _REMOVED_METHODS and super().is_safe_attribute(obj, attr, value)

    def _guard_filter(self, name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        weigh_first = _FILTER_WEIGHTS.get(name)
        first = 1 if hasattr(run, "jinja_pass_arg") else 0  # some filters take jinja's context before the value

        @wraps(run)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            self.pay(weigh_first(*args[first:], **kwargs) if weigh_first else 0)
            result = run(*args, **kwargs)
            self.pay(_weigh(result))
            return result

        return guarded

    def _guard_test(self, run: Callable[..., Any]) -> Callable[..., bool]:
        @wraps(run)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            self.pay()
            return run(*args, **kwargs)

        return guarded

    def _strftime_now(self, format: str) -> str:
        if _WIDE_PERCENT.search(format) or len(format) > MAX_WIDTH:
            raise LimitExceeded("a padded time format")
        return self._now().strftime(format)


class _GenerationTag(ext.Extension):
    """`{% generation %}` marks what the assistant said, for training; here its body is simply written."""

    tags = {"generation"}  # noqa: RUF012 - as jinja declares it

    def parse(self, parser: jinja2.parser.Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Hooks(NodeTransformer):
    """Puts the budget's calls into a template: loops, macros, `~` and slices do not pass the environment unasked."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        """Each turn is a step, and so is each test of `for ... if`."""
        self._count_body(node)
        if node.test is not None:
            node.test = nodes.And(_call("pay", [], node.lineno), node.test, lineno=node.lineno)
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Macro:
        """Each call is a step."""
        self._count_body(node)
        return node

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.CallBlock:
        """The block is a macro too."""
        self._count_body(node)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        """`~` is a call that counts first."""
        self.generic_visit(node)
        return _call("bounded_concat", node.nodes, node.lineno)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        """A slice copies, so it is a call that counts first."""
        self.generic_visit(node)
        if not isinstance(node.arg, nodes.Slice):
            return node
        none = nodes.Const(None, lineno=node.lineno)
        arguments = [node.node, *(part or none for part in (node.arg.start, node.arg.stop, node.arg.step))]
        return _call("bounded_slice", arguments, node.lineno)

    def _count_body(self, node: nodes.For | nodes.Macro | nodes.CallBlock) -> None:
        """Count a step, and the plain text of the body, at the head of the body."""
        chars = sum(len(data.data) for part in node.body for data in _find_text(part))
        self.generic_visit(node)
        pay = _call("pay", [nodes.Const(chars, lineno=node.lineno)], node.lineno)
        node.body.insert(0, nodes.ExprStmt(pay, lineno=node.lineno))


def _find_text(node: nodes.Node) -> Iterator[nodes.TemplateData]:
    """Plain text that one pass over `node` may write; inner loops count their own."""
    if isinstance(node, nodes.TemplateData):
        yield node
    elif not isinstance(node, nodes.For | nodes.Macro | nodes.CallBlock):
        for child in node.iter_child_nodes():
            yield from _find_text(child)


def _call(name: str, arguments: Iterable[nodes.Expr], line: int) -> nodes.Call:
    function = nodes.EnvironmentAttribute(name, lineno=line)
    return nodes.Call(function, list(arguments), [], None, None, lineno=line)


# ---- how long things are --------------------------------------------------------------------------------------------


def weigh_deep(value: Any) -> int:
    """Characters that writing out `value` makes at least; stops when it is over the limit for one value.

    A container that holds one item many times counts it many times: so does text.
    """
    total = 0
    waiting = [value]
    while waiting:
        item = waiting.pop()
        total += len(item) if isinstance(item, str) else _ITEM_CHARS
        if total > MAX_VALUE_CHARS:
            break
        if isinstance(item, Mapping):
            waiting.extend(item.keys())
            waiting.extend(item.values())
        elif isinstance(item, list | tuple | set | frozenset):
            waiting.extend(item)
    return total


def _weigh(value: Any) -> int:
    """What a finished value takes, its items not looked into."""
    if isinstance(value, str):
        return len(value)
    return len(value) * _ITEM_CHARS if isinstance(value, list | tuple | dict | set) else 0


def _weigh_call(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """What a call is going to make, where a string method can make more than it is given."""
    owner, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
    if not isinstance(owner, str):
        return 0
    if name in _PADDED_METHODS:
        _check_widths((*args, *kwargs.values()))
    if name == "replace" and len(args) >= 2:
        return _weigh_replace(owner, args[0], args[1])
    if name == "join" and args:
        return _weigh_join(args[0], owner)
    return len(owner)


def _weigh_binop(operator: str, left: Any, right: Any) -> int:
    if operator == "%":
        return _weigh_format(left, right, "%") if isinstance(left, str) else 0
    if operator == "+":
        return _weigh(left) + _weigh(right)
    if isinstance(left, int) and isinstance(right, int):
        _check_int_result(operator, left, right)
        return 0
    if operator == "*":
        count, value = (left, right) if isinstance(left, int) else (right, left)
        return _weigh(value) * max(count, 0) if isinstance(count, int) else 0
    return 0


def _check_int_result(operator: str, left: int, right: int) -> None:
    bits = left.bit_length() + right.bit_length() if operator == "*" else left.bit_length() * max(right, 0)
    if bits > MAX_INT_BITS:
        raise LimitExceeded(f"a number of more than {MAX_INT_BITS} bits")


def _check_widths(values: Iterable[Any]) -> None:
    for value in values:
        if isinstance(value, int) and abs(value) > MAX_WIDTH:
            raise LimitExceeded(f"a width over {MAX_WIDTH}")


def _weigh_format(text: Any, values: Any, mark: str) -> int:
    if not isinstance(text, str):
        return 0
    if (_WIDE_PERCENT if mark == "%" else _WIDE_BRACES).search(text):
        raise LimitExceeded(f"a width over {MAX_WIDTH}")
    return len(text) + text.count(mark) * (MAX_WIDTH + weigh_deep(values))


def _weigh_replace(text: Any, old: Any, new: Any, *_: Any, **__: Any) -> int:
    return len(str(text)) + str(text).count(str(old)) * len(str(new))


def _weigh_join(values: Any, separator: Any = "", *_: Any, **__: Any) -> int:
    items = values if isinstance(values, list | tuple | dict | set) else ()
    return weigh_deep(items) + len(items) * len(str(separator))


def _weigh_indent(text: Any, width: Any = 4, *_: Any, **__: Any) -> int:
    return len(str(text)) + (str(text).count("\n") + 1) * (len(width) if isinstance(width, str) else int(width))


def _weigh_round(_: Any, precision: Any = 0, *__: Any, **___: Any) -> int:
    _check_widths((precision,))
    return 0


def _weigh_sum(values: Any, *_: Any, **__: Any) -> int:
    return sum(_weigh(value) for value in values) if isinstance(values, list | tuple) else 0


_FILTER_WEIGHTS: dict[str, Callable[..., int]] = {
    "format": lambda text, *args, **kwargs: _weigh_format(text, (*args, *kwargs.values()), "%"),
    "indent": _weigh_indent,
    "join": _weigh_join,
    "replace": _weigh_replace,
    "round": _weigh_round,
    "string": lambda value: weigh_deep(value),
    "sum": _weigh_sum,
    "tojson": lambda value, *_, **__: weigh_deep(value),
}


# ---- names that templates use ---------------------------------------------------------------------------------------


@pass_context
def _count_output(context: Context, value: Any) -> Any:
    """Count everything that a template writes. With the context as argument, jinja does not run it at compile time."""
    environment = context.environment
    assert isinstance(environment, ChatEnvironment), "templates are compiled by ChatEnvironment alone"
    environment.pay(len(value) if isinstance(value, str) else weigh_deep(value))
    return value


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as models were trained on it: jinja's own filter would escape `<`, `>` and `&` for HTML."""
    widths = [len(part) if isinstance(part, str) else part for part in (indent or 0, *(separators or ()))]
    if any(width > MAX_INDENT for width in widths):
        raise LimitExceeded("a wide JSON layout")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _make_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _raise_exception(message: Any = "") -> None:
    raise TemplateRefusal(str(message))


class TemplateRefusal(jinja2.TemplateError):
    """The template itself refused the messages (`raise_exception`)."""
