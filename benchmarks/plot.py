"""A picture of benchmarks/results: decode beside the peers, for each model and batch.

python benchmarks/plot.py docs/speed.svg
"""

import argparse
import json
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results"
NAMES = {
    "hf": "HF transformers",
    "ctranslate2": "CTranslate2",
    "jx_neuron_f32": "jx_neuron",
    "jx_neuron_bf16": "jx_neuron, bfloat16",
}
COLOURS = ("#9aa5b1", "#5b7083", "#d9730d", "#f2b880")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="an .svg, .png or .pdf file")
    draw(parser.parse_args().output)


def draw(output: Path) -> None:
    mpl.rcParams["svg.hashsalt"] = "jx_neuron"  # the same bytes each time
    results = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    figure = Figure(figsize=(9, 2.6), layout="constrained")
    for axes, of in zip(figure.subplots(1, len(results), squeeze=False)[0], results, strict=True):
        for i, (engine, name) in enumerate(NAMES.items()):
            rows = [row for row in of["rows"] if engine in row["engines"]]
            places = [list(of["rows"]).index(row) + 0.2 * i for row in rows]
            rates = [row["engines"][engine]["tokens_per_second"] for row in rows]
            axes.bar(places, rates, 0.2, label=name, color=COLOURS[i])
        axes.set_xticks([j + 0.3 for j in range(len(of["rows"]))], [str(row["batch"]) for row in of["rows"]])
        axes.set_title(of["model"], fontsize=10)
        axes.set_xlabel("batch")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("tokens/s")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(output, metadata={"Date": None} if output.suffix == ".svg" else None)


if __name__ == "__main__":
    main()
