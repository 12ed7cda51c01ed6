"""StableHLO with shardings → the program of one core, by XLA's own partitioner (Shardy and SPMD).

XLA partitions on the way to CPU code, and dumps the module after each pass. It runs in child processes that import
jaxlib alone, so this process needs no device, and several programs are partitioned at once. Each child is killed once
the partitioned module is dumped: generating CPU code takes longer than the passes before it.
"""

import subprocess
import sys
import time

from jx_neuron.errors import LoweringError
from jx_neuron.lowering import _jaxlib
from jx_neuron.lowering.hlo import proto
from jx_neuron.util.temporary import temporary_folder

_STAGE = "spmd-partitioner"  # the pipeline whose passes are dumped, numbered in order
_NEXT = "HLO_passes"  # the pipeline that follows it
_DONE = ("after_spmd-partitioning", "after_call-inliner.before_pipeline-end")


def partition(stablehlo: bytes, tp_degree: int) -> bytes:
    """The per-core HloModuleProto of a StableHLO module (text or bytecode) that is sharded over `tp_degree` cores.

    Raises:
        LoweringError: XLA cannot partition it.
    """
    if tp_degree == 1:
        return _jaxlib.unpartitioned_hlo(stablehlo)
    with temporary_folder() as folder:
        source = folder / "program.mlir"
        source.write_bytes(stablehlo)
        command = [sys.executable, "-P", _jaxlib.__file__, str(source), str(tp_degree), str(folder)]
        log = folder / "log.txt"
        with open(log, "wb") as output, subprocess.Popen(command, stdout=output, stderr=output) as child:
            try:
                while child.poll() is None and not any(folder.glob(f"*.{_NEXT}*.hlo.pb")):
                    time.sleep(0.02)
            finally:
                child.kill()
        dumps = sorted(p for p in folder.glob(f"*.{_STAGE}.*.hlo.pb") if any(suffix in p.name for suffix in _DONE))
        if not dumps:
            reason = "\n".join(log.read_text(errors="replace").strip().splitlines()[-8:])
            raise LoweringError(f"XLA could not partition the program over {tp_degree} cores:\n{reason}")
        return proto.serialize(proto.HloProto.FromString(dumps[-1].read_bytes()).hlo_module)
