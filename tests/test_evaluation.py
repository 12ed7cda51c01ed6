"""A task of local data in lm-evaluation-harness, against the harness's own HF backend. Takes the extra `eval`."""

import json
from pathlib import Path

import pytest
import tiny
import transformers

from jx_neuron import InputError, NeuronAutoModelForCausalLM, NeuronConfig

pytestmark = pytest.mark.slow

CAPACITY = 64
QUESTIONS = [
    {"question": "2+2=", "choices": ["3", "4", "fish", "five"], "answer": 1, "text": "Two and two are four."},
    {
        "question": "The sky is",
        "choices": [" red", " blue", " a", " sea"],
        "answer": 1,
        "text": "The sky is blue. " * 9,
    },
    {"question": "Cats say", "choices": [" miaow", " woof", "", "!"], "answer": 0, "text": "A cat says miaow."},
]
COMMON = {"test_split": "train", "num_fewshot": 0, "metadata": {"version": 1}}
TASKS = [
    COMMON
    | {
        "task": "local_choice",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    COMMON
    | {
        "task": "local_perplexity",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
    COMMON
    | {
        "task": "local_answer",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["a", "E"], "max_gen_toks": 12},
        "metric_list": [{"metric": "exact_match"}],
    },
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    tiny.saved("llama", path)
    tokenizer = tiny.tokenizer()
    tokenizer.eos_token = tokenizer.pad_token = "<0>"
    tokenizer.save_pretrained(path)
    (path / "questions.json").write_text("\n".join(map(json.dumps, QUESTIONS)))
    return path


def evaluate(folder: Path, model: object) -> tuple[dict, dict]:
    import lm_eval

    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": str(folder / "questions.json")}}
    tasks = [dict(task) | data for task in TASKS]
    found = lm_eval.simple_evaluate(model=model, tasks=tasks, log_samples=True, bootstrap_iters=0)
    answers = {task: [sample["resps"] for sample in samples] for task, samples in found["samples"].items()}
    return found["results"], answers


def test_the_harness_gives_what_it_gives_with_hf(folder: Path) -> None:
    from lm_eval.models.huggingface import HFLM

    from jx_neuron.integrations.lm_eval import JxNeuronLM

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    hf = transformers.AutoModelForCausalLM.from_pretrained(folder)
    expected = evaluate(folder, HFLM(hf, tokenizer=tokenizer, batch_size=2, max_length=CAPACITY - 1))
    for backend in ("xla", "host"):
        ours = JxNeuronLM(str(folder), batch_size="2", n_positions=CAPACITY, backend=backend)
        results, answers = evaluate(folder, ours)
        for task, of_task in expected[0].items():
            numbers = {name: value for name, value in of_task.items() if isinstance(value, float)}
            assert numbers
            assert {name: results[task][name] for name in numbers} == pytest.approx(numbers, rel=1e-4)
        assert answers["local_answer"] == expected[1]["local_answer"]
        for a, b in zip(answers["local_choice"], expected[1]["local_choice"], strict=True):
            for ((logprob, greedy),), ((hf_logprob, hf_greedy),) in zip(a, b, strict=True):
                assert logprob == pytest.approx(hf_logprob, abs=1e-3)
                assert greedy == hf_greedy


def test_the_harness_makes_the_model_by_its_name(folder: Path) -> None:
    import lm_eval
    from lm_eval.api.registry import get_model

    import jx_neuron.integrations.lm_eval  # noqa: F401  (registers it)

    made = get_model("jx-neuron").create_from_arg_string(
        f"pretrained={folder},n_positions={CAPACITY}", {"batch_size": 2, "device": None}
    )
    assert made.model.batch_size == 2
    assert made.max_length == CAPACITY - 1
    assert lm_eval.api.model.LM in type(made).__mro__


def test_what_the_model_cannot_do_is_refused(folder: Path) -> None:
    from lm_eval.api.instance import Instance

    from jx_neuron.integrations.lm_eval import JxNeuronLM

    def asked(**options: object) -> list[Instance]:
        return [Instance("generate_until", {}, ("Why?", {"until": ["."], **options}), 0)]

    every = NeuronConfig(output_all_logits=True)
    model = NeuronAutoModelForCausalLM.from_pretrained(folder, n_positions=CAPACITY, neuron_config=every)
    ours = JxNeuronLM(model)
    with pytest.raises(InputError, match="n_positions=64"):
        ours.generate_until(asked())
    with pytest.raises(InputError, match="typical_p"):
        ours.generate_until(asked(max_gen_toks=4, typical_p=0.5))
    for size in ("auto", "2.0", 2.5, 0):
        with pytest.raises(InputError, match=f"batch_size={size!r}"):
            JxNeuronLM(str(folder), batch_size=size)
    for new in (0, 2.5, "4"):
        with pytest.raises(InputError, match=f"max_gen_toks={new!r}"):
            JxNeuronLM(model, max_gen_toks=new)
    with pytest.raises(InputError, match="max_gen_toks=0"):
        ours.generate_until(asked(max_gen_toks=0))
    with pytest.raises(InputError, match=r"64 tokens .* fewer than n_positions=64"):
        ours._loglikelihood_tokens([(None, [1], [2] * CAPACITY)])
    with pytest.raises(InputError, match="after 0"):
        ours._loglikelihood_tokens([(None, [], [2, 3])])


def test_an_empty_prompt_is_the_beginning_token(folder: Path) -> None:
    from lm_eval.api.instance import Instance

    from jx_neuron.integrations.lm_eval import JxNeuronLM

    every = NeuronConfig(output_all_logits=True)
    model = NeuronAutoModelForCausalLM.from_pretrained(folder, n_positions=CAPACITY, batch_size=2, neuron_config=every)
    ours = JxNeuronLM(model, max_gen_toks=8)
    prompts = ("Why?", "")
    answers = ours.generate_until([Instance("generate_until", {}, (text, {"until": []}), 0) for text in prompts])
    tokens = model.sample([[ours.prefix_token_id]], 9, top_k=1, eos_token_override=ours.eot_token_id)[0][1:]
    assert answers[1] == ours.tokenizer.decode(tokens, skip_special_tokens=True)
    (longest,) = ours._loglikelihood_tokens([(None, [1], [2] * (CAPACITY - 1))])
    (parts,) = model.log_likelihoods([[1, *[2] * (CAPACITY - 1)]])
    assert longest[0] == pytest.approx(parts.logprobs.sum())


def test_a_tokenizer_without_an_end_token_answers(folder: Path, tmp_path: Path) -> None:
    from lm_eval.api.instance import Instance

    from jx_neuron.integrations.lm_eval import JxNeuronLM

    tiny.saved("llama", tmp_path, tiny.tokenizer())
    every = NeuronConfig(output_all_logits=True)
    model = NeuronAutoModelForCausalLM.from_pretrained(tmp_path, n_positions=CAPACITY, neuron_config=every)
    ours = JxNeuronLM(model, max_gen_toks=8)
    (answer,) = ours.generate_until([Instance("generate_until", {}, ("Why?", {"until": []}), 0)])
    tokens = model.sample([ours.tok_encode("Why?")], 12, top_k=1)[0][4:]
    assert answer == ours.tokenizer.decode(tokens, skip_special_tokens=True)
    with pytest.raises(InputError, match="end token"):
        _ = ours.prefix_token_id
