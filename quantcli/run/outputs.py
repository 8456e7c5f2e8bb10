"""One output of a quantization: as it is planned, and as it was made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quantcli.artifacts.gguf_file import GgufFile
    from quantcli.artifacts.model_folder import ModelFolder
    from quantcli.rounding.options import Outcome
    from quantcli.run.calibrated_run import CalibratedRun, Rounding


@dataclass(frozen=True)
class Quantized:
    """One output: written, or planned where ``digest`` is None.

    ``threads`` write it, in ``seconds``. ``outcomes`` are those of the tensors that a method
    rounded, ``training`` says what training end to end changed.
    """

    artifact: GgufFile | ModelFolder
    threads: int
    digest: str | None = None
    seconds: float = 0.0
    outcomes: tuple[Outcome, ...] = ()
    training: dict[str, object] | None = None


@dataclass(frozen=True)
class Planned:
    """An output before its weights are written.

    ``run`` is how its methods run the model, ``rounding`` holds the tensors that they chose.
    """

    artifact: GgufFile | ModelFolder
    path: Path
    threads: int
    run: CalibratedRun | None = None
    rounding: Rounding | None = None

    @property
    def is_tower(self) -> bool:
        """Whether it is a vision or audio tower, which no text runs through."""
        return self.artifact.plan.recipe.mmproj_only
