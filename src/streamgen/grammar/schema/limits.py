"""How much of a schema is read before it is refused as too large."""

from __future__ import annotations

from typing import NoReturn

from msgspec import Struct

from streamgen.errors import SchemaTooComplex


class SchemaLimits(Struct, frozen=True, kw_only=True):
    """Bounds on a schema, each checked before the work that it bounds.

    max_bytes         of the schema's text
    max_depth         of nesting in that text
    max_refs          different references that are followed
    max_properties    that one object lists
    max_enum          values of one enum
    max_subschemas    combinations of subschemas that are looked at
    max_alternatives  that one subschema falls into
    max_repeats       the product of counts inside of each other in a pattern
    max_states        of the automaton, as estimated, up to which a schema becomes a regular expression
    """

    max_bytes: int = 65_536
    max_depth: int = 64
    max_refs: int = 1_000
    max_properties: int = 256
    max_enum: int = 4_096
    max_subschemas: int = 4_000
    max_alternatives: int = 400
    max_repeats: int = 5_000
    max_states: int = 4_000


def too_complex(what: str, bound: str, limit: int) -> NoReturn:
    """Refuse a schema, naming the bound."""
    raise SchemaTooComplex(f"schema: expected at most {limit} {what}; simplify it or raise {bound}", bound=bound)
