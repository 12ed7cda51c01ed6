"""Sampling GPT-2: one checkpoint, loaded once, and the ways in which tokens are chosen.

    python examples/gpt2_sampling.py
    python examples/gpt2_sampling.py --model ./my-gpt2 --prompt "Once upon a time" --new-tokens 40 --tp 2

It runs on any CPU; where there is a NeuronCore, neuronx-cc compiles the model and it runs there. Nothing in the script
says which.
"""

import argparse

from jx_neuron import GPT2ForSampling


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="openai-community/gpt2", help="a folder or hub id (%(default)s)")
    parser.add_argument("--prompt", default="Hello, I'm a language model,", help="what is continued (%(default)s)")
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens of each answer (%(default)s)")
    parser.add_argument("--tp", type=int, default=1, help="cores that share the model (%(default)s)")
    asked = parser.parse_args()

    # Two rows, so prompts are computed in pairs. Names and shapes of all tensors are checked here; `to_neuron` reads
    # them, shard by shard.
    model = GPT2ForSampling.from_pretrained(asked.model, batch_size=2, tp_degree=asked.tp, amp="f32")
    model.to_neuron()
    tokenizer = model.tokenizer
    ids = tokenizer(asked.prompt)["input_ids"]
    length = len(ids) + asked.new_tokens  # sequence_length counts the prompt

    def show(how: str, rows: list[list[int]]) -> None:
        print(f"\n== {how}")
        for row in rows:
            print(tokenizer.decode(row, skip_special_tokens=True))

    # Greedy: the most likely token each time. Lists of ids come back as lists.
    show("greedy", model.sample([ids], length, top_k=1))

    # At random among the 50 most likely. The same seed gives the same answer in any batch and at any tp; changing
    # top_k, top_p or temperature compiles nothing.
    show("top_k=50, seed=0", model.sample([ids], length, top_k=50, seed=0))
    show("top_p=0.9, temperature=0.8", model.sample([ids], length, top_k=0, top_p=0.9, temperature=0.8, seed=0))

    # A value a row: here one prompt twice, cold and warm.
    show("temperature=[0.2, 1.2]", model.sample([ids, ids], length, temperature=[0.2, 1.2], seed=0))

    # No pair of tokens twice, and no newline: its ids are pushed far down.
    newline = dict.fromkeys(tokenizer("\n")["input_ids"], -100.0)
    show(
        "no_repeat_ngram_size=2, logit_bias",
        model.sample([ids], length, top_k=1, no_repeat_ngram_size=2, logit_bias=newline),
    )

    # Prompts of different lengths are padded on the left, and the mask says where each begins. Each row is what it
    # would be alone.
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "left"
    both = tokenizer([asked.prompt, asked.prompt.split()[0]], padding=True)
    padded, mask = both["input_ids"], both["attention_mask"]
    show("two prompts", model.sample(padded, len(padded[0]) + asked.new_tokens, attention_mask=mask, top_k=1))

    # Step by step, as the text is made, with each token's log-probability.
    print("\n== streamed")
    total = 0.0
    for step in model.stream([ids], length, top_k=1, logprobs=0):
        print(step.text[0], end="", flush=True)
        total += float(step.logprobs[0])
    print(f"\n(log-probability {total:.2f}, {step.seconds:.2f} s)")


if __name__ == "__main__":
    main()
