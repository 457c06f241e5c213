"""The back end for what is no regular language, or too large for a table: llguidance, which finds states as it goes.

Its parser is asked over two vocabularies: over single bytes, to check a grammar and to answer what it accepts, and over
a model's tokens. It keeps its errors to itself until it is asked, so every call here is followed by that question.
"""

from __future__ import annotations

import functools
import json
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from msgspec import Struct

from streamgen.errors import GenerationError, SchemaError, SchemaTooComplex
from streamgen.grammar.grammar import GrammarStats

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from streamgen.grammar.grammar import Matcher, TokenGrammar
    from streamgen.grammar.vocabulary import GrammarVocabulary

_MAX_LEXER_STATES = 50_000  # one to two KB each, of one sequence
_TOO_COMPLEX = ("too big", "too complex", "too large", "too many", "too deeply", "limit", "max is")  # in its words


# Without it, the library turns text that must follow into tokens of its own choice, and allows only those.
_NO_FORCING = '%llguidance {"no_forcing": true}'


def regex_grammar(rust: str) -> str:
    """What a regular expression in Rust's syntax matches whole."""
    return lark_grammar("start: TEXT\nTEXT: /" + rust.replace("/", "\\/") + "/")


def lark_grammar(text: str) -> str:
    """A grammar in Lark's syntax."""
    grammar: str = _library().LLMatcher.grammar_from_lark(f"{text}\n{_NO_FORCING}\n")
    return grammar


def lark_literal(text: str) -> str:
    """Exactly this text in Lark's syntax; its lexer takes no control characters."""
    quoted = json.dumps(text, ensure_ascii=False)
    return "".join(char if char.isprintable() else _unicode_escape(char) for char in quoted)


def _unicode_escape(char: str) -> str:
    return json.dumps(char, ensure_ascii=True)[1:-1] if ord(char) > 0x7F else f"\\u{ord(char):04x}"


class LlguidanceDump(Struct, frozen=True, tag="llguidance"):
    """A grammar as plain data: its text in the library's own terms."""

    stats: GrammarStats
    text: str


class LlguidanceGrammar:
    """A grammar of llguidance as a `Grammar`."""

    def __init__(self, text: str, stats: GrammarStats) -> None:
        self._text = text
        self.stats = stats
        self._bytes = _compile(_byte_tokenizer(), text)

    @classmethod
    def compile(cls, text: str, *, warnings: tuple[str, ...] = ()) -> LlguidanceGrammar:
        """Check a grammar and keep it.

        Raises:
            SchemaError: it is none, or no text matches. SchemaTooComplex: it passes a limit.
        """
        start = time.perf_counter()
        grammar = cls(text, GrammarStats(backend="llguidance"))
        grammar._expect_texts()
        grammar.stats = GrammarStats(
            backend="llguidance",
            bytes=4 * len(text),
            seconds=time.perf_counter() - start,
            warnings=warnings,
        )
        return grammar

    @classmethod
    def load(cls, dump: LlguidanceDump) -> LlguidanceGrammar:
        """What was dumped."""
        return cls(dump.text, dump.stats)

    def accepts(self, text: bytes) -> bool:
        """Whether exactly this may be the whole output."""
        matcher = self._after(text)
        return matcher is not None and bool(matcher.is_accepting())

    def prefix_ok(self, text: bytes) -> bool:
        """Whether some output begins with this."""
        return self._after(text) is not None

    def dump(self) -> bytes:
        """Everything about it."""
        return msgspec.msgpack.encode(LlguidanceDump(self.stats, self._text))

    def bind(self, vocabulary: GrammarVocabulary) -> TokenGrammar:
        """The grammar over the tokens of a vocabulary.

        Raises:
            SchemaError: the vocabulary cannot spell it.
        """
        return LlguidanceTokens(self, vocabulary, _compile(_tokenizers.of(vocabulary), self._text))

    def _after(self, text: bytes) -> Any:
        matcher = self._bytes.deep_copy()
        taken = matcher.try_consume_tokens(list(text))
        _check(matcher, "output")
        return matcher if taken == len(text) else None

    def _expect_texts(self) -> None:
        """The library reads a grammar of no texts, and then allows only the end."""
        first = self._bytes.deep_copy()
        mask = np.frombuffer(first.compute_bitmask(), np.uint8)
        error = first.get_error() if first.is_error() else ""
        if "NoExtension" in error or (not error and not mask[:32].any() and not first.is_accepting()):
            raise SchemaError("output: expected a grammar of some text, got one that no text matches")
        _check(first, "output")


