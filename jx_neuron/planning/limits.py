"""Requests that no machine can run are refused before anything is built."""

from jx_neuron.errors import InputError
from jx_neuron.models import Decoder
from jx_neuron.planning.instances import INSTANCES
from jx_neuron.planning.outline import Outline
from jx_neuron.planning.request import most
from jx_neuron.util.pages import check_memory, gib

MOST_PADDING = 16  # times the weights: 32 cores pad 2 heads to 32


def check_degree(model: Decoder, tp_degree: int) -> None:
    """Raises InputError for a degree at which nearly all weights are padding, and names the largest that is legal."""
    outline = Outline.of(model)
    if (times := 1 + outline.overhead(tp_degree)) > MOST_PADDING:
        legal = most(lambda degree: 1 + outline.overhead(degree) <= MOST_PADDING)
        raise InputError(
            f"tp_degree={tp_degree} pads this model to {times:,.0f} times its weights; choose a degree up to {legal}"
        )


def check_host(model: Decoder, tp_degree: int, batch: int, positions: int, itemsize: int, processes: int = 1) -> None:
    """Raises InputError where weights and the cache of `batch` rows of `positions` exceed this machine's memory; of
    several processes, the share of one."""
    outline, cores = Outline.of(model), -(-tp_degree // processes)
    weights = cores * outline.weight_bytes(tp_degree, itemsize)
    cache = cores * outline.cache_bytes(tp_degree, batch, positions, itemsize)
    check_memory(weights + cache, f"tp_degree={tp_degree}, {batch} rows and {positions} positions take")


def check_devices(model: Decoder, tp_degree: int, batch: int, positions: int, itemsize: int) -> None:
    """Raises InputError where weights and cache exceed the device memory of every instance."""
    outline = Outline.of(model)
    weights, cache = (
        outline.weight_bytes(tp_degree, itemsize),
        outline.cache_bytes(tp_degree, batch, positions, itemsize),
    )
    largest = max(INSTANCES, key=lambda instance: instance.cores * instance.hbm_per_core)
    if (size := tp_degree * (weights + cache)) > (room := largest.cores * largest.hbm_per_core):
        raise InputError(
            f"tp_degree={tp_degree}, batch_size={batch} and n_positions={positions} take {gib(size)} and the "
            f"largest instance, {largest.name}, has {gib(room)}; ask for less of one of them"
        )
