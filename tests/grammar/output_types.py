"""Types for the tests of outputs, as people write them; and one of every kind that can be an output, with examples."""

from __future__ import annotations

import dataclasses
import datetime as dt
import decimal
import enum
import ipaddress
import uuid
from typing import Annotated, Any, Literal, NamedTuple, NewType, Optional, Required, TypedDict, Union

import msgspec
import pydantic
import typing_extensions
from msgspec import Meta, Struct
from pydantic import BaseModel, ConfigDict, Field


class Line(Struct):
    name: str
    count: Annotated[int, Meta(ge=1)] = 1


class Invoice(Struct):
    """An invoice."""

    number: int
    lines: list[Line]
    note: str | None = None


class Node(Struct):
    value: int
    children: list[Node] = []


class Renamed(Struct, rename="camel", forbid_unknown_fields=True):
    first_name: str
    is_new: bool = msgspec.field(name="new", default=False)


class Circle(Struct, tag=True):
    radius: float


class Square(Struct, tag=True):
    side: float


class Row(Struct, array_like=True):
    x: int
    label: str = ""


class Color(enum.Enum):
    RED = "red"
    GREEN = "green"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 3


class Mixed(enum.Enum):
    ONE = 1
    TWO = "two"


class Options(TypedDict, total=False):
    zeta: Required[int]
    alpha: str


class PydanticOptions(typing_extensions.TypedDict):
    zeta: Annotated[int, Field(ge=0)]


class Point(NamedTuple):
    x: int
    y: int = 0


@dataclasses.dataclass
class Data:
    a: int
    b: str = "b"


@dataclasses.dataclass
class OtherData:
    c: int


@dataclasses.dataclass
class BoundedData:
    a: Annotated[int, Field(ge=1)]
    b: str = Field(default="b", max_length=3)


class Model(BaseModel):
    a: int = Field(ge=1, alias="A")
    b: Annotated[str, Field(pattern="^x", max_length=3)] = "x"
    c: Model | None = None


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    day: dt.date
    tags: set[str] = set()


class Cat(BaseModel):
    kind: Literal["cat"]


class Dog(BaseModel):
    kind: Literal["dog"]


class Moments(BaseModel):
    any_moment: dt.datetime
    local: pydantic.NaiveDatetime
    exact: pydantic.AwareDatetime
    time: dt.time
    span: dt.timedelta


class Holder(Struct):
    model: Model
    address: ipaddress.IPv4Address


Name = NewType("Name", str)

