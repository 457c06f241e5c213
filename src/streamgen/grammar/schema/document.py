"""A schema's text -> its subschemas, each with a place and a dialect; references inside of it, resolved.

Nothing is fetched: a reference to another document is refused by name.
"""

from __future__ import annotations

import json
import re
from decimal import Decimal
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urldefrag, urljoin

from msgspec import Struct

from streamgen.errors import SchemaError
from streamgen.grammar.schema.keywords import check_keywords, subschemas
from streamgen.grammar.schema.limits import SchemaLimits, too_complex

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_EXPONENT = 350
DRAFTS = {
    "http://json-schema.org/draft-03/schema": 3,
    "http://json-schema.org/draft-04/schema": 4,
    "http://json-schema.org/draft-06/schema": 6,
    "http://json-schema.org/draft-07/schema": 7,
    "https://json-schema.org/draft/2019-09/schema": 2019,
    "https://json-schema.org/draft/2020-12/schema": 2020,
}
LATEST = 2020
# The keyword of schemas made here for the parts of an array or object under `enum`; every draft has it.
CONSTANT = "\0const"


class Place(Struct, frozen=True, eq=False):
    """A subschema and where it stands.

    id       number of the place within its document, from 1
    schema   what is written there
    pointer  JSON pointer from the root
    base     URI that references are relative to
    """

    id: int
    schema: Any  # a JSON value: an object or a boolean where the schema is valid
    pointer: str
    base: str


class Document:
    """All places of one schema."""

    def __init__(self, text: str, limits: SchemaLimits) -> None:
        self.limits = limits
        root = _load(text, limits)
        self.draft = _draft(root)
        self.uses_unevaluated = False
        self._places: list[Place] = []
        self._by_pointer: dict[str, Place] = {}
        self._resources: dict[str, Place] = {}
        self._anchors: dict[tuple[str, str], Place] = {}
        self._dynamic_names: dict[str, int] = {}
        self.root = self._place(root, "", self._base_of(root, ""))
        self._resources[""] = self.root
        self._index(self.root)

    def place(self, number: int) -> Place:
        """The place with a number."""
        return self._places[number - 1]

    def child(self, parent: Place, *path: str | int) -> Place:
        """The subschema under a place that a path of keys leads to."""
        value, pointer, base = parent.schema, parent.pointer, parent.base
        for step in path:
            value = value[step]
            pointer += "/" + str(step).replace("~", "~0").replace("/", "~1")
            base = self._base_of(value, base)
        return self._place(value, pointer, base)

    def constant(self, value: Any, pointer: str) -> Place:
        """A place for a schema that only this JSON value satisfies."""
        key = f"{pointer}\0{json.dumps(value, default=str)}"
        if key not in self._by_pointer:
            self._by_pointer[key] = self._new({CONSTANT: value}, pointer, "")
        return self._by_pointer[key]

    def resolve(self, place: Place, keyword: str) -> Place:
        """Where a reference leads.

        Raises:
            SchemaError: to another document, or nowhere.
        """
        reference = place.schema[keyword]
        target = (
            f"{urldefrag(place.base)[0]}{reference}" if reference.startswith("#") else urljoin(place.base, reference)
        )
        uri, fragment = urldefrag(target)
        resource = self._resources.get(uri)
        if resource is None:
            raise SchemaError(
                f"{place.pointer or '/'}: {keyword} leads to another document, and none is fetched; "
                "put that schema under $defs and refer to it there",
                pointer=place.pointer,
                keyword=keyword,
            )
        found = self._anchors.get((uri, fragment)) if fragment and not fragment.startswith("/") else None
        if found is None and (not fragment or fragment.startswith("/")):
            found = self._descend(resource, unquote(fragment))
        if found is None:
            raise SchemaError(
                f"{place.pointer or '/'}: {keyword} leads nowhere in this schema",
                pointer=place.pointer,
                keyword=keyword,
            )
        return found

    def is_ambiguous_anchor(self, name: str) -> bool:
        """Whether several places share a dynamic anchor, so that what it means depends on the way there."""
        return self._dynamic_names.get(name, 0) > 1

    def _descend(self, place: Place, pointer: str) -> Place | None:
        for token in pointer.split("/")[1:]:
            step: str | int = token.replace("~1", "/").replace("~0", "~")
            if isinstance(place.schema, list) and token.isdecimal():
                step = int(token)
            try:
                place = self.child(place, step)
            except (KeyError, IndexError, TypeError):
                return None
        return place

    def _place(self, schema: Any, pointer: str, base: str) -> Place:
        if pointer not in self._by_pointer:
            self._by_pointer[pointer] = self._new(schema, pointer, base)
        return self._by_pointer[pointer]

    def _new(self, schema: Any, pointer: str, base: str) -> Place:
        self._places.append(Place(len(self._places) + 1, schema, pointer, base))
        return self._places[-1]

    def _base_of(self, schema: Any, base: str) -> str:
        identifier = _identifier(schema, self.draft)
        return base if identifier is None or identifier.startswith("#") else urljoin(base, identifier)

    def _index(self, place: Place) -> None:
        """Check this and all subschemas, and note the names that references may use."""
        pending = [place]
        while pending:
            place = pending.pop()
            if not isinstance(place.schema, dict):
                check_keywords(place.schema, place.pointer, self.draft, self.limits)
                continue
            check_keywords(place.schema, place.pointer, self.draft, self.limits)
            self._note_names(place)
            pending.extend(self.child(place, *path) for path in subschemas(place.schema))

    def _note_names(self, place: Place) -> None:
        schema = place.schema
        uri = urldefrag(place.base)[0]
        identifier = _identifier(schema, self.draft)
        if identifier is not None or place is self.root:
            self._resources.setdefault(uri, place)
        names = [schema.get("$anchor"), schema.get("$dynamicAnchor")]
        names.append(identifier[1:] if identifier and identifier.startswith("#") else None)
        for name in names:
            if isinstance(name, str):
                self._anchors.setdefault((uri, name), place)
        if isinstance(schema.get("$dynamicAnchor"), str):
            name = schema["$dynamicAnchor"]
            self._dynamic_names[name] = self._dynamic_names.get(name, 0) + 1
        if schema.get("$recursiveAnchor") is True:
            self._dynamic_names[""] = self._dynamic_names.get("", 0) + 1
        self.uses_unevaluated |= "unevaluatedProperties" in schema or "unevaluatedItems" in schema


