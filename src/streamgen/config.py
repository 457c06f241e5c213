"""The options of an engine, checked once when they are made, and what opening a model reports.

Nothing here touches a file or a device. An option that the contract names but this version does not have is refused, so
that it is never silently ignored.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from enum import StrEnum
from pathlib import Path
from typing import Any

from msgspec import Struct

from streamgen.errors import ConfigError

DTYPES = ("auto", "float32", "bfloat16")
MAX_QUEUED = 1_000_000
MAX_RUNNING = 65_536
MAX_NAME = 200  # characters of a tenant's or a request's name
MAX_WEIGHT = 1e6
MAX_GROUP = 65_536  # columns that share a scale
MAX_SECONDS = 1e9
ISOLATIONS = ("thread", "process")

_UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
_QUANTIZATION = re.compile(r"int(?P<bits>[48])(?:-(?P<group>\d{1,6}|channel))?(?P<symmetric>-symmetric)?", re.ASCII)
_SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,6})?)\s{0,4}([A-Za-z]{0,3})")


class EngineState(StrEnum):
    """Where an engine is in its life."""

    NEW = "new"
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    ASLEEP = "asleep"
    FAILED = "failed"
    CLOSED = "closed"


class LoadProgress(Struct, frozen=True, kw_only=True):
    """How far opening a model is.

    stage   what is done now: "download", "read", "pack" ...
    done    bytes (or items) of it
    total   of how many; None where that is not known
    """

    stage: str
    done: int
    total: int | None = None


class MemoryPlan(Struct, frozen=True, kw_only=True):
    """What an engine takes, in bytes, before it takes it.

    weights      packed weights
    cache        the KV cache: num_pages * page_bytes
    workspace    activations and scratch of the largest step
    runtime      libraries and the tokenizer's tables: an estimate
    headroom     what stays free of the memory this process may use
    page_bytes   one page over all layers
    max_context  most tokens of one sequence, prompt and output
    """

    weights: int
    cache: int
    workspace: int
    headroom: int
    page_bytes: int
    num_pages: int
    max_context: int
    max_running: int = 0
    page_size: int = 16
    dtype: str = "float32"
    backend: str = "cpu"
    runtime: int = 0

    @property
    def total(self) -> int:
        """Weights, cache, workspace and runtime together."""
        return self.weights + self.cache + self.workspace + self.runtime


class Tenant(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One of the parties that share an engine. A tenant that the options do not name has the defaults.

    weight       its share of tokens, relative to the others' that want some
    max_running  most of its sequences that run at once; None: no limit of its own
    max_queued   most of its requests that may be open beyond those that run; None: no limit of its own

    Raises:
        ConfigError: a value cannot be used.
    """

    weight: float = 1.0
    max_running: int | None = None
    max_queued: int | None = None

    def __post_init__(self) -> None:
        weight = self.weight
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise ConfigError(f"tenants: weight: expected a number, got {type(weight).__name__}", option="tenants")
        if not (math.isfinite(weight) and 0.0 < weight <= MAX_WEIGHT):
            raise ConfigError(f"tenants: weight: expected > 0 and <= {MAX_WEIGHT:g}, got {weight}", option="tenants")
        _check_int("tenants", self.max_running, low=1, high=MAX_RUNNING)
        _check_int("tenants", self.max_queued, low=0, high=MAX_QUEUED)


class Quantization(Struct, frozen=True):
    """What the option `quantization` asks for: `int8` or `int4`, then a group, then a symmetry, as in
    `int4-64-symmetric`.

        int8            8 bits, groups of 32 columns with a scale each; always symmetric
        int4            4 bits, groups of 32 columns with a scale and a zero point each
        -64  -128 ...   another size of groups, a multiple of 32 that divides every matrix's columns: smaller, coarser
        -channel        one group for a whole row
        -symmetric      of int4: no zero points, the middle of the codes is 0

    bits      4 | 8
    group     columns; None: all
    """

    bits: int
    group: int | None
    is_symmetric: bool

    def __str__(self) -> str:
        group = "channel" if self.group is None else str(self.group)
        return f"int{self.bits}-{group}" + ("-symmetric" if self.bits == 4 and self.is_symmetric else "")