# type -> texts that are read, with what they mean
EXAMPLES: list[tuple[Any, list[tuple[str, Any]]]] = [
    (int, [("-12", -12), ("0", 0)]),
    (float, [("1", 1.0), ("-2.5e3", -2500.0)]),
    (bool, [("true", True)]),
    (type(None), [("null", None)]),
    (Any, [('{"a": [1, null]}', {"a": [1, None]})]),
    (object, [("[true]", [True])]),
    (Name, [('"x"', "x")]),
    (dict, [('{"a": 1}', {"a": 1})]),
    (list, [('[1, "a"]', [1, "a"])]),
    (dt.date, [('"2024-02-29"', dt.date(2024, 2, 29))]),
    (dt.time, [('"10:30:00"', dt.time(10, 30)), ('"10:30:00.5Z"', dt.time(10, 30, 0, 500000, dt.UTC))]),
    (dt.datetime, [
        ('"2024-02-29T10:30:00"', dt.datetime(2024, 2, 29, 10, 30)),
        ('"2000-02-29T23:59:59.25+02:00"', dt.datetime.fromisoformat("2000-02-29T23:59:59.25+02:00")),
    ]),
    (Annotated[dt.datetime, Meta(tz=True)], [('"2024-01-31T00:00:00Z"', dt.datetime(2024, 1, 31, tzinfo=dt.UTC))]),
    (Annotated[dt.datetime, Meta(tz=False)], [('"2024-01-31T00:00:00"', dt.datetime(2024, 1, 31))]),
    (dt.timedelta, [('"P1DT2H3M4.5S"', dt.timedelta(1, 7384, 500000)), ('"-PT90S"', -dt.timedelta(seconds=90))]),
    (uuid.UUID, [('"12345678-1234-5678-1234-567812345678"', uuid.UUID("12345678-1234-5678-1234-567812345678"))]),
    (decimal.Decimal, [('"-12.50"', decimal.Decimal("-12.50")), ('"0"', decimal.Decimal(0))]),
    (bytes, [('"QUI="', b"AB"), ('""', b"")]),
    (Annotated[bytes, Meta(min_length=2, max_length=4)], [('"QUI="', b"AB"), ('"QUJDRA=="', b"ABCD")]),
    (Color, [('"red"', Color.RED)]),
    (Level, [("3", Level.HIGH)]),
    (Mixed, [("1", Mixed.ONE), ('"two"', Mixed.TWO)]),
    (Literal["a", 1, None], [('"a"', "a"), ("1", 1), ("null", None)]),
    (Literal[True], [("true", True)]),
    (int | str, [("1", 1), ('"1"', "1")]),
    (Optional[int], [("null", None), ("5", 5)]),  # noqa: UP045  # both spellings are in use
    (Union[Color, None], [('"green"', Color.GREEN)]),  # noqa: UP007
    (str | dt.date, [('"x"', "x")]),
    (list[int], [("[1, 2]", [1, 2]), ("[]", [])]),
    (tuple[int, str], [('[1, "a"]', (1, "a"))]),
    (tuple[int, ...], [("[1, 2, 3]", (1, 2, 3))]),
    (tuple[()], [("[]", ())]),
    (set[int], [("[1, 1, 2]", {1, 2})]),
    (frozenset[Color], [('["red"]', frozenset({Color.RED}))]),
    (Annotated[set[Color], Meta(min_length=2)], [('["red", "green"]', {Color.RED, Color.GREEN})]),
    (dict[str, list[int]], [('{"a": [1]}', {"a": [1]})]),
    (dict[int, str], [('{"-1": "a", "20": "b"}', {-1: "a", 20: "b"})]),
    (dict[Color, int], [('{"green": 1}', {Color.GREEN: 1})]),
    (dict[bool, int], [('{"true": 1}', {True: 1})]),
    (dict[Literal["a", "b"], int], [('{"b": 1}', {"b": 1})]),
    (dict[dt.date, int], [('{"2024-02-29": 1}', {dt.date(2024, 2, 29): 1})]),
    (dict[Annotated[str, Meta(pattern="^[a-z]+$")], int], [('{"abc": 1}', {"abc": 1})]),
    (Annotated[dict[str, int], Meta(min_length=1, max_length=2)], [('{"a": 1}', {"a": 1})]),
    (Annotated[int, Meta(gt=2, le=9, multiple_of=3)], [("9", 9)]),
    (Annotated[float, Meta(ge=0, lt=1)], [("0.5", 0.5)]),
    (Annotated[str, Meta(min_length=1, max_length=2)], [('"🙂b"', "🙂b")]),
    (Annotated[str, Meta(pattern="^[0-9]{4}$")], [('"1234"', "1234")]),
    (Annotated[list[int], Meta(min_length=1, max_length=3)], [("[1]", [1])]),
    (Invoice, [('{"number": 1, "lines": [{"name": "x"}]}', Invoice(1, [Line("x")]))]),
    (list[Line], [('[{"name": "x", "count": 2}]', [Line("x", 2)])]),
    (Node, [('{"value": 1, "children": [{"value": 2}]}', Node(1, [Node(2)]))]),
    (Renamed, [('{"firstName": "a", "new": true}', Renamed("a", True))]),
    (Circle | Square, [('{"type": "Square", "side": 1}', Square(1.0))]),
    (Row, [('[1, "a"]', Row(1, "a")), ("[1]", Row(1))]),
    (Options, [('{"zeta": 1, "alpha": "a"}', {"zeta": 1, "alpha": "a"}), ('{"zeta": 1}', {"zeta": 1})]),
    (Point, [("[1, 2]", Point(1, 2)), ("[1]", Point(1))]),
    (Data, [('{"a": 1}', Data(1))]),
    (Data | OtherData, [('{"c": 1}', OtherData(1)), ('{"a": 1, "b": "x"}', Data(1, "x"))]),
    (BoundedData, [('{"a": 1, "b": "abc"}', BoundedData(1, "abc"))]),
    (Model, [('{"A": 1, "c": {"A": 2, "b": "xy"}}', Model(A=1, c=Model(A=2, b="xy")))]),
    (list[Model], [('[{"A": 1}]', [Model(A=1)])]),
    (Strict, [('{"day": "2024-02-29", "tags": ["a", "a"]}', Strict(day=dt.date(2024, 2, 29), tags={"a"}))]),
    (Cat | Dog, [('{"kind": "dog"}', Dog(kind="dog"))]),
    (Annotated[Cat | Dog, Field(discriminator="kind")], [('{"kind": "cat"}', Cat(kind="cat"))]),
    (PydanticOptions, [('{"zeta": 0}', {"zeta": 0})]),
    (Moments, [(
        '{"any_moment": "2024-02-29T10:30:00", "local": "2024-02-29T10:30:00", "exact": "2024-02-29T10:30:00+01:00", '
        '"time": "10:30:00", "span": "PT5M"}',
        Moments(
            any_moment=dt.datetime(2024, 2, 29, 10, 30),
            local=dt.datetime(2024, 2, 29, 10, 30),
            exact=dt.datetime(2024, 2, 29, 9, 30, tzinfo=dt.UTC),
            time=dt.time(10, 30),
            span=dt.timedelta(minutes=5),
        ),
    )]),
    (Holder, [(
        '{"model": {"A": 1}, "address": "10.0.0.1"}', Holder(Model(A=1), ipaddress.IPv4Address("10.0.0.1"))
    )]),
    (ipaddress.IPv4Address, [('"10.0.0.1"', ipaddress.IPv4Address("10.0.0.1"))]),
    (pydantic.UUID4, [('"12345678-1234-4678-9234-567812345678"', uuid.UUID("12345678-1234-4678-9234-567812345678"))]),
    (Annotated[decimal.Decimal, Field(max_digits=4, decimal_places=2)], [('"12.34"', decimal.Decimal("12.34"))]),
    (Annotated[decimal.Decimal, Field(ge=0)], [('"0.5"', decimal.Decimal("0.5"))]),
    (Annotated[decimal.Decimal, Field(gt=1, le=10)], [("2.5", decimal.Decimal("2.5"))]),
    (Annotated[set[int], Field(max_length=2)], [("[1, 1]", {1})]),
    (Annotated[dict[int, int], Field(max_length=1)], [('{"1": 2}', {1: 2})]),
    (pydantic.RootModel[list[int]], [("[1]", pydantic.RootModel[list[int]]([1]))]),
]  # fmt: skip

