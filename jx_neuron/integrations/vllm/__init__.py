"""A platform of vLLM whose workers run this package's programs: https://docs.vllm.ai/en/latest/design/plugin_system/

It is active where the variable VLLM_PLUGINS names jx_neuron, and only there.
"""

import os

NAME = "jx_neuron"


def register() -> str | None:
    """The path of the platform's class, for vLLM; None where VLLM_PLUGINS does not name it."""
    names = os.environ.get("VLLM_PLUGINS", "").split(",")
    return "jx_neuron.integrations.vllm.platform.JxNeuronPlatform" if NAME in names else None
