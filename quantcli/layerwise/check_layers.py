"""Whether a decoder's layers, run one by one, give what the decoder gives.

What a decoder does between its layers cannot be seen from outside: a layer might hand on more than
its hidden states. So where no table vouches for a family, a few tokens go through transformers' own
decoder, each layer's weights being filled while it runs, and beside it through the layers alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch

from quantcli.errors import ArchitectureError
from quantcli.layerwise.call_recorder import Lookup, fill_shared
from quantcli.layerwise.layerwise_model import LayerwiseModel

_CLOSE = {torch.float32: 1e-3, torch.bfloat16: 0.05}
"""Largest difference, as a fraction of the largest hidden state."""


@torch.no_grad()
def check_layers(model: LayerwiseModel, ids: Sequence[int]) -> None:
    """Read every weight once; ArchitectureError at the first layer that computes something else."""
    with model.start() as start, ExitStack() as stack:
        alone = start.embed(ids)
        calls = start.calls(ids)
        filled: list[ExitStack] = []
        shared: Sequence[Any] = ()

        def before(index: int) -> Any:
            def fill(*_: object) -> None:
                filled.append(ExitStack())
                filled[-1].enter_context(model.filled(model.layer_parameters(index)))

            return fill

        def after(index: int) -> Any:
            def compare(module: Any, given: Any, result: Any) -> None:
                nonlocal alone, shared
                whole = result[0] if isinstance(result, tuple) else result
                call, shared = fill_shared(calls[index], shared)
                alone = type(module).forward(module, alone, *call[0], **call[1])
                alone = alone[0] if isinstance(alone, tuple) else alone
                filled.pop().close()
                apart = (whole - alone).abs().max() / whole.abs().max().clamp(min=1e-20)
                if not apart <= _CLOSE[model.dtype]:
                    raise ArchitectureError(
                        f"layer {index} of {type(model.decoder).__name__} gets more than hidden "
                        "states from the layers before it, so they cannot be run one by one",
                        hint="leave --method and --calibrate out",
                    )

            return compare

        for index, layer in enumerate(model.layers):
            stack.callback(layer.register_forward_pre_hook(before(index)).remove)
            stack.callback(layer.register_forward_hook(after(index)).remove)
        try:
            tokens = torch.tensor([list(ids)], device=model.device)
            with Lookup(model.tables, start.rows):
                model.decoder(input_ids=tokens, use_cache=False)
        finally:
            while filled:
                filled.pop().close()
