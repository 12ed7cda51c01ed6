"""StableLM (Bellagente et al., arXiv:2402.17834).

https://github.com/huggingface/transformers/blob/main/src/transformers/models/stablelm/modeling_stablelm.py
"""

from dataclasses import dataclass
from typing import ClassVar

from flax import nnx
from jax import Array
from jax.sharding import PartitionSpec as P

from jx_neuron.checkpoint.hf_config import divisible, one_of
from jx_neuron.checkpoint.weights import Copy, W
from jx_neuron.models.llama_like import RopeConfig
from jx_neuron.models.rows import attention, embedding, gated_mlp, layer_norm
from jx_neuron.nn.attention import attend
from jx_neuron.nn.layers import ACT, Embedding, LayerNorm, Layers, Linear, Linears
from jx_neuron.nn.rope import Rotation, rope_half
from jx_neuron.nn.state import LayerState, Positions, State


@dataclass(frozen=True)
class Config(RopeConfig):
    """HF's StableLmConfig."""

    vocab_size: int = 50304
    hidden_size: int = 2560
    intermediate_size: int = 6912
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    hidden_act: str = "silu"
    max_position_embeddings: int = 4096
    layer_norm_eps: float = 1e-5
    use_qkv_bias: bool = False
    qk_layernorm: bool = False
    use_parallel_residual: bool = False
    partial_rotary_factor: float = 0.25
    tie_word_embeddings: bool = False

    MODEL_TYPE: ClassVar[str] = "stablelm"
    COMPLETE: ClassVar[bool] = True
    LAYERS_ALIKE: ClassVar[bool] = True
    INERT: ClassVar[frozenset[str]] = frozenset({"attention_dropout", "hidden_dropout"})

    def __post_init__(self) -> None:
        one_of("stablelm", "hidden_act", self.hidden_act, ACT)
        n, k = self.num_attention_heads, self.num_key_value_heads
        divisible("stablelm", "hidden_size", self.hidden_size, "num_attention_heads", n)
        divisible("stablelm", "num_attention_heads", n, "num_key_value_heads", k)
        super().__post_init__()

    @property
    def sizes(self) -> dict[str, int]:
        d, n, k = self.hidden_size, self.num_attention_heads, self.num_key_value_heads
        return dict(d=d, n=n, k=k, h=d // n, f=self.intermediate_size, v=self.vocab_size)


class Block(nnx.Module):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        d, n, k, h, f = (cfg.sizes[c] for c in "dnkhf")
        eps, qkv = cfg.layer_norm_eps, dict(q_proj=(n, h), k_proj=(k, h), v_proj=(k, h))
        self.input_layernorm = LayerNorm(d, eps)
        self.qkv = Linears((d,), qkv, bias=cfg.use_qkv_bias, rngs=rngs)
        self.q_layernorm = LayerNorm((n, h), eps, bias=False) if cfg.qk_layernorm else None
        self.k_layernorm = LayerNorm((k, h), eps, bias=False) if cfg.qk_layernorm else None
        self.o_proj = Linear((n, h), (d,), bias=False, rngs=rngs)
        self.post_attention_layernorm = None if cfg.use_parallel_residual else LayerNorm(d, eps)
        self.gate_up = Linears((d,), dict(gate_proj=(f,), up_proj=(f,)), bias=False, rngs=rngs)
        self.down_proj = Linear((f,), (d,), bias=False, rngs=rngs)
        self.act = ACT[cfg.hidden_act]

    def __call__(self, x_btd: Array, state: LayerState, at: Positions, by: Rotation) -> tuple[Array, LayerState]:
        h_btd = self.input_layernorm(x_btd)
        q_btnh, k_btkh, v_btkh = self.qkv(h_btd)
        if self.q_layernorm is not None and self.k_layernorm is not None:
            q_btnh, k_btkh = self.q_layernorm(q_btnh), self.k_layernorm(k_btkh)
        a_btnh, state = attend(rope_half(q_btnh, by), rope_half(k_btkh, by), v_btkh, state, at)
        x_btd = x_btd + self.o_proj(a_btnh)
        if self.post_attention_layernorm is not None:
            h_btd = self.post_attention_layernorm(x_btd)
        gate_btf, up_btf = self.gate_up(h_btd)
        return x_btd + self.down_proj(self.act(gate_btf) * up_btf), state


class Model(nnx.Module):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        self.embed_tokens = Embedding(cfg.vocab_size, cfg.hidden_size, rngs=rngs)
        self.layers = Layers(Block(cfg, rngs) for _ in range(cfg.layers))
        self.norm = LayerNorm(cfg.hidden_size, cfg.layer_norm_eps)
        self.lm_head = None if cfg.tie_word_embeddings else Embedding(cfg.vocab_size, cfg.hidden_size, rngs=rngs)
        self.rope = cfg.rope

    def __call__(self, tokens_bt: Array, state: State, at: Positions) -> tuple[Array, State]:
        x_btd, state = self.layers(self.embed_tokens(tokens_bt), state, at, self.rope(at))
        return self.norm(x_btd), state

    def logits(self, x_btd: Array) -> Array:
        return (self.embed_tokens if self.lm_head is None else self.lm_head).attend(x_btd)


HF, OURS = "model.layers.{i}.", "layers.{i}."
WEIGHTS = (
    embedding("model.embed_tokens", "embed_tokens"),
    *layer_norm(HF + "input_layernorm", OURS + "input_layernorm"),
    *attention(HF + "self_attn.", OURS, out_bias=False),
    W(HF + "self_attn.q_layernorm.norms.{n}.weight", OURS + "q_layernorm.scale", "h -> n h", P("tp", None)),
    W(HF + "self_attn.k_layernorm.norms.{k}.weight", OURS + "k_layernorm.scale", "h -> k h", P("tp", None)),
    *layer_norm(HF + "post_attention_layernorm", OURS + "post_attention_layernorm"),
    *gated_mlp(HF + "mlp.", OURS, bias=False),
    *layer_norm("model.norm", "norm"),
    embedding("lm_head", "lm_head"),
)

# inverse frequencies that older checkpoints carry, and the head where it is tied
IGNORE = (r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq", Copy("lm_head.weight", of="model.embed_tokens.weight"))
