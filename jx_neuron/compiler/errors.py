"""The meaning of neuronx-cc's error codes, and a remedy for each.

https://awsdocs-neuron.readthedocs-hosted.com/en/latest/compiler/error-codes/
"""

import re
import signal

from jx_neuron.lowering.verify.checking import RULES

DOCS = "https://awsdocs-neuron.readthedocs-hosted.com/en/latest/compiler/error-codes"

_DEVICE_MEMORY = (
    "the program needs more device memory than a core has",
    "use a larger tp degree, a smaller batch or n_positions, or 16-bit weights; see `jx-neuron plan`",
)
_INSTRUCTIONS = (
    "the program becomes more instructions than the device can hold",
    "use a larger tp degree, smaller context buckets or batch size, or --optlevel=1 in NEURON_CC_FLAGS",
)
_HOST_MEMORY = (
    "the compiler was killed, most often because this machine ran out of memory",
    "compile fewer programs at a time (--jobs 1, compilation_worker_count=1), or on a larger machine",
)

ERRORS = {
    "EARG001": (
        "this size of logical cores does not exist on the target",
        "drop --logical-nc-config except on trn2 and trn3, where it is 1 or 2",
    ),
    "EBVF030": _INSTRUCTIONS,
    "EVRF007": _INSTRUCTIONS,
    "EXTP004": _INSTRUCTIONS,
    "EOOM001": _DEVICE_MEMORY,
    "EOOM002": _DEVICE_MEMORY,
    "EVRF009": _DEVICE_MEMORY,
    "EXSP001": _DEVICE_MEMORY,
    "F134": (
        "the compiler crashed",
        "try --optlevel=1 in NEURON_CC_FLAGS, or report it to AWS with what NEURONX_DUMP_TO=folder keeps",
    ),
    "F137": _HOST_MEMORY,
}
"""Meanings and remedies of errors that only compiling can find. The verifier's rules have the other codes."""


def explain(log: str, status: int) -> str:
    """Explains a failed compilation, and names a remedy, from its log and exit status.

    >>> explain("ERROR [NCC_EVRF014] ...", 1).partition(". ")[0]
    'NCC_EVRF014: Top-k with k above 16384'
    """
    named = re.search(r"NCC_([A-Z]{4}\d{3})\b", log) or re.search(r"\[(F\d{3})\]", log)
    if named:
        code = named[1]
        label = named[0].strip("[]")
        rule = next((rule for rule in RULES.values() if code in rule.codes), None)
        if code in ERRORS:
            meaning, way_out = ERRORS[code]
        elif rule is not None:
            meaning, way_out = rule.title, f"{rule.advice}; `jx-neuron check` names the instruction"
        else:
            return f"{label}. See {DOCS}/{code}.html"
        return f"{label}: {meaning}. Remedy: {way_out}"
    if status == -signal.SIGKILL:
        meaning, way_out = _HOST_MEMORY
        return f"{meaning} (SIGKILL). Remedy: {way_out}"
    if status < 0:
        return f"it was ended by {signal.Signals(-status).name}"
    if status == 0:
        return "it ended well but wrote no NEFF"
    return f"it ended with status {status} and names no error code"