def parse_quantization(text: str) -> Quantization:
    """Read the option `quantization`; see `Quantization`.

    Raises:
        ConfigError: it is something else.
    """
    match = _QUANTIZATION.fullmatch(text)
    group = int(match["group"]) if match and match["group"] and match["group"] != "channel" else 32
    if match is None or not 0 < group <= MAX_GROUP or group % 32 or (match["bits"] == "8" and match["symmetric"]):
        raise ConfigError(
            f"quantization: expected 'int8' or 'int4', then perhaps '-' and a multiple of 32 or 'channel', and of int4 "
            f"perhaps '-symmetric' (as in 'int4-64-symmetric'), got {text[:40]!r}",
            option="quantization",
        )
    bits = int(match["bits"])
    return Quantization(bits, None if match["group"] == "channel" else group, bits == 8 or bool(match["symmetric"]))


class EngineOptions(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Every option of `Engine`. `None` leaves the choice to the plan, the checkpoint or the machine.

    Raises:
        ConfigError: a value cannot be used; `option` names it.
    """

    model: str | None = None
    device: str | tuple[str, ...] = "auto"
    dtype: str = "auto"
    quantization: str | None = None
    kv_memory: str | float | None = None
    kv_dtype: str = "auto"
    max_context: int | None = None
    max_running: int | None = None
    max_queued: int = 256
    isolation: str = "thread"
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    speculation: Any = None
    prefix_cache: bool = True
    deterministic: bool = False
    seed: int | None = None
    threads: int | None = None
    step_budget_ms: float | None = None
    tenants: dict[str, Tenant] = {}
    grammars: Any = ()
    idle_sleep: float | None = None
    chat_template: str | None = None
    offline: bool = False
    revision: str | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        _check_available(self)
        _check_values(self)


def make_options(model: str | Path | None, fields: Mapping[str, Any]) -> EngineOptions:
    """Options from the arguments of `Engine`.

    Raises:
        ConfigError: an unknown option (the nearest known name is suggested), or a value that cannot be used.
    """
    for name in fields:
        if name not in EngineOptions.__struct_fields__ or name == "model":
            near = get_close_matches(name, (*EngineOptions.__struct_fields__[1:], "on_progress"), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"unknown option {name!r}{hint}", option=name)
    if isinstance(model, Path):
        model = str(model)
    device = fields.get("device", "auto")
    if isinstance(device, list):
        fields = {**fields, "device": tuple(device)}
    tenants = parse_tenants(fields.get("tenants"))
    return EngineOptions(model=model, **{**fields, "tenants": tenants})


def parse_tenants(tenants: Any) -> dict[str, Tenant]:
    """Tenants by name; a `Tenant` may be given as a mapping of its fields.

    Raises:
        ConfigError: no mapping, a name that cannot be one, or an option that a tenant does not have.
    """
    if tenants is None:
        return {}
    if not isinstance(tenants, Mapping):
        raise ConfigError(f"tenants: expected a mapping of names, got {type(tenants).__name__}", option="tenants")
    return {_check_tenant_name(name): _parse_tenant(name, tenant) for name, tenant in tenants.items()}


def _check_tenant_name(name: Any) -> str:
    if not isinstance(name, str) or not 1 <= len(name) <= MAX_NAME:
        shown = repr(name)[:40] if isinstance(name, str) else type(name).__name__
        raise ConfigError(f"tenants: expected names of 1 to {MAX_NAME} characters, got {shown}", option="tenants")
    return name


def _parse_tenant(name: str, tenant: Any) -> Tenant:
    if isinstance(tenant, Tenant):
        return tenant
    if not isinstance(tenant, Mapping):
        raise ConfigError(
            f"tenants: {name!r}: expected a Tenant or its fields, got {type(tenant).__name__}", option="tenants"
        )
    for field in tenant:
        if field not in Tenant.__struct_fields__:
            near = get_close_matches(str(field), Tenant.__struct_fields__, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(Tenant.__struct_fields__)}"
            raise ConfigError(f"tenants: {name!r}: unknown option {str(field)[:40]!r}{hint}", option="tenants")
    return Tenant(**tenant)


def parse_bytes(text: str) -> int:
    """Bytes of a size like "2GiB", "512 MB" or "1048576".

    Raises:
        ValueError: the text is not a size.
    """
    match = _SIZE.fullmatch(text.strip())
    unit = _UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None:
        raise ValueError(f"expected a size like '2GiB' or '512MB', got {text[:40]!r}")
    return int(float(match[1]) * unit)


# What a later version brings: option -> (does this value work today, what works today).
_NOT_YET: dict[str, tuple[Callable[[Any], bool], str]] = {
    "device": (lambda v: v in ("auto", "cpu", ("auto",), ("cpu",)), "'auto' or 'cpu'"),
    "kv_dtype": (lambda v: v in ("auto", "int8"), "'auto' or 'int8'"),
    "tensor_parallel": (lambda v: v == 1, "1"),
    "pipeline_parallel": (lambda v: v == 1, "1"),
    "speculation": (lambda v: v is None, "None"),
    "step_budget_ms": (lambda v: v is None, "None"),
}


def _check_available(options: EngineOptions) -> None:
    for name, (works, wanted) in _NOT_YET.items():
        value = getattr(options, name)
        if not works(value):
            shown = repr(value) if isinstance(value, str | int | float) else type(value).__name__
            raise ConfigError(f"{name}: {shown[:60]} is not available in this version; use {wanted}", option=name)
    if options.dtype == "float16":
        raise ConfigError(
            "dtype: 'float16' is not available in this version; use 'auto', 'float32' or 'bfloat16'", option="dtype"
        )


def _check_values(options: EngineOptions) -> None:
    for name in ("model", "quantization", "chat_template", "revision", "name"):
        _check_text(name, getattr(options, name))
    if options.dtype not in DTYPES:
        raise ConfigError(
            f"dtype: expected one of {', '.join(DTYPES)}, got {str(options.dtype)[:40]!r}", option="dtype"
        )
    _check_quantization(options)
    for name in ("prefix_cache", "deterministic", "offline"):
        value = getattr(options, name)
        if not isinstance(value, bool):
            raise ConfigError(f"{name}: expected True or False, got {type(value).__name__}", option=name)
    _check_int("max_context", options.max_context, low=2, high=2**31 - 1)
    _check_int("max_running", options.max_running, low=1, high=MAX_RUNNING)
    _check_int("max_queued", options.max_queued, low=0, high=MAX_QUEUED, optional=False)
    _check_int("seed", options.seed, low=0, high=2**64 - 1)
    _check_int("threads", options.threads, low=1, high=4096)
    if options.isolation not in ISOLATIONS:
        raise ConfigError(
            f"isolation: expected one of {', '.join(ISOLATIONS)}, got {str(options.isolation)[:40]!r}",
            option="isolation",
        )
    _check_seconds("idle_sleep", options.idle_sleep)
    _check_kv_memory(options.kv_memory)
    if isinstance(options.grammars, str) or not isinstance(options.grammars, Sequence):
        got = type(options.grammars).__name__
        raise ConfigError(f"grammars: expected a sequence of output types, got {got}", option="grammars")


def _check_quantization(options: EngineOptions) -> None:
    if options.quantization is None:
        return
    parse_quantization(options.quantization)
    if options.dtype == "float32":
        raise ConfigError(
            "quantization: with dtype 'float32' every weight stays float32, the exact path; leave one of the two out",
            option="quantization",
        )


def _check_text(name: str, value: Any) -> None:
    if value is None:
        return
    if not isinstance(value, str):
        raise ConfigError(f"{name}: expected a string, got {type(value).__name__}", option=name)
    if not value:
        raise ConfigError(f"{name}: expected a string that is not empty, got ''", option=name)


def _check_int(name: str, value: Any, *, low: int, high: int, optional: bool = True) -> None:
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{name}: expected an integer, got {type(value).__name__}", option=name)
    if not low <= value <= high:
        wanted = f">= {low}" if value < low else f"<= {high}"
        raise ConfigError(f"{name}: expected {wanted}, got {value}", option=name)


def _check_seconds(name: str, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{name}: expected seconds, got {type(value).__name__}", option=name)
    if not (math.isfinite(value) and 0.0 < value <= MAX_SECONDS):
        raise ConfigError(f"{name}: expected seconds > 0 and <= {MAX_SECONDS:g}, got {value}", option=name)


def _check_kv_memory(value: Any) -> None:
    if value is None:
        return
    if isinstance(value, str):
        try:
            size = parse_bytes(value)
        except ValueError as e:
            raise ConfigError(f"kv_memory: {e}", option="kv_memory") from None
        if size == 0:
            raise ConfigError("kv_memory: expected more than 0 bytes", option="kv_memory")
    elif isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(
            f"kv_memory: expected a size like '2GiB' or a share of free memory, got {type(value).__name__}",
            option="kv_memory",
        )
    elif not (math.isfinite(value) and 0.0 < value < 1.0):
        raise ConfigError(
            f"kv_memory: expected a share of free memory > 0 and < 1 (or a size like '2GiB'), got {value}",
            option="kv_memory",
        )
