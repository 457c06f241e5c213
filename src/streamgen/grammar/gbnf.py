"""GBNF, the grammars of llama.cpp: read, and written again for a back end.

A grammar whose rules never come back to themselves is a regular expression. Any other becomes one of llguidance
(`lexemes`).

    root ::= "a" item* | [^x-z] . {2,3}    # text, rules, groups, classes, any character; * + ? {m} {m,} {m,n}
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Never, TypeAlias

from msgspec import Struct

from streamgen.errors import SchemaError
from streamgen.grammar import charsets
from streamgen.grammar.positions import charset, escape, too_complex

if TYPE_CHECKING:
    from streamgen.grammar.bounds import CompileLimits
    from streamgen.grammar.charsets import Ranges


class Text(Struct, frozen=True):
    """Exactly this; "" is nothing at all."""

    text: str


class Chars(Struct, frozen=True):
    """One character of a set."""

    ranges: Ranges


class Ref(Struct, frozen=True):
    """What another rule says."""

    name: str


class Sequence(Struct, frozen=True):
    """One after the other."""

    items: tuple[Expression, ...]


class Choice(Struct, frozen=True):
    """Any of these."""

    items: tuple[Expression, ...]


class Repeat(Struct, frozen=True):
    """`low` to `high` times, without end if `high` is None."""

    item: Expression
    low: int
    high: int | None


Expression: TypeAlias = Text | Chars | Ref | Sequence | Choice | Repeat

NOTHING = Text("")


class Rules(Struct, frozen=True):
    """A grammar: its rules by name; `root` is where it starts."""

    rules: dict[str, Expression]
    limits: CompileLimits

    def regex(self) -> str | None:
        """The regular expression of the whole; None if it is none, or a very large one."""
        return Regexes(self).of(Ref("root"))

    def lark(self) -> str:
        """The same for llguidance."""
        from streamgen.grammar.lexemes import write_lark

        return write_lark(self)


def read_gbnf(text: str, limits: CompileLimits) -> Rules:
    """Parse it.

    Raises:
        SchemaError: it is none; line and column tell where. SchemaTooComplex: it passes a limit.
    """
    return _Reader(text, limits).read()


class Regexes:
    """Regular expressions of expressions. One that leads to a rule under way has none."""

    def __init__(self, grammar: Rules) -> None:
        self._grammar = grammar
        self._known: dict[str, str | None] = {}  # of rules; None also for those under way
        self._max_chars = grammar.limits.max_regex_chars // 4

    def of(self, expression: Expression) -> str | None:
        """The text of one, in one piece."""
        match expression:
            case Text(text):
                return f"(?:{escape(text)})"
            case Chars(ranges):
                return charset(ranges).text
            case Ref(name):
                return self._of_rule(name)
            case Sequence(items):
                return self._joined(items, "")
            case Choice(items):
                return self._joined(items, "|")
            case Repeat(item, low, high):
                inner = self.of(item)
                counts = f"{{{low},{'' if high is None else high}}}"
                return None if inner is None else f"(?:{inner}{counts})"

    def _of_rule(self, name: str) -> str | None:
        if name not in self._known:
            self._known[name] = None
            self._known[name] = self.of(self._grammar.rules[name])
        return self._known[name]

    def _joined(self, items: tuple[Expression, ...], between: str) -> str | None:
        texts = []
        for item in items:
            text = self.of(item)
            if text is None:
                return None
            texts.append(text)
        if sum(map(len, texts)) > self._max_chars:
            return None
        return f"(?:{between.join(texts)})"


_TOKEN = re.compile(
    r"""(?P<space>[ \t]+|\#[^\r\n]*)
      | (?P<newline>\r\n|\n|\r)
      | (?P<define>::=)
      | (?P<name>[a-zA-Z0-9_-]+)
      | (?P<text>"(?:[^"\\\n]|\\.)*")
      | (?P<chars>\[(?:[^\]\\\n]|\\.)*\])
      | (?P<repeat>[*+?]|\{[ \t\n]*[0-9]+[ \t\n]*(?:,[ \t\n]*(?:[0-9]+[ \t\n]*)?)?\}|\{[ \t]*,[ \t]*[0-9]+[ \t]*\})
      | (?P<token>!?<[^>\n]*>)
      | (?P<mark>[|().])
      | (?P<other>.)""",
    re.VERBOSE | re.DOTALL,
)
_CHAR = re.compile(r"\\x([0-9A-Fa-f]{2})|\\u([0-9A-Fa-f]{4})|\\U([0-9A-Fa-f]{8})|\\(.)|(.)", re.DOTALL)
_ESCAPES = {"t": "\t", "r": "\r", "n": "\n", "\\": "\\", '"': '"', "[": "[", "]": "]", "-": "-", "^": "^"}
_ANY: Ranges = ((0, charsets.LAST),)


class _Token(Struct, frozen=True):
    kind: str
    text: str
    at: int


class _Reader:
    """Recursive descent over tokens; a newline ends a rule unless it is inside parentheses or after a |."""

    def __init__(self, text: str, limits: CompileLimits) -> None:
        self._source = text
        self._limits = limits
        found = _TOKEN.finditer(text)
        self._tokens = [_Token(t.lastgroup or "", t[0], t.start()) for t in found if t.lastgroup != "space"]
        self._tokens.append(_Token("end", "", len(text)))
        self._next = 0
        self._refs: list[_Token] = []

    def read(self) -> Rules:
        """Every rule of it."""
        rules: dict[str, Expression] = {}
        self._skip_newlines()
        while self._token.kind != "end":
            name = self._take("name", "the name of a rule")
            self._take("define", "::= after the name of the rule")
            self._skip_newlines()
            if name.text in rules:
                self._refuse(f"the rule {name.text!r} is there twice", name)
            rules[name.text] = self._choice(depth=0)
            if self._token.kind not in ("newline", "end"):
                self._refuse("expected the end of the rule", self._token)
            self._skip_newlines()
        if "root" not in rules:
            raise SchemaError("grammar: expected a rule named root, where every text starts")
        for ref in self._refs:
            if ref.text not in rules:
                self._refuse(f"there is no rule named {ref.text!r}", ref)
        return Rules(rules, self._limits)

    @property
    def _token(self) -> _Token:
        return self._tokens[self._next]

    def _take(self, kind: str, what: str) -> _Token:
        token = self._token
        if token.kind != kind:
            self._refuse(f"expected {what}", token)
        self._next += 1
        return token

    def _is(self, mark: str) -> bool:
        return self._token.kind == "mark" and self._token.text == mark

    def _skip_newlines(self) -> None:
        while self._token.kind == "newline":
            self._next += 1

    def _refuse(self, problem: str, token: _Token) -> Never:
        before = self._source[: token.at]
        line, column = before.count("\n") + 1, token.at - (before.rfind("\n") + 1) + 1
        raise SchemaError(f"grammar: {problem}, at line {line}, column {column}")

    def _choice(self, depth: int) -> Expression:
        items = [self._sequence(depth)]
        while self._is("|"):
            self._next += 1
            self._skip_newlines()
            items.append(self._sequence(depth))
        return items[0] if len(items) == 1 else Choice(tuple(items))

    def _sequence(self, depth: int) -> Expression:
        items: list[Expression] = []
        while True:
            if depth:
                self._skip_newlines()
            token = self._token
            if token.kind == "repeat":
                if not items:
                    self._refuse("expected something to repeat", token)
                items.append(self._repeat(items.pop(), token))
            elif token.kind in ("text", "chars", "name", "token", "other") or token.text in ("(", "."):
                items.append(self._item(token, depth))
            else:
                break
        return items[0] if len(items) == 1 else Sequence(tuple(items)) if items else NOTHING

    def _item(self, token: _Token, depth: int) -> Expression:
        self._next += 1
        match token.kind, token.text:
            case "text", text:
                return Text("".join(char for char, _ in self._chars(text[1:-1], token)))
            case "chars", text:
                return Chars(self._class(text[1:-1], token))
            case "name", name:
                if self._token.kind == "define":
                    self._refuse("expected a new line before the next rule", token)
                self._refs.append(token)
                return Ref(name)
            case "mark", ".":
                return Chars(_ANY)
            case "mark", "(":
                return self._group(token, depth + 1)
            case "token", _:
                self._refuse("expected text alone, got a special token (<...>)", token)
        self._refuse("expected text, a class, a group or the name of a rule", token)

    def _group(self, opened: _Token, depth: int) -> Expression:
        if depth > self._limits.max_cfg_depth:
            raise too_complex("max_cfg_depth", self._limits.max_cfg_depth, "groups inside each other", "more")
        inner = self._choice(depth)
        if not self._is(")"):
            self._refuse("expected a ) for the ( here", opened)
        self._next += 1
        return inner

    def _repeat(self, item: Expression, token: _Token) -> Expression:
        self._next += 1
        match token.text:
            case "*":
                return Repeat(item, 0, None)
            case "+":
                return Repeat(item, 1, None)
            case "?":
                return Repeat(item, 0, 1)
        first, comma, second = token.text[1:-1].partition(",")
        low = int(first) if first.strip() else 0
        high = low if not comma else int(second) if second.strip() else None
        if max(low, high or 0) > self._limits.max_repeats:
            raise too_complex("max_repeats", self._limits.max_repeats, "repeats", max(low, high or 0))
        if high is not None and high < low:
            self._refuse("expected the lower count first", token)
        return Repeat(item, low, high)

    def _class(self, text: str, token: _Token) -> Ranges:
        is_inverted = text.startswith("^")
        chars = list(self._chars(text[is_inverted:], token))
        ranges: list[tuple[int, int]] = []
        index = 0
        while index < len(chars):
            low = high = ord(chars[index][0])
            if index + 2 < len(chars) and chars[index + 1] == ("-", False):
                high = ord(chars[index + 2][0])
                index += 2
            if high < low:
                self._refuse("expected a range from a character to one that is not before it", token)
            ranges.append((low, high))
            index += 1
        merged = charsets.merge(ranges)
        return charsets.invert(merged) if is_inverted else merged

    def _chars(self, text: str, token: _Token) -> list[tuple[str, bool]]:
        """Characters, and whether each was escaped."""
        chars = []
        for found in _CHAR.finditer(text):
            *codes, escaped, plain = found.groups()
            code = next((int(digits, 16) for digits in codes if digits), None)
            if code is not None and (code > charsets.LAST or 0xD800 <= code <= 0xDFFF):
                self._refuse(f"{found[0]} is no character that can be written", token)
            if escaped is not None and escaped not in _ESCAPES:
                self._refuse(f"the escape \\{escaped} is not known", token)
            if code == 0 and token.kind == "text":
                self._refuse("the character NUL is never written", token)
            char = chr(code) if code is not None else _ESCAPES[escaped] if escaped else plain
            chars.append((char, plain is None))
        return chars
