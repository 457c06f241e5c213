"""JSON schemas: what they mean as a grammar of JSON text, exactly or not at all.

document    text -> places and references           keywords, limits   what is a schema, and how large
assertions, expand   places -> sets of values       values, numbers, language   the sets and their algebra
emptiness   which sets hold nothing                 patterns, formats  what strings hold
emit, structures, scalars, spelling   sets -> productions of JSON text     productions, printing   -> text
plan        all of it: schema -> `SchemaPlan`
"""

from streamgen.grammar.schema.limits import SchemaLimits
from streamgen.grammar.schema.plan import SchemaPlan, plan_schema

__all__ = ["SchemaLimits", "SchemaPlan", "plan_schema"]
