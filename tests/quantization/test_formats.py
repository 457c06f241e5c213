"""Quantized checkpoints of other tools, read to the bit; variants that are not read are refused by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from streamgen.errors import CorruptWeights, LoadError, UnsupportedModel
from streamgen.quantization.base import Packing, TensorType
from streamgen.quantization.compressed_tensors import part_infos, written_parts
from streamgen.quantization.formats import IntegerMatrix, Part
from streamgen.quantization.groups import Groups
from streamgen.quantization.registry import weight_format
from streamgen.quantization.rounding import round_matrix
from tests.quantization import stored
from tests.quantization.test_groups import random_groups

CT: dict[str, Any] = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
INT8_CT = {**CT, "format": "int-quantized"}
AWQ: dict[str, Any] = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
GPTQ: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}


def assert_reads(config: dict[str, Any], arrays: stored.Arrays, groups: Groups, matrix: IntegerMatrix) -> None:
    """The format finds the matrix, and its codes, scales and zero points are those that were written."""
    weights, module = weight_format(config), stored.module_of(arrays)
    assert set(arrays) <= weights.parts
    assert weights.find(module) == matrix
    read = weights.read(module, matrix)
    for field in Groups.__struct_fields__:
        np.testing.assert_array_equal(getattr(read, field), getattr(groups, field), err_msg=field)


@pytest.mark.parametrize("group", [32, 96])
def test_awq(group: int) -> None:
    groups = random_groups(24, 96, group, codes=16)
    assert_reads(AWQ, stored.awq(groups), groups, IntegerMatrix(TensorType.INT4, 24, 96, group))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("layout", "less"), [("gptq", 1), ("gptq_v2", 0), (None, 1)])
def test_gptq(bits: int, layout: str | None, less: int) -> None:
    groups = random_groups(16, 128, 64, codes=1 << bits)
    groups.zeros[groups.zeros < less] = less
    config = {**GPTQ, "bits": bits, "checkpoint_format": layout}
    arrays = stored.gptq(groups, bits=bits, less=less)
    matrix = IntegerMatrix(TensorType.INT4 if bits == 4 else TensorType.INT8, 16, 128, 64)
    assert_reads(config, arrays, groups, matrix)
    assert_reads(config, {**arrays, "g_idx": np.zeros_like(arrays["g_idx"])}, groups, matrix)
    del arrays["g_idx"]
    assert_reads(config, arrays, groups, matrix)


def test_a_zero_point_of_16_in_gptq() -> None:
    groups = random_groups(8, 32, 32, codes=16)
    groups.zeros[:] = 16  # stored as 15
    assert_reads(GPTQ, stored.gptq(groups, bits=4, less=1), groups, IntegerMatrix(TensorType.INT4, 8, 32, 32))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("rows", [16, 13])
def test_pack_quantized(bits: int, symmetric: bool, rows: int) -> None:
    groups = random_groups(rows, 96, 32, codes=1 << bits, zero=1 << bits - 1 if symmetric else None)
    arrays = stored.pack_quantized(groups, bits=bits, symmetric=symmetric)
    type = TensorType.INT4 if bits == 4 else TensorType.INT8
    assert_reads(CT, arrays, groups, IntegerMatrix(type, rows, 96, 32, symmetric))


@pytest.mark.parametrize("symmetric", [False, True])
def test_int_quantized(symmetric: bool) -> None:
    groups = random_groups(9, 64, 64, codes=256, zero=128 if symmetric else None)
    arrays = stored.int_quantized(groups, symmetric=symmetric)
    assert_reads(INT8_CT, arrays, groups, IntegerMatrix(TensorType.INT8, 9, 64, 64, symmetric))


@pytest.mark.parametrize("scales", [np.float32, np.float16])
def test_scales_of_other_precisions(scales: type) -> None:
    groups = random_groups(8, 32, 32, codes=256, zero=128)
    arrays = stored.int_quantized(groups, symmetric=True)
    arrays["weight_scale"] = arrays["weight_scale"].astype(scales)
    assert_reads(INT8_CT, arrays, groups, IntegerMatrix(TensorType.INT8, 8, 32, 32, True))


@pytest.mark.parametrize(
    "packing",
    [
        Packing(TensorType.INT4, 32, False),
        Packing(TensorType.INT4, 64, True),
        Packing(TensorType.Q4_0),
        Packing(TensorType.Q8_0),
        Packing(TensorType.INT8, 64, True),
    ],
)
@pytest.mark.parametrize("rows", [16, 21])
def test_what_is_written_is_read(packing: Packing, rows: int) -> None:
    groups = round_matrix(np.random.default_rng(0).standard_normal((rows, 192), np.float32), packing)
    arrays = written_parts(groups, packing)
    headers = part_infos(rows, 192, packing)
    assert {name: stored.module_of(arrays).parts[name] for name in arrays} == headers
    weights = weight_format(CT if packing.type in (TensorType.INT4, TensorType.Q4_0) else INT8_CT)
    matrix = weights.find(stored.module_of(arrays))
    assert matrix is not None
    read = weights.read(stored.module_of(arrays), matrix)
    for field in Groups.__struct_fields__:
        np.testing.assert_array_equal(getattr(read, field), getattr(groups, field), err_msg=field)


def test_what_is_not_quantized_is_left_alone() -> None:
    dense = stored.module_of({"weight": np.zeros((4, 4), np.float16)})
    for config in (CT, INT8_CT, AWQ, GPTQ):
        assert weight_format(config).find(dense) is None


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"quant_method": "bitsandbytes"}, "method 'bitsandbytes' cannot be read; this version reads compressed-tens"),
        ({}, "method 'None'"),
        ({**CT, "format": "float-quantized"}, "format 'float-quantized'"),
        ({**CT, "transform_config": {"config_groups": {}}}, "transform_config"),
        ({**CT, "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
        ({**AWQ, "version": "gemv"}, "version 'gemv' of awq"),
        ({**AWQ, "bits": 3}, "awq with 3 bits"),
        ({**AWQ, "zero_point": False}, "without zero points"),
        ({**GPTQ, "bits": 3}, "gptq with 3 bits"),
        ({**GPTQ, "desc_act": True}, "gptq with desc_act"),
        ({**GPTQ, "dynamic": {"-:.*": {}}}, "gptq with dynamic"),
        ({**GPTQ, "checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
    ],
)
def test_variants_that_are_refused(config: dict[str, Any], match: str) -> None:
    with pytest.raises(UnsupportedModel, match=match):
        weight_format(config)


def broken(config: dict[str, Any], arrays: stored.Arrays) -> None:
    weights, module = weight_format(config), stored.module_of(arrays)
    matrix = weights.find(module)
    assert matrix is not None
    weights.read(module, matrix)


@pytest.mark.parametrize(
    ("part", "value", "error", "match"),
    [
        ("weight_scale", None, CorruptWeights, "weight_scale: expected a matrix of F16, got nothing"),
        ("weight_scale", np.ones((15, 2), np.float16), CorruptWeights, r"expected F16 or BF16 or F32 \[16, 2\]"),
        ("weight_scale", np.ones((16, 5), np.float16), CorruptWeights, "weight_zero_point: expected I32"),
        ("weight_scale", np.full((16, 2), 1e-9, np.float32), UnsupportedModel, "beyond what half precision holds"),
        ("weight_shape", None, CorruptWeights, "weight_shape: expected two integers"),
        ("weight_shape", np.array([16, 60]), UnsupportedModel, r"\[16, 8\] for a matrix of \[16, 60\]"),
        ("weight_shape", np.array([17, 64]), UnsupportedModel, r"\[16, 8\] for a matrix of \[17, 64\]"),
        ("weight_packed", np.zeros((16, 8), np.int8), CorruptWeights, "expected a matrix of I32, got I8"),
        ("weight_zero_point", np.zeros((16, 2), np.int32), CorruptWeights, r"expected I32 \[2, 2\], got"),
        ("weight_g_idx", np.zeros(64, np.int32), UnsupportedModel, "in the order of their activations"),
    ],
)
def test_parts_that_contradict_each_other(part: str, value: Any, error: type[LoadError], match: str) -> None:
    groups = random_groups(16, 64, 32, codes=16)
    arrays = stored.pack_quantized(groups, bits=4, symmetric=False)
    if value is None:
        del arrays[part]
    else:
        arrays[part] = value
    with pytest.raises(error, match=match):
        broken(CT, arrays)


@pytest.mark.parametrize(
    ("config", "part", "value", "error", "match"),
    [
        (AWQ, "qzeros", np.zeros((3, 1), np.int32), CorruptWeights, r"scales: expected F16 or BF16 \[3, 8\]"),
        (AWQ, "scales", np.zeros((2, 9), np.float16), CorruptWeights, r"scales: expected F16 or BF16 \[2, 8\]"),
        (GPTQ, "qzeros", np.zeros((2, 2), np.int32), CorruptWeights, r"qzeros: expected I32 \[2, 1\]"),
        (GPTQ, "g_idx", np.arange(64, dtype=np.int32)[::-1] // 32, UnsupportedModel, "in the order of activations"),
        (GPTQ, "g_idx", np.full(64, 7, np.int32), CorruptWeights, "expected groups below 2"),
        (GPTQ, "g_idx", np.zeros(63, np.int32), CorruptWeights, r"g_idx: expected I32 \[64\]"),
    ],
)
def test_broken_awq_and_gptq(config: dict[str, Any], part: str, value: Any, error: type[LoadError], match: str) -> None:
    groups = random_groups(8, 64, 32, codes=16)
    groups.zeros[groups.zeros == 0] = 1
    arrays = stored.awq(groups) if config is AWQ else stored.gptq(groups, bits=4, less=1)
    with pytest.raises(error, match=match):
        broken(config, {**arrays, part: value})


def test_groups_that_kernels_do_not_take() -> None:
    groups = random_groups(8, 64, 16, codes=16)
    with pytest.raises(UnsupportedModel, match="64 columns in groups of 16; this version reads whole groups"):
        broken(AWQ, stored.awq(groups))


def test_float8_is_named() -> None:
    module = stored.module_of({"weight": np.zeros((4, 32), np.int8), "weight_scale": np.ones((4, 1), np.float32)})
    module.parts = {**module.parts, "weight": Part("F8_E4M3", (4, 32))}
    with pytest.raises(UnsupportedModel, match="of F8_E4M3"):
        weight_format(INT8_CT).find(module)
