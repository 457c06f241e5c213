"""The reference backend: pages, rounding, op by op against plain formulas; and a real model against its golden run."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from streamgen.backends.base import Backend, LoadOptions
from streamgen.backends.reference import ReferenceBackend
from streamgen.checkpoints.open import CheckpointWeights, open_checkpoint
from streamgen.errors import CorruptWeights
from streamgen.models.config import ModelConfig, RopeConfig
from streamgen.models.program import Builder, Program
from streamgen.models.registry import build_program
from streamgen.models.rope import RopeTable
from tests.backends.toy import Chunk, ToyModel, ToyWeights, available_backends, random_weights, sample_rows

if TYPE_CHECKING:
    from pathlib import Path

CONFIG = ModelConfig(
    family="qwen2",
    architecture="Qwen2ForCausalLM",
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=48,
    vocab_size=61,
    norm_eps=1e-5,
    max_context=96,
    rope=RopeConfig(rotary_dim=8),
)


@pytest.fixture(params=available_backends(), ids=repr)
def backend(request: pytest.FixtureRequest) -> Backend:
    chosen: Backend = request.param
    return chosen


@pytest.fixture(scope="module")
def program() -> Program:
    return build_program(CONFIG, max_context=96)


@pytest.fixture(scope="module")
def weights(program: Program) -> ToyWeights:
    return random_weights(program)


def ids_of(seed: int, count: int) -> list[int]:
    return [int(i) for i in np.random.default_rng(seed).integers(0, CONFIG.vocab_size, count)]


def test_page_size_does_not_matter(backend: Backend, program: Program, weights: ToyWeights) -> None:
    found = []
    for page_size in (1, 16):
        model = ToyModel(backend, program, weights, page_size=page_size)
        model.put(0, ids_of(0, 30))
        model.logprobs(Chunk(0, 0, 17))
        found.append(model.logprobs(Chunk(0, 17, 13)))
    np.testing.assert_allclose(found[0], found[1], atol=1e-5)


def test_copied_pages_hold_the_same_context(backend: Backend, program: Program, weights: ToyWeights) -> None:
    model = ToyModel(backend, program, weights)
    ids = ids_of(1, 40)
    model.put(0, ids)
    model.put(3, ids)
    model.logprobs(Chunk(0, 0, 37))
    model.model.copy_pages(np.stack([model.page_tables[0, :3], model.page_tables[3, :3]], axis=1))
    wanted = model.logprobs(Chunk(0, 37, 3))
    np.testing.assert_allclose(model.logprobs(Chunk(3, 37, 3)), wanted, atol=1e-5)


def test_pages_are_copied_in_order(backend: Backend, program: Program, weights: ToyWeights) -> None:
    model = ToyModel(backend, program, weights)
    model.put(0, ids_of(2, 16))
    model.put(1, ids_of(2, 20))
    model.logprobs(Chunk(0, 0, 16))
    first, middle, last = model.page_tables[0, 0], model.page_tables[2, 0], model.page_tables[1, 0]
    model.model.copy_pages(np.array([[first, middle], [middle, last]], np.int32))
    got = model.logprobs(Chunk(1, 16, 4))
    model.put(2, ids_of(2, 20))
    np.testing.assert_allclose(got, model.logprobs(Chunk(2, 0, 20))[16:], atol=1e-5)


def test_more_sample_rows_than_one_head_block(backend: Backend, program: Program, weights: ToyWeights) -> None:
    model = ToyModel(backend, program, weights)
    ids = ids_of(3, 90)
    model.put(0, ids)
    whole = model.logprobs(Chunk(0, 0, 90))
    model.put(1, ids)
    parts = [model.logprobs(Chunk(1, at, 30)) for at in (0, 30, 60)]
    np.testing.assert_allclose(np.concatenate(parts), whole, atol=1e-5)


def test_only_the_rows_that_sample_are_written(backend: Backend, program: Program, weights: ToyWeights) -> None:
    model = ToyModel(backend, program, weights)
    model.put(0, ids_of(4, 20))
    chunk = Chunk(0, 0, 20)
    wanted = model.logprobs(chunk)
    samples = sample_rows([chunk])[[4, 19]]
    samples["num_top"] = [-1, 2]
    samples["write"] = [0, 1]
    outputs = model.run([chunk], samples)
    assert outputs.token.tolist() == wanted[[4, 19]].argmax(1).tolist()
    assert model.tokens[0, 20] == outputs.token[1] and model.tokens[0, 5] == ids_of(4, 20)[5]
    assert outputs.rank.tolist() == [0, 1] and outputs.logprob[0] == 0
    assert outputs.logprob[1] == pytest.approx(wanted[19].max(), abs=1e-5)
    assert (outputs.top_ids[1, 2:] == 0).all() and (outputs.top_ids[0] == 0).all()


def test_a_step_without_samples_only_fills_pages(backend: Backend, program: Program, weights: ToyWeights) -> None:
    model = ToyModel(backend, program, weights)
    ids = ids_of(5, 20)
    model.put(0, ids)
    chunk = Chunk(0, 0, 15)
    model.run([chunk], sample_rows([chunk])[:0])
    rest = model.logprobs(Chunk(0, 15, 5))
    model.put(1, ids)
    np.testing.assert_allclose(rest, model.logprobs(Chunk(1, 0, 20))[15:], atol=1e-5)


def test_missing_and_misshapen_tensors_are_refused(backend: Backend, program: Program, weights: ToyWeights) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    tensors = dict(weights.tensors)
    del tensors[name]
    with pytest.raises(CorruptWeights, match="down_proj"):
        ToyModel(backend, program, ToyWeights(tensors))
    with pytest.raises(CorruptWeights, match="down_proj"):
        ToyModel(backend, program, ToyWeights(tensors | {name: np.zeros((48, 32), np.float32)}))


def test_sizes_are_what_is_allocated(program: Program, weights: ToyWeights) -> None:
    backend = ReferenceBackend()
    for dtype, element in (("float32", 4), ("bfloat16", 2)):
        model = ToyModel(backend, program, weights, dtype=dtype)
        assert model.bytes_seen == sorted(model.bytes_seen)
        assert model.bytes_seen[-1] == backend.weight_bytes(program, dtype, {})
        assert backend.page_bytes(program, dtype, 16) == 2 * 2 * 16 * 2 * 8 * element
    options = LoadOptions(dtype="float32", max_rows=8, num_pages=1, max_context=96, threads=1)
    assert backend.workspace_bytes(program, options) > 0
    assert backend.unsupported_reasons(program, "float32") == []
    assert "float16" in backend.unsupported_reasons(program, "float16")[0]


def test_every_tensor_is_given_back(program: Program, weights: ToyWeights) -> None:
    own = ToyWeights(weights.tensors)
    ToyModel(ReferenceBackend(), program, own).model.close()
    assert sorted(own.done_names) == sorted(own.tensors)


def test_closing_twice(program: Program, weights: ToyWeights) -> None:
    model = ToyModel(ReferenceBackend(), program, weights).model
    model.close()
    model.close()


def test_host_default_dtype_is_ignored(program: Program, weights: ToyWeights) -> None:
    model = ToyModel(ReferenceBackend(), program, weights)
    model.put(0, ids_of(6, 9))
    wanted = model.logprobs(Chunk(0, 0, 9))
    torch.set_default_dtype(torch.float64)
    try:
        assert (model.logprobs(Chunk(0, 0, 9)) == wanted).all()
    finally:
        torch.set_default_dtype(torch.float32)


# ---- ops that no family uses yet, and rounding, against formulas written out here


def tiny_program(record: Any) -> Program:
    """Embedding, what `record(builder, x)` adds to the residual, and a head tied to the embedding; one layer."""
    builder = Builder()
    x = builder.embed("embed", vocab=40, hidden=16, scale=2.0)
    for _ in builder.layers(1, "layer.{}"):
        x = record(builder, x)
    h = builder.rms_norm(builder.sampled(x), "norm", eps=1e-6, offset=1.0)
    return builder.finish(builder.head(h, "head", vocab=40, tied="embed"))


def attention(builder: Builder, x: Any) -> Any:
    """Normed queries and keys (in groups), partial rope, softcap, window, a scale of its own."""
    h = builder.rms_norm(x, "in", eps=1e-6)
    q, k, v = builder.linears(h, ("q", 32), ("k", 16), ("v", 16))
    table = builder.rope_table(RopeTable((1.0, 0.1), scale=1.5))
    q = builder.rope(q, num_heads=4, head_dim=8, table=table)
    k = builder.rope(k, num_heads=2, head_dim=8, table=table)
    a = builder.attend(q, k, v, head_dim=8, scale=0.7, window=3, softcap=2.0)
    return builder.add(x, builder.linear(a, "o", 16, bias=True))


def by_hand(tensors: dict[str, torch.Tensor], ids: list[int], dtype: torch.dtype) -> torch.Tensor:
    """The program of `attention` in float64, rounding where a program's operands are: logits [rows, vocab]."""

    def rounded(x: torch.Tensor) -> torch.Tensor:
        return x.float().to(dtype).double()

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return rounded(x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight)

    def turned(x: torch.Tensor) -> torch.Tensor:
        angles = torch.arange(len(ids))[:, None, None] * torch.tensor([1.0, 0.1], dtype=torch.float64)
        a, b, rest = x[..., :2], x[..., 2:4], x[..., 4:]
        cos, sin = 1.5 * angles.cos(), 1.5 * angles.sin()
        return torch.cat((a * cos - b * sin, a * sin + b * cos, rest), -1)

    w = {n: rounded(t) if t.ndim == 2 else t.double() for n, t in tensors.items()}
    x = 2 * w["embed.weight"][ids]
    h = norm(x, w["layer.0.in.weight"])
    q = rounded(turned((h @ w["layer.0.q.weight"].T).reshape(-1, 4, 8)))
    k = rounded(turned((h @ w["layer.0.k.weight"].T).reshape(-1, 2, 8)))
    v = rounded((h @ w["layer.0.v.weight"].T).reshape(-1, 2, 8))
    out = torch.zeros_like(q)
    for row in range(len(ids)):
        seen = slice(max(0, row - 2), row + 1)
        for head in range(4):
            scores = 2 * torch.tanh(0.7 * (k[seen, head // 2] @ q[row, head]) / 2)
            out[row, head] = scores.softmax(0) @ v[seen, head // 2]
    x = x + rounded(out.flatten(1)) @ w["layer.0.o.weight"].T + w["layer.0.o.bias"]
    return norm(x, w["norm.weight"] + 1) @ w["embed.weight"].T


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attention_by_hand(backend: Backend, dtype: str) -> None:
    program = tiny_program(attention)
    weights = random_weights(program)
    ids = [int(i) for i in np.random.default_rng(8).integers(0, 40, 25)]
    model = ToyModel(backend, program, weights, dtype=dtype)
    model.put(0, ids)
    got = model.logprobs(Chunk(0, 0, 25))
    tensors = {name: torch.from_numpy(values) for name, values in weights.tensors.items()}
    wanted = by_hand(tensors, ids, getattr(torch, dtype)).log_softmax(-1).numpy()
    # The reference rounds exactly where the formulas do; kernels may round probabilities too.
    tolerance = 0.05 if dtype == "bfloat16" and backend.name != "reference" else 2e-5
    np.testing.assert_allclose(got, wanted, atol=tolerance, rtol=0)


def test_rounding_is_seen() -> None:
    """The reference's tolerance above tells an engine that rounds from one that does not."""
    program = tiny_program(attention)
    tensors = {name: torch.from_numpy(values) for name, values in random_weights(program).tensors.items()}
    ids = [int(i) for i in np.random.default_rng(8).integers(0, 40, 25)]
    exact, rounded = by_hand(tensors, ids, torch.float32), by_hand(tensors, ids, torch.bfloat16)
    assert (exact - rounded).abs().max() > 0.01


@pytest.mark.parametrize("groups", [1, 4])
def test_norm_groups(backend: Backend, groups: int) -> None:
    def record(builder: Builder, x: Any) -> Any:
        h = builder.rms_norm(x, "in", eps=1e-3, groups=groups)
        kv = builder.linear(h, "kv", 8)
        builder.attend(kv, kv, kv, head_dim=8, scale=1.0)  # a program has at least one
        return builder.add(x, builder.linear(h, "o", 16))

    program = tiny_program(record)
    weights = random_weights(program)
    model = ToyModel(backend, program, weights)
    model.put(0, [3, 4])
    t = {name: torch.from_numpy(values).double() for name, values in weights.tensors.items()}
    x = 2 * t["embed.weight"][[3, 4]]
    parts = x.reshape(2, groups, -1)
    h = (parts / (parts.square().mean(-1, keepdim=True) + 1e-3).sqrt() * t["layer.0.in.weight"]).flatten(1)
    x = x + h @ t["layer.0.o.weight"].T
    logits = F.rms_norm(x, (16,), t["norm.weight"] + 1, 1e-6) @ t["embed.weight"].T
    np.testing.assert_allclose(model.logprobs(Chunk(0, 0, 2)), logits.log_softmax(-1).numpy(), atol=2e-5)


# ---- a trained model


def test_stories_follow_the_golden_run(backend: Backend, shared_data: Path) -> None:
    """Each recorded path in one step: every row's likeliest token is the next one. The first is also decoded."""
    folder = shared_data / "models" / "stories260K"
    golden = json.loads((folder / "golden.json").read_text())
    checkpoint = open_checkpoint(folder)
    program = build_program(checkpoint.config, max_context=256)
    weights = CheckpointWeights(checkpoint)
    model = ToyModel(backend, program, weights, num_slots=1, max_context=256)
    checkpoint.close()
    for case in golden["cases"]:
        assert case["min_top2_gap"] > 1e-3
        ids, first = case["prompt_ids"] + case["output_ids"], len(case["prompt_ids"]) - 1
        model.put(0, ids)
        logprobs = model.logprobs(Chunk(0, 0, len(ids)))[first:-1]
        assert logprobs.argmax(1).tolist() == case["output_ids"], case["prompt"]
        steps = [step["logprob"] for step in case["steps"]]
        np.testing.assert_allclose(logprobs.max(1), steps, atol=2e-4)
    case = golden["cases"][0]
    assert model.greedy(0, case["prompt_ids"], 24) == case["output_ids"][:24]
    for text in golden["scored_texts"]:
        ids = text["ids"]
        model.put(0, ids)
        logprobs = model.logprobs(Chunk(0, 0, len(ids)))
        got = [float(logprobs[i, token]) for i, token in enumerate(ids[1:])]
        np.testing.assert_allclose(got, text["token_logprobs"], atol=2e-4)
