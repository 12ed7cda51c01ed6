"""Fields of other servers' requests that this one has no use for: ignored, or refused unless they ask for nothing."""

from collections.abc import Mapping
from typing import Any

from jx_neuron.serve.errors import invalid

IGNORED = (
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "request_id",
    "priority",
    "prediction",
    "verbosity",
    "include_reasoning",
)
"""Fields that change no answer. The header X-Ignored-Fields names those of a request."""

REFUSED: Mapping[str, str] = {
    "suffix": "this model continues a text, and fills no gap in one",
    "best_of": "n gives all answers, and logprobs tells them apart",
    "use_beam_search": "answers are sampled, or greedy",
    "length_penalty": "there is no beam search",
    "prompt_embeds": "a prompt is text or token ids",
    "modalities": "answers are text",
    "audio": "answers are text",
    "web_search_options": "the server opens no address",
    "functions": "give them as tools",
    "function_call": "give it as tool_choice",
    "chat_template": "a template is a program; the checkpoint's own is used",
    "documents": "put them into a message",
    "mm_processor_kwargs": "messages are text",
    "media_io_kwargs": "messages are text",
    "guided_json": "use structured_outputs or response_format",
    "guided_regex": "use structured_outputs",
    "guided_choice": "use structured_outputs",
    "guided_grammar": "use structured_outputs with json, regex or choice",
    "logits_processors": "the server runs no code of requests",
    "cache_salt": "prompts of all callers share what is computed",
    "thinking_token_budget": "max_tokens limits the whole answer",
    "kv_transfer_params": "keys and values stay in this server",
    "previous_response_id": "responses are not kept; give the conversation as input",
    "conversation": "conversations are not kept; give the conversation as input",
    "background": "the answer comes with the response",
}
"""Fields that would change answers, and why there is none of them. Null, false, 0 and empty values pass."""

NEUTRAL: Mapping[str, tuple[Any, ...]] = {"best_of": (1,), "modalities": (["text"],), "length_penalty": (1, 1.0)}
"""Other values of these that ask for nothing."""


def known(fields: dict[str, Any], n: Any) -> tuple[dict[str, Any], list[str]]:
    """The fields without those of other servers, and the names of the ignored ones.

    Raises APIError, which names the field, for a refused one.
    """
    for name in REFUSED.keys() & fields.keys():
        value = fields[name]
        if value and value not in NEUTRAL.get(name, ()) and not (name == "best_of" and value == n):
            raise invalid(f"{name} is not supported: {REFUSED[name]}", name, "unsupported_parameter")
    ignored = [name for name in IGNORED if fields.get(name) is not None]
    return {name: value for name, value in fields.items() if name not in IGNORED and name not in REFUSED}, ignored
