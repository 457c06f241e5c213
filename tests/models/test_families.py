"""Every family on every backend against transformers, and chunked against one-shot."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from streamgen.models.registry import build_program, config_from_hf
from tests.backends.toy import Chunk, ToyModel, available_backends
from tests.models.families import CASES, VOCAB, FamilyCase, reference_logprobs, reference_model, weights_of

if TYPE_CHECKING:
    from streamgen.backends.base import Backend

LENGTH = 40


@pytest.fixture(params=available_backends(), ids=repr)
def backend(request: pytest.FixtureRequest) -> Backend:
    chosen: Backend = request.param
    return chosen


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_logits_equal_transformers(case: FamilyCase, backend: Backend) -> None:
    reference = reference_model(case)
    ids = np.random.default_rng(1).integers(0, VOCAB, LENGTH).tolist()
    # dynamic scaling takes its base from the longest context: transformers takes it from the sequence's length
    max_context = LENGTH if case.name == "llama-dynamic" else case.max_context
    program = build_program(config_from_hf(reference.config.to_dict()), max_context=max_context)
    model = ToyModel(backend, program, weights_of(reference))
    model.put(0, ids)
    got = model.logprobs(Chunk(0, 0, LENGTH))
    wanted = reference_logprobs(reference, ids)
    assert wanted.std() > 0.1, "the case's weights give the same logits everywhere"
    np.testing.assert_allclose(got, wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["llama-groups-of-3", "mistral-window", "qwen2-window", "llama-dynamic"])
def test_chunks_and_decodes_equal_one_shot(name: str, backend: Backend) -> None:
    case = next(case for case in CASES if case.name == name)
    reference = reference_model(case)
    program = build_program(config_from_hf(reference.config.to_dict()), max_context=LENGTH)
    model = ToyModel(backend, program, weights_of(reference))
    rng = np.random.default_rng(2)
    ids, other = rng.integers(0, VOCAB, LENGTH).tolist(), rng.integers(0, VOCAB, LENGTH).tolist()
    model.put(0, ids)
    whole = model.logprobs(Chunk(0, 0, LENGTH))
    model.put(2, ids)
    model.put(1, other)
    parts = [model.logprobs(Chunk(2, 0, 5))]
    # a chunk across two page borders beside another sequence's prompt, then single tokens beside its decodes
    parts.append(model.logprobs(Chunk(1, 0, 3), Chunk(2, 5, 29))[3:])
    parts += [model.logprobs(Chunk(2, at, 1), Chunk(1, at - 31, 1))[:1] for at in range(34, LENGTH)]
    np.testing.assert_allclose(np.concatenate(parts), whole, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_backends_agree(dtype: str) -> None:
    """One program, one set of weights: every backend against the reference, in each dtype."""
    first, *others = available_backends()
    if not others:
        pytest.skip("only the reference backend is built")
    case = next(case for case in CASES if case.name == "qwen2")
    reference = reference_model(case)
    program = build_program(config_from_hf(reference.config.to_dict()), max_context=LENGTH)
    ids = np.random.default_rng(3).integers(0, VOCAB, LENGTH).tolist()
    found = []
    for backend in (first, *others):
        model = ToyModel(backend, program, weights_of(reference), dtype=dtype)
        model.put(0, ids)
        found.append(model.logprobs(Chunk(0, 0, LENGTH)))
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], atol=1e-4 if dtype == "float32" else 0.05, rtol=0)
