"""JSON that is still being written: what it says so far, in time that is linear in its length.

`JsonReader` builds the value as the text comes, at any split of it. `ItemScanner` cuts the elements out of an array and
looks no further into them. Neither knows of types or streams, and neither uses the stack, however deep the text nests.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

from streamgen.grammar.shapes import FREE, Shape

if TYPE_CHECKING:
    from collections.abc import Callable


class JsonMalformed(ValueError):
    """The text is not JSON. The message says where, in characters from the beginning, and holds none of the text."""


class NotAnArray(ValueError):
    """The text is JSON of another kind than an array."""


class _Absent:
    """Nothing, where None is a value."""

    def __repr__(self) -> str:
        return "ABSENT"


ABSENT: Final = _Absent()
"""What a reader's value is before it has begun."""

_SPACE = re.compile(r"[ \t\n\r]*")
_PLAIN = re.compile(r'[^"\\\x00-\x1f]*')
_SCALAR = re.compile(r"[-+.0-9A-Za-z]*")
_INTEGER = re.compile(r"-?(?:0|[1-9][0-9]*)")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?")
_HEX = re.compile(r"[0-9A-Fa-f]{4}")
_LITERALS = {"true": True, "false": False, "null": None}
_ESCAPES = {'"': '"', "\\": "\\", "/": "/", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}
_MAX_DIGITS = 4000  # of a number: reading one costs the square of its length, and Python has a limit of its own
_CHARACTERS_PER_ENTRY = 16  # copying so many characters costs about what copying an entry of a container does


