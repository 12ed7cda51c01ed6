"""OPT (Zhang et al., arXiv:2205.01068).

https://github.com/huggingface/transformers/blob/main/src/transformers/models/opt/modeling_opt.py
"""

from dataclasses import dataclass, field

from flax import nnx
from jax import Array

from jx_neuron.checkpoint.hf_config import HFConfig, divisible, one_of
from jx_neuron.checkpoint.weights import Copy, W
from jx_neuron.models.rows import attention, embedding, layer_norm, mlp, position_embedding
from jx_neuron.nn.layers import ACT, Embedding, LayerNorm, Layers, Linear
from jx_neuron.nn.state import LayerState, Positions, State
from jx_neuron.nn.sublayers import MLP, Attention

OFFSET = 2  # position 0 is entry 2 of the table, for reasons of fairseq's padding index
EPSILON = 1e-5  # torch's default, which HF leaves as it is


@dataclass(frozen=True)
class Config(HFConfig):
    """HF's OPTConfig."""

    vocab_size: int = 50272
    hidden_size: int = 768
    num_hidden_layers: int = 12
    ffn_dim: int = 3072
    max_position_embeddings: int = 2048
    do_layer_norm_before: bool = True
    remove_final_layer_norm: bool = field(default=False, metadata={"hf": "_remove_final_layer_norm"})
    word_embed_proj_dim: int | None = None
    num_attention_heads: int = 12
    activation_function: str = "relu"
    enable_bias: bool = True
    layer_norm_elementwise_affine: bool = True
    tie_word_embeddings: bool = True

    MODEL_TYPE = "opt"
    COMPLETE = True
    LAYERS_ALIKE = True

    def __post_init__(self) -> None:
        one_of("opt", "activation_function", self.activation_function, ACT)
        divisible("opt", "hidden_size", self.hidden_size, "num_attention_heads", self.num_attention_heads)

    @property
    def sizes(self) -> dict[str, int]:
        d, n, e = self.hidden_size, self.num_attention_heads, self.word_embed_proj_dim or self.hidden_size
        s = self.max_position_embeddings + OFFSET
        return dict(d=d, n=n, k=n, h=d // n, f=self.ffn_dim, v=self.vocab_size, s=s, e=e)


class Block(nnx.Module):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        d, bias, affine = cfg.hidden_size, cfg.enable_bias, cfg.layer_norm_elementwise_affine
        self.self_attn = Attention(cfg.sizes, bias=bias, rngs=rngs)
        self.self_attn_layer_norm = LayerNorm(d, EPSILON, affine=affine)
        self.mlp = MLP(cfg.sizes, cfg.activation_function, bias=bias, rngs=rngs)
        self.final_layer_norm = LayerNorm(d, EPSILON, affine=affine)
        self.pre_norm = cfg.do_layer_norm_before

    def __call__(self, x_btd: Array, state: LayerState, at: Positions) -> tuple[Array, LayerState]:
        h_btd = self.self_attn_layer_norm(x_btd) if self.pre_norm else x_btd
        a_btd, state = self.self_attn(h_btd, state, at)
        x_btd = x_btd + a_btd
        if not self.pre_norm:
            x_btd = self.self_attn_layer_norm(x_btd)
        h_btd = self.final_layer_norm(x_btd) if self.pre_norm else x_btd
        x_btd = x_btd + self.mlp(h_btd)
        return (x_btd if self.pre_norm else self.final_layer_norm(x_btd)), state


class Model(nnx.Module):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        d, e, v, s = (cfg.sizes[c] for c in "devs")
        final_norm = cfg.do_layer_norm_before and not cfg.remove_final_layer_norm
        self.embed_tokens = Embedding(v, e, rngs=rngs)
        self.embed_positions = Embedding(s, d, rngs=rngs)
        self.project_in = Linear((e,), (d,), bias=False, rngs=rngs) if e != d else None
        self.layers = Layers(Block(cfg, rngs) for _ in range(cfg.layers))
        self.final_layer_norm = LayerNorm(d, EPSILON, affine=cfg.layer_norm_elementwise_affine) if final_norm else None
        self.project_out = Linear((d,), (e,), bias=False, rngs=rngs) if e != d else None
        self.lm_head = None if cfg.tie_word_embeddings else Embedding(v, e, rngs=rngs)

    def __call__(self, tokens_bt: Array, state: State, at: Positions) -> tuple[Array, State]:
        x_btd = self.embed_tokens(tokens_bt)
        if self.project_in is not None:
            x_btd = self.project_in(x_btd)
        x_btd = x_btd + self.embed_positions(at.position_bt + OFFSET)
        x_btd, state = self.layers(x_btd, state, at)
        return x_btd if self.final_layer_norm is None else self.final_layer_norm(x_btd), state

    def logits(self, x_btd: Array) -> Array:
        x_bte = x_btd if self.project_out is None else self.project_out(x_btd)
        return (self.embed_tokens if self.lm_head is None else self.lm_head).attend(x_bte)


LAYER = "model.decoder.layers.{i}"
WEIGHTS = (
    embedding("model.decoder.embed_tokens", "embed_tokens", width="e"),
    position_embedding("model.decoder.embed_positions", "embed_positions"),
    W("model.decoder.project_in.weight", "project_in.kernel", "d e -> e d"),
    W("model.decoder.project_out.weight", "project_out.kernel", "e d -> d e"),
    *layer_norm("model.decoder.final_layer_norm", "final_layer_norm"),
    *layer_norm(LAYER + ".self_attn_layer_norm"),
    *attention(LAYER + ".self_attn", out="out_proj"),
    *layer_norm(LAYER + ".final_layer_norm"),
    *mlp(LAYER, "layers.{i}.mlp", up="fc1", down="fc2"),
    embedding("lm_head", width="e"),
)

# the version that older checkpoints carry, and the head where it is tied
IGNORE = (
    r"decoder\.version",
    Copy("lm_head.weight", of="model.decoder.embed_tokens.weight"),
)
