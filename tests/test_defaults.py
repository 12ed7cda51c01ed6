"""The defaults that docs/getting-started.md tells, held against the code."""

import inspect
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import transformers
import typer

from jx_neuron import GenerationConfig, HuggingFaceGenerationModelAdapter, NeuronAutoModelForCausalLM, NeuronConfig
from jx_neuron.cli.app import app
from jx_neuron.engine.options import choices
from jx_neuron.models import Decoder
from jx_neuron.planning import plan

COMMANDS = typer.main.get_command(app).commands
DOCUMENT = (Path(__file__).parent.parent / "docs" / "getting-started.md").read_text()
SECTION = DOCUMENT.partition("\n## Defaults\n")[2].partition("\n## ")[0]


def table(first_title: str) -> dict[str, list[str]]:
    """The cells of each row by its first, of the table whose first title this is."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in SECTION.splitlines() if line[:1] == "|"]
    starts = [n for n, row in enumerate(rows) if set("".join(row)) == {"-"}]
    (start,) = [n for n in starts if rows[n - 1][0] == first_title]
    end = next((n - 1 for n in starts if n > start), len(rows))
    return {row[0]: row[1:] for row in rows[start + 1 : end]}


def options(name: str) -> list[object]:
    """The default of an option in each command that has it."""
    servers = ("serve", "simulate", "fleet") if name == "batch_size" else ()  # many callers are what these are for
    commands = [command for key, command in COMMANDS.items() if key not in servers]
    return [o.default for command in commands for o in command.params if o.name == name]


ENTRY = re.compile(r"(\w+(?:, \w+)*): +\S")
MADE = [getattr(NeuronAutoModelForCausalLM, name) for name in ("from_pretrained", "from_module", "from_config")]


@pytest.mark.parametrize(("name", "commands"), [("amp", 9), ("batch_size", 4)])
def test_what_is_the_same_everywhere(name: str, commands: int) -> None:
    on_the_command_line, in_python, in_plans = (cell.partition(";")[0].strip("`") for cell in table("")[f"`{name}`"])
    assert len(options(name)) == commands
    assert {str(default) for default in options(name)} == {on_the_command_line}
    assert {str(inspect.signature(made).parameters[name].default) for made in MADE} == {in_python}
    assert str(inspect.signature(plan).parameters[name].default) == in_plans


@pytest.mark.parametrize(
    ("made", "name"),
    [("from_pretrained", "batchsize"), ("from_module", "revision"), ("from_config", "backend")],
)
def test_an_option_that_a_constructor_lacks_is_named_with_those_it_has(made: str, name: str) -> None:
    function = getattr(NeuronAutoModelForCausalLM, made)
    assert name not in inspect.signature(function).parameters
    with pytest.raises(TypeError, match=rf"{made}\(\) takes no '{name}'; it takes .*batch_size, prompt_batch_size"):
        function("./nowhere", **{name: 1})


def test_from_pretrained_documents_each_of_its_options() -> None:
    text = inspect.getdoc(NeuronAutoModelForCausalLM.from_pretrained) or ""
    listed = {name for line in text.splitlines() if (entry := ENTRY.match(line)) for name in entry[1].split(", ")}
    for made in MADE:
        parameters = inspect.signature(made).parameters.values()
        assert {p.name for p in parameters if p.kind is p.KEYWORD_ONLY} - {"weights"} <= listed, made.__name__


def test_degrees() -> None:
    assert table("")["tensor-parallel degree"] == [
        "`1`; `plan` picks the fastest, `fleet` that of the fewest cores",
        "`1`",
        "the fastest",
    ]
    degrees = {name: o.default for name, of in COMMANDS.items() for o in of.params if o.name == "tp"}
    assert degrees == {
        "sample": 1,
        "chat": 1,
        "serve": 1,
        "score": 1,
        "compile": 1,
        "bench": 1,
        "simulate": 1,
    } | dict.fromkeys(("plan", "fleet"))
    assert {inspect.signature(made).parameters["tp_degree"].default for made in MADE} == {1}
    assert inspect.signature(plan).parameters["tp_degree"].default is None


LLAMA = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
    "num_attention_heads": 4, "vocab_size": 64,
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
GPTJ = {"model_type": "gptj", "n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": 64, "rotary_dim": 4}


@pytest.mark.parametrize(
    ("config", "trained"),
    [
        ({**LLAMA, "max_position_embeddings": 256}, 256),
        ({**LLAMA, "max_position_embeddings": 131072}, 131072),
        (LLAMA, 2048),
        ({**LLAMA, "max_position_embeddings": 256, "rope_scaling": DYNAMIC}, 256),
        ({**LLAMA, "max_position_embeddings": 512, "rope_parameters": LLAMA3}, 512),
        ({**GPTJ, "n_positions": 100}, 100),
        ({**tiny.CONFIGS["opt"]().to_dict(), "max_position_embeddings": 60}, 60),
        ({**tiny.CONFIGS["gpt2"]().to_dict(), "n_positions": 70}, 70),
    ],
)
def test_positions(config: dict, trained: int) -> None:
    told = "`2048`, or the model's trained positions where they are fewer"
    assert table("")["`n_positions`"] == [told, "the same", "the same"]
    assert set(options("n_positions")) == {None}
    assert Decoder.from_config(config, 1).config.trained_positions == trained
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = NeuronAutoModelForCausalLM.from_config(config)
    assert model.buckets.capacity == plan(config).n_positions == min(2048, trained)


def test_one_warning_beyond_what_a_model_was_trained_on() -> None:
    config = {**LLAMA, "max_position_embeddings": 256}
    words = "n_positions=257 is beyond the 256 positions that the model was trained on"
    with pytest.warns(UserWarning, match=words) as caught:
        model = NeuronAutoModelForCausalLM.from_config(config, n_positions=257)
    assert len(caught) == 1
    assert model.buckets.capacity == 257
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        NeuronAutoModelForCausalLM.from_config(config, n_positions=256)
        notes = plan(config, n_positions=257).notes
    assert [note for note in notes if words in note]


def test_how_tokens_are_chosen(tmp_path: Path) -> None:
    chosen = {face: how for face, (how,) in table("no sampling option is given to").items()}
    how = dict(vocab_size=101, compiled=None, eos=())
    (choice,) = choices({}, GenerationConfig(do_sample=True), 1, 1, **how)
    top_k = choice.draw.top_k
    assert chosen["`sample()`, `stream()`"] == f"sampled from the `{top_k}` likeliest"
    (choice,) = choices({}, GenerationConfig(), 1, 1, **how)
    assert choice.draw.top_k == 1
    assert chosen["`sample()`, `stream()` of a model made with a `GenerationConfig`"] == "greedily"

    folder = tiny.saved("gpt2", tmp_path / "gpt2")
    ids = tiny.prompts(1, 5)
    expected = tiny.greedy(tiny.model("gpt2"), ids, 25)
    greedy = NeuronConfig(on_device_generation=GenerationConfig())
    model = NeuronAutoModelForCausalLM.from_pretrained(folder, neuron_config=greedy)
    np.testing.assert_array_equal(model.sample(ids, 25), expected)
    adapter = HuggingFaceGenerationModelAdapter(transformers.AutoConfig.from_pretrained(folder), model)
    prompt = torch.tensor(ids)
    answer = adapter.generate(prompt, attention_mask=torch.ones_like(prompt), max_length=25, pad_token_id=0)
    np.testing.assert_array_equal(answer.numpy(), expected)
    assert chosen["HF `generate()`"] == "greedily"

    from test_cli import run

    typed = ",".join(map(str, ids[0]))
    done = run("sample", folder, "--ids", typed, "--max-new-tokens", 20)
    assert done.stdout == ",".join(map(str, expected[0])) + "\n", done.stderr
    assert chosen["`jx-neuron sample`, `jx-neuron chat`"] == "greedily"


def test_help_and_docstrings_lead_to_the_table() -> None:
    place = '"Defaults" in docs/getting-started.md'
    texts = (COMMANDS["sample"].help, inspect.getdoc(NeuronAutoModelForCausalLM.sample))
    for text in texts:
        assert place in re.sub(r"\s+", " ", text or "")