# type -> texts that are not of it, which its schema refuses as well
COUNTEREXAMPLES: list[tuple[Any, list[str]]] = [
    (int, ["1.5", '"1"', "true"]),
    (dt.date, ['"2023-02-29"', '"2024-1-1"']),
    (dt.time, ['"24:00:00"', '"10:30"', '"10:30:60"']),
    (dt.datetime, [
        '"2023-02-29T10:30:00"', '"1900-02-29T10:30:00"', '"0000-01-01T00:00:00"', '"2024-04-31T10:30:00"',
        '"2024-02-29 10:30"', '"2024-02-29"',
    ]),
    (Annotated[dt.datetime, Meta(tz=True)], ['"2024-01-31T00:00:00"']),
    (Annotated[dt.datetime, Meta(tz=False)], ['"2024-01-31T00:00:00Z"']),
    (dt.timedelta, ['"P"', '"PT"', '"P1Y"', '"1 day"', '"P1DT"']),
    (decimal.Decimal, ['"1,5"', '"x"', '""']),
    (bytes, ['"QUI"', '"@@@@"']),
    (Annotated[bytes, Meta(min_length=2, max_length=4)], ['"QQ=="', '"QUJDREU="']),
    (Mixed, ['"1"', "2"]),
    (dict[int, str], ['{"01": "a"}', '{"x": "a"}']),
    (dict[Color, int], ['{"blue": 1}']),
    (dict[dt.date, int], ['{"2023-02-29": 1}']),
    (Circle | Square, ['{"type": "Oval", "side": 1}', '{"side": 1}']),
    (Row, ["[]", '["a"]']),
    (Options, ['{"alpha": "a"}']),
    (Model, ['{"a": 1}', '{"A": 0}', '{"A": 1, "b": "y"}']),
    (Strict, ['{"day": "2024-02-29", "x": 1}']),
    (Annotated[decimal.Decimal, Field(max_digits=4, decimal_places=2)], ['"123.4"', '"1.234"']),
    (Annotated[decimal.Decimal, Field(ge=0)], ['"-1"']),
    (Annotated[decimal.Decimal, Field(gt=1, le=10)], ["1", "10.5"]),
    (pydantic.UUID4, ['"12345678-1234-1678-9234-567812345678"']),
    (Moments, [
        '{"any_moment": "2024-02-29T10:30:00", "local": "2024-02-29T10:30:00Z", "exact": "2024-02-29T10:30:00+01:00", '
        '"time": "10:30:00", "span": "PT5M"}',
    ]),
]  # fmt: skip
