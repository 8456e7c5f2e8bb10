"""The options of ``quantize`` that are about model folders: where to, and the integer grid."""

from __future__ import annotations

from typing import Annotated, Any

import typer

_PANEL = "Model folders (--to)"


def _option(*names: str, help: str, metavar: str = "") -> Any:
    return typer.Option(
        *names, help=help, metavar=metavar, show_default=False, rich_help_panel=_PANEL
    )


To = Annotated[
    str | None,
    _option(
        "--to",
        metavar="FORMAT",
        help="gguf (the default), or a model folder: compressed-tensors, gptq, gptq-v2, awq, mlx, "
        "or hf (any --type, decoded again, to try a type in any runtime).",
    ),
]
GroupSize = Annotated[
    str | None,
    _option(
        "--group-size",
        metavar="N",
        help="How many weights share a scale, 'channel' for a row, or 'tensor'. Default: 128, "
        "64 for mlx, channel with int8 activations.",
    ),
]
Symmetric = Annotated[
    bool | None,
    _option(
        "--symmetric/--asymmetric",
        help="Without zero points, or with one for each group. Default: symmetric where the "
        "format can be.",
    ),
]
Activations = Annotated[
    str | None,
    _option(
        "--activations",
        metavar="int8",
        help="Quantize activations too, each token as it comes (W8A8; compressed-tensors).",
    ),
]
Range = Annotated[
    str | None,
    _option(
        "--range",
        metavar="minmax|mse|imatrix",
        help="How each group's range is found: its extremes, the least squared error, or the "
        "least error weighted by --imatrix. Default: imatrix if one is given, else mse.",
    ),
]
Keep = Annotated[
    list[str] | None,
    _option(
        "--keep",
        metavar="PLACES=TYPE|REGEX",
        help="In a GGUF: another type for some of first, last (block), head, embeddings, such as "
        "first,last=Q8_0. In a model folder: leave linear modules whose name matches as they are. "
        "Repeatable.",
    ),
]
Dtype = Annotated[
    str | None,
    _option(
        "--dtype",
        metavar="BF16|F16|F32",
        help="Of what is not quantized. Default: as stored.",
    ),
]


def grid_fields(
    to: str | None,
    group_size: str | None,
    symmetric: bool | None,
    activations: str | None,
    range: str | None,
    keep: list[str] | None,
    dtype: str | None,
) -> dict[str, Any]:
    """The recipe's fields that these options set."""
    size: int | str | None = group_size
    if group_size is not None and group_size.isdigit():
        size = int(group_size)
    return {
        "to": to.lower() if to else None,
        "group_size": size,
        "symmetric": symmetric,
        "activations": activations,
        "range": range,
        "keep": keep,
        "dtype": dtype.upper() if dtype else None,
    }
