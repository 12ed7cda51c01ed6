"""A picture of benchmarks/results: decode, compared with the peers, for each model and batch.

python benchmarks/plot.py docs/speed.svg
"""

import argparse
import json
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results"
ENGINES = {
    "hf": ("HF transformers", "#c3ccd5"),
    "ctranslate2": ("CTranslate2", "#9aa5b1"),
    "openvino": ("OpenVINO", "#71808f"),
    "onnxruntime_genai": ("onnxruntime-genai", "#4f6375"),
    "llama_cpp": ("llama.cpp", "#2f4152"),
    "hf_bf16": ("HF transformers, bfloat16", "#cfe0cf"),
    "openvino_bf16": ("OpenVINO, bfloat16", "#8fb58f"),
    "jx_neuron_f32": ("jx_neuron", "#d9730d"),
    "jx_neuron_bf16": ("jx_neuron, bfloat16", "#f2b880"),
}
"""As they are called and coloured."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="an .svg, .png or .pdf file")
    draw(parser.parse_args().output)


def draw(output: Path) -> None:
    mpl.rcParams["svg.hashsalt"] = "jx_neuron"  # the same bytes each time
    results = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    figure = Figure(figsize=(9, 2.6), layout="constrained")
    for axes, of in zip(figure.subplots(1, len(results), squeeze=False)[0], results, strict=True):
        there = [engine for engine in ENGINES if any(engine in row["engines"] for row in of["rows"])]
        width = 0.8 / len(there)
        for i, engine in enumerate(there):
            rates = {j: row["engines"][engine] for j, row in enumerate(of["rows"]) if engine in row["engines"]}
            name, colour = ENGINES[engine]
            heights = [found["tokens_per_second"] for found in rates.values()]
            axes.bar([j + width * i for j in rates], heights, width, label=name, color=colour)
        middle = width * (len(there) - 1) / 2
        axes.set_xticks([j + middle for j in range(len(of["rows"]))], [str(row["batch"]) for row in of["rows"]])
        axes.set_title(of["model"], fontsize=10)
        axes.set_xlabel("batch")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("tokens/s")
    bars = {bar.get_label(): bar for axes in figure.axes for bar in axes.containers}
    shown = [bars[name] for name, _ in ENGINES.values() if name in bars]
    figure.legend(handles=shown, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(output, metadata={"Date": None} if output.suffix == ".svg" else None)


if __name__ == "__main__":
    main()
