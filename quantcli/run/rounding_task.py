"""What a run that rounds layer by layer is to do: its outputs and the options that they share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from quantcli.layerwise.model_run import ModelRun
from quantcli.rounding.base import ROUNDERS, Rounder
from quantcli.rounding.codecs import WeightCodec
from quantcli.rounding.device.gptq import on_device
from quantcli.rounding.options import Options
from quantcli.rounding.run_store import EncodedStore
from quantcli.training.base import TRAINERS, Trainer


@dataclass(frozen=True)
class RoundedOutput:
    """An output's codecs by tensor, and where its rounded tensors go."""

    codecs: Mapping[str, WeightCodec]
    every_codec: Mapping[str, WeightCodec]
    """Also of tensors that no method rounds."""
    store: EncodedStore
    layout: str = ""
    """Of an output that rounded tensors go into at once, what tells its places from others."""


@dataclass(frozen=True)
class RoundingTask:
    """What is to be rounded: the calibration run, the outputs, the options that they share."""

    run: ModelRun
    outputs: tuple[RoundedOutput, ...]
    options: Options
    gradients: Path
    """The folder that gradients are in, or will be."""

    @property
    def rounder(self) -> Rounder:
        """What chooses the codes."""
        return on_device(ROUNDERS.get(self.options.rounder), self.run.device)

    @property
    def trainer(self) -> Trainer | None:
        """What trains each layer that was rounded."""
        name = self.options.trainer
        return None if name is None else TRAINERS.get(name)

    @property
    def identity(self) -> dict[str, object]:
        """What must be the same for a run to be continued, by what to call it."""
        plans = [
            {name: codec.identity for name, codec in output.every_codec.items()}
            for output in self.outputs
        ]
        text = json.dumps(plans, sort_keys=True)
        return {
            **self.run.identity,
            "choice of types": hashlib.sha256(text.encode()).hexdigest(),
            "method options": asdict(self.options),
            "layout of the output": "".join(output.layout for output in self.outputs),
        }

    def codec_of(self, name: str) -> WeightCodec | None:
        """The codec that the first output rounds the tensor to, if one does."""
        return next((o.codecs[name] for o in self.outputs if name in o.codecs), None)
