"""Every error that quantcli raises on purpose.

A message names the file, the tensor, what was expected and what was found; the hint names the
next step. The command line turns an error into one sentence and the exit code; nothing below it
prints.
"""

from __future__ import annotations


class QuantcliError(Exception):
    """Base of all errors: a sentence for the user, an optional hint and a process exit code."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.result: object = None
        """What was found nevertheless, of a check that failed."""

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message} ({self.hint})"


class UsageError(QuantcliError, ValueError):
    """An option or argument is wrong; nothing was read."""

    exit_code = 2


class SourceError(QuantcliError, ValueError):
    """A checkpoint, GGUF or importance matrix is missing, broken or not what it claims to be."""


class ArchitectureError(SourceError):
    """The model's architecture is unknown or its tensors do not fit it."""


class UnknownArchitectureError(ArchitectureError):
    """There is no table for the model's class."""


class MismatchError(ArchitectureError):
    """The checkpoint lacks a tensor that its family needs, or has it in another shape."""


class VocabularyError(SourceError):
    """The tokenizer files are missing, broken or of an unknown structure."""


class WeightError(SourceError):
    """A weight is not a finite number, or does not fit the target format."""


class PlanError(QuantcliError, ValueError):
    """What was asked for cannot be done with this model; found before any weight is read."""


class OutputError(QuantcliError, OSError):
    """The output exists, cannot be written or does not fit on the disk."""


class MissingExtraError(QuantcliError, ImportError):
    """An optional dependency is not installed; the hint is the exact install command."""


class DeviceError(QuantcliError, RuntimeError):
    """An accelerator has no memory left, or cannot do what is asked of it."""


class GateError(QuantcliError):
    """A quality gate of ``eval-ppl`` failed."""

    exit_code = 3


class InterruptedRunError(QuantcliError):
    """A thread ends because the user asked to stop."""

    exit_code = 130
