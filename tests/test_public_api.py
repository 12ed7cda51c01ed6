"""The public names: those listed here and no others, each resolved, documented and typed."""

import ast
import enum
import importlib
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import jx_neuron

PUBLIC = {
    "jx_neuron": """
        AutoModelForCausalLM __version__ Answer BloomForSampling ContinuousBatchingConfig Event
        GPTNeoXForSampling Generation SamplingParams
        GPT2ForSampling GPT2ForSamplingWithContextBroadcasting GPTJForSampling GQA GenerationConfig
        InputError JxNeuronError KVCacheQuantizationConfig LlamaForSampling MistralForSampling
        NeuronAutoModelForCausalLM NeuronConfig QuantizationConfig
        OPTForSampling Score Step generate load model_types register request_devices
    """,
    "jx_neuron.config": """
        AMP ContinuousBatchingConfig GQA GenerationConfig KVCacheQuantizationConfig NeuronConfig PerRow
        QuantizationConfig dtype_of
    """,
    "jx_neuron.distributed": "follow group join",
    "jx_neuron.errors": """
        ArtifactError CheckpointError CompilerError ConfigError InputError JxNeuronError LoweringError
        NonFiniteError
    """,
    "jx_neuron.checkpoint.hf_config": "FULL HFConfig INERT ONLY divisible one_of",
    "jx_neuron.lowering": """
        Collective Cost Executable Program ProgramSpec TensorSpec Traced compile_py_func lower lower_many trace
    """,
    "jx_neuron.lowering.verify.checking": "RULES Rule Violation verify",
    "jx_neuron.models": "Decoder DecoderModule Family family model_types register text_config text_model",
    "jx_neuron.models.known": "KNOWN config_of",
    "jx_neuron.planning": """
        Arrival Estimated Fleet INSTANCES Instance Load Measured Memory Plan Service Simulated Spread StepTimes Target
        ULTRASERVERS check find padding_note plan plan_fleet simulate
    """,
    "jx_neuron.nn.rope": """
        RopeScaling Rotation by_layer_type inverse_frequencies query_scale rope_half rope_interleaved rotation
    """,
    "jx_neuron.serve": """
        AsyncEngine DeadlineExceeded EngineFailed QueueFull Server ServerSettings ShuttingDown Stats Stream Timings app
        raise_file_limit
    """,
    "jx_neuron.integrations.parity": "ModelTensors Parity parity",
}
WITH_TORCH = {"HuggingFaceGenerationModelAdapter"}  # of jx_neuron, and not among what `import *` brings
EVERYWHERE = [(module, name) for module, names in PUBLIC.items() for name in names.split()]


@pytest.mark.parametrize("module", PUBLIC)
def test_all_is_what_is_listed_here(module: str) -> None:
    """In whatever order; ruff holds that of the written lists, by RUF022."""
    names = importlib.import_module(module).__all__
    assert sorted(names) == sorted(PUBLIC[module].split())


@pytest.mark.parametrize("module", PUBLIC)
def test_a_name_without_an_underscore_is_listed(module: str) -> None:
    """Whatever a module defines, and whatever a package takes from within, is public or starts with an underscore."""
    of = importlib.import_module(module)
    defined = {name for name in defined_in(of) if not name.startswith("_")}
    if module == "jx_neuron":
        assert defined == set()  # all names are read on first use
        assert set(dir(jx_neuron)) == {*jx_neuron.__all__, *WITH_TORCH}
    else:
        assert defined <= set(of.__all__) | INTERNAL.get(module, set()), f"neither listed nor underscored in {module}"
        assert {name for name in of.__all__ if not hasattr(of, name)} == set()


INTERNAL = {
    "jx_neuron.config": {"READ"},
    "jx_neuron.checkpoint.hf_config": {"in_range", "shown"},
    "jx_neuron.distributed": {"AUTO", "Follower", "Group", "Hosts", "Shared", "end", "ranks", "shared"}
    | {"ROOT_COMM_ID", "choose_backend"},
    "jx_neuron.lowering.verify.checking": {"RULE_MODULES"},
}  # of this package's own use


def defined_in(module: ModuleType) -> Iterator[str]:
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (target.id for target in targets if isinstance(target, ast.Name) and target.id not in TYPES)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{module.__name__}."):
            yield from (alias.asname or alias.name for alias in node.names)


TYPES = {"T"}  # type variables


def test_a_star_import_brings_what_is_listed_and_takes_no_torch() -> None:
    code = "from jx_neuron import *; print(*dir()); import sys; assert 'torch' not in sys.modules"
    root = Path(jx_neuron.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert set(PUBLIC["jx_neuron"].split()) <= set(done.stdout.split())


@pytest.mark.parametrize("name", sorted(WITH_TORCH))
def test_what_takes_torch_is_there_too(name: str) -> None:
    assert inspect.getdoc(getattr(jx_neuron, name))
    assert name not in jx_neuron.__all__


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'MambaForSampling'"):
        jx_neuron.MambaForSampling  # noqa: B018


def public(value: Any) -> Iterator[tuple[str, Any]]:
    """A function, or a class and what it defines without an underscore: names, and what holds docstring and hints."""
    yield "", value
    if inspect.isclass(value):
        for name, member in vars(value).items():
            if name.startswith("_"):
                continue
            if isinstance(member, property):
                yield name, member.fget
            elif isinstance(member, classmethod | staticmethod):
                yield name, member.__func__
            elif inspect.isfunction(member):
                yield name, member


OBJECTS = [
    (f"{module}.{name}", getattr(importlib.import_module(module), name))
    for module, name in EVERYWHERE
    if inspect.isclass(getattr(importlib.import_module(module), name))
    or inspect.isroutine(getattr(importlib.import_module(module), name))
]


@pytest.mark.parametrize(("name", "value"), OBJECTS, ids=[name for name, _ in OBJECTS])
def test_it_is_documented(name: str, value: Any) -> None:
    written = value.__doc__ or ""
    assert written.strip(), f"{name} has no docstring"
    assert not written.startswith(f"{value.__name__}("), f"{name} has the docstring that a dataclass gives itself"
    assert not (isinstance(value, enum.EnumType) and written == enum.Enum.__doc__)


@pytest.mark.parametrize(("name", "value"), OBJECTS, ids=[name for name, _ in OBJECTS])
def test_its_parts_are_documented(name: str, value: Any) -> None:
    for member, _ in public(value):
        assert inspect.getdoc(getattr(value, member) if member else value), f"{name}.{member} has no docstring"


@pytest.mark.parametrize(("name", "value"), OBJECTS, ids=[name for name, _ in OBJECTS])
def test_it_is_typed(name: str, value: Any) -> None:
    for member, function in public(value):
        if inspect.isclass(function):
            function = vars(function).get("__init__")  # noqa: PLW2901
            if getattr(function, "__module__", None) != value.__module__:  # a protocol's, which is typing's own
                continue
        whole = f"{name}.{member}".rstrip(".")
        signature = inspect.signature(function)
        parameters = list(signature.parameters.values())
        if member and parameters and parameters[0].name in ("self", "cls"):
            parameters = parameters[1:]
        untyped = [p.name for p in parameters if p.annotation is p.empty and p.name not in ("self", "cls")]
        assert not untyped, f"{whole}: {untyped} have no type hint"
        if function.__name__ != "__init__":
            assert signature.return_annotation is not signature.empty, f"{whole} has no return type"
