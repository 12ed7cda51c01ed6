"""Artifacts: models that are ready to run, as folders on disk."""

from jx_neuron.util.lazy import exports

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "folder": "Artifact is_artifact read",
        "settings": "Settings",
        "writing": "check_replaceable write",
    },
)
