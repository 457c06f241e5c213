"""What a request may ask of the sampler, checked before any compute.

A field of `None` takes the checkpoint's own `generation_config.json`, else the default in `ResolvedSampling`.
"""

from __future__ import annotations

import math
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Protocol, TypedDict

import msgspec
from msgspec import Struct

from streamgen.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray

MAX_TOP_LOGPROBS = 20
MAX_STOPS = 16
MAX_STOP_BYTES = 256
MAX_BIASES = 1024
MAX_STOP_IDS = 64


class LogitsProcessor(Protocol):
    """Changes what a request's next token is drawn from.

    It is called for each token, in a thread of the engine, one call at a time. It must depend on `ids` alone: after a
    preemption, or beside drafts, it may be called again for a place where it was called before, or for tokens that are
    not kept.
    """

    def __call__(self, ids: NDArray[np.int32], logits: NDArray[np.float32], /) -> NDArray[np.float32] | None:
        """Change `logits` in place and return None, or return an array to take instead.

        ids      int32 [length], read-only: prompt and output so far
        logits   float32 [vocab], the model's own; -inf forbids a token, NaN is an error, as is -inf everywhere
        returns  None or float32 [vocab]
        """
        ...


class SamplingFields(TypedDict, total=False):
    """The fields of `Sampling`, as keyword arguments of `stream`, `generate`, ..."""

    max_tokens: int | None
    min_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    typical_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | None
    stop: str | tuple[str, ...] | list[str] | None
    stop_ids: tuple[int, ...] | list[int] | None
    include_stop: bool | None
    ignore_eos: bool | None
    seed: int | None
    logprobs: int | None
    prompt_logprobs: int | None


class Sampling(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """How tokens are chosen and when a request ends.

    max_tokens           most tokens to generate; None: what the context leaves
    min_tokens           end-of-text is not allowed before this many
    temperature          0 is greedy; 1 leaves the distribution as it is
    top_p, top_k, min_p, typical_p   truncations, in the order top_k, top_p, min_p, typical_p; off at 1, 0, 0, 1
    repetition_penalty   > 1 makes tokens of prompt and output less likely (CTRL, arXiv:1909.05858)
    presence_penalty, frequency_penalty   subtracted once, or once per occurrence, for tokens of the output (OpenAI)
    logit_bias           token id -> what is added to its logit
    stop                 strings that end the text; kept out of it unless include_stop
    stop_ids             token ids that end the text, beside the checkpoint's own (which ignore_eos switches off)
    seed                 the request's random numbers depend on (seed, sample index, position) alone
    logprobs             None: none; k: the chosen token's natural-log probability, and the k likeliest alternatives.
                         They are of the model's own distribution, before penalties, bias and temperature
    prompt_logprobs      the same for the prompt's tokens
    """

    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    stop: tuple[str, ...] | None = None
    stop_ids: tuple[int, ...] | None = None
    include_stop: bool | None = None
    ignore_eos: bool | None = None
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("stop", self.stop), ("stop_ids", self.stop_ids)):
            if isinstance(value, str):
                msgspec.structs.force_setattr(self, name, (value,))
            elif isinstance(value, list):
                msgspec.structs.force_setattr(self, name, tuple(value))
        _check(self)


class ResolvedSampling(Struct, frozen=True, kw_only=True):
    """`Sampling` with every default filled in: what the engine runs. `None` is left only where it means "none"."""

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    include_stop: bool = False
    ignore_eos: bool = False
    seed: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None


