"""Each example runs, on a small local model where it names a large one."""

import os
import re
import runpy
import shlex
import subprocess
import sys
from ast import literal_eval
from pathlib import Path
from unittest import mock

import nbclient
import nbformat
import pytest
import tiny
import torch
import transformers
from doubles import neuronx_cc
from test_cli import Done, run

from jx_neuron import GPT2ForSampling, GPTJForSampling, JxNeuronError, OPTForSampling
from jx_neuron.lowering.hlo import proto
from jx_neuron.planning import INSTANCES

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
PROMPT = "Hello, I'm a language model,"
NEW = 12
FOLDERS = {"gpt2": "gpt2", "gptj": "gptj", "llama": "llama", "opt-13b": "opt"}  # what the pages name: a small stand-in
FENCE = re.compile(r"^```(\w+)( notest)?\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoints")
    for folder, name in FOLDERS.items():
        tiny.saved(name, path / folder)
        tokenizer = tiny.tokenizer()
        tokenizer.eos_token = "<0>"
        tokenizer.save_pretrained(path / folder)
    return path


@pytest.fixture
def here(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder that has the checkpoints in it, with a stand-in for neuronx-cc on PATH."""
    for folder in FOLDERS:
        (tmp_path / folder).symlink_to(folders / folder)
    monkeypatch.setenv("PATH", f"{neuronx_cc.install(tmp_path / 'bin').parent}{os.pathsep}/usr/bin:/bin")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("NEURON_CC_FLAGS", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def script(name: str, *arguments: object) -> None:
    path = EXAMPLES / name
    with mock.patch.object(sys, "argv", [str(path), *map(str, arguments)]):
        runpy.run_path(str(path), run_name="__main__")


def sections(printed: str) -> dict[str, list[str]]:
    """What is below each heading that starts with ==."""
    parts = re.split(r"^== (.*)$", printed, flags=re.MULTILINE)
    return {title: body.strip("\n").splitlines() for title, body in zip(parts[1::2], parts[2::2], strict=True)}


def hf_answers(folder: Path, prompt: str = PROMPT, new: int = NEW, **options: object) -> list[str]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    how = dict(max_new_tokens=new, do_sample=False, pad_token_id=0) | options
    return tokenizer.batch_decode(
        model.generate(**tokenizer(prompt, return_tensors="pt"), **how), skip_special_tokens=True
    )


def blocks(page: str) -> list[tuple[str, str, bool]]:
    """Language and text of each fenced block, and whether it is only shown."""
    return [(language, text, bool(notest)) for language, notest, text in FENCE.findall((EXAMPLES / page).read_text())]


def test_every_example_is_in_the_index_and_its_links_lead_somewhere() -> None:
    linked = set(re.findall(r"\]\(([^):]+)\)", (EXAMPLES / "README.md").read_text()))
    assert linked == {path.name for path in EXAMPLES.iterdir() if path.is_file() and path.name != "README.md"}
    for page in EXAMPLES.glob("*.md"):
        for link in re.findall(r"\]\(([^):]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


@pytest.mark.parametrize("name", [path.name for path in EXAMPLES.glob("*.py") if path.name != "persimmon.py"])
def test_help_says_what_it_is_and_takes(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        script(name, "--help")
    assert stop.value.code == 0
    said = capsys.readouterr().out
    documentation = (EXAMPLES / name).read_text().split('"""')[1]
    assert documentation.splitlines()[0] in said
    for command in re.findall(rf"python examples/{re.escape(name)} ?(.*)", documentation):
        for option in re.findall(r"--[\w-]+", command.partition("#")[0]):
            assert option in (EXAMPLES / name).read_text()


@pytest.mark.slow
def test_gpt2_sampling(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script("gpt2_sampling.py", "--model", "gpt2", "--new-tokens", NEW, "--tp", 2)
    found = sections(capsys.readouterr().out)
    assert len(found) == 7
    assert found["greedy"] == hf_answers(here / "gpt2")
    assert found["two prompts"] == hf_answers(here / "gpt2") + hf_answers(here / "gpt2", "Hello,")
    assert PROMPT + found["streamed"][0] == found["greedy"][0]
    model = GPT2ForSampling.from_pretrained(here / "gpt2")
    ids = model.tokenizer(PROMPT)["input_ids"]
    alone = model.sample([ids], len(ids) + NEW, top_k=50, seed=0)
    assert found["top_k=50, seed=0"] == model.tokenizer.batch_decode(alone, skip_special_tokens=True)
    cold, warm = found["temperature=[0.2, 1.2]"]
    assert cold != warm


def test_the_notebook_is_kept_with_its_outputs() -> None:
    notebook = nbformat.read(EXAMPLES / "sampling.ipynb", as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    printing = [cell for cell in code if re.search(r"show\(|print", cell.source)]
    assert len(printing) == 7
    assert all(cell.outputs for cell in printing[1:])  # the first defines show
    assert [out for cell in notebook.cells for out in cell.get("outputs", ()) if "image/png" in out.get("data", ())]


@pytest.mark.slow
def test_the_notebook_runs(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JX_NEURON_MODEL", str(here / "gpt2"))
    monkeypatch.setenv("JX_NEURON_NEW_TOKENS", str(NEW))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(EXAMPLES / "sampling.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    printed = ["".join(out.text for out in cell.outputs if out.get("name") == "stdout") for cell in code]
    _, _, greedy, at_random, a_row, together, streamed, _, scores = (text.splitlines() for text in printed)
    assert [literal_eval(line) for line in greedy] == hf_answers(here / "gpt2")
    assert (len(at_random), len(a_row)) == (2, 2)
    assert [literal_eval(line) for line in together[1:]] == hf_answers(here / "gpt2", "Hello")
    assert together[0] == greedy[0]
    assert PROMPT + literal_eval(streamed[0]) == literal_eval(greedy[0])
    assert all(float(line) > 1 for line in scores)


@pytest.mark.slow
def test_gptj_gives_at_tp_8_what_it_gives_on_one_core(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    how = ("--n-positions", 64, "--amp", "f32", "--new-tokens", NEW, "--backend", "host")
    with pytest.warns(UserWarning, match="pads 4 heads to 8"):
        script("gptj_tp8.py", "--model", "gptj", *how)
    collectives, answer = capsys.readouterr().out.splitlines()
    layers = tiny.CONFIGS["gptj"]().n_layer
    assert collectives == f"decode-b1-s64-k64: 2 all-gather, {layers + 1} all-reduce"
    model = GPTJForSampling.from_pretrained(here / "gptj", n_positions=64)
    ids = model.tokenizer("The purpose of a decoder is")["input_ids"]
    expected = model.sample([ids], len(ids) + NEW, top_k=40, temperature=0.8, seed=0)
    assert answer == model.tokenizer.decode(expected[0])


def test_lower_function(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script("lower_function.py", "--tp", 8, "--output", here / "mlp.hlo.pb", "--target", "trn2")
    said = capsys.readouterr().out
    assert "all-reduce of float32[16,256] among ((0, 1, 2, 3, 4, 5, 6, 7),)" in said
    assert "trn2:\n  passes" in said
    assert float(re.search(r"largest difference from jax itself: (\S+)", said)[1]) < 1e-5
    module = proto.parse((here / "mlp.hlo.pb").read_bytes())
    assert sum(i.opcode == "all-reduce" for i in proto.instructions(module)) == 1
    assert run("check", here / "mlp.hlo.pb").stdout == "mlp.hlo.pb: passes on trn1\n"


@pytest.mark.few(1)
@pytest.mark.parametrize("compiled", [True, False])
def test_save_on_a_laptop_load_on_an_instance(compiled: bool, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "save_on_laptop_load_on_instance.py"
    how = ("--amp", "f32", "--n-positions", 64, "--tp", 2, *(["--compile"] if compiled else []))
    script(name, "save", "gpt2", "saved", *how)
    assert capsys.readouterr().out.startswith(f"3 programs for trn1 in {here / 'saved'}, ")
    assert len(list((here / "saved").glob("neff/*"))) == (3 if compiled else 0)
    expected = hf_answers(here / "gpt2")
    (here / "gpt2").unlink()  # the instance has the folder alone
    script(name, "load", "saved", PROMPT, "--new-tokens", NEW)
    assert capsys.readouterr().out.splitlines() == expected
    program = next((here / "saved" / "hlo").iterdir())
    program.write_bytes(program.read_bytes()[:-1] + b"\0")
    with pytest.raises(JxNeuronError, match="was altered"):
        script(name, "load", "saved", PROMPT)


def test_hf_generate(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script("hf_generate.py", "--model", "gpt2", "--new-tokens", NEW)
    found = sections(capsys.readouterr().out)
    assert found["greedy"] == found["streamed"] == hf_answers(here / "gpt2")
    assert found["4 beams"] == hf_answers(here / "gpt2", num_beams=4)
    torch.manual_seed(0)
    drawn = dict(do_sample=True, top_p=0.9, temperature=0.8, num_return_sequences=3)
    assert found["three answers at random"] == hf_answers(here / "gpt2", **drawn)


def test_plan_instance(capsys: pytest.CaptureFixture[str]) -> None:
    script("plan_instance.py", "facebook/opt-30b", "--amp", "f16")
    rows = capsys.readouterr().out.splitlines()
    for instance, row in zip(INSTANCES, rows[1:], strict=False):
        assert row.startswith(f"{instance.name} ")
        assert row.endswith("each core would need 31.3 GiB and has 16 GiB") == (instance.cores == 2)
    assert "The smallest that holds it: inf2.24xlarge, at tp 8. A core holds:" in rows
    assert max(map(len, rows)) <= 80


@pytest.mark.slow
def test_the_decoder_of_one_s_own_as_a_program(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.PersimmonConfig(
        vocab_size=tiny.VOCAB, hidden_size=48, num_hidden_layers=2, num_attention_heads=6, intermediate_size=80,
        max_position_embeddings=64, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    transformers.PersimmonForCausalLM(config).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    command = [sys.executable, EXAMPLES / "persimmon.py", "sample", tmp_path, PROMPT, "--max-new-tokens", str(NEW)]
    how = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=how)
    assert done.returncode == 0, done.stderr
    assert [done.stdout.rstrip("\n")] == hf_answers(tmp_path)


@pytest.mark.slow
def test_what_a_migrated_script_becomes(here: Path) -> None:
    page = blocks("migrate_from_transformers_neuronx.md")
    assert sum(notest for *_, notest in page) == 7  # how each part was before
    namespace: dict[str, object] = {}
    for language, text, notest in page:
        assert language == "python"
        if not notest:
            exec(compile(text, "migrate_from_transformers_neuronx.md", "exec"), namespace)
    model = transformers.AutoModelForCausalLM.from_pretrained(here / "gpt2")
    batch = namespace["batch"]
    how = dict(attention_mask=batch.attention_mask, do_sample=False, pad_token_id=95)
    expected = model.generate(batch.input_ids, max_length=48, **how)
    assert torch.equal(namespace["generated"], expected)
    assert torch.equal(namespace["answers"], model.generate(batch.input_ids, max_new_tokens=12, **how))
    assert proto.parse(namespace["hlo_module"])


OPT = "facebook-opt-13b-sampling.md"
NOT_RUN = ("pip", "hf")  # the page says that it is not tested


@pytest.mark.slow
def test_the_opt_13b_page_on_a_small_model(here: Path) -> None:
    namespace: dict[str, object] = {}
    for language, text, notest in blocks(OPT):
        assert not notest
        if language == "python":
            exec(compile(text, OPT, "exec"), namespace)
            continue
        for command, done in commands(text.replace("compile facebook/opt-13b", "compile opt-13b/config.json")):
            assert done.returncode == 0, (command, done)
            if "sample" in command:
                assert done.stdout.startswith(PROMPT)
                assert "48 tokens" in done.stderr
            if "check" in command:
                assert done.stdout.count("passes on trn1") == len(list((here / "opt-13b-hlo" / "hlo").iterdir()))
    saved = OPTForSampling.from_pretrained("./opt-13b-tp2")
    ids = saved.tokenizer(namespace["prompts"][0])["input_ids"]
    alone = saved.sample([ids], len(ids) + 48, top_k=50, seed=0)
    assert namespace["generated"][0][-48:] == alone[0][-48:]
    assert namespace["model"].settings.tp_degree == 2


@pytest.mark.slow
def test_the_opt_13b_page_with_its_own_config(here: Path) -> None:
    found = [
        (command, done)
        for language, text, _ in blocks(OPT)
        if language == "sh" and ("facebook/" in text or "opt-13b-hlo" in text)
        for command, done in commands(text)
    ]
    assert [command[1] for command, _ in found] == ["plan", "compile", "check"]
    assert all(done.returncode == 0 for _, done in found), found
    plan, compiled, checked = (done.stdout for _, done in found)
    assert "just fits trn1.2xlarge at tp 2: 15 GiB of 16 GiB a core" in " ".join(plan.split())
    assert f"11 programs for trn1 in {here / 'opt-13b-hlo'}" in compiled
    assert checked.count("passes on trn1") == 11


def commands(text: str) -> list[tuple[list[str], Done]]:
    """Each command of a shell block, run, but for those that are not tested."""
    split = [shlex.split(line) for line in text.splitlines() if line.strip()]
    wanted = [words for words in split if words[0] not in NOT_RUN]
    assert all(words[0] == "jx-neuron" for words in wanted)
    return [(words, run(*words[1:])) for words in wanted]
