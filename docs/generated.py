"""The parts of the documents that are made from the code.

A document has a part between `<!-- generated: PART -->` and `<!-- /generated -->`. `python docs/generated.py` writes
all parts, and a test compares them. A mark without an end is replaced when the site is built.
"""

import ast
import html
import inspect
import json
import pkgutil
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import jx_neuron
from jx_neuron.checkpoint.gguf.architectures import ARCHITECTURES
from jx_neuron.checkpoint.hf_config import ONLY
from jx_neuron.compiler.errors import ERRORS
from jx_neuron.config import _NO_EFFECT, _REFUSED
from jx_neuron.lowering.verify.checking import RULES
from jx_neuron.lowering.verify.rules import TARGETS, Rule
from jx_neuron.models import family, model_types
from jx_neuron.models.known import KNOWN
from jx_neuron.planning import INSTANCES
from jx_neuron.serve.fields import IGNORED, REFUSED
from jx_neuron.serve.metrics import COUNTERS, GAUGES, HISTOGRAMS
from jx_neuron.serve.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, Sampling, TokenizeRequest
from jx_neuron.serve.responses import ResponsesRequest

ROOT = Path(__file__).parent.parent

Engines = Mapping[str, Mapping[str, float]]
COPY = re.compile(r"<!-- generated: (\w+) -->\n.*?<!-- /generated -->", re.DOTALL)


def models() -> str:
    """The decoder families of this package, from its registry, without the ones that a user registered."""
    classes = {
        of.MODEL_TYPE: name
        for name in reversed(jx_neuron.__all__)
        if getattr(of := getattr(jx_neuron, name), "MODEL_TYPE", None)
    }
    rows = []
    for model_type in _own():
        described = (inspect.getdoc(family(model_type)) or "").splitlines()[0].rstrip(".")
        known = [f"`{name}`" for name, config in KNOWN.items() if config["model_type"] == model_type]
        names = f"{known[0]} … {known[-1]}" if len(known) > 1 else "".join(known)
        title = classes.get(model_type, "NeuronAutoModelForCausalLM")
        rows.append((f"`{model_type}`", f"`{title}`", described, names))
    return _table(("model_type", "class", "decoder", "known by name, without a network"), rows)


def gguf() -> str:
    """The architectures of GGUF files, and what HF calls the model."""
    names = {"mistral3": "`ministral3` or `mistral`", "olmo2": "`olmo2` or `olmo3`"}
    rows = [(f"`{name}`", names.get(name, f"`{of.model_type}`")) for name, of in sorted(ARCHITECTURES.items())]
    return _table(("general.architecture", "model_type"), rows)


def families() -> str:
    """Which families this package has, from its registry, and which others have, from families.json."""
    others = json.loads((ROOT / "docs" / "families.json").read_text())
    own = _own()
    theirs = {name for project in others.values() for name in project["yes"]}
    rows = [
        (
            f"`{model_type}`",
            "yes" if model_type in own else "",
            *(next((how for how in ("yes", "contrib") if model_type in of.get(how, ())), "") for of in others.values()),
        )
        for model_type in sorted({*own, *theirs}, key=lambda name: (name not in own, name))
    ]
    count = [sum(bool(cell) for cell in column) for column in zip(*rows, strict=True)]
    rows.append(("families", *map(str, count[1:])))
    sources = [f"[{name}]({of['source']}), {of['date']}: {of['about']}." for name, of in others.items()]
    return "\n\n".join([_table(("model_type", "jx_neuron", *others), rows), " ".join(sources)])


def known() -> str:
    """The checkpoints that known.json has, by family."""
    names: dict[str, list[str]] = {}
    for group in json.loads((ROOT / "jx_neuron" / "models" / "known.json").read_text()):
        names.setdefault(group["model_type"], []).extend(f"`{name}`" for name in group["rows"])
    return _table(("model_type", "checkpoints"), [(f"`{model}`", ", ".join(of)) for model, of in names.items()])


def rules() -> str:
    """What the verifier checks, rule by rule."""
    rows = [(_codes(rule), f"`{rule.name}`", rule.title, rule.severity) for rule in RULES.values()]
    parts = [_table(("code", "rule", "what", "severity"), rows)]
    parts += [f"## {rule.name}\n\n{_codes(rule)}\n\n{rule.doc}\n\nInstead: {rule.advice}." for rule in RULES.values()]
    return "\n\n".join(parts)


