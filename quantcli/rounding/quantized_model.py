"""The model as it is quantized so far: what later layers will see when it runs.

Tensors that a method has rounded are decoded from the store; those that no method rounds, such as
embeddings, go through their format's encoder on the fly; whatever stays float is the original.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantcli.formats import get_format, native
from quantcli.model import Model
from quantcli.rounding.codecs import WeightCodec
from quantcli.rounding.run_store import EncodedStore
from quantcli.types import OutputTensor
from quantcli.workers import Workers


@dataclass(frozen=True)
class QuantizedModel(Model):
    """A model whose rows come as the output will hold them, float32; ``base`` is the original."""

    base: Model | None = None
    codecs: Mapping[str, WeightCodec] | None = None
    encoded: EncodedStore | None = None

    def read_rows(self, tensor: OutputTensor, start: int, stop: int) -> NDArray[Any]:
        """Rows ``start:stop`` as `Model.read_rows` gives them, after quantization."""
        name = tensor.name
        if self.encoded is not None and name in self.encoded:
            return (self.codecs or {})[name].decode(self.encoded.read_rows(name, start, stop))
        if self.base is None:
            raise ValueError("a quantized model has no original")
        rows = self.base.read_rows(tensor, start, stop)
        codec = (self.codecs or {}).get(name)
        if codec is None or not codec.rounds or tensor.values is not None:
            return rows
        if rows.dtype == np.uint8:
            rows = native.decode(get_format(tensor.dtype), rows)
        return codec.decode(codec.encode(native.to_float32(rows), None, Workers()))


def quantized_model(
    model: Model, codecs: Mapping[str, WeightCodec], encoded: EncodedStore
) -> QuantizedModel:
    """``model`` as ``codecs`` and the tensors in ``encoded`` make it."""
    own = {field.name: getattr(model, field.name) for field in fields(Model)}
    return QuantizedModel(**own, base=model, codecs=codecs, encoded=encoded)
