"""Reasoning: the part of an output that stands between `<think>` and `</think>`, before the answer.

Where the two are tokens they are told by their ids, else by their text. White space next to them belongs to the format,
not to what is said, and is dropped.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

from msgspec import Struct

if TYPE_CHECKING:
    from collections.abc import Callable

_PAIRS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
)


class ReasoningFormat(Struct, frozen=True, kw_only=True):
    """How a model marks its reasoning. The ids are None where the texts are no tokens."""

    begin: str
    end: str
    begin_id: int | None = None
    end_id: int | None = None

    def has_opened(self, prompt_end: str) -> bool:
        """Whether a prompt that ends like this leaves the model in its reasoning."""
        return prompt_end.rstrip().endswith(self.begin)

    def has_closed(self, prompt_end: str) -> bool:
        """Whether a prompt that ends like this leaves no reasoning to come."""
        return prompt_end.rstrip().endswith(self.end)


def find_reasoning(template: str, find_id: Callable[[str], int | None]) -> ReasoningFormat | None:
    """The format that a chat template knows of, None if it knows of none.

    find_id   the id of a token by its literal text; None if there is none
    """
    for begin, end in _PAIRS:
        if begin in template or end in template:
            begin_id, end_id = find_id(begin), find_id(end)
            is_token = begin_id is not None and end_id is not None
            return ReasoningFormat(
                begin=begin, end=end, begin_id=begin_id if is_token else None, end_id=end_id if is_token else None
            )
    return None


class _Stage(Enum):
    BEGINNING = "beginning"  # reasoning may begin
    REASONING = "reasoning"
    ANSWER_BEGINS = "answer begins"  # white space behind the reasoning is dropped
    ANSWER = "answer"


class ReasoningSplitter:
    """Tells reasoning from answer in a text that arrives in parts. Owned by whoever feeds it.

    is_open   the prompt has opened the reasoning: the text begins inside of it
    markers   ids that are to be fed as tokens

    Every call returns (reasoning, answer): what of either can be shown now. Reasoning always comes before the answer.
    """

    def __init__(self, format_: ReasoningFormat, *, is_open: bool) -> None:
        self.markers = frozenset(i for i in (format_.begin_id, format_.end_id) if i is not None)
        self._format = format_
        self._stage = _Stage.REASONING if is_open else _Stage.BEGINNING
        self._space: list[str] = []  # that may stand before a marker
        self._prefix = ""  # of a marker that is spelled
        self._has_shown = False  # any of the reasoning

    @property
    def is_reasoning(self) -> bool:
        """Whether what comes next is reasoning."""
        return self._stage is _Stage.REASONING

    def feed(self, text: str) -> tuple[str, str]:
        """More text."""
        match self._stage:
            case _Stage.ANSWER:
                return "", text
            case _Stage.ANSWER_BEGINS:
                return "", self._begin_answer(text)
            case _Stage.BEGINNING:
                return self._feed_beginning(text)
            case _Stage.REASONING:
                return self._feed_reasoning(text)

    def feed_token(self, token: int, text: str) -> tuple[str, str]:
        """A token of `markers`; `text` is what it adds to a text where it marks nothing."""
        if self._stage is _Stage.BEGINNING and token == self._format.begin_id:
            self._space.clear()
            self._stage = _Stage.REASONING
            return "", ""
        if self._stage is _Stage.REASONING and token == self._format.end_id:
            self._end_reasoning()
            return "", ""
        return self.feed(text)

    def finish(self) -> tuple[str, str]:
        """The output is over: what was held belongs to where it stands."""
        held = "".join(self._space) + self._prefix
        self._space.clear()
        self._prefix = ""
        if not self.is_reasoning:
            return "", held
        return (held if self._has_shown else held.lstrip()), ""

    def finish_beginning(self) -> tuple[str, str]:
        """What comes next is answer, with no reasoning before it; what was held in case there was is answer as well."""
        if self._stage is not _Stage.BEGINNING:
            return "", ""
        held = self._take_space() + self._prefix
        self._prefix = ""
        self._stage = _Stage.ANSWER
        return "", held

    def _feed_beginning(self, text: str) -> tuple[str, str]:
        begin = self._format.begin
        body = self._prefix + text
        if not self._prefix:
            body = text.lstrip()
            self._space.append(text[: len(text) - len(body)])
        if self._format.begin_id is None:
            if body.startswith(begin):
                self._prefix = ""
                self._space.clear()
                self._stage = _Stage.REASONING
                return self._feed_reasoning(body[len(begin) :])
            if begin.startswith(body):
                self._prefix = body
                return "", ""
        if not body:
            return "", ""
        self._stage = _Stage.ANSWER
        self._prefix = ""
        return "", self._take_space() + body

    def _feed_reasoning(self, text: str) -> tuple[str, str]:
        if self._format.end_id is not None:
            return self._show(text), ""
        before, found, rest = (self._prefix + text).partition(self._format.end)
        if found:
            shown = self._show(before)
            self._end_reasoning()
            return shown, self._begin_answer(rest)
        count = _count_begun(before, self._format.end)
        self._prefix = before[len(before) - count :]
        return self._show(before[: len(before) - count]), ""

    def _show(self, text: str) -> str:
        """Reasoning without the white space at its beginning, and at its end as far as that is known."""
        if not self._has_shown:
            text = text.lstrip()
        body = text.rstrip()
        if not body:
            self._space.append(text)
            return ""
        shown = self._take_space() + body
        self._space.append(text[len(body) :])
        self._has_shown = True
        return shown

    def _end_reasoning(self) -> None:
        self._space.clear()
        self._prefix = ""
        self._stage = _Stage.ANSWER_BEGINS

    def _begin_answer(self, text: str) -> str:
        text = text.lstrip()
        if text:
            self._stage = _Stage.ANSWER
        return text

    def _take_space(self) -> str:
        space = "".join(self._space)
        self._space.clear()
        return space


def _count_begun(text: str, marker: str) -> int:
    """How many characters at the end of `text` could be the beginning of `marker`."""
    most = min(len(text), len(marker) - 1)
    return next((count for count in range(most, 0, -1) if text.endswith(marker[:count])), 0)
