"""Formats: what the RFCs give as examples, and what they exclude."""

from __future__ import annotations

import datetime
import ipaddress
import random

import pytest

from streamgen.errors import SchemaError
from streamgen.grammar.schema import language as lang
from streamgen.grammar.schema import plan_schema
from streamgen.grammar.schema.formats import format_language

GOOD: dict[str, list[str]] = {
    "date": ["2024-02-29", "2000-02-29", "1999-12-31", "0001-01-01"],
    "time": ["23:59:59Z", "00:00:00.123+05:30", "12:00:00-23:59"],
    "date-time": ["2024-02-29T12:00:00Z", "1963-06-19t08:30:06.283185z", "1990-12-31T15:59:59-08:00"],
    "duration": ["P4DT12H30M5S", "PT0S", "P1Y2M", "P2W", "PT36H"],
    "email": ["joe.bloggs@example.com", "te~st@example.com", "a+b@c-d.e"],
    "idn-email": ["실례@실례.테스트", "a@b.c"],
    "hostname": ["www.example.com", "a", "1host", "a-b.c", "a--b", "x" * 63, ".".join(["label"] * 8)],
    "ipv4": ["0.0.0.0", "255.255.255.255", "192.168.1.10"],
    "ipv6": ["::", "::1", "1::", "1:2:3:4:5:6:7:8", "::ffff:192.168.0.1", "1::6:7:8"],
    "uuid": ["2EB8AA08-aa98-11ea-b4aa-73b441d16380"],
    "uri": [
        "http://foo.bar/?baz=qux#quux",
        "urn:oasis:names",
        "mailto:a@b.c",
        "ldap://[2001:db8::7]/c=GB?x",
        "http://a:8080",
    ],
    "uri-reference": ["/abc", "//foo.bar/x", "#frag", "", "a/b?c", "http://x"],
    "iri": ["http://ƒøø.ßår/?∂éœ=πîx#πîüx"],
    "iri-reference": ["/âππ", "#ƒrägmênt"],
    "uri-template": ["http://example.com/dictionary/{term:1}/{term}", "plain", "{?a,b*}"],
    "json-pointer": ["", "/foo/0", "/a~1b/~0"],
    "relative-json-pointer": ["1", "0/foo", "2#"],
}
BAD: dict[str, list[str]] = {
    "date": ["2023-02-29", "1900-02-29", "2024-04-31", "2024-1-1", "24-01-01", "0000-01-01", "2024-01-01x"],
    "time": ["24:00:00Z", "12:60:00Z", "12:00:00", "12:00Z", "08:30:06 PST"],
    "date-time": ["2024-02-30T12:00:00Z", "2024-01-01 12:00:00Z", "2024-01-01", "2024-01-01T12:00:00"],
    "duration": ["P", "PT", "4DT12H", "P1D2H", "P1YT", "PT1D", "P2D1Y", "P1Y2W"],
    "email": ["2962", "a@", "@b", ".a@b.c", "a..b@c.d", "a b@c.d", "a@b..c"],
    "idn-email": ["2962", "a@"],
    "hostname": ["-a", "a-", "a..b", "", "a_b", "x" * 64, "a." * 127 + "a" * 3, "xn--X", "ab--c"],
    "ipv4": ["256.0.0.0", "1.2.3", "1.2.3.4.5", "01.2.3.4", "1.2.3.4 "],
    "ipv6": [
        "12345::",
        "1:2:3:4:5:6:7",
        "1::2::3",
        ":::",
        "::1.2.3",
        "1:2:3:4:5:6:7:8:9",
        "fe80::%eth1",
        "1:2:3:4:5:6:7::8",
    ],
    "uuid": ["2eb8aa08aa9811eab4aa73b441d16380", "2eb8aa08-aa98-11ea-b4aa-73b441d1638g"],
    "uri": ["//foo.bar", "/abc", "http:// x", "bar,baz", "http://a b", "http://[::1", "\\\\WINDOWS"],
    "uri-reference": ["\\\\WINDOWS", "#frag\\ment", "a b", "1:2"],
    "iri": ["/abc", "âππ", "http:// x"],
    "iri-reference": ["\\\\WINDOWS", "#ƒräg\\mênt"],
    "uri-template": ["http://x/{term", "a b{}", "{"],
    "json-pointer": ["foo", "/foo~", "/~2", "#/a"],
    "relative-json-pointer": ["/foo", "-1/a", "+1", "01/a", "0##", ""],
}


@pytest.mark.parametrize("name", GOOD)
def test_format(name: str) -> None:
    language = format_language(name)
    assert language is not None
    assert [text for text in GOOD[name] if not lang.matches(language, text)] == []
    assert [text for text in BAD[name] if lang.matches(language, text)] == []


def test_dates_are_those_of_the_calendar() -> None:
    language = format_language("date")
    assert language is not None
    day = datetime.date(1895, 1, 1)
    while day.year < 1909:
        assert lang.matches(language, day.isoformat())
        day += datetime.timedelta(days=17)
    for year in (1900, 1996, 2000, 2023, 2024, 2100, 2400):
        is_leap = year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)
        assert lang.matches(language, f"{year}-02-29") == is_leap


def test_addresses_are_those_that_python_reads() -> None:
    rng = random.Random(5)
    language = format_language("ipv6")
    assert language is not None
    for _ in range(400):
        groups = [
            "".join(rng.choice("0f3A") for _ in range(rng.choice([0, 1, 1, 2, 4]))) for _ in range(rng.randrange(2, 10))
        ]
        text = ":".join(groups)
        try:
            ipaddress.IPv6Address(text)
        except ValueError:
            assert not lang.matches(language, text), text
        else:
            assert lang.matches(language, text), text


@pytest.mark.parametrize("name", ["regex", "idn-hostname"])
def test_a_format_that_validators_assert_and_no_language_says_is_refused(name: str) -> None:
    with pytest.raises(SchemaError, match=name) as caught:
        plan_schema(f'{{"properties": {{"a": {{"format": "{name}"}}}}}}')
    assert (caught.value.pointer, caught.value.keyword) == ("/properties/a", "format")
