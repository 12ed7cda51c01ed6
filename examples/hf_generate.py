"""Hugging Face's generate() over a model that runs here.

    python examples/hf_generate.py --model openai-community/gpt2

The adapter gives the model HF's whole generation loop: beams, sampling, stopping criteria, streamers, assistants. That
loop is HF's, in torch on the host, and asks for the logits of each token. `sample` chooses tokens on the device, and is
the faster way where it has the option.
"""

import argparse

import torch
from transformers import AutoConfig, AutoTokenizer, TextStreamer

from jx_neuron import HuggingFaceGenerationModelAdapter, NeuronAutoModelForCausalLM

BEAMS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="openai-community/gpt2", help="a folder or hub id (%(default)s)")
    parser.add_argument("--prompt", default="Hello, I'm a language model,", help="what is continued (%(default)s)")
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens of each answer (%(default)s)")
    asked = parser.parse_args()

    # Each beam, and each of several answers, is a row of the batch.
    neuron_model = NeuronAutoModelForCausalLM.from_pretrained(asked.model, batch_size=BEAMS).to_neuron()
    model = HuggingFaceGenerationModelAdapter(AutoConfig.from_pretrained(asked.model), neuron_model)
    tokenizer = AutoTokenizer.from_pretrained(asked.model)
    inputs = tokenizer(asked.prompt, return_tensors="pt")
    length = dict(max_new_tokens=asked.new_tokens, pad_token_id=tokenizer.eos_token_id)

    def show(how: str, rows: torch.Tensor) -> None:
        print(f"\n== {how}")
        for row in rows:
            print(tokenizer.decode(row, skip_special_tokens=True))

    show("greedy", model.generate(**inputs, **length, do_sample=False))
    show(f"{BEAMS} beams", model.generate(**inputs, **length, do_sample=False, num_beams=BEAMS))
    torch.manual_seed(0)
    show(
        "three answers at random",
        model.generate(**inputs, **length, do_sample=True, top_p=0.9, temperature=0.8, num_return_sequences=3),
    )
    print("\n== streamed")
    model.generate(**inputs, **length, do_sample=False, streamer=TextStreamer(tokenizer))


if __name__ == "__main__":
    main()