def compiler_errors() -> str:
    """What only compiling can tell, by code."""
    rows = [(_code(code), meaning, way_out) for code, (meaning, way_out) in sorted(ERRORS.items())]
    return _table(("code", "meaning", "remedy"), rows)


def targets() -> str:
    """The targets of neuronx-cc, and the device memory of a logical core."""
    rows = [
        (f"`{name}`", str(generation), ", ".join(map(str, lnc)), f"{hbm * lnc[-1] / 2**30:.0f} GiB")
        for name, (generation, lnc, hbm) in TARGETS.items()
    ]
    return _table(("target", "NeuronCore version", "cores to a logical one", "memory of a core, at the last"), rows)


def instances() -> str:
    """The instances that `plan` knows, and the tensor-parallel degrees of each."""
    rows = [
        (of.name, str(of.cores), f"{of.hbm_per_core / 2**30:.0f} GiB", ", ".join(map(str, of.degrees)))
        for of in INSTANCES
    ]
    return _table(("instance", "cores", "memory of a core", "degrees"), rows)


def neuron_config() -> str:
    """The fields of transformers-neuronx's NeuronConfig that are refused, and the ones without effect."""
    refused = [
        (f"`{name}`", " or ".join(f"`{value!r}`" for value in legal)) for name, legal in sorted(_REFUSED.items())
    ]
    quiet = ", ".join(f"`{name}`" for name in sorted(_NO_EFFECT))
    return f"{_table(('refused', 'unless it is'), refused)}\n\nAccepted, and said to have no effect: {quiet}."


def config_fields() -> str:
    """What any config.json may say in one way only."""
    rows = [(f"`{name}`", " or ".join(f"`{value!r}`" for value in legal)) for name, legal in sorted(ONLY.items())]
    return _table(("field", "unless it is"), rows)


def rooms() -> str:
    """The modules of the package, each with the first line of its documentation."""
    rows = []
    for module in pkgutil.iter_modules(jx_neuron.__path__):
        path = Path(jx_neuron.__path__[0], module.name)
        text = (path / "__init__.py" if module.ispkg else path.with_suffix(".py")).read_text()
        said = (ast.get_docstring(ast.parse(text)) or "").split("\n\n")[0].replace("\n", " ")
        rows.append((f"`{module.name}{'/' if module.ispkg else ''}`", said))
    return _table(("room", "contents"), rows)


