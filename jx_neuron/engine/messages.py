"""Conversations as prompts: messages that the tokenizer's chat template writes."""

from collections.abc import Mapping, Sequence
from typing import Any

from jx_neuron.errors import InputError
from jx_neuron.util.arguments import shown


def is_conversation(prompt: Any) -> bool:
    """Whether it is a list of messages."""
    return isinstance(prompt, list | tuple) and bool(prompt) and isinstance(prompt[0], Mapping)


def check_messages(messages: Sequence[Any], name: str) -> None:
    """Raises InputError unless each message has a role and content."""
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise InputError(
                f'{name} is a list of messages, and message {number} is {shown(message)}; a message is {{"role": '
                '"user", "content": "…"}'
            )


def rendered_by_template(tokenizer: Any, messages: Sequence[Mapping[str, Any]], instead: str) -> str:
    """Messages as the tokenizer's chat template writes them, ready for an answer.

    Raises InputError, which says what to do `instead`, where there is no template, or it fails.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(f"this tokenizer has no chat template; {instead}")
    try:
        rendered: str = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        rendered.encode()  # raises for half a surrogate pair
    except Exception as error:  # a template is a program of its own, in jinja
        what = str(error) or type(error).__name__
        raise InputError(
            f"the tokenizer's chat template fails: {what}\n{instead[0].upper()}{instead[1:]}, or mend it"
        ) from error
    return rendered
