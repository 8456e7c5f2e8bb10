"""A block format's own encoder on rows of any values, without torch, which feedback needs."""

from __future__ import annotations

import numpy as np

from quantcli.formats import native
from quantcli.formats.base import BlockFormat, Bytes, Floats
from quantcli.workers import Workers


def encode_columns(
    fmt: BlockFormat, target: Floats, importance: Floats | None, pool: Workers
) -> Bytes:
    """The encoder's own packed blocks of ``target`` (n, columns).

    What feedback has moved beyond the largest weight of the format becomes that weight.
    """
    if fmt.byte_scales and fmt.holds and np.isfinite(target).all():
        target = np.clip(target, -fmt.holds, fmt.holds)
    packed = np.empty((len(target), fmt.row_bytes(target.shape[1])), np.uint8)

    def share(start: int, stop: int) -> None:
        native.encode(fmt, target[start:stop], importance, out=packed[start:stop])

    pool.run(len(target), share)
    return packed
