"""quantcli quantizes large language models.

The functions behind the commands, loaded when first used::

    import quantcli

    done = quantcli.quantize("./my-model", type="Q4_K_M")
    with quantcli.open_model(done.paths[0]) as model:
        print(model.arch, len(model.tensors))
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantcli.api.calibrate import calibrate
    from quantcli.api.evaluate import evaluate
    from quantcli.api.export import export
    from quantcli.api.inspect import inspect
    from quantcli.api.quantize import quantize
    from quantcli.model import open_model

__version__ = "0.1.0"
__all__ = [
    "__version__",
    "calibrate",
    "evaluate",
    "export",
    "inspect",
    "open_model",
    "quantize",
]

_HOMES = {
    "calibrate": "quantcli.api.calibrate",
    "evaluate": "quantcli.api.evaluate",
    "export": "quantcli.api.export",
    "inspect": "quantcli.api.inspect",
    "open_model": "quantcli.model",
    "quantize": "quantcli.api.quantize",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'quantcli' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
