"""Errors of input, as opposed to bugs of this package.

Each message says what is wrong, what is legal, and what to do. The command line prints only the message and exits with
status 2.
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
    """Base of every error that a user can fix."""


class ConfigError(JxNeuronError):
    """A model or Neuron configuration holds a value that is not supported."""


class CheckpointError(JxNeuronError):
    """A checkpoint is missing, truncated, or lacks tensors of its config."""


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
