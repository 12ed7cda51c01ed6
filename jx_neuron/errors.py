"""What can go wrong because of what was given, as opposed to a fault of ours.

Each message says what was wrong, what would be legal, and what to do next. The
command line prints it alone and exits with status 2.
"""

__all__ = [
    "ArtifactError",
    "CheckpointError",
    "CompilerError",
    "ConfigError",
    "InputError",
    "JxNeuronError",
    "LoweringError",
    "NonFiniteError",
]


class JxNeuronError(ValueError):
    """Base of every error that a user can mend."""


class ConfigError(JxNeuronError):
    """A model or Neuron configuration holds a value that is not supported."""


class CheckpointError(JxNeuronError):
    """A checkpoint is missing, cut short, or does not hold the tensors that its config calls for."""


class InputError(JxNeuronError):
    """A call's arguments do not fit the compiled model."""


class NonFiniteError(JxNeuronError):
    """The model's logits hold a NaN or an infinity, so that no token can be chosen."""


class LoweringError(JxNeuronError):
    """A program cannot be lowered to what Neuron takes."""


class CompilerError(JxNeuronError):
    """neuronx-cc is missing, or refused a program."""


class ArtifactError(JxNeuronError):
    """A saved artifact is incomplete, altered, too new, or does not fit the request."""
