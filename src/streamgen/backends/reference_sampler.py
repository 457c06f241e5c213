"""The sampler, said plainly: one row of logits at a time, in numpy.

It defines what the fast samplers must do. A row goes through: log-probabilities of the raw logits, if asked for; the
host's logits processors, if it has some (they run between `finish_row` and `sample_row`); bias; grammar mask, and bans
as far as they leave something of it; penalties; temperature; top_k, top_p, min_p, typical_p, each on what the former
kept; one draw. Logits are changed in float32, so that ties stay ties in every implementation; probabilities are in
float64.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from streamgen.backends.base import GRAMMAR

if TYPE_CHECKING:
    from streamgen.backends.base import Float32Array, StepInputs, StepOutputs

Float64Array = NDArray[np.float64]

_MAX = np.finfo(np.float32).max


def finish_row(inputs: StepInputs, outputs: StepOutputs, index: int, logits: Float32Array) -> None:
    """What a step does with row `index` after the head: sample it, or write its logits [vocab] out."""
    place = int(inputs.samples[index]["logits"])
    if place < 0:
        sample_row(inputs, outputs, index, logits)
    else:
        outputs.logits[place] = _cleaned(logits)


def sample_row(
    inputs: StepInputs, outputs: StepOutputs, index: int, logits: Float32Array, *, raw: Float32Array | None = None
) -> None:
    """Sample row `index` of inputs.samples.

    logits [vocab]. raw [vocab]: the model's own, where `logits` were changed since; log-probabilities are theirs.
    Writes the row's entries of `outputs` and, where the row says so, inputs.tokens.
    """
    row = inputs.samples[index]
    cleaned = _cleaned(logits)
    token = int(row["target"])
    if token < 0:
        token = _choose(inputs, row, cleaned)
    outputs.token[index] = token
    if row["num_top"] >= 0:
        _report(outputs, index, cleaned if raw is None else raw, token, int(row["num_top"]))
    if row["write"]:
        inputs.tokens[row["slot"], row["position"] + 1] = token


def uniform(seed: int, position: int, sample_index: int) -> float:
    """The random number in [0, 1) of the token that follows `position`: 53 bits, the first word on top."""
    words = philox((seed & 0xFFFFFFFF, seed >> 32), (position + 1, sample_index, 0, 0))
    return ((words[0] << 32 | words[1]) >> 11) * 2.0**-53


def philox(key: tuple[int, int], counter: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011)."""
    k0, k1 = key
    c0, c1, c2, c3 = counter
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & 0xFFFFFFFF, (p0 >> 32) ^ c3 ^ k1, p0 & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def _choose(inputs: StepInputs, row: np.void, raw: Float32Array) -> int:
    x = _biased(inputs, row, raw)
    is_allowed = _allowed(inputs, row, len(x))
    x[~is_allowed] = -np.inf
    x = _penalized(inputs, row, x)
    best = int(np.argmax(x))  # the lowest id among equals
    if x[best] == -np.inf:
        return int(np.argmax(is_allowed))  # nothing likely is allowed: the lowest id that is
    if not row["temperature"] > 0:
        return best
    # The maximum is subtracted first: a quotient is then finite or -inf, however small the temperature.
    with np.errstate(over="ignore"):
        x = (x - x[best]) / row["temperature"]
    return _draw(_truncated(x, row), uniform(int(row["seed"]), int(row["position"]), int(row["sample_index"])))


def _cleaned(logits: Float32Array) -> Float32Array:
    """Numbers that compare and subtract: NaN becomes -inf, +inf the largest float."""
    return np.where(np.isnan(logits), np.float32(-np.inf), np.minimum(logits, _MAX)).astype(np.float32)


def _biased(inputs: StepInputs, row: np.void, raw: Float32Array) -> Float32Array:
    x = raw.copy()
    chosen = slice(row["bias_start"], row["bias_start"] + row["bias_count"])
    for token, value in zip(inputs.bias_ids[chosen], inputs.bias_values[chosen], strict=True):
        x[token] += value
    return _cleaned(x)


