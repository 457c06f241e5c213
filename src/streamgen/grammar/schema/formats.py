"""The formats that are enforced, as languages of what the string holds.

Each is inside of what the defining RFC allows, never outside; where it is smaller, the comment says what is missing.
A format that no validator knows is an annotation; one that validators know and that is not here is refused.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from streamgen.grammar.schema.patterns import full_language

if TYPE_CHECKING:
    from streamgen.grammar.schema.language import Language

# Known to validators, but with no exact regular language worth having here.
REFUSED = frozenset({"regex", "idn-hostname"})

_YEAR = r"(?:[1-9][0-9]{3}|0[1-9][0-9]{2}|00[1-9][0-9]|000[1-9])"
# Not century years, except those that 400 divides; the year 0000 is missing, since no date type has it.
_LEAP = r"(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"
_DATE = (
    rf"(?:{_YEAR}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    rf"|02-(?:0[1-9]|1[0-9]|2[0-8]))|{_LEAP}-02-29)"
)
_OFFSET = r"(?:[Zz]|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
# Leap seconds are missing: date types reject them.
_TIME = rf"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{{1,9}})?{_OFFSET}"

_OCTET = r"(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_IPV4 = rf"(?:{_OCTET}\.){{3}}{_OCTET}"
_H16 = r"[0-9a-fA-F]{1,4}"
_LS32 = rf"(?:{_H16}:{_H16}|{_IPV4})"

_ATEXT = r"[a-zA-Z0-9!#$%&'*+/=?^_`{|}~-]"
# Labels without a doubled hyphen, which may mean punycode.
_LABEL = r"[a-zA-Z0-9]+(?:-[a-zA-Z0-9]+)*"
# Quoted local parts and address literals are missing.
_EMAIL = rf"{_ATEXT}+(?:\.{_ATEXT}+)*@{_LABEL}(?:\.{_LABEL})*"


def _label(length: int) -> str:
    """A host's label of at most so many characters; two hyphens in the third and fourth place are for punycode."""
    edge, inner = "[a-zA-Z0-9]", "[a-zA-Z0-9-]"
    short = rf"{edge}(?:{inner}?{edge})?|{edge}{inner}{inner}{edge}"
    return rf"(?:{short}|{edge}{inner}(?:{edge}{inner}|-{edge}){inner}{{0,{length - 5}}}{edge})"


def _hostname() -> str:
    """RFC 1123. Missing are names of many labels of which one is long: all must stay within 253 characters."""
    return rf"{_label(63)}(?:\.{_label(63)}){{0,2}}|{_label(30)}(?:\.{_label(30)}){{0,7}}"


_UNICODE = "\u00a0-\ud7ff\uf900-\ufdcf\ufdf0-\uffef\U00010000-\U0001fffd\U00020000-\U0002fffd\U00030000-\U0003fffd"

_DURATION_DATE = r"(?:[0-9]{1,9}Y(?:[0-9]{1,9}M(?:[0-9]{1,9}D)?)?|[0-9]{1,9}M(?:[0-9]{1,9}D)?|[0-9]{1,9}D)"
_DURATION_TIME = r"T(?:[0-9]{1,9}H(?:[0-9]{1,9}M(?:[0-9]{1,9}S)?)?|[0-9]{1,9}M(?:[0-9]{1,9}S)?|[0-9]{1,9}S)"

_POINTER = r"(?:/(?:[^/~]|~[01])*)*"


def _ipv6() -> str:
    """RFC 4291, section 2.2: eight groups, or fewer around one `::`."""
    options = [rf"(?:{_H16}:){{6}}{_LS32}"]
    for after in range(6):
        head = rf"(?:(?:{_H16}:){{0,{5 - after - 1}}}{_H16})?" if after < 5 else ""
        options.append(rf"{head}::(?:{_H16}:){{{after}}}{_LS32}")
    options.append(rf"(?:(?:{_H16}:){{0,5}}{_H16})?::{_H16}")
    options.append(rf"(?:(?:{_H16}:){{0,6}}{_H16})?::")
    return "(?:" + "|".join(options) + ")"


def _uri(unicode: str, *, is_reference: bool) -> str:
    """RFC 3986 and, with more letters, RFC 3987. IPvFuture is missing."""
    escaped = r"%[0-9a-fA-F]{2}"
    plain = rf"a-zA-Z0-9._~!$&'()*+,;=\-{unicode}"
    segment, segment_no_colon = rf"(?:[{plain}:@]|{escaped})", rf"(?:[{plain}@]|{escaped})"
    authority = rf"(?:(?:[{plain}:]|{escaped})*@)?(?:\[{_ipv6()}\]|(?:[{plain}]|{escaped})*)(?::[0-9]{{0,5}})?"
    absolute = rf"//{authority}(?:/{segment}*)*|/(?:{segment}+(?:/{segment}*)*)?"
    tail = rf"(?:\?(?:[{plain}:@/?]|{escaped})*)?(?:#(?:[{plain}:@/?]|{escaped})*)?"
    rootless = rf"{segment}+(?:/{segment}*)*"
    full = rf"[a-zA-Z][a-zA-Z0-9+.\-]*:(?:{absolute}|{rootless}|){tail}"
    relative = rf"(?:{absolute}|{segment_no_colon}+(?:/{segment}*)*|){tail}"
    return rf"(?:{full}|{relative})" if is_reference else full


def _uri_template() -> str:
    """RFC 6570."""
    name = r"(?:[a-zA-Z0-9_]|%[0-9a-fA-F]{2})(?:\.?(?:[a-zA-Z0-9_]|%[0-9a-fA-F]{2}))*"
    variable = rf"{name}(?:\*|:[1-9][0-9]{{0,3}})?"
    expression = rf"\{{[+#./;?&]?{variable}(?:,{variable})*\}}"
    plain = rf"[!#$&()*+,\-./0-9:;=?@A-Z\[\]_a-z~{_UNICODE}]|%[0-9a-fA-F]{{2}}"
    return rf"(?:{plain}|{expression})*"


@lru_cache(maxsize=1)
def _patterns() -> dict[str, str]:
    return {
        "date": _DATE,
        "time": _TIME,
        "date-time": rf"{_DATE}[Tt]{_TIME}",
        "duration": rf"P(?:{_DURATION_DATE}(?:{_DURATION_TIME})?|{_DURATION_TIME}|[0-9]{{1,9}}W)",
        "email": _EMAIL,
        "idn-email": _EMAIL.replace("a-zA-Z0-9", f"a-zA-Z0-9{_UNICODE}"),
        "hostname": _hostname(),
        "ipv4": _IPV4,
        "ipv6": _ipv6(),
        "uuid": r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}",
        "uri": _uri("", is_reference=False),
        "uri-reference": _uri("", is_reference=True),
        "iri": _uri(_UNICODE, is_reference=False),
        "iri-reference": _uri(_UNICODE, is_reference=True),
        "uri-template": _uri_template(),
        "json-pointer": _POINTER,
        "relative-json-pointer": rf"(?:0|[1-9][0-9]{{0,9}})(?:#|{_POINTER})",
    }


@lru_cache(maxsize=64)
def format_language(name: str) -> Language | None:
    """What the strings of a format are; None for a format that is an annotation."""
    pattern = _patterns().get(name)
    return None if pattern is None else full_language(pattern)