class JsonReader:
    """Reads JSON piece by piece.

    An object's member, an array's element, a number and a literal are there once their end is certain; a string that
    grows, and an object or array, as soon as it begins. What was closed is never changed again, so snapshots share it.

    version   changes when the value does
    fields    (JSON pointer, value) of each object's member that was completed, inner ones first; for the caller to take
    """

    def __init__(self, shape: Shape = FREE, *, wants_fields: bool = False) -> None:
        self.version = 0
        self.fields: list[tuple[str, Any]] = []
        self._wants_fields = wants_fields
        self._stack: list[dict[str, Any] | list[Any]] = []  # what is open, the outermost first
        self._keys: list[str] = []  # beside it: the key of the member being read, "" in arrays
        self._shapes: list[Shape] = []  # beside it
        self._shape = shape  # of the value being read, or to come
        self._root: Any = ABSENT
        self._pieces: list[str] = []  # of the string, number or literal being read
        self._length = 0  # of these
        self._escape = ""  # what there is of an escape
        self._high = ""  # the first half of a surrogate pair
        self._is_key = False
        self._step: Callable[[str, int], int] = self._read_value
        self._offset = 0  # of the piece of text being read

    @property
    def is_whole(self) -> bool:
        """Whether the value is complete."""
        return self._root is not ABSENT

    @property
    def snapshot_cost(self) -> int:
        """How many entries `snapshot` has to copy."""
        return sum(map(len, self._stack)) + self._length // _CHARACTERS_PER_ENTRY

    def feed(self, text: str) -> None:
        """Read on.

        Raises:
            JsonMalformed.
        """
        position = 0
        while position < len(text):
            position = self._step(text, position)
        self._offset += len(text)

    def finish(self) -> None:
        """There is no more text.

        Raises:
            JsonMalformed: it ends too early.
        """
        if self._step == self._read_scalar and not self._stack:
            self._end_scalar(0)
        if not self.is_whole:
            raise self._malformed("it ends too early", 0)

    def snapshot(self) -> Any:
        """The value so far, ABSENT before it begins. It stays as it is when reading goes on."""
        if self.is_whole:
            return self._root
        value = self._growing()
        for container, key in zip(reversed(self._stack), reversed(self._keys), strict=True):
            copy = container.copy()
            if value is ABSENT:
                pass
            elif isinstance(copy, dict):
                copy[key] = value
            else:
                copy.append(value)
            value = copy
        return value

    def _growing(self) -> Any:
        """The string being read, if half of it is shown."""
        if self._step not in (self._read_string, self._read_escape) or self._is_key or not self._shape.grows:
            return ABSENT
        self._pieces = ["".join(self._pieces)]
        return self._pieces[0]

    # ---- steps: each reads on from a position and returns the next ----

    def _read_value(self, text: str, position: int) -> int:
        position = _skip_space(text, position)
        if position == len(text):
            return position
        match text[position]:
            case "{":
                self._open({}, self._read_first_key)
            case "[":
                self._open([], self._read_first_element)
            case '"':
                self._begin(self._read_string)
                self.version += self._shape.grows
            case "-" | "0" | "1" | "2" | "3" | "4" | "5" | "6" | "7" | "8" | "9" | "t" | "f" | "n":
                self._begin(self._read_scalar)
                return position
            case _:
                raise self._malformed("expected a value", position)
        return position + 1

    def _read_first_key(self, text: str, position: int) -> int:
        position = _skip_space(text, position)
        if position < len(text) and text[position] == "}":
            self._close()
            return position + 1
        return self._read_key(text, position)

    def _read_key(self, text: str, position: int) -> int:
        position = _skip_space(text, position)
        if position == len(text):
            return position
        if text[position] != '"':
            raise self._malformed("expected a key", position)
        self._is_key = True
        self._begin(self._read_string)
        return position + 1

    def _read_colon(self, text: str, position: int) -> int:
        position = _skip_space(text, position)
        if position == len(text):
            return position
        if text[position] != ":":
            raise self._malformed("expected a colon", position)
        self._step = self._read_value
        return position + 1

    def _read_first_element(self, text: str, position: int) -> int:
        position = _skip_space(text, position)
        if position == len(text):
            return position
        if text[position] == "]":
            self._close()
            return position + 1
        self._shape = self._shapes[-1].element(0)
        self._step = self._read_value
        return position

    def _read_after(self, text: str, position: int) -> int:
        """What follows a value: a comma, the end of what it is in, or nothing."""
        position = _skip_space(text, position)
        if position == len(text):
            return position
        container = self._stack[-1] if self._stack else None
        match text[position]:
            case "," if isinstance(container, dict):
                self._step = self._read_key
            case "," if isinstance(container, list):
                self._shape = self._shapes[-1].element(len(container))
                self._step = self._read_value
            case "}" if isinstance(container, dict):
                self._close()
            case "]" if isinstance(container, list):
                self._close()
            case _:
                raise self._malformed("expected the end" if container is None else "expected a comma", position)
        return position + 1

    def _read_string(self, text: str, position: int) -> int:
        start, position = position, _end_of(_PLAIN, text, position)
        if position > start:
            self._add(text[start:position])
        if position == len(text):
            return position
        match text[position]:
            case '"':
                self._end_string()
            case "\\":
                self._escape = "\\"
                self._step = self._read_escape
            case _:
                raise self._malformed("a control character in a string", position)
        return position + 1

    def _read_escape(self, text: str, position: int) -> int:
        if len(self._escape) == 1:
            self._escape += text[position]
            position += 1
        if self._escape[1] == "u":
            piece = text[position : position + 6 - len(self._escape)]
            self._escape += piece
            position += len(piece)
            if len(self._escape) == 6:
                self._end_unicode(position)
        elif self._escape[1] in _ESCAPES:
            self._add(_ESCAPES[self._escape[1]])
            self._step = self._read_string
        else:
            raise self._malformed("an unknown escape", position - 1)
        return position

    def _read_scalar(self, text: str, position: int) -> int:
        start, position = position, _end_of(_SCALAR, text, position)
        self._pieces.append(text[start:position])
        if position < len(text):
            self._end_scalar(position)
        return position

    # ---- what steps do ----

    def _begin(self, step: Callable[[str, int], int]) -> None:
        self._pieces, self._length = [], 0
        self._step = step

    def _add(self, piece: str) -> None:
        """To the string being read."""
        if self._high:  # which has no second half
            piece, self._high = self._high + piece, ""
        self._pieces.append(piece)
        self._length += len(piece)
        if not self._is_key:
            self.version += self._shape.grows

    def _end_unicode(self, position: int) -> None:
        digits = self._escape[2:]
        if _HEX.fullmatch(digits) is None:
            raise self._malformed("an escape that is not \\u and four hexadecimal digits", position)
        code = int(digits, 16)
        self._step = self._read_string
        if self._high and 0xDC00 <= code < 0xE000:
            code = 0x10000 + ((ord(self._high) - 0xD800) << 10) + (code - 0xDC00)
            self._high = ""
        if 0xD800 <= code < 0xDC00:
            high, self._high = self._high, chr(code)
            if high:
                self._pieces.append(high)
        else:
            self._add(chr(code))

    def _end_string(self) -> None:
        if self._high:
            self._add("")
        value = "".join(self._pieces)
        self._pieces, self._length = [], 0
        if not self._is_key:
            self._complete(value, is_shown=self._shape.grows)
            return
        self._is_key = False
        self._keys[-1] = value
        self._shape = self._shapes[-1].member(value)
        self._step = self._read_colon

    def _end_scalar(self, position: int) -> None:
        token = "".join(self._pieces)
        self._pieces = []
        if token in _LITERALS:
            self._complete(_LITERALS[token])
        elif _INTEGER.fullmatch(token) and len(token) <= _MAX_DIGITS:
            self._complete(int(token))
        elif _NUMBER.fullmatch(token) and len(token) <= _MAX_DIGITS:
            self._complete(float(token))
        else:
            raise self._malformed("neither a number nor a literal", position)

    def _open(self, container: dict[str, Any] | list[Any], step: Callable[[str, int], int]) -> None:
        self._stack.append(container)
        self._keys.append("")
        self._shapes.append(self._shape)
        self._step = step
        self.version += 1

    def _close(self) -> None:
        value = self._stack.pop()
        self._keys.pop()
        self._shapes.pop()
        self._complete(value, is_shown=True)

    def _complete(self, value: Any, *, is_shown: bool = False) -> None:
        self.version += not is_shown
        self._step = self._read_after
        if not self._stack:
            self._root = value
            return
        container = self._stack[-1]
        if isinstance(container, list):
            container.append(value)
            return
        container[self._keys[-1]] = value
        if self._wants_fields:
            self.fields.append((self._pointer(), value))

    def _pointer(self) -> str:
        """That of the member that was completed."""
        parts = (
            str(len(container)) if isinstance(container, list) else key.replace("~", "~0").replace("/", "~1")
            for container, key in zip(self._stack, self._keys, strict=True)
        )
        return "".join(f"/{part}" for part in parts)

    def _malformed(self, what: str, position: int) -> JsonMalformed:
        return JsonMalformed(f"not JSON: {what} at character {self._offset + position}")


