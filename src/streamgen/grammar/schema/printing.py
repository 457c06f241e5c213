"""Languages -> regular expressions in text, and a guess of how large their automata are.

The dialect is what Rust's `regex` and Python's `re` both read: groups, alternatives, classes, counted repetition.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

from streamgen.grammar.schema.language import And, Cat, Chars, Language, Not, Or, Repeat, Words, cat, has_operators

_SPECIAL = set("\\.+*?()|[]{}^$#&-~/ \"'")
_KEPT = set(" \"'/")
_CLASS_SPECIAL = set("\\]^-[&~")


@lru_cache(maxsize=4_096)
def regex_text(part: Language) -> str:
    """A regular expression of a language without intersection or complement."""
    match part:
        case Chars():
            return _class(part)
        case Words():
            return _alternatives([_literal(word) for word in part.words])
        case Cat():
            return "".join(map(regex_text, part.parts))
        case Or():
            return _alternatives([regex_text(p) for p in part.parts]) if part.parts else r"[^\x00-\U0010FFFF]"
        case Repeat():
            return _atom(part.part) + _quantifier(part.low, part.high)
        case And() | Not():
            raise ValueError("a regular expression has no intersection or complement")


def _alternatives(options: list[str]) -> str:
    return options[0] if len(options) == 1 else "(?:" + "|".join(options) + ")"


def _atom(part: Language) -> str:
    text = regex_text(part)
    is_single = isinstance(part, Chars) or (isinstance(part, Or) and len(part.parts) > 1)
    return text if is_single or (isinstance(part, Words) and len(part.words) > 1) else f"(?:{text})"


def _quantifier(low: int, high: int | None) -> str:
    simple = {(0, None): "*", (1, None): "+", (0, 1): "?"}.get((low, high))
    if simple is not None:
        return simple
    if low == high:
        return f"{{{low}}}"
    return f"{{{low},{'' if high is None else high}}}"


def _literal(text: str) -> str:
    return "".join(_escaped(char, _SPECIAL - _KEPT) for char in text)


def _class(part: Chars) -> str:
    if len(part.ranges) == 1 and part.ranges[0][0] == part.ranges[0][1]:
        return _literal(chr(part.ranges[0][0]))
    items = []
    for low, high in part.ranges:
        items.append(_escaped(chr(low), _CLASS_SPECIAL))
        if high > low:
            items.append("-" if high > low + 1 else "")
            items.append(_escaped(chr(high), _CLASS_SPECIAL))
    return "[" + "".join(items) + "]"


def _escaped(char: str, special: set[str]) -> str:
    code = ord(char)
    if char in special:
        return "\\" + char
    if char.isascii():
        return char if char.isprintable() else f"\\x{code:02X}"
    return f"\\u{code:04X}" if code <= 0xFFFF else f"\\U{code:08X}"


def lark_text(part: Language) -> str:
    """A terminal's right side in a Lark grammar as llguidance reads it, where `&` and `~` exist."""
    try:
        # An empty expression needs a group: two slashes begin a comment.
        return "/" + (regex_text(part).replace("/", r"\/") or "(?:)") + "/"
    except ValueError:
        pass
    match part:
        case Cat():
            return "( " + " ".join(map(lark_text, _runs(part))) + " )"
        case Or():
            return "( " + " | ".join(map(lark_text, part.parts)) + " )"
        case And():
            return "( " + " & ".join(map(lark_text, part.parts)) + " )"
        case Not():
            return f"~( {lark_text(part.part)} )"
        case Repeat():
            high = "" if part.high is None else part.high
            return f"( {lark_text(part.part)} ){{{part.low},{high}}}"
        case _:
            raise AssertionError("plain languages are printed above")


def _runs(part: Cat) -> list[Language]:
    """Its parts, with neighbours that need no operators joined."""

    runs: list[Language] = []
    for p in part.parts:
        if runs and not has_operators(p) and not has_operators(runs[-1]):
            runs[-1] = cat(runs[-1], p)
        else:
            runs.append(p)
    return runs


def num_states(part: Language) -> int:
    """About how many states of a byte automaton it needs."""
    match part:
        case Chars():
            return 1 if part.ranges[-1][1] < 0x80 else 6
        case Words():
            return _trie_size(part.words)
        case Cat() | Or() | And():
            return sum(map(num_states, part.parts))
        case Not():
            return num_states(part.part)
        case Repeat():
            return num_states(part.part) * max(part.low + 1 if part.high is None else part.high, 1)


def _trie_size(words: tuple[str, ...]) -> int:
    ordered = sorted(words)
    return sum(len(word) - _num_shared(before, word) for before, word in pairwise(["", *ordered]))


def _num_shared(left: str, right: str) -> int:
    pairs = zip(left, right, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(left), len(right)))
