"""A source becomes a grammar: which back end takes it, and what it is held to before it is built."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, assert_never

import msgspec

from streamgen.errors import SchemaError, SchemaTooComplex
from streamgen.grammar.automaton import AutomatonDump, AutomatonGrammar
from streamgen.grammar.bounds import DEFAULT_LIMITS, check_cfg_text, check_lark_text
from streamgen.grammar.gbnf import read_gbnf
from streamgen.grammar.llguidance import (
    LlguidanceDump,
    LlguidanceGrammar,
    lark_grammar,
    lark_literal,
    regex_grammar,
)
from streamgen.grammar.pattern import read_pattern
from streamgen.grammar.positions import escape
from streamgen.grammar.schema import plan_schema
from streamgen.grammar.source import BACKENDS, CfgSource, GrammarSource, RegexSource, SchemaSource

if TYPE_CHECKING:
    from streamgen.grammar.bounds import CompileLimits
    from streamgen.grammar.grammar import Grammar
    from streamgen.grammar.schema import SchemaPlan

# A table over these is large, and nothing else is wrong with it: a back end without tables has no trouble.
_SIZE_BOUNDS = {"max_states", "max_positions", "max_regex_chars"}

_PART_OF_NUMBERS = tuple("0123456789.eE+-")  # where llguidance's lexer would go on instead of ending one


def compile_source(source: GrammarSource, limits: CompileLimits = DEFAULT_LIMITS) -> Grammar:
    """The grammar of a source. Takes milliseconds, and no more than the limits allow.

    Raises:
        SchemaError: it is no grammar, or nothing enforces it. SchemaTooComplex: it passes a limit.
    """
    try:
        return _compile(source, limits)
    except RecursionError as error:
        raise SchemaTooComplex(
            "output: expected a grammar that nests less deeply; make it flatter", bound="nesting"
        ) from error
    except UnicodeError as error:
        raise SchemaError("output: expected text that UTF-8 can write, got a lone surrogate") from error
    except MemoryError as error:
        raise SchemaTooComplex("output: there is not enough memory to compile it", bound="memory") from error


def load_grammar(dump: bytes) -> Grammar:
    """The grammar that `Grammar.dump` described."""
    data = msgspec.msgpack.decode(dump, type=AutomatonDump | LlguidanceDump)
    if isinstance(data, AutomatonDump):
        return AutomatonGrammar.load(data)
    return LlguidanceGrammar.load(data)


def _compile(source: GrammarSource, limits: CompileLimits) -> Grammar:
    start = time.perf_counter()
    match source:
        case RegexSource():
            grammar = _regex(source, limits)
        case SchemaSource():
            grammar = _schema(source, limits)
        case CfgSource():
            grammar = _cfg(source, limits)
        case _:
            assert_never(source)
    grammar.stats = msgspec.structs.replace(grammar.stats, seconds=time.perf_counter() - start)
    return grammar


def _regex(source: RegexSource, limits: CompileLimits) -> AutomatonGrammar | LlguidanceGrammar:
    _check_backend(source.backend)
    if source.backend == "llguidance":
        return _regex_without_table(source.pattern, limits)
    try:
        return AutomatonGrammar.compile(source.pattern, limits)
    except SchemaTooComplex as error:
        if source.backend == "auto" and error.bound == "max_states":
            return _regex_without_table(source.pattern, limits)
        raise


def _regex_without_table(pattern: str, limits: CompileLimits) -> LlguidanceGrammar:
    rust = read_pattern(pattern, limits).rust
    if rust is None:
        raise SchemaError("regex: expected one that some text matches, got one that none does", keyword="pattern")
    return LlguidanceGrammar.compile(regex_grammar(rust))


def _schema(source: SchemaSource, limits: CompileLimits) -> AutomatonGrammar | LlguidanceGrammar:
    _check_backend(source.backend)
    plan = _plan(source, source.backend, limits)
    if plan.regex is not None:
        try:
            pattern = f"{escape(source.before)}(?:{plan.regex}){escape(source.after)}"
            return AutomatonGrammar.compile(pattern, limits, warnings=plan.warnings)
        except SchemaTooComplex as error:
            if source.backend != "auto" or error.bound not in _SIZE_BOUNDS:
                raise
            plan = _plan_without_table(source, limits, error)
    assert plan.lark is not None, "a plan has a regex or rules"
    if source.after.startswith(_PART_OF_NUMBERS):
        raise SchemaError(
            "output: expected text after the JSON that cannot be part of a number, got a digit or the like"
        )
    before, after = (lark_literal(text) if text else "" for text in (source.before, source.after))
    start = f"{before} json {after}"
    return LlguidanceGrammar.compile(lark_grammar(f"start: {start}\n{plan.lark}"), warnings=plan.warnings)


def _plan(source: SchemaSource, backend: str, limits: CompileLimits) -> SchemaPlan:
    return plan_schema(
        source.text,
        is_closed=source.is_closed,
        on_unsupported=source.on_unsupported,
        backend=backend,
        limits=limits.schema,
    )


def _plan_without_table(source: SchemaSource, limits: CompileLimits, too_large: SchemaTooComplex) -> SchemaPlan:
    """For the other back end; where it does not enforce everything, the first refusal is the one to tell."""
    try:
        return _plan(source, "llguidance", limits)
    except SchemaError:
        raise too_large from None


def _cfg(source: CfgSource, limits: CompileLimits) -> AutomatonGrammar | LlguidanceGrammar:
    check_cfg_text(source.text, limits)
    match source.syntax:
        case "lark":
            check_lark_text(source.text, limits)
            return LlguidanceGrammar.compile(lark_grammar(source.text))
        case "gbnf":
            return _gbnf(source.text, limits)
    raise SchemaError(f"grammar: expected the syntax 'lark' or 'gbnf', got {source.syntax!r}")


def _gbnf(text: str, limits: CompileLimits) -> AutomatonGrammar | LlguidanceGrammar:
    """A grammar without recursion is a regular expression, and so a table if it is small enough."""
    grammar = read_gbnf(text, limits)
    pattern = grammar.regex()
    if pattern is not None:
        try:
            return AutomatonGrammar.compile(pattern, limits)
        except SchemaTooComplex:
            pass
    return LlguidanceGrammar.compile(lark_grammar(grammar.lark()))


def _check_backend(backend: str) -> None:
    if backend not in BACKENDS:
        raise SchemaError(f"output: expected a back end of {', '.join(BACKENDS)}, got {backend!r}")
