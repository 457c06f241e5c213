"""The prefix cache's index: which page holds the keys and values of which tokens.

A full page is named by a keyed hash of its token ids and of the name of the page before it, back to a root that is the
hash of the request's scope. So equal names mean equal tokens from the first one on, in one scope; without the key
nobody can make two different prompts meet. The index holds names and page numbers only; `PagePool` decides what goes.
"""

from __future__ import annotations

from array import array
from hashlib import blake2b
from typing import TYPE_CHECKING

from streamgen.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from streamgen.scheduling.pages import PagePool

MAX_KEY_BYTES = blake2b.MAX_KEY_SIZE
_NAME_BYTES = 32


class PrefixIndex:
    """Names of full pages -> page numbers.

    Raises:
        ConfigError: `key` is empty or longer than the hash takes.
    """

    def __init__(self, pool: PagePool, *, page_size: int, key: bytes) -> None:
        if not 1 <= len(key) <= MAX_KEY_BYTES:
            raise ConfigError(
                f"prefix_key: expected 1 to {MAX_KEY_BYTES} bytes, got {len(key)}; pass e.g. os.urandom(32)",
                option="prefix_key",
            )
        self._pool = pool
        self._page_size = page_size
        self._key = key
        self._pages: dict[bytes, int] = {}
        self._names: dict[int, bytes] = {}
        pool.on_evict = self._forget

    def __len__(self) -> int:
        return len(self._pages)

    def root(self, scope: str) -> bytes:
        """The name that stands before the first page of every sequence of a scope."""
        text = scope.encode("utf-8", "surrogatepass")
        return blake2b(text, key=self._key, digest_size=_NAME_BYTES, person=b"scope").digest()

    def extend_names(self, names: list[bytes], ids: Sequence[int], num_pages: int) -> None:
        """Append names until `names`, which begins with the root, has those of the first `num_pages` pages of `ids`."""
        size = self._page_size
        for i in range(len(names) - 1, num_pages):
            content = array("q", ids[i * size : (i + 1) * size]).tobytes()
            name = blake2b(names[-1] + content, key=self._key, digest_size=_NAME_BYTES, person=b"page").digest()
            names.append(name)

    def take(self, names: Sequence[bytes], max_pages: int) -> list[int]:
        """The longest indexed run of pages, at most `max_pages`, each with one more holder: the caller's."""
        found: list[int] = []
        for name in names[1 : 1 + max_pages]:
            page = self._pages.get(name)
            if page is None:
                break
            # NOTE: held at once, so that nothing that happens later in the same call can evict it.
            self._pool.retain(page)
            found.append(page)
        return found

    def insert(self, name: bytes, page: int) -> None:
        """Index a full page that the caller holds. If its name is known already, the page stays private."""
        if name not in self._pages:
            self._pages[name] = page
            self._names[page] = name
            self._pool.mark_indexed(page)

    def _forget(self, page: int) -> None:
        del self._pages[self._names.pop(page)]