def _allowed(inputs: StepInputs, row: np.void, vocab: int) -> NDArray[np.bool_]:
    is_allowed = np.ones(vocab, np.bool_)
    words = _mask(inputs, row, vocab)
    if words is not None:
        ids = np.arange(vocab)
        is_allowed = (words[ids // 32] >> (ids % 32).astype(np.uint32)) & 1 == 1
    is_free = is_allowed.copy()
    is_free[inputs.ban_ids[row["ban_start"] : row["ban_start"] + row["ban_count"]]] = False
    return is_free if words is None or is_free.any() else is_allowed


def _mask(inputs: StepInputs, row: np.void, vocab: int) -> NDArray[np.uint32] | None:
    """The bits of what the row may draw; None for everything."""
    mask = int(row["mask"])
    words: NDArray[np.uint32]
    if mask >= 0:
        words = inputs.masks[mask]
        return words
    if mask != GRAMMAR:
        return None
    assert inputs.grammars is not None, "a row's grammar is missing"
    words = np.zeros(-(-vocab // 32), np.uint32)
    is_limited = inputs.grammars.fill(int(row["slot"]), int(row["position"]), words.ctypes.data)
    return words if is_limited else None


def _penalized(inputs: StepInputs, row: np.void, x: Float32Array) -> Float32Array:
    history = inputs.tokens[row["slot"], : row["position"] + 1]
    seen = np.unique(history)
    x[seen] = np.where(x[seen] > 0, x[seen] / row["repetition_penalty"], x[seen] * row["repetition_penalty"])
    output, counts = np.unique(history[row["num_prompt"] :], return_counts=True)
    x[output] -= row["presence_penalty"] + row["frequency_penalty"] * counts.astype(np.float32)
    return _cleaned(x)


def _truncated(x: Float32Array, row: np.void) -> Float64Array:
    """Weights of the tokens, not normalized: exp(x), or 0 for those that top_k, top_p, min_p or typical_p cut.

    x [vocab]: its maximum is 0. Definitions are those of transformers' logits processors.
    """
    weights: Float64Array = np.exp(x.astype(np.float64))
    order = np.lexsort((np.arange(len(x)), -x))  # likeliest first, the lowest id among equals
    if 0 < row["top_k"] < len(x):
        weights[x < x[order[row["top_k"] - 1]]] = 0  # those that equal the last one stay
    if row["top_p"] < 1:
        before = np.cumsum(weights[order]) - weights[order]
        cut = before >= row["top_p"] * weights.sum()
        weights[order[1:][cut[1:]]] = 0
    if row["min_p"] > 0:
        weights[weights < min(float(row["min_p"]), 1.0)] = 0  # the likeliest weighs 1
    if row["typical_p"] < 1:
        _keep_typical(x, weights, float(row["typical_p"]))
    return weights


def _keep_typical(x: Float32Array, weights: Float64Array, mass: float) -> None:
    """Keep the tokens whose surprise is nearest to the mean surprise (https://arxiv.org/abs/2202.00666); in place."""
    kept = np.flatnonzero(weights)
    probabilities = weights[kept] / weights.sum()
    surprise = np.log(weights.sum()) - x[kept].astype(np.float64)
    distance = np.abs(surprise - np.sum(probabilities * surprise)).astype(np.float32)
    order = np.argsort(distance, kind="stable")
    last = min(int(np.sum(np.cumsum(probabilities[order]) < mass)), len(order) - 1)
    weights[kept[distance > distance[order[last]]]] = 0


def _draw(weights: Float64Array, u: float) -> int:
    """The first token, by ascending id, whose cumulative weight exceeds u times the total."""
    kept = np.flatnonzero(weights)
    cumulative = np.cumsum(weights[kept])
    place = int(np.searchsorted(cumulative, u * cumulative[-1], side="right"))
    return int(kept[min(place, len(kept) - 1)])


def _report(outputs: StepOutputs, index: int, raw: Float32Array, token: int, num_top: int) -> None:
    """Log-probability and rank of the token, and the likeliest `num_top`, under log_softmax of the raw logits."""
    x = raw.astype(np.float64)
    log_sum = x.max() + np.log(np.sum(np.exp(x - x.max()))) if x.max() > -np.inf else 0.0
    outputs.logprob[index] = x[token] - log_sum
    outputs.rank[index] = 1 + np.sum(x > x[token]) + np.sum(x[:token] == x[token])
    top = np.lexsort((np.arange(len(x)), -x))[: min(num_top, outputs.top_ids.shape[1])]
    outputs.top_ids[index, : len(top)] = top
    outputs.top_logprobs[index, : len(top)] = x[top] - log_sum