def _identifier(schema: Any, draft: int) -> str | None:
    if not isinstance(schema, dict) or (draft <= 7 and "$ref" in schema):
        return None
    found = schema.get("id" if draft <= 4 else "$id")
    return found if isinstance(found, str) else None


def _load(text: str, limits: SchemaLimits) -> Any:
    if len(text) > limits.max_bytes or len(text.encode(errors="replace")) > limits.max_bytes:
        too_complex("bytes", "max_bytes", limits.max_bytes)
    depth = 0
    for mark in _marks(text):
        depth += 1 if mark in "[{" else -1
        if depth > limits.max_depth:
            too_complex("levels of nesting", "max_depth", limits.max_depth)
    try:
        root = json.loads(text, parse_float=_decimal, parse_int=_whole, parse_constant=_no_constant)
        json.dumps(root, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        raise SchemaError("schema: expected Unicode text, got half of a surrogate pair", pointer="") from error
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}: {error.msg}"
        raise SchemaError(f"schema: expected JSON text, got something else ({where})", pointer="") from error
    except ValueError as error:
        raise SchemaError(f"schema: expected JSON text, got {error}", pointer="") from error
    return root


def _marks(text: str) -> Iterator[str]:
    for match in re.finditer(r'"(?:[^"\\]|\\.)*"|[\[\]{}]', text):
        if match[0][0] != '"':
            yield match[0]


def _decimal(digits: str) -> Decimal:
    value = Decimal(digits)
    if abs(value.adjusted()) > MAX_EXPONENT or len(value.as_tuple().digits) > MAX_EXPONENT:
        raise ValueError(f"a number with more than {MAX_EXPONENT} digits")
    return value


def _whole(digits: str) -> int:
    if len(digits) > MAX_EXPONENT:
        raise ValueError(f"a number with more than {MAX_EXPONENT} digits")
    return int(digits)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _draft(root: Any) -> int:
    written = root.get("$schema") if isinstance(root, dict) else None
    draft = DRAFTS.get(written.rstrip("#"), LATEST) if isinstance(written, str) else LATEST
    if draft == 3:
        raise SchemaError(
            "/: $schema names draft 3, which is not supported; use draft 4 or later", pointer="", keyword="$schema"
        )
    return draft
