"""A plan as a picture: memory of a core by item at each degree, and predicted time per token by batch."""

from io import BytesIO
from pathlib import Path
from typing import Any

from jx_neuron.errors import InputError
from jx_neuron.planning.instances import GIB
from jx_neuron.planning.plan import Plan
from jx_neuron.util.durable import write_file

FORMATS = (".pdf", ".png", ".svg")
ERROR = 0.2  # the largest error on published rows that were not fitted
# Okabe and Ito's palette, which the colour-blind can distinguish
COLOURS = {
    "weights": "#0072B2",
    "cache": "#E69F00",
    "activations": "#009E73",
    "rings": "#CC79A7",
    "code": "#999999",
}
LABELS = {"cache": "KV cache", "rings": "DMA rings (allowance)", "code": "code (allowance)"}


def draw(plan: Plan, model: str, path: Path) -> None:
    """Writes a picture of the plan of `model` to `path`, a .png, .pdf or .svg.

    Raises InputError for another suffix, for a folder that does not exist, and where matplotlib is missing.
    """
    if path.suffix not in FORMATS:
        raise InputError(f"{path} cannot be drawn; name a file that ends in {', '.join(FORMATS)}")
    if not path.parent.is_dir():
        raise InputError(f"the folder {path.parent} does not exist; make it first")
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator
    except ImportError:
        raise InputError("a picture needs matplotlib, which is not installed: pip install matplotlib") from None
    figure = Figure(figsize=(11, 4.6), dpi=150, layout="constrained")
    figure.suptitle(f"{model} ({plan.size}, {plan.amp}) on {plan.instance}", fontsize=13)
    memory_axes, latency_axes = figure.subplots(1, 2, width_ratios=(1.15, 1))
    _memory(memory_axes, plan)
    _latency(latency_axes, plan, LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    for axes in (memory_axes, latency_axes):
        axes.spines[["top", "right"]].set_visible(False)
    data = BytesIO()
    figure.savefig(data, format=path.suffix[1:])
    write_file(path, data.getvalue())


def _memory(axes: Any, plan: Plan) -> None:
    names = [str(degree.tp_degree) for degree in plan.degrees]
    bottom = [0.0] * len(names)
    for item, colour in COLOURS.items():
        heights = [degree.memory.items()[item] / GIB for degree in plan.degrees]
        axes.bar(names, heights, 0.62, bottom, color=colour, label=LABELS.get(item, item), zorder=2)
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    room = plan.memory_per_core / GIB
    top = min(max(1.35 * room, 1.15 * plan.memory.total / GIB), 1.3 * max(*bottom, room))
    axes.axhline(room, color="black", linestyle="--", linewidth=1, zorder=3)
    axes.annotate(
        f"memory of a core, {room:g} GiB", (1, room), (-2, 3), xycoords=("axes fraction", "data"),
        textcoords="offset points", ha="right", va="bottom", fontsize=9,
    )  # fmt: skip
    for n, (degree, total) in enumerate(zip(plan.degrees, bottom, strict=True)):
        cut = total > top
        y = 0.97 * top if cut else total + 0.012 * top
        label = f"{total:.3g}" + (" ↑" if cut else "")
        colour = "white" if cut else "#B00020" if degree.refusal else "black"
        axes.text(n, y, label, ha="center", va="top" if cut else "bottom", fontsize=9, color=colour, zorder=4)
    axes.set_ylim(0, top)
    axes.set_xlabel("tensor-parallel degree")
    axes.set_ylabel("GiB a core")
    axes.set_title(f"Memory of a core: batch {plan.batch_size}, {plan.n_positions} positions", fontsize=11)
    for label, degree in zip(axes.get_xticklabels(), plan.degrees, strict=True):
        label.set_fontweight("bold" if degree.tp_degree == plan.tp_degree else "normal")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=len(COLOURS), fontsize=8, frameon=False,
                columnspacing=1, handlelength=1)  # fmt: skip


def _latency(axes: Any, plan: Plan, ticks: Any) -> None:
    batches = [rate.batch_size for rate in plan.rates]
    milliseconds = [1e3 * rate.seconds_per_token for rate in plan.rates]
    colour = COLOURS["weights"]
    low, high = ([m * factor for m in milliseconds] for factor in (1 - ERROR, 1 + ERROR))
    axes.fill_between(batches, low, high, color=colour, alpha=0.15, linewidth=0, label=f"± {ERROR:.0%}")
    axes.plot(batches, milliseconds, "o-", color=colour, markersize=4, label="predicted")
    for rate, y in zip(plan.rates, milliseconds, strict=True):
        is_requested = rate.batch_size == plan.batch_size
        axes.annotate(
            f"{rate.tokens_per_second:,.0f}", (rate.batch_size, y), (0, 11), textcoords="offset points", ha="center",
            fontsize=8, fontweight="bold" if is_requested else "normal",
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.set_yscale("log")
    axes.set_ylim(0.6 * min(milliseconds), 2 * max(milliseconds))
    axes.yaxis.set_major_locator(ticks)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_xlabel("batch size (at the points: tokens per second of all rows)")
    axes.set_ylabel("ms a token")
    axes.set_title(f"Time per token at tp {plan.tp_degree}, full context", fontsize=11)
    axes.legend(loc="upper left", fontsize=8, frameon=False)
