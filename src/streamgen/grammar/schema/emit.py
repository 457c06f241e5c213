"""The goals of a schema -> a grammar of the JSON text of what satisfies its root."""

from __future__ import annotations

from typing import TYPE_CHECKING

from streamgen.errors import SchemaError
from streamgen.grammar.schema import language as lang
from streamgen.grammar.schema.numbers import Number, finite_choices
from streamgen.grammar.schema.productions import Call, Grammar, Guarded, Node, Production, Token, options
from streamgen.grammar.schema.scalars import number_node
from streamgen.grammar.schema.spelling import string_text
from streamgen.grammar.schema.structures import array_node, object_nodes
from streamgen.grammar.schema.values import Array, Atom, Boolean, Goal, Null, Object, Text

if TYPE_CHECKING:
    from streamgen.grammar.schema.expand import Expander


class Emitter:
    """Makes one production for each goal that is reached, and more where a structure needs them."""

    def __init__(self, expander: Expander) -> None:
        self._expander = expander
        self.emptiness = expander.emptiness
        self._productions: dict[str, Production] = {}
        self._names: dict[Goal, str] = {}
        self._named: dict[Node, str] = {}
        self._pending: list[Goal] = []
        self._num_names = 0

    def emit(self, goal: Goal) -> Grammar:
        """The grammar of a goal.

        Raises:
            SchemaError: nothing satisfies it.
            Unsupported: a keyword is not enforced.
        """
        if self.emptiness.is_empty(goal):
            raise self._contradiction()
        self.call(goal)
        while self._pending:
            pending = self._pending.pop()
            self._productions[self._names[pending]] = self._production(pending)
        return Grammar(self._productions, self._names[goal])

    def _contradiction(self) -> SchemaError:
        wanted = "expected a schema that some JSON value satisfies"
        if self._expander.conflicts:
            found = self._expander.conflicts[0]
            return SchemaError(f"{found.message}; {wanted}", pointer=found.pointer, keyword=found.keyword)
        reason = "its keywords contradict each other, or it is recursive without an end"
        return SchemaError(f"/: {wanted}, but {reason}", pointer="")

    def call(self, goal: Goal) -> Node:
        """What stands for a value that satisfies a goal."""
        if goal not in self._names:
            self._names[goal] = self.reserve()
            self._pending.append(goal)
        return Call(self._names[goal])

    def named(self, node: Node) -> Node:
        """The same under a name of its own, which keeps a grammar small where it is used often."""
        if node not in self._named:
            self._named[node] = self.add(Production((Guarded(node),)))
        return Call(self._named[node])

    def reserve(self) -> str:
        """A name that nothing has yet."""
        self._num_names += 1
        return f"r{self._num_names}"

    def define(self, name: str, production: Production) -> None:
        """Say what a reserved name stands for."""
        self._productions[name] = production

    def add(self, production: Production) -> str:
        """A new name for a production."""
        name = self.reserve()
        self.define(name, production)
        return name

    def _production(self, goal: Goal) -> Production:
        atoms = [atom for atom in self._expander.expand(goal) if not self.emptiness.is_atom_empty(atom)]
        nodes: list[Node] = []
        languages: list[lang.Language] = []
        for atom in atoms:
            for node in self._nodes(atom):
                if isinstance(node, Token):
                    languages.append(node.language)
                else:
                    nodes.append(node)
        if languages:
            nodes.insert(0, Token(lang.union(*languages)))
        return Production((Guarded(options(*nodes)),))

    def _nodes(self, atom: Atom) -> list[Node]:
        match atom:
            case Null():
                return [Token(lang.words(["null"]))]
            case Boolean():
                return [Token(lang.words("true" if value else "false" for value in atom.values))]
            case Number():
                return [number_node(atom, has_point=self._has_point(atom))]
            case Text():
                return [Token(string_text(atom.language))]
            case Array():
                node = array_node(atom, self)
                return [] if node is None else [node]
            case Object():
                return object_nodes(atom, self)

    def _has_point(self, number: Number) -> bool:
        """Whether an integer may be written as 1.0: not in draft 4, and not where a class reads it."""
        return not (self._expander.is_closed or (self._expander.draft <= 4 and number.is_integer))

    def finite_values(self, goal: Goal, limit: int) -> list[Node] | None:
        """One node for each different value that satisfies a goal, where these are few constants."""
        found: list[Node] = []
        for atom in self._expander.expand(goal):
            nodes = self._constants(atom)
            if nodes is None or len(found) + len(nodes) > limit:
                return None
            found.extend(nodes)
        return list(dict.fromkeys(found))

    def _constants(self, atom: Atom) -> list[Node] | None:
        match atom:
            case Text(language=lang.Words(words)):
                return [Token(string_text(lang.words([word]))) for word in words]
            case Number():
                choices = finite_choices(atom)
                singles = [Number(choices=(value,), is_integer=atom.is_integer) for value in choices or ()]
                return (
                    None if choices is None else [number_node(one, has_point=self._has_point(one)) for one in singles]
                )
            case Boolean():
                return [Token(lang.words(["true" if value else "false"])) for value in atom.values]
            case Null():
                return self._nodes(atom)
            case _:
                return None
