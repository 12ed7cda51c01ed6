"""EAGLE-3 heads as they are published, of random weights or made to agree with their target; and one in torch."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tiny
import torch
import transformers
from safetensors.torch import save_file

D, DRAFT_VOCAB = 48, 40
CONFIG = {
    "architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", "hidden_size": D, "intermediate_size": 64,
    "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": tiny.VOCAB,
    "draft_vocab_size": DRAFT_VOCAB, "max_position_embeddings": tiny.POSITIONS, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0, "torch_dtype": "float32", "transformers_version": "4.53.1",
}  # fmt: skip
Head = dict[str, torch.Tensor]


def target(model_type: str = "llama", layers: int = 4) -> torch.nn.Module:
    """A random model, far enough from ties for greedy tokens to be the same in any order of sums."""
    sizes = dict(hidden_size=D, intermediate_size=90, num_hidden_layers=layers, num_attention_heads=4)
    sizes |= dict(num_key_value_heads=2, vocab_size=tiny.VOCAB, max_position_embeddings=tiny.POSITIONS)
    if model_type == "qwen3":
        sizes |= dict(head_dim=12)
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **tiny.SPECIAL, **sizes)
    found = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.normal_(0, 0.2) if parameter.ndim > 1 else parameter.add_(0.1 * torch.randn_like(parameter))
    return found


def random_head(seed: int = 0, **fields: Any) -> tuple[Head, dict[str, Any]]:
    """A head's tensors, and its config.json."""
    config, draw = CONFIG | fields, torch.Generator().manual_seed(seed)
    n, k, f = config["num_attention_heads"], config["num_key_value_heads"], config["intermediate_size"]
    h, v = D // n, config["draft_vocab_size"]
    shapes = {
        "fc.weight": (D, 3 * D),
        "midlayer.self_attn.q_proj.weight": (n * h, 2 * D),
        "midlayer.self_attn.k_proj.weight": (k * h, 2 * D),
        "midlayer.self_attn.v_proj.weight": (k * h, 2 * D),
        "midlayer.self_attn.o_proj.weight": (D, n * h),
        "midlayer.mlp.gate_proj.weight": (f, D),
        "midlayer.mlp.up_proj.weight": (f, D),
        "midlayer.mlp.down_proj.weight": (D, f),
        "midlayer.hidden_norm.weight": (D,),
        "midlayer.input_layernorm.weight": (D,),
        "midlayer.post_attention_layernorm.weight": (D,),
        "norm.weight": (D,),
        "lm_head.weight": (v, D),
    }
    head = {name: 0.2 * torch.randn(shape, generator=draw) + (len(shape) == 1) for name, shape in shapes.items()}
    tokens = torch.randperm(tiny.VOCAB, generator=draw)[:v].sort().values
    if config.get("attention_bias"):
        for name, size in (("q", n * h), ("k", k * h), ("v", k * h), ("o", D)):
            head[f"midlayer.self_attn.{name}_proj.bias"] = 0.2 * torch.randn(size, generator=draw)
    head["d2t"] = tokens - torch.arange(v)
    head["t2d"] = torch.zeros(tiny.VOCAB, dtype=torch.bool).index_fill(0, tokens, True)
    return head, config


def agreeing(hf: torch.nn.Module) -> tuple[Head, dict[str, Any]]:
    """Makes a target in which a token depends on the one before it alone, and a head that draws what it draws.

    The head attends to its own position alone, by a large constant as queries and keys, and passes the embedding on.
    Its residual is zero.
    """
    fields = dict(draft_vocab_size=tiny.VOCAB, attention_bias=True, norm_before_residual=True)
    head, config = random_head(num_key_value_heads=4, **fields)
    with torch.no_grad():
        for layer in hf.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    zeros = ("midlayer.hidden_norm", "midlayer.self_attn.q_proj", "midlayer.self_attn.k_proj", "midlayer.mlp.down_proj")
    for name in zeros:
        head[f"{name}.weight"].zero_()
    for name in "qkvo":
        head[f"midlayer.self_attn.{name}_proj.bias"] = torch.full((D,), 10.0 if name in "qk" else 0.0)
    head["midlayer.self_attn.v_proj.weight"] = torch.cat([torch.eye(D), torch.zeros(D, D)], dim=1)
    head["midlayer.self_attn.o_proj.weight"] = torch.eye(D)
    head["midlayer.input_layernorm.weight"] = torch.ones(D)
    head["norm.weight"], head["lm_head.weight"] = hf.model.norm.weight.detach(), hf.lm_head.weight.detach()
    return {name: tensor.clone() for name, tensor in head.items()}, config


