"""Sets of arrays and objects -> productions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec import Struct

from streamgen.grammar.schema import language as lang
from streamgen.grammar.schema.productions import (
    COMMA,
    NOTHING,
    Call,
    Guarded,
    Node,
    Production,
    Token,
    optional,
    options,
    sequence,
    text,
    times,
)
from streamgen.grammar.schema.spelling import key_text
from streamgen.grammar.schema.values import (
    FALSE,
    TRUE,
    Array,
    Contains,
    Goal,
    Object,
    Unsupported,
    both_goals,
    item_goal,
    negations,
)

if TYPE_CHECKING:
    from streamgen.grammar.schema.emit import Emitter
    from streamgen.grammar.schema.language import Language

MAX_NAME_CLASSES = 24
MAX_COUNT = 60_000
MAX_UNIQUE = 60
MAX_VARIANTS = 64


# --- objects ---------------------------------------------------------------------------------------------------------


class Entry(Struct, frozen=True):
    """A named property that may be written here."""

    name: str
    node: Node
    is_required: bool


def object_nodes(found: Object, emitter: Emitter) -> list[Node]:
    """The text of a set of objects, as alternatives.

    Raises:
        Unsupported: its counts are not enforced.
    """
    entries = _entries(found, emitter)
    tails = _tails(found, emitter)
    nodes = [_object_node(found, entries_, tails, some, emitter) for entries_, some in _variants(found, entries, tails)]
    return [node for node in nodes if node is not None]


def _entries(found: Object, emitter: Emitter) -> list[Entry]:
    names = dict.fromkeys([name for name, _ in found.properties] + list(found.required))
    entries = []
    for name in names:
        goal = emitter.emptiness.property_goal(found, name)
        if not emitter.emptiness.is_empty(goal):
            node = sequence(Token(key_text(lang.words([name]))), emitter.call(goal))
            entries.append(Entry(name, node, name in found.required))
    return entries


def _tails(found: Object, emitter: Emitter) -> list[tuple[Language, Node]]:
    """What other properties there may be: disjoint languages of names, each with its value."""
    listed = lang.words([*(name for name, _ in found.properties), *found.required])
    classes: list[tuple[Language, Goal]] = [(lang.negate(listed), TRUE)]
    for names, goal in found.clauses:
        split: list[tuple[Language, Goal]] = []
        for language, wanted in classes:
            split.append((lang.both(language, names), both_goals(wanted, goal)))
            split.append((lang.both(language, lang.negate(names)), wanted))
        classes = [part for part in split if part[1] != FALSE and not lang.is_empty(part[0])]
        if len(classes) > MAX_NAME_CLASSES:
            raise Unsupported(found.counts_at, "patternProperties", "so many overlapping patterns are not enforced")
    if found.is_closed:
        classes = [part for part in classes if part[1] != TRUE]
    return [(language, emitter.call(goal)) for language, goal in classes if not emitter.emptiness.is_empty(goal)]


def _variants(
    found: Object, entries: list[Entry], tails: list[tuple[Language, Node]]
) -> list[tuple[list[Entry], list[Language]]]:
    """Ways to have a name of each language that asks for one: an optional entry, or one of the others."""
    variants: list[tuple[list[Entry], list[Language]]] = [(entries, [])]
    for names in found.some:
        following: list[tuple[list[Entry], list[Language]]] = []
        for present, wanted in variants:
            holding = [entry for entry in present if lang.matches(names, entry.name)]
            if any(entry.is_required for entry in holding):
                following.append((present, wanted))
                continue
            if len(holding) == len(present) and all(_covers(names, language) for language, _ in tails):
                following.append((present, [*wanted, lang.ANY]))
                continue
            following.extend((_requiring(present, entry), wanted) for entry in holding)
            following.append((present, [*wanted, names]))
        variants = following
        if len(variants) > MAX_VARIANTS:
            raise Unsupported(found.counts_at, "minProperties", "so many ways to satisfy it are not enforced")
    return variants


def _covers(names: Language, language: Language) -> bool:
    return lang.is_empty(lang.both(language, lang.negate(names)))


def _requiring(entries: list[Entry], wanted: Entry) -> list[Entry]:
    return [Entry(entry.name, entry.node, True) if entry is wanted else entry for entry in entries]


def _object_node(
    found: Object,
    entries: list[Entry],
    tails: list[tuple[Language, Node]],
    some: list[Language],
    emitter: Emitter,
) -> Node | None:
    needs_any = any(names == lang.ANY for names in some)
    needed = [names for names in some if names != lang.ANY]
    if len(needed) > 1:
        raise Unsupported(found.counts_at, "not", "so many demands on other properties are not enforced")
    tail = _tail_node(tails)
    needed_tail = _tail_node([(lang.both(needed[0], names), node) for names, node in tails]) if needed else None
    if needed and needed_tail is None:
        return None
    num_required = sum(entry.is_required for entry in entries)
    low = found.low if found.low > num_required else 0
    high = found.high
    if high is not None and tail is None and high >= len(entries):
        high = None
    if low or high is not None:
        if needed or (needs_any and not low):
            low = max(low, 1)
        if needed:
            raise Unsupported(
                found.counts_at, "maxProperties", "beside a demand on other properties it is not enforced"
            )
        return _counted(found, entries, tail, low, high, emitter)
    members = _members(entries, tail, needed_tail, emitter)
    if not num_required and not needs_any and not needed:
        members = NOTHING if members is None else optional(members)
    return None if members is None else sequence(text("{"), members, text("}"))


def _tail_node(tails: list[tuple[Language, Node]]) -> Node | None:
    nodes = [sequence(Token(key_text(names)), node) for names, node in tails if not lang.is_empty(names)]
    return options(*nodes) if nodes else None


def _members(entries: list[Entry], tail: Node | None, needed: Node | None, emitter: Emitter) -> Node | None:
    """At least one member, separated by commas; None if there can be none."""
    after = NOTHING if tail is None else times(sequence(COMMA, tail), 0, None)
    first_required = next((index for index, entry in enumerate(entries) if entry.is_required), None)
    if needed is not None:
        assert tail is not None, "what is needed is among the others"
        before = [_before_comma(entry) for entry in entries]
        return sequence(*before, times(sequence(tail, COMMA), 0, None), needed, after)
    if first_required is not None:
        before = [_before_comma(entry) for entry in entries[:first_required]]
        following = [_after_comma(entry) for entry in entries[first_required + 1 :]]
        return sequence(*before, entries[first_required].node, *following, after)
    if not entries:
        return None if tail is None else sequence(tail, after)
    return _all_optional(entries, tail, after, emitter)


def _before_comma(entry: Entry) -> Node:
    node = sequence(entry.node, COMMA)
    return node if entry.is_required else optional(node)


def _after_comma(entry: Entry) -> Node:
    node = sequence(COMMA, entry.node)
    return node if entry.is_required else optional(node)


def _all_optional(entries: list[Entry], tail: Node | None, after: Node, emitter: Emitter) -> Node:
    """Some member comes first; what follows each is shared, so that the grammar stays linear in their number."""
    rest: Node = after
    firsts: list[Node] = [] if tail is None else [sequence(tail, after)]
    for entry in reversed(entries):
        firsts.append(sequence(entry.node, rest))
        rest = emitter.named(sequence(_after_comma(entry), rest))
    return options(*reversed(firsts))


def _counted(
    found: Object, entries: list[Entry], tail: Node | None, low: int, high: int | None, emitter: Emitter
) -> Node | None:
    """Members of which there are low to high.

    NOTE: a name may come twice among the other properties, and a reader then counts it once. So these may fill an
    upper bound, but towards a lower one they count as one.
    """
    num_required = sum(entry.is_required for entry in entries)
    if max(low, high or 0) > MAX_COUNT:
        raise Unsupported(found.counts_at, "minProperties", f"counts beyond {MAX_COUNT} are not enforced")
    if tail is not None and low > num_required + 1:
        raise Unsupported(
            found.counts_at, "minProperties", "a property written twice counts once, which no grammar can tell"
        )
    if high is not None and (high < num_required or low > high):
        return None
    counter = _ObjectCounter(entries, tail, low, high, emitter)
    return sequence(text("{"), counter.start(), text("}"))


class _ObjectCounter:
    """Productions that carry the number of members so far."""

    def __init__(self, entries: list[Entry], tail: Node | None, low: int, high: int | None, emitter: Emitter) -> None:
        self._entries = entries
        self._tail = tail
        self._low = f"ge(_, {low})" if low else None
        self._more = None if high is None else f"lt(_, {high})"
        self._emitter = emitter

    def start(self) -> Node:
        rests = self._rests()
        firsts: list[Guarded] = []
        for index, entry in enumerate(self._entries):
            firsts.append(Guarded(sequence(entry.node, Call(rests[index + 1], "incr(_)")), self._more))
            if entry.is_required:
                break
        else:
            if self._tail is not None:
                firsts.append(Guarded(sequence(self._tail, Call(rests[-1], "incr(_)")), self._more))
            firsts.append(Guarded(NOTHING, self._low))
        return Call(self._emitter.add(Production(tuple(firsts), counts=True)), "0x0")

    def _rests(self) -> list[str]:
        """Names of what may follow once something has been written, from each entry on; the last are the others."""
        last = self._emitter.reserve()
        ends = [Guarded(NOTHING, self._low)]
        if self._tail is not None:
            ends.append(Guarded(sequence(COMMA, self._tail, Call(last, "incr(_)")), self._more))
        self._emitter.define(last, Production(tuple(ends), counts=True))
        names = [last]
        for entry in reversed(self._entries):
            ways = [Guarded(sequence(COMMA, entry.node, Call(names[0], "incr(_)")), self._more)]
            ways.extend([] if entry.is_required else [Guarded(Call(names[0], "_"))])
            names.insert(0, self._emitter.add(Production(tuple(ways), counts=True)))
        return names


# --- arrays ----------------------------------------------------------------------------------------------------------


def array_node(array: Array, emitter: Emitter) -> Node | None:
    """The text of a set of arrays; None if there are none.

    Raises:
        Unsupported: its items need to be compared, or counted in too many ways.
    """
    array = _trimmed(array, emitter)
    if array.high is not None and array.low > array.high:
        return None
    contains = [part for part in array.contains if part.low or part.high is not None]
    if array.unique is not None and (array.high is None or array.high > 1):
        return _unique(array, contains, emitter)
    if contains:
        return _containing(array, contains, emitter)
    return sequence(text("["), _items(array, emitter), text("]"))


def _trimmed(array: Array, emitter: Emitter) -> Array:
    """The same arrays with a bound where no further item is possible."""
    is_empty = emitter.emptiness.is_empty
    end = next((index for index, goal in enumerate(array.prefix) if is_empty(goal)), None)
    if end is None and is_empty(array.rest):
        end = len(array.prefix)
    high = min((bound for bound in (array.high, end) if bound is not None), default=None)
    return Array(array.prefix[:high], array.rest, array.low, high, array.contains, array.unique)


def _items(array: Array, emitter: Emitter) -> Node:
    count, low, high = len(array.prefix), array.low, array.high
    if high == 0:
        return NOTHING
    node = NOTHING
    if high is None or high > count:
        item = emitter.call(array.rest)
        written = max(count, 1)
        node = times(sequence(COMMA, item), max(low - written, 0), None if high is None else high - written)
        if not count:
            node = sequence(item, node)
            return node if low else optional(node)
    for index in reversed(range(count)):
        node = sequence(*([COMMA] if index else []), emitter.call(array.prefix[index]), node)
        node = node if index < low else optional(node)
    return node


def _unique(array: Array, contains: list[Contains], emitter: Emitter) -> Node | None:
    """Arrays without repetition: of few different values, or of items that cannot be equal."""
    pointer = array.unique or ""
    plain = Array(array.prefix, array.rest, array.low, array.high, tuple(contains))
    if array.high is not None and array.high <= len(array.prefix) and _are_disjoint(array.prefix, emitter):
        return array_node(plain, emitter)
    if array.prefix or contains:
        raise Unsupported(pointer, "uniqueItems", "no grammar compares items")
    values = emitter.finite_values(array.rest, MAX_UNIQUE)
    if values is None:
        raise Unsupported(pointer, "uniqueItems", "no grammar compares items, other than of few constants")
    if array.low > len(values):
        return None
    rest = emitter.reserve()
    low = f"bit_count_ge(_, {array.low})" if array.low else None
    high = None if array.high is None or array.high >= len(values) else f"bit_count_lt(_, {array.high})"
    first, following = [Guarded(NOTHING, low)], [Guarded(NOTHING, low)]
    for index, value in enumerate(values):
        after = Call(rest, f"set_bit({index})")
        unused = f"bit_clear({index})"
        first.append(Guarded(sequence(value, after)))
        following.append(Guarded(sequence(COMMA, value, after), f"and({unused}, {high})" if high else unused))
    emitter.define(rest, Production(tuple(following), counts=True))
    start = emitter.add(Production(tuple(first), counts=True))
    return sequence(text("["), Call(start, "0x0"), text("]"))


def _are_disjoint(goals: tuple[Goal, ...], emitter: Emitter) -> bool:
    pairs = ((a, b) for index, a in enumerate(goals) for b in goals[:index])
    return len(goals) <= 16 and all(emitter.emptiness.is_empty(both_goals(a, b)) for a, b in pairs)


def _containing(array: Array, contains: list[Contains], emitter: Emitter) -> Node | None:
    part = contains[0]
    if len(contains) > 1 or max(array.low, array.high or 0, part.low, part.high or 0) > MAX_COUNT:
        raise Unsupported(part.pointer, "contains", "several of it in one place are not enforced")
    if not array.prefix and (part.low, part.high) == (1, None) and array.low <= 1 and array.high is None:
        found = both_goals(array.rest, part.goal)
        if emitter.emptiness.is_empty(found):
            return None
        item = emitter.call(array.rest)
        around = times(sequence(item, COMMA), 0, None), times(sequence(COMMA, item), 0, None)
        return sequence(text("["), around[0], emitter.call(found), around[1], text("]"))
    counter = _ArrayCounter(array, part, emitter)
    return sequence(text("["), Call(counter.at(0), "0x0"), text("]"))


class _ArrayCounter:
    """Productions that carry the number of items, and of those that are contained."""

    LENGTH, FOUND = "[0:16]", "[16:32]"

    def __init__(self, array: Array, part: Contains, emitter: Emitter) -> None:
        self._array = array
        self._part = part
        self._emitter = emitter
        self._last = max(len(array.prefix), part.start, 1)
        self._names: dict[int, str] = {}

    def at(self, index: int) -> str:
        """What may stand from an index on; from `_last` on it is always the same."""
        index = min(index, self._last)
        if index not in self._names:
            self._names[index] = name = self._emitter.reserve()
            self._emitter.define(name, Production(tuple(self._ways(index)), counts=True))
        return self._names[index]

    def _ways(self, index: int) -> list[Guarded]:
        array, part = self._array, self._part
        ends = [f"ge({self.LENGTH}, {array.low})"] if array.low else []
        ends.extend([f"ge({self.FOUND}, {part.low})"] if part.low else [])
        ways = [Guarded(NOTHING, _all_of(ends))]
        more = [] if array.high is None else [f"lt({self.LENGTH}, {array.high})"]
        following = self.at(index + 1)
        for goal, is_found in self._goals(index):
            if self._emitter.emptiness.is_empty(goal):
                continue
            fits = [f"lt({self.FOUND}, {part.high})"] if is_found and part.high is not None else []
            item, comma = self._emitter.call(goal), [COMMA] if index else []
            rest = self._counting(item, following) if is_found else [item, Call(following, f"incr({self.LENGTH})")]
            ways.append(Guarded(sequence(*comma, *rest), _all_of([*more, *fits])))
        return ways

    def _goals(self, index: int) -> list[tuple[Goal, bool]]:
        """What the item may be, and whether it then counts as contained."""
        goal, part = item_goal(self._array, index), self._part
        if index < part.start:
            return [(goal, False)]
        # With a lower bound alone, leaving an item uncounted does no harm.
        others = [goal] if part.high is None else [both_goals(goal, other) for other in negations(part.goal)]
        return [(both_goals(goal, part.goal), True), *((other, False) for other in others)]

    def _counting(self, item: Node, following: str) -> list[Node]:
        """An item that counts in both ways, by two productions: each call does one."""
        way = Guarded(sequence(item, Call(following, f"incr({self.LENGTH})")))
        return [Call(self._emitter.add(Production((way,), counts=True)), f"incr({self.FOUND})")]


def _all_of(conditions: list[str]) -> str | None:
    if len(conditions) < 2:
        return conditions[0] if conditions else None
    return f"and({conditions[0]}, {_all_of(conditions[1:])})"