def make_sampling(sampling: Sampling | None, fields: Mapping[str, Any]) -> Sampling:
    """Join a `Sampling` with keyword fields; the keywords win.

    Raises:
        InvalidRequest: an unknown field (the nearest known name is suggested), or a value that cannot be used.
    """
    for name in fields:
        if name not in Sampling.__struct_fields__:
            near = get_close_matches(name, Sampling.__struct_fields__, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise InvalidRequest(f"unknown field {name!r}{hint}", param=name)
    base = msgspec.structs.asdict(sampling) if sampling is not None else {}
    return Sampling(**{**base, **fields})


def resolve_sampling(sampling: Sampling, defaults: Sampling, *, seed: int) -> ResolvedSampling:
    """Fill what the request left open from the checkpoint's `defaults`, then from the field's default."""
    chosen: dict[str, Any] = {}
    for name in ResolvedSampling.__struct_fields__:
        value = getattr(sampling, name)
        if value is None:
            value = getattr(defaults, name)
        if value is not None:
            chosen[name] = value
    chosen.setdefault("seed", seed)
    return ResolvedSampling(**chosen)


def _check(s: Sampling) -> None:
    _check_int("max_tokens", s.max_tokens, low=1)
    _check_int("min_tokens", s.min_tokens, low=0)
    _check_float("temperature", s.temperature, low=0.0, high=100.0)
    _check_float("top_p", s.top_p, low=0.0, high=1.0, open_low=True)
    _check_int("top_k", s.top_k, low=0)
    _check_float("min_p", s.min_p, low=0.0, high=1.0)
    _check_float("typical_p", s.typical_p, low=0.0, high=1.0, open_low=True)
    _check_float("repetition_penalty", s.repetition_penalty, low=0.0, high=100.0, open_low=True)
    _check_float("presence_penalty", s.presence_penalty, low=-100.0, high=100.0)
    _check_float("frequency_penalty", s.frequency_penalty, low=-100.0, high=100.0)
    _check_int("seed", s.seed, low=0, high=2**64 - 1)
    _check_int("logprobs", s.logprobs, low=0, high=MAX_TOP_LOGPROBS)
    _check_int("prompt_logprobs", s.prompt_logprobs, low=0, high=MAX_TOP_LOGPROBS)
    _check_bool("include_stop", s.include_stop)
    _check_bool("ignore_eos", s.ignore_eos)
    _check_stops(s.stop)
    _check_stop_ids(s.stop_ids)
    _check_bias(s.logit_bias)
    if s.min_tokens is not None and s.max_tokens is not None and s.min_tokens > s.max_tokens:
        raise InvalidRequest(
            f"min_tokens: expected <= max_tokens ({s.max_tokens}), got {s.min_tokens}", param="min_tokens"
        )


def _check_int(name: str, value: Any, *, low: int, high: int = 2**31 - 1) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequest(f"{name}: expected an integer, got {type(value).__name__}", param=name)
    if not low <= value <= high:
        wanted = f">= {low}" if value < low else f"<= {high}"
        raise InvalidRequest(f"{name}: expected {wanted}, got {value}", param=name)


def _check_float(name: str, value: Any, *, low: float, high: float, open_low: bool = False) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidRequest(f"{name}: expected a number, got {type(value).__name__}", param=name)
    if not math.isfinite(value):
        raise InvalidRequest(f"{name}: expected a finite number, got {value}", param=name)
    if value < low or value > high or (open_low and value == low):
        sign = ">" if open_low else ">="
        raise InvalidRequest(f"{name}: expected {sign} {low:g} and <= {high:g}, got {value:g}", param=name)


def _check_bool(name: str, value: Any) -> None:
    if value is not None and not isinstance(value, bool):
        raise InvalidRequest(f"{name}: expected true or false, got {type(value).__name__}", param=name)


def _check_stops(stop: Any) -> None:
    if stop is None:
        return
    if not isinstance(stop, tuple) or not all(isinstance(s, str) for s in stop):
        raise InvalidRequest("stop: expected a string or a sequence of strings", param="stop")
    if len(stop) > MAX_STOPS:
        raise InvalidRequest(f"stop: expected <= {MAX_STOPS} strings, got {len(stop)}", param="stop")
    for text in stop:
        size = len(text.encode("utf-8", "surrogatepass"))
        if not 1 <= size <= MAX_STOP_BYTES:
            raise InvalidRequest(f"stop: expected strings of 1 to {MAX_STOP_BYTES} bytes, got {size}", param="stop")


def _check_stop_ids(ids: Any) -> None:
    if ids is None:
        return
    if not isinstance(ids, tuple) or not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise InvalidRequest("stop_ids: expected a sequence of token ids", param="stop_ids")
    if len(ids) > MAX_STOP_IDS:
        raise InvalidRequest(f"stop_ids: expected <= {MAX_STOP_IDS} ids, got {len(ids)}", param="stop_ids")


def _check_bias(bias: Any) -> None:
    if bias is None:
        return
    if not isinstance(bias, dict):
        raise InvalidRequest(
            f"logit_bias: expected a mapping of token id to number, got {type(bias).__name__}", param="logit_bias"
        )
    if len(bias) > MAX_BIASES:
        raise InvalidRequest(f"logit_bias: expected <= {MAX_BIASES} entries, got {len(bias)}", param="logit_bias")
    for token, value in bias.items():
        if isinstance(token, bool) or not isinstance(token, int):
            raise InvalidRequest(
                f"logit_bias: expected token ids as keys, got {type(token).__name__}", param="logit_bias"
            )
        _check_float("logit_bias", value, low=-1000.0, high=1000.0)
