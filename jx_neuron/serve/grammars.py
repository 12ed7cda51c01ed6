"""The grammar of a request: response_format, or structured_outputs."""

import asyncio
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from jx_neuron.engine.grammar import Grammar, Grammars
from jx_neuron.serve.errors import invalid
from jx_neuron.serve.protocol import Sampling
from jx_neuron.serve.served import Served

SPECIAL = re.compile(r"[\\.+*?()|\[\]{}^$#&~-]")

Maker = Callable[[Grammars], Grammar]


async def grammar_of(served: Served, request: Sampling) -> Grammar | None:
    """A Grammar, or None where any text may be the answer. Raises APIError for more than one."""
    makers = [maker for maker in (_of_format(request), _of_structured(request)) if maker is not None]
    if len(makers) > 1:
        raise invalid("give response_format or structured_outputs, not both", "structured_outputs")
    return await _made(served, makers[0]) if makers else None


async def schema_grammar(served: Served, schema: Mapping[str, Any]) -> Grammar | None:
    """The Grammar of a JSON schema."""
    return await _made(served, lambda grammars: grammars.json_schema(dict(schema)))


async def _made(served: Served, maker: Maker) -> Grammar:
    return await asyncio.to_thread(lambda: maker(served.grammars))  # the first takes a second


def _of_format(request: Sampling) -> Maker | None:
    how = request.response_format
    if how is None or how.type == "text":
        return None
    if how.type == "json_object":
        return Grammars.json_object
    if how.json_schema is None or how.json_schema.schema_ is None:
        raise invalid("json_schema has to have a schema", "response_format.json_schema")
    schema = how.json_schema.schema_
    return lambda grammars: grammars.json_schema(schema)


def _of_structured(request: Sampling) -> Maker | None:
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
            return lambda grammars: grammars.json_schema(schema)
        case "regex":
            return lambda grammars: grammars.regex(str(how.regex))
        case "choice":
            alternatives = "|".join(SPECIAL.sub(r"\\\g<0>", one) for one in how.choice or ())
            return lambda grammars: grammars.regex(f"({alternatives})")
    return Grammars.json_object
