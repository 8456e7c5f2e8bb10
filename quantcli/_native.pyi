import numpy as np
from numpy.typing import NDArray

def available() -> tuple[str, ...]: ...
def select(name: str) -> None: ...
def isa() -> str: ...
def block_size(type_id: int) -> tuple[int, int]: ...
def has_encoder(type_id: int) -> bool: ...
def has_decoder(type_id: int) -> bool: ...
def is_ready(type_id: int) -> bool: ...
def set_grid(type_id: int, levels: NDArray[np.uint8], values: NDArray[np.int8]) -> None: ...
def encode(
    type_id: int,
    src_type_id: int,
    src: NDArray[np.uint8],
    nrows: int,
    ncols: int,
    dst: NDArray[np.uint8],
    weights: NDArray[np.float32] | None = None,
) -> int: ...
def decode(type_id: int, src: NDArray[np.uint8], dst: NDArray[np.float32]) -> None: ...
def first_infinite_scale(
    type_id: int, blocks: NDArray[np.uint8], offsets: tuple[int, ...]
) -> int: ...
def largest(
    src_type_id: int,
    src: NDArray[np.uint8],
    nrows: int,
    ncols: int,
    width: int,
    out: NDArray[np.float32],
) -> int: ...
def small_floats(
    kind: int,
    src_type_id: int,
    src: NDArray[np.uint8],
    scales: NDArray[np.float32],
    nrows: int,
    ncols: int,
    width: int,
    dst: NDArray[np.uint8],
) -> None: ...
def feedback(
    levels: NDArray[np.float32],
    uniform: bool,
    sub: int,
    target: NDArray[np.float32],
    weights: NDArray[np.float32],
    factor: NDArray[np.float32],
    steps: NDArray[np.float32],
    lows: NDArray[np.float32],
    codes: NDArray[np.uint8],
    errors: NDArray[np.float32],
) -> None: ...
def sweep(
    levels: NDArray[np.float32],
    uniform: bool,
    sub: int,
    block: int,
    half: bool,
    scale_range: tuple[int, int],
    min_range: tuple[int, int],
    hessian: NDArray[np.float32],
    sums: NDArray[np.float32],
    gradient: NDArray[np.float32],
    scales_too: bool,
    codes: NDArray[np.uint8],
    d: NDArray[np.float32],
    scales: NDArray[np.float32],
    dmin: NDArray[np.float32] | None = None,
    mins: NDArray[np.float32] | None = None,
) -> None: ...
def feedback_points(
    first: NDArray[np.float32],
    second: NDArray[np.float32],
    patterns: NDArray[np.uint8],
    signs: str,
    apart: float,
    sub: int,
    spread: int,
    most: int,
    target: NDArray[np.float32],
    weights: NDArray[np.float32],
    factor: NDArray[np.float32],
    metric: NDArray[np.float32],
    norms: NDArray[np.float32],
    d: NDArray[np.float32],
    scales: NDArray[np.float32],
    codes: NDArray[np.int32],
    errors: NDArray[np.float32],
) -> None: ...
def sweep_points(
    first: NDArray[np.float32],
    second: NDArray[np.float32],
    patterns: NDArray[np.uint8],
    signs: str,
    apart: float,
    sub: int,
    block: int,
    scale_range: tuple[int, int],
    hessian: NDArray[np.float32],
    norms: NDArray[np.float32],
    gradient: NDArray[np.float32],
    scales_too: bool,
    codes: NDArray[np.int32],
    d: NDArray[np.float32],
    scales: NDArray[np.float32],
) -> None: ...
