"""The generated parts of the documents are what the code and the results say."""

import ast
import json
import re
import sys
from pathlib import Path

import pytest
import transformers

from jx_neuron.models.registry import FAMILIES

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "docs"))
import generated  # noqa: E402


def test_the_table_of_peers_is_up_to_date() -> None:
    listed = re.search(
        r"^<!-- peers: .* -->\n(.*)<!-- /peers -->$", (ROOT / "docs/benchmarks.md").read_text(), re.M | re.S
    )
    assert listed is not None
    assert listed[1] == generated.peers() + "\n", "python docs/generated.py peers prints what belongs there"


def test_the_table_of_features_names_tests_that_exist() -> None:
    features = json.loads((ROOT / "docs" / "features.json").read_text())
    named = {test for feature in features for backend, test in feature.items() if backend != "feature" and test}
    assert len(named) > 20
    for test in named:
        file, name = test.split("::")
        tree = ast.parse((ROOT / "tests" / file).read_text())
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, test
    assert all(any(feature[backend] for backend in ("xla", "host", "neuron")) for feature in features)


def test_families_beside_those_of_other_projects() -> None:
    others = json.loads((ROOT / "docs" / "families.json").read_text())
    for project in others.values():
        assert project["source"].startswith("https://")
        assert re.fullmatch(r"[A-Z][a-z]+ 20\d\d", project["date"])
        assert {*project["yes"], *project.get("contrib", ())} <= set(transformers.CONFIG_MAPPING)
        assert not set(project["yes"]) & set(project.get("contrib", ()))
    head, _, *rows = (re.split(r" *\| *", line)[1:-1] for line in generated.families().split("\n\n")[0].splitlines())
    assert head == ["model_type", "jx_neuron", *others]
    ours = {name for name, entry in FAMILIES.items() if isinstance(entry, str)}
    assert {row[0].strip("`") for row in rows if row[1] == "yes"} == ours
    assert rows[-1][1] == str(len(ours))


def test_benchmark_tables_hold_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = {"tokens_per_second": 9.6, "prefill_milliseconds": 70.2, "decode_over_hf": 1.5, "prefill_over_hf": 0.5}
    engines = {
        "jx_neuron_f32": ours,
        "jx_neuron_bf16": {"tokens_per_second": 12.0, "decode_over_hf": 2.0},
        "hf": {"tokens_per_second": 6.4, "prefill_milliseconds": 35.0},
    }
    monkeypatch.setattr(generated, "ROOT", tmp_path)
    file = tmp_path / "benchmarks" / "results" / "gpt2.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"model": "gpt2", "rows": [{"batch": 4, "engines": engines}]}))
    assert generated.peers().splitlines() == [
        "| model | phase | batch | hf |",
        "| --- | --- | --- | --- |",
        "| gpt2 | decode | 4 | 1.50 / 2.00 |",
        "| gpt2 | prefill | 4 | 0.50 |",
    ]
    assert generated.rates().splitlines()[2:] == [
        "| gpt2 | decode | 4 | 6 | 12 | 10 |",
        "| gpt2 | prefill | 4 | 35 |  | 70 |",
    ]