def command_line() -> str:
    """Every command and option, as typer documents them."""
    asked = [sys.executable, "-m", "typer", "jx_neuron.cli.app", "utils", "docs", "--name", "jx-neuron"]
    done = subprocess.run(asked, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    made = html.unescape(done.stdout)
    return made.partition("\n")[2]  # the page has a title of its own


def peers() -> str:
    """How many times as fast as each peer we are, from benchmarks/results: in float32, then in bfloat16.

    Compared with peers in bfloat16, in bfloat16 only.
    """

    def ratios(engines: Engines, phase: str, peer: str) -> str:
        ours = [engines[f"jx_neuron_{amp}"] for amp in ("f32", "bf16")[peer.endswith("bf16") :]]
        return " / ".join(f"{engine[key]:.2f}" for engine in ours if (key := f"{phase}_over_{peer}") in engine)

    return _by_engine(ratios)


def rates() -> str:
    """Each engine's tokens a second in decode and milliseconds of a prefill, from benchmarks/results."""
    measures = {"decode": "tokens_per_second", "prefill": "prefill_milliseconds"}

    def rate(engines: Engines, phase: str, engine: str) -> str:
        value = engines.get(engine, {}).get(measures[phase])
        return "" if value is None else f"{value:.0f}"

    return _by_engine(rate)


def serve_fields() -> str:
    """The fields of requests, by the routes that take them."""
    common = list(Sampling.model_fields)
    routes = {
        "`/v1/completions` and `/v1/chat/completions`": common,
        "`/v1/completions`": [name for name in CompletionRequest.model_fields if name not in common],
        "`/v1/chat/completions`": [name for name in ChatRequest.model_fields if name not in common],
        "`/v1/responses`": list(ResponsesRequest.model_fields),
        "`/tokenize`": list(TokenizeRequest.model_fields),
        "`/detokenize`": list(DetokenizeRequest.model_fields),
    }
    rows = [(route, ", ".join(f"`{name}`" for name in names)) for route, names in routes.items()]
    return _table(("route", "fields"), rows)


def serve_ignored() -> str:
    """The fields of requests that are ignored."""
    return ", ".join(f"`{name}`" for name in IGNORED)


def serve_refused() -> str:
    """The fields of requests that are refused, and why."""
    return _table(("field", "instead, or why"), ((f"`{name}`", why) for name, why in REFUSED.items()))


def serve_metrics() -> str:
    """The metrics of a server."""
    rows = [(f"`vllm:{name}`", "gauge", text) for name, _, text in GAUGES]
    rows += [(f"`vllm:{name}_total`", "counter", text) for name, _, text in COUNTERS]
    rows += [
        ("`vllm:request_success_total`", "counter", "Answers that ended, by `finished_reason`."),
        ("`vllm:prompt_tokens_cached_total`", "counter", "Tokens of prompts found in slots."),
        ("`vllm:cache_config_info`", "info", "`block_size` and `num_gpu_blocks`."),
    ]
    rows += [(f"`vllm:{name}`", "histogram", text) for name, (text, _) in HISTOGRAMS.items()]
    return _table(("metric", "kind", "meaning"), rows)


def notebook() -> str:
    """The notebook of examples/ as Markdown, with its outputs; plots are data URIs."""
    parts = []
    for cell in json.loads((ROOT / "examples" / "sampling.ipynb").read_text())["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            if plot := output.get("data", {}).get("image/png"):
                parts.append(f"![A plot of the cell above](data:image/png;base64,{''.join(plot.split())})")
            elif text := "".join(output.get("text", output.get("data", {}).get("text/plain", ""))):
                parts.append(f"```text\n{text.rstrip()}\n```")
    return "\n\n".join(parts)


def examples() -> str:
    """The scripts of examples/, each with the first line of its documentation."""
    scripts = sorted((ROOT / "examples").glob("*.py"))
    lines = [(ast.get_docstring(ast.parse(path.read_text())) or "").splitlines()[0] for path in scripts]
    return _table(("script", "shows"), [(f"`{path.name}`", line) for path, line in zip(scripts, lines, strict=True)])


def features() -> str:
    """What each backend supports, with the test that shows it, from features.json."""
    backends = ("xla", "host", "neuron")
    rows = []
    for feature in json.loads((ROOT / "docs" / "features.json").read_text()):
        tests = [feature.get(backend, "") for backend in backends]
        cells = [f"`{test.replace('::', '` `')}`" if "::" in test else test for test in tests]
        rows.append((feature["feature"], *cells))
    return _table(("feature", *(f"`{backend}`" for backend in backends)), rows)


PARTS = {
    part.__name__: part
    for part in (
        command_line, compiler_errors, config_fields, examples, families, features, gguf, instances, known, models,
        neuron_config, notebook, peers, rates, rooms, rules, serve_fields, serve_ignored, serve_metrics, serve_refused,
        targets,
    )
}  # fmt: skip


def _own() -> list[str]:
    """The model types of this package, and not of a decoder that was registered."""
    return [name for name in model_types() if getattr(family(name), "__name__", "").startswith("jx_neuron.")]


def _by_engine(cell: Callable[[Engines, str, str], str]) -> str:
    """A row for each model, phase and batch that was measured, and a column for each engine, ours last."""
    results = [json.loads(path.read_text()) for path in sorted((ROOT / "benchmarks" / "results").glob("*.json"))]
    names = {name for result in results for row in result["rows"] for name in row["engines"]}
    names = sorted(names, key=lambda name: (name.startswith("jx_neuron"), name))
    lines = [
        (result["model"], phase, str(row["batch"]), *(cell(row["engines"], phase, name) for name in names))
        for result in results
        for phase in ("decode", "prefill")
        for row in result["rows"]
    ]
    measured = [line for line in lines if any(line[3:])]
    titles = ("model", "phase", "batch", *names)
    columns = [column for column in zip(titles, *measured, strict=True) if any(column[1:])]
    head, *rest = zip(*columns, strict=True)
    return _table(head, rest)


def _code(code: str) -> str:
    return f"NCC_{code}" if len(code) > 4 else code


def _codes(rule: Rule) -> str:
    return ", ".join(map(_code, rule.codes)) or "–"


def _table(titles: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(titles), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)


def up_to_date(document: str) -> str:
    """The text of a document, with its generated parts as they are now."""
    return COPY.sub(
        lambda mark: f"<!-- generated: {mark[1]} -->\n\n{PARTS[mark[1]]().strip()}\n\n<!-- /generated -->", document
    )


if __name__ == "__main__":
    for path in sorted((ROOT / "docs").rglob("*.md")):
        path.write_text(up_to_date(path.read_text()))
