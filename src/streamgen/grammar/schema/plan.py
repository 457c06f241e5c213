"""A JSON schema -> what a back end enforces exactly, or a refusal that names the keyword."""

from __future__ import annotations

from msgspec import Struct

from streamgen.errors import SchemaError
from streamgen.grammar.schema.document import Document
from streamgen.grammar.schema.emit import Emitter
from streamgen.grammar.schema.expand import Expander
from streamgen.grammar.schema.limits import SchemaLimits, too_complex
from streamgen.grammar.schema.productions import Grammar, LarkPrinter, NotRegular, RegexPrinter
from streamgen.grammar.schema.values import Unsupported

MAX_IGNORED = 64


class SchemaPlan(Struct, frozen=True):
    """How a schema is enforced.

    backend   "outlines": by the automaton of a regular expression | "llguidance": by its parser
    regex     for "outlines": the language of the JSON text
    lark      for "llguidance": rules in Lark's syntax, of which `json` is the JSON text; there is no `start`
    warnings  what is not enforced, where the caller allowed that
    """

    backend: str
    regex: str | None = None
    lark: str | None = None
    warnings: tuple[str, ...] = ()


def plan_schema(
    text: str,
    *,
    is_closed: bool = False,
    on_unsupported: str = "error",
    backend: str = "auto",
    limits: SchemaLimits | None = None,
) -> SchemaPlan:
    """Decide how a schema is enforced.

    text       the schema as JSON text; properties are written in the order in which it lists them
    is_closed  objects that list properties have no others, unless the schema itself says what others may be
    on_unsupported   what becomes of a keyword that is not enforced: "error" | "warn" | "ignore"
    backend    "auto" | "outlines" | "llguidance"

    Raises:
        SchemaError: it is no schema, nothing satisfies it, or a keyword is not enforced.
        SchemaTooComplex: it passes a limit.
    """
    limits = limits or SchemaLimits()
    ignored: dict[tuple[str, str], str] = {}
    while True:
        try:
            grammar = _grammar(text, limits, is_closed, frozenset(ignored))
            warnings = tuple(ignored.values()) if on_unsupported == "warn" else ()
            return _choose(grammar, backend, limits, warnings)
        except Unsupported as found:
            key = (found.pointer, found.keyword)
            if on_unsupported == "error" or key in ignored or len(ignored) >= MAX_IGNORED:
                raise _refusal(found) from found
            ignored[key] = f"{found.pointer or '/'}: {found.keyword} is not enforced: {found.reason}"
        except RecursionError:
            too_complex("subschemas inside of each other", "max_depth", limits.max_depth)


def _grammar(text: str, limits: SchemaLimits, is_closed: bool, ignored: frozenset[tuple[str, str]]) -> Grammar:
    document = Document(text, limits)
    expander = Expander(document, is_closed=is_closed, ignored=ignored)
    return Emitter(expander).emit(expander.goal(document.root))


def _refusal(found: Unsupported) -> SchemaError:
    return SchemaError(
        f"{found.pointer or '/'}: {found.keyword} cannot be enforced: {found.reason}; "
        'change the schema, or allow wider output with on_unsupported="warn"',
        pointer=found.pointer,
        keyword=found.keyword,
    )


def _choose(grammar: Grammar, backend: str, limits: SchemaLimits, warnings: tuple[str, ...]) -> SchemaPlan:
    reason = None
    if backend != "llguidance":
        try:
            regex = RegexPrinter(grammar, limits.max_states).print()
            return SchemaPlan("outlines", regex=regex, warnings=warnings)
        except NotRegular as found:
            reason = found
    if backend == "outlines":
        raise SchemaError(f"/: the schema is no regular expression of a moderate size: {reason}; use another back end")
    return SchemaPlan("llguidance", lark=LarkPrinter(grammar).print(), warnings=warnings)
