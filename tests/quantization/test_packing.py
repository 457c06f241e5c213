"""What the option `quantization` means, and which packing each matrix gets."""

from __future__ import annotations

import pytest

from streamgen.config import Quantization, make_options, parse_quantization
from streamgen.errors import ConfigError
from streamgen.quantization.base import Packing, TensorType
from streamgen.quantization.packing import asked_packing, choose_packing, is_what_was_asked

SPELLINGS = {
    "int8": Quantization(8, 32, True),
    "int8-64": Quantization(8, 64, True),
    "int8-channel": Quantization(8, None, True),
    "int4": Quantization(4, 32, False),
    "int4-symmetric": Quantization(4, 32, True),
    "int4-128": Quantization(4, 128, False),
    "int4-64-symmetric": Quantization(4, 64, True),
    "int4-channel-symmetric": Quantization(4, None, True),
}


@pytest.mark.parametrize("text", SPELLINGS)
def test_spellings(text: str) -> None:
    asked = parse_quantization(text)
    assert asked == SPELLINGS[text]
    assert parse_quantization(str(asked)) == asked
    assert make_options("x", {"quantization": text}).quantization == text


@pytest.mark.parametrize(
    "text",
    ["int", "int3", "int16", "INT4", "int4-", "int4-0", "int4-16", "int4-48", "int4--32", "int4-32-asymmetric",
     "int8-symmetric", "int8-64-symmetric", "int4-symmetric-32", "int4-999999", " int4", "int4\n", "int4-٣٢",
     "x" * 999],
)  # fmt: skip
def test_what_is_no_spelling(text: str) -> None:
    with pytest.raises(ConfigError, match="quantization: expected 'int8' or 'int4'") as caught:
        make_options("x", {"quantization": text})
    assert caught.value.option == "quantization"
    assert len(str(caught.value)) < 300


def test_values_of_other_kinds_are_refused() -> None:
    for value in (4, "", True):
        with pytest.raises(ConfigError, match="quantization: expected a string"):
            make_options("x", {"quantization": value})
    with pytest.raises(ConfigError, match="with dtype 'float32' every weight stays float32") as caught:
        make_options("x", {"quantization": "int8", "dtype": "float32"})
    assert caught.value.option == "quantization"


@pytest.mark.parametrize(
    ("text", "packing"),
    [
        ("int8", Packing(TensorType.Q8_0)),
        ("int8-64", Packing(TensorType.INT8, 64, True)),
        ("int8-channel", Packing(TensorType.INT8, 192, True)),
        ("int4", Packing(TensorType.INT4, 32, False)),
        ("int4-symmetric", Packing(TensorType.Q4_0)),
        ("int4-64-symmetric", Packing(TensorType.INT4, 64, True)),
        ("int4-channel", Packing(TensorType.INT4, 192, False)),
    ],
)
def test_packings(text: str, packing: Packing) -> None:
    asked = parse_quantization(text)
    assert asked_packing(asked, "a.weight", 192, is_edge=False) == packing
    assert asked_packing(asked, "a.weight", 192, is_edge=True) == Packing(TensorType.Q8_0)
    assert is_what_was_asked(asked, packing, 192, is_edge=False)


@pytest.mark.parametrize(
    ("text", "columns", "match"),
    [
        ("int4-128", 576, r"'a.weight' has 576 columns, .* groups of 128; groups of 32 or 64 would do, or 'channel'"),
        ("int4", 172, "172 columns, .* groups of 32; this model cannot be quantized"),
        ("int8-channel", 172, "172 columns, .* groups of 172; this model cannot"),
        ("int8-96", 256, "groups of 96; groups of 32 or 64 or 128 or 256 would do"),
    ],
)
def test_groups_that_do_not_divide_the_columns(text: str, columns: int, match: str) -> None:
    with pytest.raises(ConfigError, match=match) as caught:
        asked_packing(parse_quantization(text), "a.weight", columns, is_edge=False)
    assert caught.value.option == "quantization"


def test_a_checkpoint_that_is_something_else_already() -> None:
    int4 = parse_quantization("int4")
    assert not is_what_was_asked(int4, Packing(TensorType.Q8_0), 64, is_edge=False)
    assert is_what_was_asked(int4, Packing(TensorType.Q8_0), 64, is_edge=True)
    assert is_what_was_asked(int4, Packing(TensorType.INT4, 32), 64, is_edge=True)
    assert not is_what_was_asked(int4, Packing(TensorType.INT4, 64), 64, is_edge=False)
    assert not is_what_was_asked(int4, Packing(TensorType.Q4_K), 256, is_edge=False)


def test_without_the_option_weights_stay_what_they_are() -> None:
    assert choose_packing(TensorType.Q4_K, 256, dtype="bfloat16") == Packing(TensorType.Q4_K)
    assert choose_packing(TensorType.INT4, 256, group=64, dtype="bfloat16") == Packing(TensorType.INT4, 64)
    assert choose_packing(TensorType.F16, 256, dtype="bfloat16") == Packing(TensorType.BF16)
    assert choose_packing(TensorType.Q4_K, 256, dtype="float32") == Packing(TensorType.F32)
