"""Tokens a second with and without drafts, and how many tokens are the same.

    python benchmarks/speculation.py --draft ngram --rounds 3

The demo model answers, greedily unless --temperature is given, prompts whose answers repeat them (code, edits,
summaries), and one that does not; each answer to its end. Calls with and without drafts take turns, and each has its
fastest; `same` is the length of what their answers have in common, of `tokens`. --draft random has a model of the same
size and random weights draft.
"""

import argparse
import json
from itertools import takewhile

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jx_neuron import NeuronAutoModelForCausalLM, SamplingParams
from jx_neuron.checkpoint.demo import demo_model

CODE = """def mean(numbers):
    total = 0
    for number in numbers:
        total = total + number
    return total / len(numbers)


def variance(numbers):
    middle = mean(numbers)
    total = 0
    for number in numbers:
        total = total + (number - middle) ** 2
    return total / len(numbers)


def deviation(numbers):
    return variance(numbers) ** 0.5
"""
CART = '''class Cart:
    """A customer's shopping cart."""

    def __init__(self, owner):
        self.owner = owner
        self.items = []

    def add(self, name, price, count=1):
        """Adds an item to the cart."""
        self.items.append((name, price, count))

    def remove(self, name):
        """Removes an item from the cart."""
        self.items = [item for item in self.items if item[0] != name]

    def total(self):
        """Returns the total price of the items."""
        result = 0
        for name, price, count in self.items:
            result += price * count
        return result

    def count(self):
        """Returns the number of items."""
        result = 0
        for name, price, count in self.items:
            result += count
        return result

    def most_expensive(self):
        """Returns the item with the highest price."""
        return max(self.items, key=lambda item: item[1])

    def cheapest(self):
        """Returns the item with the lowest price."""
        return min(self.items, key=lambda item: item[1])
'''
NEWS = """The city council voted on Tuesday to close the old harbour bridge to cars from the first of May. The bridge, \
which was built in 1934, will stay open to pedestrians and cyclists. Engineers who inspected it last autumn found rust \
in eleven of its forty supports. A new bridge, which is to cost ninety million, will open in four years at the \
earliest. Until then, buses will take the northern tunnel, and the council will pay for a ferry at rush hour."""
CODE_FIRST = "Here is some code:\n\n```python\n{}```\n\n"
PROMPTS = {
    "copy": CODE_FIRST.format(CODE) + "Copy this code exactly, with comments added.",
    "rename": CODE_FIRST.format(CART) + "Rename the class `Cart` to `Basket`. Write the whole code with this change.",
    "spelling": f"Correct the spelling of this text. Change nothing else.\n\n{NEWS}",
    "grammar": f"Fix the grammar of this text:\n\n{NEWS}",
    "quotes": f"Repeat the important sentences of this text word for word:\n\n{NEWS}",
    "summary": f"Summarize this text:\n\n{NEWS}",
    "question": "How does a sailing boat sail against the wind?",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draft", choices=["ngram", "random"], default="ngram")
    parser.add_argument("--amp", default="f32")
    parser.add_argument("--batch", type=int, default=1, help="answers at a time, to the same prompt")
    parser.add_argument("--tokens", type=int, default=300, help="most tokens of an answer")
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", default=",".join(PROMPTS))
    options = parser.parse_args()

    made = dict(amp=options.amp, batch_size=options.batch, n_positions=1024)
    model = NeuronAutoModelForCausalLM.from_pretrained(demo_model(), **made)
    draft = "ngram" if options.draft == "ngram" else random_model(made)
    for name in options.prompts.split(","):
        message = [{"role": "user", "content": PROMPTS[name]}]
        prompt = model.tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        ids = [model.tokenizer(prompt)["input_ids"]] * options.batch
        sampling = [
            SamplingParams(max_tokens=options.tokens, temperature=options.temperature, seed=seed)
            for seed in range(options.batch)
        ]
        ways, answers = {"plain": None, "drafts": draft}, {}
        rates = dict.fromkeys(ways, 0.0)
        for turn in range(options.rounds + 1):
            for way, drafter in ways.items():
                answers[way] = model.generate(ids, sampling, draft=drafter)
                if turn:
                    rates[way] = max(rates[way], *(rate(one.answers[0]) for one in answers[way]))
        pairs = [(a.ids, b.ids) for a, b in zip(answers["plain"], answers["drafts"], strict=True)]
        drafts = [one.answers[0].drafts for one in answers["drafts"]]
        result = {way: round(value, 1) for way, value in rates.items()}
        result |= dict(ratio=round(rates["drafts"] / rates["plain"], 2), tokens=len(pairs[0][0]))
        result |= dict(same=[common(*pair) for pair in pairs])
        result |= dict(proposed=sum(d.proposed for d in drafts), accepted=sum(d.accepted for d in drafts))
        print(json.dumps({"prompt": name, **result, "steps": sum(d.steps for d in drafts)}), flush=True)


def rate(answer) -> float:
    return (len(answer.ids) - 1) / (answer.seconds - answer.seconds_to_first)


def common(one, other) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def random_model(made: dict) -> NeuronAutoModelForCausalLM:
    from jx_neuron.checkpoint.folder import open_checkpoint
    from jx_neuron.models import Decoder

    config = open_checkpoint(demo_model()).config
    decoder, rng = Decoder.from_config(config), np.random.default_rng(0)
    params = {
        path: jnp.asarray(0.02 * rng.standard_normal(leaf.shape, np.float32))
        for path, leaf in decoder.abstract_params(jnp.float32).items()
    }
    module = decoder.bind(params)
    assert isinstance(module, nnx.Module)
    return NeuronAutoModelForCausalLM.from_module(module, decoder.config, weights=decoder.rows, **made)


if __name__ == "__main__":
    main()