_OUTSIDE = re.compile(r'["\[\]{},]')
_INSIDE = re.compile(r'["\\]')


class ItemScanner:
    """Cuts an array into its elements. It looks at strings and brackets only: who reads the elements judges them."""

    def __init__(self) -> None:
        self._depth = 0  # 1: between the array's brackets
        self._in_string = False
        self._is_escaped = False  # the next character belongs to an escape
        self._is_over = False
        self._pieces: list[str] = []  # of the element being read

    def feed(self, text: str) -> list[str]:
        """The elements that this text closes.

        Raises:
            NotAnArray: the text begins otherwise. JsonMalformed: it goes on after the array.
        """
        position = 0
        if self._depth == 0:
            position = self._enter(text)
        elements: list[str] = []
        while position < len(text) and self._depth > 0:
            position = self._scan(text, position, elements)
        if self._is_over and _end_of(_SPACE, text, position) < len(text):
            raise JsonMalformed("not JSON: there is more after the array")
        return elements

    def _enter(self, text: str) -> int:
        """Find the array's beginning."""
        position = _skip_space(text, 0)
        if position == len(text) or self._is_over:
            return position
        if text[position] != "[":
            raise NotAnArray("the value is not an array")
        self._depth = 1
        return position + 1

    def _scan(self, text: str, start: int, elements: list[str]) -> int:
        """Go on to the next bracket, comma, quote or escape."""
        if self._is_escaped:
            self._is_escaped = False
            self._pieces.append(text[start])
            return start + 1
        match = (_INSIDE if self._in_string else _OUTSIDE).search(text, start)
        if match is None:
            self._pieces.append(text[start:])
            return len(text)
        mark, end = match[0], match.end()
        is_border = self._depth == 1 and not self._in_string and mark in ",]"
        self._pieces.append(text[start : match.start() if is_border else end])
        if is_border:
            self._end_element(elements, is_last=mark == "]")
        elif mark == '"':
            self._in_string = not self._in_string
        elif mark == "\\":
            self._is_escaped = True
        elif mark in "[{":
            self._depth += 1
        elif mark in "]}":
            self._depth -= 1
        return end

    def _end_element(self, elements: list[str], *, is_last: bool) -> None:
        element = "".join(self._pieces).strip(" \t\n\r")
        self._pieces = []
        if element or not is_last:
            elements.append(element)
        if is_last:
            self._depth = 0
            self._is_over = True


def _skip_space(text: str, position: int) -> int:
    return _end_of(_SPACE, text, position)


def _end_of(pattern: re.Pattern[str], text: str, position: int) -> int:
    """Where the longest match at a position ends; the patterns match nothing as well."""
    match = pattern.match(text, position)
    assert match is not None, "a pattern that matches nothing as well"
    return match.end()
