"""lm-evaluation-harness over a model of this package: https://github.com/EleutherAI/lm-evaluation-harness

Importing this module registers the harness's model "jx-neuron". It needs the extra `eval`.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jx_neuron.config import NeuronConfig
from jx_neuron.engine.options import SamplingParams
from jx_neuron.engine.ticket import Event
from jx_neuron.errors import InputError
from jx_neuron.llm import NeuronAutoModelForCausalLM
from jx_neuron.util.arguments import integer
from jx_neuron.util.progress import track

try:
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
except ImportError as error:
    raise InputError(f"lm-evaluation-harness cannot be imported ({error}): pip install 'lm-eval[hf]'") from None

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@register_model("jx-neuron")
class JxNeuronLM(TemplateLM):  # type: ignore[misc]
    """A model for `lm_eval.simple_evaluate`.

    pretrained:   a model, or the first argument of `from_pretrained`, with `options` as its others.
    max_gen_toks: the longest answer in tokens, where a task has no limit.

    Texts that are too long for the model are truncated at the beginning. n_positions must exceed the number of tokens.

    Raises InputError for texts that the model cannot score or answer.
    """

    def __init__(
        self,
        pretrained: str | NeuronAutoModelForCausalLM,
        *,
        batch_size: int | str = 1,
        max_gen_toks: int = 256,
        max_batch_size: int | None = None,
        device: str | None = None,
        **options: Any,
    ):
        super().__init__()
        if isinstance(pretrained, str):
            every = NeuronConfig(output_all_logits=True)
            self.model = NeuronAutoModelForCausalLM.from_pretrained(
                pretrained, batch_size=_size(batch_size), neuron_config=every, **options
            )
        else:
            self.model = pretrained
        self.tokenizer, self.max_gen_toks = self.model.tokenizer, integer("max_gen_toks", max_gen_toks)

    @property
    def max_length(self) -> int:
        """The most tokens from which the next is predicted."""
        return self.model.buckets.capacity - 1

    @property
    def eot_token_id(self) -> int:
        """The tokenizer's end token, or else the model's first."""
        ends = (self.tokenizer.eos_token_id, *self.model.eos_token_ids)
        if (end := next((id for id in ends if id is not None), None)) is None:
            raise InputError("neither tokenizer nor model has an end token, which texts are scored behind; set one")
        return int(end)

    @property
    def prefix_token_id(self) -> int:
        """The token before a text whose every token is scored: the bos token, or else the end token."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else int(begin)

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer's name, a key of the harness's cache of requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids of a text. A text that begins with the bos token gets no second one."""
        begin = self.tokenizer.bos_token
        special = not (begin and string.startswith(begin)) if add_special_tokens is None else add_special_tokens
        return list(self.tokenizer.encode(string, add_special_tokens=special))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A chat as the tokenizer's template writes it."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        capacity = self.model.buckets.capacity
        for _, context, continuation in requests:
            if not context or len(continuation) >= capacity:
                raise InputError(
                    f"{len(continuation)} tokens cannot be scored after {len(context)}: at least one must come before "
                    f"them, and they must be fewer than n_positions={capacity}; make the model with more"
                )
        rows = [[*context, *continuation][-capacity:] for _, context, continuation in requests]
        results = []
        for (key, _context, continuation), parts in zip(requests, self.model.log_likelihoods(rows), strict=True):
            scored = slice(len(parts.logprobs) - len(continuation), None)
            results.append((float(parts.logprobs[scored].sum(dtype=np.float64)), bool(parts.likeliest[scored].all())))
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, results[-1])
        return results

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each text, all its tokens, in the harness's disjoint windows."""
        log_likelihoods: list[float] = []
        for request in track(requests, "scoring texts", len(requests)):
            windows = utils.get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, context_len=1
            )
            parts = self._loglikelihood_tokens([(None, *utils.make_disjoint_window(window)) for window in windows])
            log_likelihoods.append(sum(logprob for logprob, _ in parts))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, log_likelihoods[-1])
        return log_likelihoods

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The answer to each prompt, up to the first stop string of the task."""
        answers = [""] * len(requests)
        prompts, samplings = zip(*(self._sampling(*request.args) for request in requests), strict=True)
        events = self.model.generate(prompts, samplings, stream=True)
        ends = (event for event in self._texts(events, answers) if event.finish_reason is not None)
        for event in track(ends, "answering", len(requests)):
            number = event.prompt
            answers[number] = _before(answers[number], samplings[number].stop or ())
            self.cache_hook.add_partial("generate_until", requests[number].args, answers[number])
        return answers

    def _texts(self, events: Iterator[Event], texts: list[str]) -> Iterator[Event]:
        """Yields the events, and appends their texts to those of their prompts."""
        for event in events:
            texts[event.prompt] += event.text or ""
            yield event

    def _sampling(self, prompt: str, gen_kwargs: Mapping[str, Any]) -> tuple[list[int], SamplingParams]:
        """A prompt's tokens, truncated at the beginning to leave room for an answer, and its sampling parameters."""
        options = dict(normalize_gen_kwargs(dict(gen_kwargs), self.max_gen_toks))
        until, new = options.pop("until"), integer("max_gen_toks", options.pop("max_gen_toks"))
        samples = options.pop("do_sample")
        if unknown := sorted(set(options) - set(SAMPLING)):
            raise InputError(f"{unknown[0]} is no option of answers here; there are {', '.join(SAMPLING)}")
        room = self.model.buckets.capacity - new
        if room < 1:
            raise InputError(
                f"answers of {new} tokens leave no room for a prompt in n_positions={self.model.buckets.capacity}; "
                "make the model with a larger n_positions, or ask for a smaller max_gen_toks"
            )
        how: dict[str, Any] = {"temperature": 1.0, **options} if samples else dict(top_k=1)
        legal = range(self.model.settings.vocab_size)
        ends = [id for id in (self.tokenizer.eos_token_id, *self.model.eos_token_ids) if id in legal]
        row = (self.tok_encode(prompt) or [self.prefix_token_id])[-room:]
        return row, SamplingParams(max_tokens=new, eos_token_id=ends or -1, stop=list(until) or None, **how)


def _before(text: str, ends: Sequence[str]) -> str:
    for end in filter(None, ends):
        text = text.split(end, maxsplit=1)[0]
    return text


def _size(batch_size: int | str) -> int:
    digits = isinstance(batch_size, str) and batch_size.isdecimal()
    return integer("batch_size", int(batch_size) if digits else batch_size)
