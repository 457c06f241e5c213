"""Typed reads from a checkpoint's configuration, a stranger's file: a complaint names key, wanted and found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from streamgen.errors import CorruptWeights

MAX_SIZE = 1 << 24  # of any dimension: a lie about a size is refused before anything is allocated
MAX_CONTEXT = 1 << 30  # positions are int32
MAX_NUMBER = 1e30  # float32 still holds it


class Fields:
    """A mapping of configuration values; `source` names it in errors. A value of None counts as missing."""

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self._values = values
        self._source = source

    def __contains__(self, key: str) -> bool:
        return self._values.get(key) is not None

    def is_null(self, key: str) -> bool:
        """Whether the key is there with a null: said to be absent, rather than left to the default."""
        return key in self._values and self._values[key] is None

    def size(self, key: str, default: int | None = None, *, least: int = 1, most: int = MAX_SIZE) -> int:
        """An integer in least .. most; required where there is no default."""
        value = self._get(key, default)
        if not _is_int(value) or not least <= value <= most:
            self.fail(key, f"an integer in {least} .. {most}", value)
        return int(value)

    def number(self, key: str, default: float | None = None, *, above: float = 0.0) -> float:
        """A finite number over `above`; required where there is no default."""
        value = self._get(key, default)
        # NOTE: compared before float(): an integer of JSON has no limit, and a huge one does not convert.
        if not _is_number(value) or not above < value < MAX_NUMBER:
            self.fail(key, f"a finite number over {above:g}", value)
        return float(value)

    def optional_number(self, key: str) -> float | None:
        """A positive finite number; None where the key is missing or 0."""
        return self.number(key) if self._values.get(key) else None

    def flag(self, key: str, default: bool) -> bool:
        """True or False."""
        value = self._get(key, default)
        if not isinstance(value, bool):
            self.fail(key, "true or false", value)
        return value

    def text(self, key: str, default: str | None = None) -> str:
        """A string; required where there is no default."""
        value = self._get(key, default)
        if not isinstance(value, str):
            self.fail(key, "a string", value)
        return value

    def is_list(self, key: str) -> bool:
        """Whether the value is a sequence."""
        return isinstance(self._values.get(key), Sequence) and not isinstance(self._values[key], str | bytes)

    def texts(self, key: str) -> list[str] | None:
        """A list of strings, or None where the key is missing."""
        value = self._values.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            self.fail(key, "a list of strings", value)
        return value

    def section(self, key: str) -> Mapping[str, Any]:
        """A mapping; empty where the key is missing."""
        value = self._values.get(key)
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            self.fail(key, "a mapping", value)
        return value

    def fail(self, key: str, wanted: str, found: object) -> NoReturn:
        """Raise CorruptWeights about a key."""
        what = "nothing" if found is None else repr(found)
        what = what if len(what) <= 80 else what[:77] + "..."
        raise CorruptWeights(f"{self._source}: {key}: expected {wanted}, got {what}")

    def _get(self, key: str, default: Any) -> Any:  # Any: whatever the file holds
        value = self._values.get(key)
        return default if value is None else value


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
