"""The families under test: HF's options of tiny models, from tests/families_*.py, and checkpoints known by name."""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

OPTIONS: dict[str, list[dict[str, Any]]] = {}
for path in sorted(Path(__file__).parent.glob("families_*.py")):
    for name, options in import_module(path.stem).OPTIONS.items():
        OPTIONS.setdefault(name, []).extend(options)

# families that normalize queries and keys of all heads together, and those that add attention and MLP together
NORMS_OVER_HEADS = {"minimax_m2", "olmo2", "olmo3", "olmoe"}
PARALLEL = {"codegen", "cohere", "cohere2", "gptj", "phi"}


def is_parallel(model_type: str, config: dict[str, Any]) -> bool:
    """Whether attention and MLP of a layer, as HF has its config, are added to the residual together."""
    if model_type == "falcon":
        return config["new_decoder_architecture"] or config["parallel_attn"]
    return model_type in PARALLEL or bool(config.get("use_parallel_residual"))


def all_reduces(model_type: str, config: dict[str, Any], layers: int, tp: int) -> int:
    """All-reduces of the layers in a step: of attention or a recurrence, of an MLP, and of norms over many heads."""
    groups = config.get("n_groups", config.get("mamba_n_groups", tp))
    norms = groups % tp > 0  # of heads of groups that lie on several cores
    if model_type == "mamba2":
        return layers * (1 + norms)
    if model_type == "falcon_h1":
        adds_scaled = {config["ssm_out_multiplier"], config["attention_out_multiplier"]} != {1.0}
        return layers * (2 + adds_scaled + (norms and config["mamba_rms_norm"]))
    if model_type == "granitemoehybrid":
        return 2 * layers + norms * config["layer_types"].count("linear_attention")
    beside = bool(config.get("enable_moe_block"))  # experts, with a norm between them and the MLP
    return layers * (2 - is_parallel(model_type, config) + 2 * (model_type in NORMS_OVER_HEADS) + beside)


def numbered(cases: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
    """The ids of cases: model_type-number."""
    names = [name for name, _ in cases]
    return [f"{name}-{names[:index].count(name)}" for index, name in enumerate(names)]


# the checkpoints of the first release of transformers-neuronx
FIRST_RELEASE = """EleutherAI/gpt-j-6B facebook/opt-125m facebook/opt-1.3b facebook/opt-2.7b facebook/opt-6.7b
facebook/opt-13b facebook/opt-30b gpt2 gpt2-medium gpt2-large gpt2-xl""".split()
