"""XLA of mid-2023 (jaxlib 0.4.13, in a virtual environment of its own) reads what lowering writes."""

import json
import re
import subprocess
import sys
import venv
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import tiny
from families import OPTIONS
from jax.sharding import PartitionSpec as P
from transformers import AutoConfig

from jx_neuron import NeuronAutoModelForCausalLM, QuantizationConfig
from jx_neuron.lowering import lower
from jx_neuron.lowering.hlo import proto
from jx_neuron.lowering.model import lower_model
from jx_neuron.models import Decoder
from jx_neuron.step.program_key import ProgramKey

READ = """
import json, sys
from jaxlib import xla_client
print(json.dumps([xla_client.XlaComputation(open(f, "rb").read()).as_hlo_text() for f in sys.argv[1:]]))
"""


@pytest.fixture(scope="session")
def python_of_2023(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if sys.version_info >= (3, 12):
        pytest.skip("jaxlib 0.4.13 has wheels up to Python 3.11")
    folder = tmp_path_factory.mktemp("xla2023")
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "jaxlib==0.4.13", "numpy<2", "scipy<1.12"], check=True)
    return python


def decode(params, cache_bsf, tokens_b, at_b):
    x_bd = params["wte"].at[tokens_b].get(mode="clip")
    h_bf = jax.nn.gelu(x_bd @ params["up"])
    cache_bsf = cache_bsf.at[jnp.arange(2), at_b].set(h_bf, mode="promise_in_bounds")
    x_bd = x_bd + jax.nn.softmax(cache_bsf, 1).sum(1) @ params["down"] + h_bf @ params["down"]
    logits_bv = (x_bd @ params["wte"].T).astype(jnp.float32)
    return jnp.argmax(logits_bv, -1), jax.lax.top_k(logits_bv, 8), cache_bsf


@pytest.mark.slow
def test_xla_of_2023_reads_the_modules(python_of_2023: Path, tmp_path: Path) -> None:
    def bf16(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    i32 = jax.ShapeDtypeStruct((2,), jnp.int32)
    params = {"wte": bf16(512, 64), "up": bf16(64, 256), "down": bf16(256, 64)}
    specs = {"wte": P("tp"), "up": P(None, "tp"), "down": P("tp")}
    split = P(None, None, "tp")
    degrees = (1, 2, 8, 32)
    files = []
    for tp in degrees:
        program = lower(
            decode, params, bf16(2, 128, 256), i32, i32, tp_degree=tp,
            in_specs=(specs, split, None, None), out_specs=(None, None, split), donate_argnums=(1,),
        )  # fmt: skip
        files.append(tmp_path / f"tp{tp}.pb")
        files[-1].write_bytes(program.hlo_module)
        assert max(i.id for i in proto.instructions(proto.parse(program.hlo_module))) < 2**31
    done = subprocess.run([python_of_2023, "-c", READ, *map(str, files)], capture_output=True, text=True, check=True)
    for tp, text in zip(degrees, json.loads(done.stdout), strict=True):
        groups = re.findall(r"replica_groups=(\{\}|\{.*?\}\})", text)
        assert set(groups) == ({f"{{{{{','.join(map(str, range(tp)))}}}}}"} if tp > 1 else set()), groups
        assert groups or tp == 1
        assert "partition-id" not in text
        assert "channel_id" not in text
        assert " topk(" not in text
        assert 'custom_call_target="AwsNeuronTopK"' in text
        assert re.search(r"input_output_alias=\{ \{3\}: \(3, \{\}, must-alias\) \}", text)
    assert "Malformed" not in done.stderr


def check_read(python_of_2023: Path, files: list[Path], aliases: int) -> None:
    """Reads the modules, and looks for what an XLA of 2023 has no word for, and for `aliases` of state and outputs."""
    done = subprocess.run([python_of_2023, "-c", READ, *map(str, files)], capture_output=True, text=True, check=True)
    for file, text in zip(files, json.loads(done.stdout), strict=True):
        assert max(i.id for i in proto.instructions(proto.parse(file.read_bytes()))) < 2**31
        assert "replica_groups={}" not in text
        assert ("replica_groups=" in text) == ("/tp1/" not in str(file))
        assert "partition-id" not in text
        assert "channel_id" not in text
        assert " topk(" not in text
        assert text.count("must-alias") == aliases


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(tiny.CONFIGS))
def test_xla_of_2023_reads_artifacts(python_of_2023: Path, tmp_path: Path, family: str) -> None:
    config = json.loads(tiny.CONFIGS[family]().to_json_string(use_diff=False))
    files = []
    for tp in (1, 2, 4, 8):
        folder = tmp_path / f"tp{tp}"
        NeuronAutoModelForCausalLM.from_config(config, tp_degree=tp, n_positions=64).save(folder)
        files += sorted((folder / "hlo").glob("*.pb"))
    assert len(files) == 4 * 3
    check_read(python_of_2023, files, 4 + 1)  # keys and values of two layers, and the last tokens


# float8_e4m3 is in XLA since September 2024
FORMS = {"s8": QuantizationConfig(lm_head=True), "int4": QuantizationConfig(quant_dtype="int4", group_size=2)}
QUANTIZED = [(family, form) for family in ("deepseek_v3", "llama", "mixtral") for form in FORMS]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "form"), [*((family, None) for family in OPTIONS), *QUANTIZED])
def test_xla_of_2023_reads_the_programs_of_every_family(
    python_of_2023: Path, tmp_path: Path, family: str, form: str | None
) -> None:
    raw = AutoConfig.for_model(family, **deepcopy(OPTIONS[family][0])).to_dict()
    decoder = replace(Decoder.from_config(raw, 4), quant=FORMS[form] if form else None)
    keys = [ProgramKey("decode", 2, 1, 64, 16), ProgramKey("prefill", 2, 32, 32, 16)]
    files = []
    for program in lower_model(decoder, keys, 3, 96, jnp.bfloat16):
        files.append(tmp_path / f"{program.name}.pb")
        files[-1].write_bytes(program.hlo_module)
    check_read(python_of_2023, files, sum(spec.alias is not None for spec in program.outputs))
