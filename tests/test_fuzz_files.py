"""Damaged checkpoint files: each is refused with an error of this package, or read as other readers read it."""

import json
import random
import struct
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from checkpoints import TENSORS, TEXT, save_torch, write, write_bin, write_gguf, write_shards
from mutations import damaged_bytes, damaged_json, limits

from jx_neuron.checkpoint.folder import Checkpoint, open_checkpoint
from jx_neuron.checkpoint.gguf.format import read_gguf
from jx_neuron.errors import CheckpointError

IDS = {"bos_token_id": 1, "eos_token_id": [2, 7], "pad_token_id": 0, "temperature": 0.7}


@dataclass(frozen=True)
class Subject:
    """A folder whose `file` is damaged by `damage`; `check` fails where what was opened is not what the file says."""

    folder: Path
    file: Path
    damage: Callable[[bytes, random.Random], bytes]
    check: Callable[[Path, Checkpoint], None]


def to_numpy(tensor):
    tensor = tensor.detach().resolve_neg().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def same_tensors(checkpoint, expected):
    assert checkpoint.names() == frozenset(expected)
    for name, array in expected.items():
        assert (checkpoint.shape(name), checkpoint.dtype(name)) == (array.shape, array.dtype.name)
        assert checkpoint.read(name).tobytes() == array.tobytes(), name


def safetensors_subject(folder):
    def damage(data, rng):
        length = int.from_bytes(data[:8], "little")
        if rng.random() < 0.5:
            header = damaged_json(json.loads(data[8 : 8 + length]), rng)
            return struct.pack("<Q", len(header)) + header + data[8 + length :]
        return damaged_bytes(data, rng, within=8 + length)

    def check(file, checkpoint):
        same_tensors(checkpoint, {k: to_numpy(v) for k, v in safetensors.torch.load_file(file).items()})

    return Subject(write(folder), folder / "model.safetensors", damage, check)


def bin_subject(folder, zipped):
    def check(file, checkpoint):
        state = torch.load(file, weights_only=True, map_location="cpu", mmap=zipped)  # as transformers does
        same_tensors(checkpoint, {name: to_numpy(tensor) for name, tensor in state.items()})

    write_bin(folder, _use_new_zipfile_serialization=zipped)
    return Subject(folder, folder / "pytorch_model.bin", damaged_bytes, check)


def gguf_subject(folder):
    def damage(data, rng):
        return damaged_bytes(data, rng, within=data.index(b"output_norm.weight") + 2000)

    def check(file, checkpoint):
        theirs, ours = gguf.GGUFReader(file), read_gguf(file)
        metadata = {key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
        assert ours.metadata.keys() == metadata.keys()
        for key, value in ours.metadata.items():
            same = np.float32(value) if isinstance(value, float) else np.array(value)
            np.testing.assert_array_equal(same, np.array(metadata[key]).astype(same.dtype), key)
        assert [(name, list(entry.shape)[::-1], entry.type, entry.offset) for name, entry in ours.entries.items()] == [
            (tensor.name, tensor.shape.tolist(), tensor.tensor_type, tensor.data_offset) for tensor in theirs.tensors
        ]
        assert (checkpoint.config["hidden_size"], checkpoint.config["num_hidden_layers"]) == (64, 2)
        tokenizer = checkpoint.tokenizer()
        assert isinstance(tokenizer.decode(tokenizer(TEXT).input_ids), str)

    folder.mkdir()
    return Subject(folder, write_gguf(folder / "m.gguf"), damage, check)


def index_subject(folder, form):
    save = {"safetensors": safetensors.numpy.save_file, "bin": save_torch}[form]

    def check(file, checkpoint):
        assert checkpoint.names() <= frozenset(TENSORS)
        same_tensors(checkpoint, {name: TENSORS[name] for name in checkpoint.names()})

    index = write_shards(folder, save, "model" if form == "safetensors" else "pytorch_model", form)
    return Subject(folder, index, json_or_bytes, check)


def ids_subject(folder, name):
    """The oracle has no part in common with the reader: what JSON holds, and a rule of three lines."""

    def meant(value):
        several = value if isinstance(value, list) else [value]
        assert all(type(token) is int or token is None for token in several)
        tokens = list(dict.fromkeys(token for token in several if token is not None and token >= 0))
        return tokens or None if isinstance(value, list) else next(iter(tokens), None)

    def check(file, checkpoint):
        fields = json.loads(file.read_bytes())
        for key in set(IDS) & set(fields):
            if key.endswith("_token_id"):
                fields[key] = meant(fields[key])
        read = checkpoint.config if name == "config.json" else checkpoint.generation_config
        assert json.dumps(read) == json.dumps(fields)

    write(folder, config=IDS)
    (folder / name).write_text(json.dumps(IDS))
    return Subject(folder, folder / name, json_or_bytes, check)


def tokenizer_subject(folder, name):
    def check(file, checkpoint):
        tokenizer = checkpoint.tokenizer()
        ids = tokenizer(TEXT).input_ids
        assert all(type(token) is int for token in ids)
        assert isinstance(tokenizer.decode(ids), str)

    gguf_file = write_gguf(write(folder, config={"model_type": "llama"}) / "m.gguf")
    open_checkpoint(gguf_file).save_tokenizer(folder)
    gguf_file.unlink()
    return Subject(folder, folder / name, json_or_bytes, check)


def json_or_bytes(data, rng):
    return damaged_json(json.loads(data), rng) if rng.random() < 0.7 else damaged_bytes(data, rng)


SUBJECTS = {
    "safetensors": safetensors_subject,
    "bin": lambda folder: bin_subject(folder, True),
    "bin of old torch": lambda folder: bin_subject(folder, False),
    "gguf": gguf_subject,
    "index of safetensors": lambda folder: index_subject(folder, "safetensors"),
    "index of bin": lambda folder: index_subject(folder, "bin"),
    "generation_config.json": lambda folder: ids_subject(folder, "generation_config.json"),
    "ids in config.json": lambda folder: ids_subject(folder, "config.json"),
    "tokenizer.json": lambda folder: tokenizer_subject(folder, "tokenizer.json"),
    "tokenizer_config.json": lambda folder: tokenizer_subject(folder, "tokenizer_config.json"),
}


FEW, MANY = range(40), pytest.param(range(40, 640), marks=pytest.mark.slow)


@pytest.mark.parametrize("seeds", [FEW, MANY], ids=["few", "many"])
@pytest.mark.parametrize("kind", SUBJECTS)
def test_damage_is_refused_or_read_right(kind, seeds, tmp_path):
    subject = SUBJECTS[kind](tmp_path / "whole")
    subject.check(subject.file, open_checkpoint(subject.folder))
    whole = subject.file.read_bytes()
    refusals, failures = [], []
    for seed in seeds:
        subject.file.write_bytes(subject.damage(whole, random.Random(f"{kind} {seed}")))
        try:
            with limits(), warnings.catch_warnings(action="ignore"):
                checkpoint = open_checkpoint(subject.folder)
                for name in checkpoint.names():
                    checkpoint.read(name)
                subject.check(subject.file, checkpoint)
        except CheckpointError as error:
            refusals.append(str(error))
        except BaseException as error:
            failures.append((seed, repr(error)[:300]))
    assert not failures
    assert all(str(subject.folder) in message for message in refusals)
    assert len(refusals) > len(seeds) // 10
