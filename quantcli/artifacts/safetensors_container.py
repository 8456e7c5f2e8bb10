"""The safetensors container: a header that is complete before one value is written.

Layout: a little-endian 64-bit length, that many bytes of JSON padded with spaces to a multiple of
eight, then the tensors without gaps in the order given. The caller writes the values wherever the
layout says. Source: the format's README.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence

from quantcli.artifacts.gguf_container import FileLayout
from quantcli.types import Declared


def lay_out(metadata: Mapping[str, str], tensors: Sequence[Declared]) -> FileLayout:
    """Fix every byte offset of a file that holds ``tensors`` in that order."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    starts: dict[str, int] = {}
    end = 0
    for tensor in tensors:
        starts[tensor.name] = end
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.nbytes],
        }
        end += tensor.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    head = struct.pack("<Q", len(text)) + text
    offsets = {name: len(head) + start for name, start in starts.items()}
    return FileLayout(head, offsets, len(head) + end)
