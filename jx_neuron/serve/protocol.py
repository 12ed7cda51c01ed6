"""The fields of requests: OpenAI's, and vLLM's beyond them.

https://platform.openai.com/docs/api-reference, https://docs.vllm.ai/en/latest/serving/openai_compatible_server.html
"""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

T = TypeVar("T")
Several = Annotated[list[T], Field(fail_fast=True)]
"""A list of which only the first wrong item is an error: a million errors take minutes."""
MOST_PARTS = 4096
"""Parts of a message's content."""
Text = Annotated[str, Field(min_length=1, max_length=1024)]


class Body(BaseModel):
    """An object of a request. A field that it lacks is refused by name."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _one_unknown(cls, fields: Any) -> Any:
        """Leaves one unknown field, for the same reason as in `Several`."""
        if not isinstance(fields, dict) or len(fields) <= len(cls.model_fields):
            return fields
        names = {field.alias or name for name, field in cls.model_fields.items()}
        unknown = next(name for name in fields if name not in names)
        return {name: value for name, value in fields.items() if name in names or name == unknown}


class StreamOptions(Body):
    """Usage in a stream: in a last chunk of its own, or in every chunk."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


class JsonSchema(Body):
    """A JSON schema, and its name."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """How an answer is written."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(Body):
    """What an answer may be: JSON of a schema, a match of a regular expression, or one of several texts."""

    json_: dict[str, Any] | str | None = Field(None, alias="json")
    regex: str | None = Field(None, max_length=8192)
    choice: Several[str] | None = Field(None, min_length=1, max_length=1024)
    json_object: bool | None = None


class Sampling(Body):
    """How tokens are chosen, and when an answer ends."""

    model: str | None = None
    max_tokens: int | None = Field(None, ge=0)
    n: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    top_p_min_tokens: int | None = Field(None, ge=1)
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = Field(None, gt=0)
    no_repeat_ngram_size: int | None = Field(None, ge=0)
    logit_bias: dict[str, Any] | None = Field(None, max_length=1024)
    allowed_token_ids: Several[int] | None = Field(None, min_length=1)
    bad_words: Several[Text] | None = Field(None, max_length=256)
    stop: Text | Annotated[Several[Text], Field(max_length=64)] | None = None
    stop_token_ids: Several[int] | None = Field(None, max_length=1024)
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = Field(None, ge=0)
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: Literal[True] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    truncate_prompt_tokens: int | None = Field(None, ge=-1)
    add_special_tokens: bool | None = None
    prompt_logprobs: int | None = Field(None, ge=0)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None


class CompletionRequest(Sampling):
    """POST /v1/completions."""

    prompt: str | Several[int] | Several[str | Several[int]]
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0)


class TextPart(Body):
    """A part of a message's content; only text is taken."""

    type: Literal["text", "input_text", "output_text", "refusal"]
    text: str | None = None
    refusal: str | None = None
    annotations: Several[Any] | None = None
    logprobs: Several[Any] | None = None


class CalledFunction(Body):
    """The function of a call, with its arguments as JSON text."""

    name: str
    arguments: str


class ToolCall(Body):
    """A call that an earlier answer made."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None


class Message(Body):
    """A message of a conversation. Clients send some fields empty that an answer had."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[Several[TextPart], Field(max_length=MOST_PARTS)] | None = None
    name: str | None = None
    tool_calls: Several[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    refusal: None = None
    annotations: Several[Any] | None = None
    audio: None = None
    function_call: None = None


class Function(Body):
    """A function that the model may call; `parameters` is a JSON schema."""

    name: Annotated[str, Field(min_length=1, max_length=256)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    """A function, as a tool."""

    type: Literal["function"] = "function"
    function: Function


class NamedFunction(Body):
    """The name of a function."""

    name: str


class NamedTool(Body):
    """The tool that has to be called."""

    type: Literal["function"] = "function"
    function: NamedFunction


class Conversation(Body):
    """What the chat template renders."""

    messages: Several[Message] = Field(min_length=1)
    tools: Several[Tool] | None = Field(None, max_length=256)
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None


class ChatRequest(Sampling, Conversation):
    """POST /v1/chat/completions."""

    max_completion_tokens: int | None = Field(None, ge=0)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    echo: bool | None = None


class TokenizeRequest(Body):
    """POST /tokenize, of a text or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: Several[Message] | None = Field(None, min_length=1)
    tools: Several[Tool] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeRequest(Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: Several[int]
