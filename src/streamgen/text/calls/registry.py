"""Which format a checkpoint's template has calls written in."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from streamgen.text.calls.hermes import HermesCalls
from streamgen.text.calls.llama import LlamaCalls
from streamgen.text.calls.mistral import MistralListCalls, MistralNamedCalls

if TYPE_CHECKING:
    from streamgen.text.calls.formats import CallFormat, CallTokens

# In the order of looking: (what the template holds, what it does not hold, the format).
_FORMATS: tuple[tuple[tuple[str, ...], tuple[str, ...], type[CallFormat]], ...] = (
    (("[TOOL_CALLS]", "[ARGS]"), (), MistralNamedCalls),
    (("[TOOL_CALLS]",), (), MistralListCalls),
    # Others have XML inside of the same tags.
    (("<tool_call>", '"arguments"'), ("<arg_key>", "<function=", "<function name="), HermesCalls),
    (("<|start_header_id|>", '"parameters": '), ("<function=",), LlamaCalls),
)


def find_format(template: str, tokens: CallTokens) -> CallFormat | None:
    """The first that fits; None where calls are written in a way that is not known here."""
    for present, absent, make in _FORMATS:
        if all(text in template for text in present) and not any(text in template for text in absent):
            return make(tokens)
    return None


def takes_tools(template: str) -> bool:
    """Whether the template does anything with tools."""
    return re.search(r"\btools\b", template) is not None
