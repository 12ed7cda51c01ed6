"""Lowering and saving where there is no Neuron, loading where there is.

On a laptop, or any machine with room for the checkpoint:

    python examples/save_on_laptop_load_on_instance.py save facebook/opt-1.3b ./opt-1.3b-tp2 --tp 2 --amp bf16

Copy the folder, and on the instance:

    python examples/save_on_laptop_load_on_instance.py load ./opt-1.3b-tp2 "Hello, I'm a language model,"

The folder is all that is needed there: programs, each core's weights, the tokenizer. It is written whole or not at all,
and a file that was altered on the way is refused. neuronx-cc needs no device: with `save --compile` the folder has its
NEFFs too, and without, `load` compiles on the instance. Where there is no NeuronCore, `load` runs the saved programs on
CPU devices.
"""

import argparse

from jx_neuron import NeuronAutoModelForCausalLM


def save(asked: argparse.Namespace) -> None:
    model = NeuronAutoModelForCausalLM.from_pretrained(
        asked.model, tp_degree=asked.tp, amp=asked.amp, n_positions=asked.n_positions
    )
    if asked.compile:
        model.cpu_compile(asked.target)
    else:
        model.lowered().check(asked.target)  # what neuronx-cc would refuse is found here, and not on the instance
    folder = model.save(asked.folder, sharded_weights=True)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"{len(model.lowered().programs)} programs for {asked.target} in {folder}, {size / 1e6:.1f} MB")


def load(asked: argparse.Namespace) -> None:
    model = NeuronAutoModelForCausalLM.from_pretrained(asked.folder).to_neuron()  # the folder knows its tp and dtype
    ids = model.tokenizer(asked.prompt)["input_ids"]
    answer = model.sample([ids], len(ids) + asked.new_tokens, top_k=1)
    print(model.tokenizer.decode(answer[0]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    saving = commands.add_parser("save", help="lower a checkpoint, and save it with its weights")
    saving.add_argument("model", help="a folder, .gguf file or hub id")
    saving.add_argument("folder", help="to be written")
    saving.add_argument("--tp", type=int, default=2, help="cores (%(default)s)")
    saving.add_argument("--amp", default="bf16", help="dtype of weights and cache (%(default)s)")
    saving.add_argument("--n-positions", type=int, help="longest prompt and answer (2048, or the model's)")
    saving.add_argument("--target", default="trn1", help="inf2, trn1, trn1n, trn2 or trn3 (%(default)s)")
    saving.add_argument("--compile", action="store_true", help="with neuronx-cc, which must be installed")
    saving.set_defaults(run=save)
    loading = commands.add_parser("load", help="run what was saved")
    loading.add_argument("folder", help="that save wrote")
    loading.add_argument("prompt", help="what is continued")
    loading.add_argument("--new-tokens", type=int, default=32, help="tokens of the answer (%(default)s)")
    loading.set_defaults(run=load)
    asked = parser.parse_args()
    asked.run(asked)


if __name__ == "__main__":
    main()