class LlguidanceTokens:
    """A grammar of llguidance over a vocabulary; a `TokenGrammar`. Shared: every sequence gets a copy of the parser."""

    def __init__(self, grammar: LlguidanceGrammar, vocabulary: GrammarVocabulary, compiled: Any) -> None:
        self.grammar = grammar
        self.vocabulary = vocabulary
        self._compiled = compiled
        self._stops = frozenset(vocabulary.stop_ids)
        self._num_words = -(-vocabulary.vocab_size // 32)
        self._expect_tokens()

    @property
    def stats(self) -> GrammarStats:
        """Those of the grammar."""
        return self.grammar.stats

    def start(self) -> Matcher:
        """A sequence that has no tokens yet."""
        return LlguidanceMatcher(self._compiled.deep_copy(), self._stops, self._num_words)

    def _expect_tokens(self) -> None:
        words = np.zeros(self._num_words, np.uint32)
        try:
            self.start().fill_mask(words)
        except GenerationError as error:
            raise SchemaError(
                "output: expected a grammar that the model's tokens can spell; there is none for the first character"
            ) from error


class LlguidanceMatcher:
    """One sequence's place in a grammar of llguidance. A `Matcher`.

    Stop ids are kept away from the library, which takes only some of them, and not everywhere.
    """

    def __init__(self, matcher: Any, stops: frozenset[int], num_words: int) -> None:
        self._matcher = matcher
        self._stops = stops
        self._num_words = num_words
        self._num_stops = 0  # 1 after a stop id
        self._mask: NDArray[np.uint32] | None = None  # of this place, once it was asked for

    @property
    def may_stop(self) -> bool:
        """Whether the output may end here."""
        return self._num_stops > 0 or bool(self._matcher.is_accepting())

    @property
    def must_stop(self) -> bool:
        """Whether it has to: nothing can follow."""
        return self._num_stops > 0 or bool(self._matcher.is_stopped())

    def advance(self, token: int) -> bool:
        """Take a token; False, and no change, if it is not allowed."""
        if self._num_stops:
            return False
        if token in self._stops:
            self._num_stops = int(self._matcher.is_accepting())
            return self._num_stops > 0
        taken = self._matcher.try_consume_tokens([token])
        self._mask = None
        _check_running(self._matcher)
        return bool(taken)

    def rollback(self, count: int) -> None:
        """Forget the last `count` tokens."""
        stops = min(count, self._num_stops)
        self._num_stops -= stops
        if count > stops:
            self._matcher.rollback(count - stops)
            self._mask = None
            _check_running(self._matcher)

    def fill_mask(self, words: NDArray[np.uint32]) -> None:
        """Write what is allowed next: bit t & 31 of word t >> 5 for token t, [ceil(vocab / 32)].

        Raises:
            GenerationError: nothing is, or finding out passed a limit.
        """
        assert words.shape == (self._num_words,) and words.flags.c_contiguous, "words of a whole mask"
        words[:] = 0 if self._num_stops else self._allowed()

    def forced_run(self, limit: int) -> tuple[int, ...]:
        """The tokens that follow without a choice, at most `limit`."""
        run: list[int] = []
        while len(run) < limit:
            token = self._only_choice()
            if token is None or not self.advance(token):
                break
            run.append(token)
        self.rollback(len(run))
        return tuple(run)

    def _only_choice(self) -> int | None:
        if self.may_stop:
            return None
        words = self._allowed()
        places = np.flatnonzero(words)
        bits = int(words[places[0]])
        if len(places) != 1 or bits & (bits - 1):
            return None
        return int(places[0]) * 32 + bits.bit_length() - 1

    def _allowed(self) -> NDArray[np.uint32]:
        if self._mask is None:
            words = np.empty(self._num_words, np.uint32)
            self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
            _check_running(self._matcher)
            self._write_stops(words)
            if not words.any():
                raise GenerationError("output: the grammar came to a place where no token fits")
            self._mask = words
        return self._mask

    def _write_stops(self, words: NDArray[np.uint32]) -> None:
        may_stop = bool(self._matcher.is_accepting())
        for stop in self._stops:
            bit = np.uint32(1 << (stop & 31))
            words[stop >> 5] = words[stop >> 5] | bit if may_stop else words[stop >> 5] & ~bit


class _Tokenizer:
    """Tokens in the form that the library reads. It never has to turn a text into them as a model would."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokens: Sequence[bytes], stop_id: int) -> None:
        self.eos_token_id = stop_id
        self.special_token_ids = [number for number, token in enumerate(tokens) if not token]
        self.tokens = [token or b"<%d>" % number for number, token in enumerate(tokens)]

    def __call__(self, text: bytes | str) -> list[int]:
        raise NotImplementedError("grammars are matched token by token")


class _Tokenizers:
    """The library's tokenizer of each vocabulary, for as long as the vocabulary lives."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: weakref.WeakKeyDictionary[GrammarVocabulary, Any] = weakref.WeakKeyDictionary()

    def of(self, vocabulary: GrammarVocabulary) -> Any:
        """That of a vocabulary; building one takes a while, and is done once."""
        with self._lock:
            known = self._known.get(vocabulary)
            if known is None:
                known = self._known[vocabulary] = _tokenizer(vocabulary.tokens, vocabulary.stop_ids)
            return known


_tokenizers = _Tokenizers()


def _tokenizer(tokens: Sequence[bytes], stop_ids: Sequence[int]) -> Any:
    """Slices, which make masks inside strings fast, are added in a second step: the first holds the interpreter."""
    stops = list(stop_ids) or [next((number for number, token in enumerate(tokens) if not token), len(tokens) - 1)]
    library = _library().LLTokenizer
    tokenizer = library(_Tokenizer(tokens, stops[0]), eos_token=stops if len(stops) > 1 else None, slices=[])
    return tokenizer.with_slices(library.json_slices())


@functools.cache
def _byte_tokenizer() -> Any:
    return _tokenizer([*(bytes([byte]) for byte in range(256)), b""], [256])


def _library() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise SchemaError(
            "output: this grammar needs the package llguidance, which is not installed: pip install llguidance"
        ) from error
    return llguidance


def _compile(tokenizer: Any, text: str) -> Any:
    library = _library()
    limits = library.LLParserLimits(max_lexer_states=_MAX_LEXER_STATES, verbose_errors=False)
    matcher = library.LLMatcher(tokenizer, text, log_level=0, limits=limits)
    _check(matcher, "output")
    return matcher


def _check(matcher: Any, what: str) -> None:
    if not matcher.is_error():
        return
    error = matcher.get_error()
    if any(words in error.lower() for words in _TOO_COMPLEX):
        raise SchemaTooComplex(f"{what}: {_shortened(error)}", bound="llguidance")
    raise SchemaError(f"{what}: {_shortened(error)}")


def _check_running(matcher: Any) -> None:
    if matcher.is_error():
        raise GenerationError(f"output: the grammar failed: {_shortened(matcher.get_error())}")


def _shortened(error: str) -> str:
    """Its first line: what follows it shows the grammar."""
    return (error.strip().splitlines() or ["unknown error"])[0][:160]
