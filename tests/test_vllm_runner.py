"""Turns of another's scheduler, on a runtime made of arithmetic; and the plugin without vLLM."""

import sys
from importlib import import_module
from importlib.metadata import entry_points

import numpy as np
import pytest
from arithmetic import VOCAB, Arithmetic, following

from jx_neuron.artifact.settings import Settings
from jx_neuron.config import GenerationConfig
from jx_neuron.engine.options import choices
from jx_neuron.errors import ConfigError
from jx_neuron.integrations import vllm
from jx_neuron.integrations.vllm.options import PluginOptions
from jx_neuron.integrations.vllm.runner import Request, Runner
from jx_neuron.step.buckets import Buckets

SLOTS, POSITIONS = 4, 64
SETTINGS = dict(model_type="llama", tp_degree=1, amp="f32", candidates=8, vocab_size=VOCAB, all_logits=False)
BUCKETS = Buckets((8, 16), (32, POSITIONS))


def runner(**changes: object) -> Runner:
    settings = Settings(**SETTINGS, batch_sizes=(1, 2, SLOTS), buckets=BUCKETS, **changes)
    made = Runner(Arithmetic(SLOTS, POSITIONS), settings, budget=32)
    made.warm_up(every=True)
    return made


def request(length: int, **options: object) -> Request:
    (choice,) = choices(options, GenerationConfig(), 1, 0, vocab_size=VOCAB, compiled=None, eos=())
    prompt = np.random.default_rng(length).integers(0, VOCAB, length).tolist()
    return Request(list(prompt), length, choice)


def turn(made: Runner, scheduled: dict[str, tuple[int, int]]) -> None:
    made.run(scheduled)
    complete = [name for name, (start, count) in scheduled.items() if start + count == len(made.requests[name].tokens)]
    made.choose(complete, {})


def expected(one: Request, count: int) -> list[int]:
    tokens = one.tokens[: one.prompt]
    for index in range(count):
        tokens.append(following(tokens, one.choice.draw, index))
    return tokens


def test_chunks_cut_anywhere_decode_and_preemption_give_the_tokens_of_each_alone() -> None:
    made = runner()
    requests = {
        "one": request(1, top_k=1),
        "cut": request(37, top_k=5, temperature=1.0, seed=3),
        "host": request(9, top_k=5, temperature=1.0, seed=4, presence_penalty=0.0, min_p=0.01),
    }
    for name, one in requests.items():
        made.add(name, one)
    assert [made.on_host(one) for one in requests.values()] == [False, False, True]
    turn(made, {"one": (0, 1), "cut": (0, 19), "host": (0, 9)})
    turn(made, {"one": (1, 1), "cut": (19, 11), "host": (9, 1)})
    turn(made, {"one": (2, 1), "cut": (30, 7), "host": (10, 1)})
    made.finish("one")
    turn(made, {"cut": (37, 1), "host": (11, 1)})
    assert sorted(one.slot for one in made.requests.values()) == [0, 1]
    made.preempt("cut")
    made.add("later", request(3, top_k=1))
    turn(made, {"later": (0, 3), "host": (12, 1)})
    turn(made, {"cut": (0, 39), "later": (3, 1)})
    for one in (*requests.values(), made.requests["later"]):
        assert one.tokens == expected(one, len(one.tokens) - one.prompt)
    assert [len(one.answer) for one in requests.values()] == [3, 3, 5]


def test_a_mask_limits_what_the_host_chooses() -> None:
    made, one = runner(), request(5, top_k=1)
    one.constrained = True
    made.add("masked", one)
    made.run({"masked": (0, 5)})
    mask_v = np.zeros(VOCAB, bool)
    mask_v[[11, 12]] = True
    assert made.choose(["masked"], {"masked": mask_v})["masked"].token in (11, 12)


def test_keys_that_depend_on_a_prompts_length_are_refused() -> None:
    with pytest.raises(ConfigError, match="at most 48 positions"):
        runner(rotations=(48, False))


def test_the_plugin_is_declared_and_active_where_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    assert vllm.register() is None
    monkeypatch.setenv("VLLM_PLUGINS", "other,jx_neuron")
    module, _, name = vllm.register().rpartition(".")
    assert (module, name) == ("jx_neuron.integrations.vllm.platform", "JxNeuronPlatform")
    declared = entry_points(group="vllm.platform_plugins")
    assert all(point.load() is vllm.register for point in declared if point.name == vllm.NAME)


@pytest.mark.parametrize("module", ["platform", "worker"])
def test_without_vllm_it_says_what_to_install(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.delitem(sys.modules, f"jx_neuron.integrations.vllm.{module}", raising=False)
    with pytest.raises(ConfigError, match="pip install vllm"):
        import_module(f"jx_neuron.integrations.vllm.{module}")


@pytest.mark.parametrize("options", [{"quantize": 1}, {"quant": "int3"}, {"backend": "cuda"}, ["quant"]])
def test_options_that_are_not_legal_are_refused(options: object) -> None:
    with pytest.raises(ConfigError, match=r"it has backend|takes a JSON object|int8|xla, host, neuron"):
        PluginOptions.of(options)


def test_the_degree_is_kept_with_the_options() -> None:
    options = PluginOptions.of({"quant": "int8", "backend": "host"}).with_degree(2)
    assert PluginOptions.of(options.as_dict()) == options
    assert not options.scores
