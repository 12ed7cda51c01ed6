"""One host of several with NeuronCores, for tests/test_neuron_hosts.py: RANK COUNT PORT FOLDER OUT what."""

import json
import os
import sys
from pathlib import Path

import pytest
from doubles import nrtpy
from several_hosts import answer_for_ever, answers

from jx_neuron import NeuronAutoModelForCausalLM, distributed


def main() -> None:
    rank, count, port = map(int, sys.argv[1:4])
    folder, out, what = sys.argv[4], Path(sys.argv[5]), sys.argv[6]
    device = nrtpy.install(pytest.MonkeyPatch(), host=rank, hosts=count)
    distributed.join(",".join([f"127.0.0.1:{port}"] + ["127.0.0.1"] * (count - 1)), rank, backend="neuron")
    model = NeuronAutoModelForCausalLM.from_pretrained(folder, backend="neuron").to_neuron()
    loaded = dict(
        root=os.environ["NEURON_RT_ROOT_COMM_ID"],
        cores=os.environ["NEURON_RT_VISIBLE_CORES"],
        ranks=sorted({(loaded.core, loaded.rank, loaded.group.world_size) for loaded in device.models}),
    )
    (out / f"loaded-{rank}.json").write_text(json.dumps(loaded))
    distributed.follow(model)
    (out / "answers.json").write_text(json.dumps(answers(model)))
    if what != "answers":
        answer_for_ever(model, out)


if __name__ == "__main__":
    main()
