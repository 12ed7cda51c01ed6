"""The grammar of a request: response_format, or structured_outputs."""

import asyncio
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from jx_neuron.engine.grammar import Grammar
from jx_neuron.serve.errors import invalid
from jx_neuron.serve.protocol import Sampling
from jx_neuron.serve.served import Served

SPECIAL = re.compile(r"[\\.+*?()|\[\]{}^$#&~-]")


async def grammar_of(served: Served, request: Sampling) -> Grammar | None:
    """A Grammar, or None where any text may be the answer. Raises APIError for more than one."""
    makers = [maker for maker in (_of_format(served, request), _of_structured(served, request)) if maker is not None]
    if len(makers) > 1:
        raise invalid("give response_format or structured_outputs, not both", "structured_outputs")
    return await asyncio.to_thread(makers[0]) if makers else None


async def schema_grammar(served: Served, schema: Mapping[str, Any]) -> Grammar | None:
    """The Grammar of a JSON schema."""
    return await asyncio.to_thread(served.grammars.json_schema, dict(schema))


def _of_format(served: Served, request: Sampling) -> Callable[[], Grammar] | None:
    how = request.response_format
    if how is None or how.type == "text":
        return None
    if how.type == "json_object":
        return served.grammars.json_object
    if how.json_schema is None or how.json_schema.schema_ is None:
        raise invalid("json_schema has to have a schema", "response_format.json_schema")
    schema = how.json_schema.schema_
    return lambda: served.grammars.json_schema(schema)


def _of_structured(served: Served, request: Sampling) -> Callable[[], Grammar] | None:
    how = request.structured_outputs
    if how is None:
        return None
    kinds = [name for name in ("json_", "regex", "choice", "json_object") if getattr(how, name)]
    if len(kinds) != 1:
        raise invalid("structured_outputs has one of json, regex, choice and json_object", "structured_outputs")
    match kinds[0]:
        case "json_":
            try:
                schema = json.loads(how.json_) if isinstance(how.json_, str) else how.json_
            except (ValueError, RecursionError) as error:
                raise invalid(f"json is no JSON schema: {error}", "structured_outputs.json") from None
            if not isinstance(schema, dict):
                raise invalid("json is no JSON schema", "structured_outputs.json")
            return lambda: served.grammars.json_schema(schema)
        case "regex":
            return lambda: served.grammars.regex(str(how.regex))
        case "choice":
            alternatives = "|".join(SPECIAL.sub(r"\\\g<0>", one) for one in how.choice or ())
            return lambda: served.grammars.regex(f"({alternatives})")
    return served.grammars.json_object