def saved(head: Head, config: dict[str, Any], folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(head, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def features(hf: torch.nn.Module, tokens: list[int], taps: Sequence[int]) -> Any:
    """What enters the layers `taps` of a target, end to end, [t, 3 d]."""
    with torch.no_grad():
        states = hf.model(torch.tensor([tokens]), output_hidden_states=True).hidden_states
    return torch.cat([states[layer][0] for layer in taps], dim=-1)


def draft(head: Head, config: dict[str, Any], embedding: Any, tokens: list[int], known: Any, count: int) -> Any:
    """EAGLE-3's drafting without a cache, in float32: `count` tokens behind `tokens`, and the logits of each.

    known: the target's features of all tokens but the last.
    """
    x, following, drawn, logits = known @ head["fc.weight"].T, list(tokens[1:]), [], []
    for _ in range(count):
        hidden = _layer(head, config, embedding[following], x)
        logits.append(_rms(hidden[-1], head["norm.weight"], config) @ head["lm_head.weight"].T)
        token = int(logits[-1].argmax())
        drawn.append(token + int(head["d2t"][token]))
        x, following = torch.cat([x, hidden[-1:]]), [*following, drawn[-1]]
    return drawn, torch.stack(logits)


def _layer(head: Head, config: dict[str, Any], embedded: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ head[f"midlayer.{name}.weight"].T + head.get(f"midlayer.{name}.bias", torch.zeros(()))

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        return _rms(x, head[f"midlayer.{name}.weight"], config)

    n, k, t = config["num_attention_heads"], config["num_key_value_heads"], len(x)
    normed = norm("hidden_norm", x)
    both = torch.cat([norm("input_layernorm", embedded), normed], dim=-1)
    q, keys, values = (
        linear(f"self_attn.{name}_proj", both).view(t, heads, D // n).transpose(0, 1)
        for name, heads in (("q", n), ("k", k), ("v", k))
    )
    q, keys = _rotated(q, config), _rotated(keys, config).repeat_interleave(n // k, 0)
    scores = q @ keys.transpose(1, 2) / (D // n) ** 0.5
    scores = scores.masked_fill(~torch.ones(t, t, dtype=torch.bool).tril(), -torch.inf)
    attended = (scores.softmax(-1) @ values.repeat_interleave(n // k, 0)).transpose(0, 1).reshape(t, -1)
    x = (normed if config.get("norm_before_residual") else x) + linear("self_attn.o_proj", attended)
    y = norm("post_attention_layernorm", x)
    y = torch.nn.functional.silu(linear("mlp.gate_proj", y)) * linear("mlp.up_proj", y)
    return x + linear("mlp.down_proj", y)


def _rms(x: torch.Tensor, weight: torch.Tensor, config: dict[str, Any]) -> torch.Tensor:
    return weight * x * torch.rsqrt((x * x).mean(-1, keepdim=True) + config["rms_norm_eps"])


def _rotated(x: torch.Tensor, config: dict[str, Any]) -> torch.Tensor:
    h = x.shape[-1]
    angle = torch.arange(x.shape[1])[:, None] / config["rope_theta"] ** (torch.arange(0, h, 2) / h)
    cos, sin = (torch.cat([f(angle)] * 2, dim=-1) for f in (torch.cos, torch.sin))
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-high, low], dim=-1) * sin
