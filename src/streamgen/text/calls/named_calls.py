"""Calls whose name stands before their arguments, not in one object with them: `[TOOL_CALLS]name[ARGS]{...}`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from streamgen.text.calls.parser import CallParser, Marker, MarkerKind, Misfit, Steps

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_MAX_HEAD = 512


class NamedCalls(CallParser):
    """A block is a head that holds the name, then the arguments as an object; it ends with them.

    read_head   the name in a head, None if there is none
    """

    def __init__(
        self, markers: Mapping[int, Marker], *, read_head: Callable[[str], str | None], begin: str = ""
    ) -> None:
        self._read_head = read_head
        super().__init__(markers, begin=begin)

    def _calls(self) -> Steps[None]:
        name = self._read_head((yield from self._head()))
        if not name:
            raise Misfit
        self._start_call(name)
        yield from self._container("{", self._arguments)
        self._end_call()

    def _head(self) -> Steps[str]:
        """Everything before the `{`, which is taken."""
        head: list[str] = []
        for _ in range(_MAX_HEAD):
            symbol = yield
            if symbol == "{":
                return "".join(head)
            if isinstance(symbol, str):
                head.append(symbol)
            elif symbol.kind is MarkerKind.INNER:
                head.append(symbol.literal)
            else:
                break
        raise Misfit
