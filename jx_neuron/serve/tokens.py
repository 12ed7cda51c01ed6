"""POST /tokenize and /detokenize, GET /tokenizer_info."""

from typing import Any

from jx_neuron.serve.conversation import tokens_of
from jx_neuron.serve.errors import invalid
from jx_neuron.serve.protocol import DetokenizeRequest, TokenizeRequest
from jx_neuron.serve.served import Served


async def tokenize(served: Served, fields: dict[str, Any]) -> dict[str, Any]:
    """The tokens of a text, or of a conversation by the chat template."""
    served.require_length(fields.get("messages"), "messages")
    request = TokenizeRequest.model_validate(fields)
    served.require_name(request.model)
    if (request.prompt is None) == (request.messages is None):
        raise invalid("give prompt or messages")
    if request.messages is not None:
        tokens = await tokens_of(
            served,
            request.messages,
            request.tools,
            add_generation_prompt=request.add_generation_prompt,
            continue_final_message=request.continue_final_message,
            add_special_tokens=request.add_special_tokens,
            template_kwargs=request.chat_template_kwargs,
            any_length=True,
        )
    else:
        tokens = await served.encode(request.prompt or "", request.add_special_tokens is not False, any_length=True)
    texts = [served.token_text(id) for id in tokens] if request.return_token_strs else None
    return dict(count=len(tokens), max_model_len=served.capacity, tokens=tokens, token_strs=texts)


async def detokenize(served: Served, fields: dict[str, Any]) -> dict[str, Any]:
    """The text of tokens."""
    request = DetokenizeRequest.model_validate(fields)
    served.require_name(request.model)
    return dict(prompt=served.decode(request.tokens))


def tokenizer_info(served: Served) -> dict[str, Any]:
    """The special tokens and the chat template, of which lm-evaluation-harness makes a tokenizer."""
    tokenizer = served.tokenizer
    names = ("bos_token", "eos_token", "pad_token", "unk_token", "chat_template")
    return dict(
        {name: getattr(tokenizer, name, None) for name in names},
        tokenizer_class=type(tokenizer).__name__,
        model_max_length=served.capacity,
        vocab_size=served.vocab_size,
    )
