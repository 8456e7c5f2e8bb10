"""How a model is run: on which windows, in which precision, with which memory and threads.

Products are computed in float32, or in bfloat16 where the weights are stored so and the processor
multiplies it natively. A run that continues from a checkpoint gives the same bytes, on the same
machine, as one that was never interrupted, so all of this belongs to its identity; not the number
of threads, on which nothing depends (`quantcli.layerwise.steady`).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

import quantcli
from quantcli.artifacts.fingerprint import fingerprint
from quantcli.errors import UsageError
from quantcli.layerwise.devices import torch_device
from quantcli.layerwise.hidden_states import WindowsOfRank
from quantcli.layerwise.windows import Windows
from quantcli.model import Model
from quantcli.ranks.group import Group

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class RunRanks:
    """The ranks of a run, and the ``windows`` that are this one's.

    ``folder`` is where all keep what a run goes on from.
    """

    group: Group
    windows: WindowsOfRank
    folder: Path


@dataclass(frozen=True)
class ModelRun:
    """A model and its windows; ``folder`` takes what is larger than ``max_memory`` bytes.

    ``device`` is a name of `quantcli.layerwise.devices`.
    """

    model: Model
    windows: Windows
    folder: Path
    dtype: str
    device: str
    max_memory: int
    threads: int
    ranks: RunRanks | None = None
    """Where several processes run the model, each its own windows."""

    @property
    def identity(self) -> dict[str, object]:
        """What must be the same for a run to be continued, by what to call it."""
        return {
            "model": fingerprint(self.model),
            "text or cut of it": hashlib.sha256(self.windows.ids.tobytes()).hexdigest(),
            "window length": self.windows.ids.shape[1],
            "dtype": self.dtype,
            "device": self.device,
            "version of quantcli": quantcli.__version__,
            "version of torch": version("torch"),
            "version of transformers": version("transformers"),
        }


def choose_dtype(name: str | None, device: str, model: Model) -> str:
    """The fast "bfloat16" where no weight loses by it and the processor has it, else "float32"."""
    if name is not None:
        if name not in DTYPES:
            raise UsageError(f"products are not computed in {name!r}", hint=" or ".join(DTYPES))
        return name
    matrices = {tensor.dtype for tensor in model.tensors if len(tensor.shape) > 1}
    if matrices != {"BF16"}:
        return "float32"
    kind = torch_device(device).type
    if kind == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif kind == "xpu":
        native = torch.xpu.is_bf16_supported(including_emulation=False)
    elif kind != "cpu":
        return "float32"
    else:
        able = torch.cpu.get_capabilities()
        native = bool(able.get("avx512_bf16") or able.get("amx_bf16") or able.get("bf16"))
    return "bfloat16" if native else "float32"
