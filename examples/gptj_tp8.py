"""GPT-J-6B shared by eight cores.

    python examples/gptj_tp8.py                                    # 12 GB in bf16, on eight CPU devices
    python examples/gptj_tp8.py --model ./gpt-j-6B --backend host  # the programs as neuronx-cc gets them
    python examples/gptj_tp8.py --backend neuron                   # on a trn1.32xlarge

The backends: "xla" is jax.jit, on CPU devices or whatever JAX has; "host" runs the lowered programs themselves, one
replica a core; "neuron" what neuronx-cc makes of them. One seed gives the same tokens on each.
"""

import argparse
from collections import Counter

from jx_neuron import GPTJForSampling
from jx_neuron.lowering import cost


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="EleutherAI/gpt-j-6B", help="a folder or hub id (%(default)s)")
    parser.add_argument("--prompt", default="The purpose of a decoder is", help="what is continued (%(default)s)")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens of the answer (%(default)s)")
    parser.add_argument("--n-positions", type=int, default=512, help="longest prompt and answer (%(default)s)")
    parser.add_argument("--amp", default="bf16", help="dtype of weights and cache (%(default)s)")
    parser.add_argument("--tp", type=int, default=8, help="cores (%(default)s)")
    parser.add_argument("--backend", choices=["xla", "host", "neuron"], help="by default neuron where there is one")
    asked = parser.parse_args()

    model = GPTJForSampling.from_pretrained(
        asked.model, tp_degree=asked.tp, n_positions=asked.n_positions, amp=asked.amp, backend=asked.backend
    )

    # The family's weight table splits attention heads, the MLP's width and the vocabulary. What one core has to be told
    # by the others is a collective: one all-reduce a layer, since GPT-J adds attention and MLP to the same input, one
    # for the embedding, and all-gathers of the candidates that tokens are drawn from.
    program = model.lowered().programs[decode_shape(model)]
    found = Counter(collective.opcode for collective in cost.collectives(model.lowered().hlo(program.name)))
    print(f"{program.name}: {', '.join(f'{count} {opcode}' for opcode, count in sorted(found.items()))}")

    model.to_neuron()
    ids = model.tokenizer(asked.prompt)["input_ids"]
    answer = model.sample([ids], len(ids) + asked.new_tokens, top_k=40, temperature=0.8, seed=0)
    print(model.tokenizer.decode(answer[0]))


def decode_shape(model):
    """The key of the decode program that attends to the most positions."""
    return max((key for key in model.lowered().programs if key.kind == "decode"), key=lambda key: key.positions)


if __name__ == "__main__":
    main()
