"""The fields of a recipe as keywords, for type checkers; a test compares them with the recipe's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypedDict


class RecipeOptions(TypedDict, total=False):
    """Keywords of `quantize` that are fields of a recipe; see ``quantcli quantize --help``."""

    type: str | Sequence[str]
    tensor_types: Sequence[str]
    output_tensor_type: str
    token_embedding_type: str
    leave_output_tensor: bool
    pure: bool
    imatrix: str | Path
    include_weights: Sequence[str]
    exclude_weights: Sequence[str]
    allow_requantize: bool
    override_kv: Sequence[str]
    on_fallback: Literal["warn", "nearest", "error"]
    split_max_size: str
    pre: str
    to: str | Sequence[str]
    bits: int | Sequence[int]
    group_size: int | str
    symmetric: bool
    activations: str
    range: str
    keep: Sequence[str]
    dtype: str
    method: str
    damping: float
    column_order: Literal["natural", "activation"]
    sweeps: int
    fisher_windows: int
    random_share: float
    propagate: bool
    tune_steps: int
    allocate: bool
    target_size: str
    tune: Literal["e2e", "e2e-scales"]
    e2e_steps: int
    mmproj_only: bool
    no_mtp: bool
    ignore_tensors: Sequence[str]
    chat_template: str | Path
    scheme: Sequence[str]
    strict: bool
    kv_cache: Literal["fp8"]
    statistics: str | Path
    target_bpw: float
    allocate_from: str
    sample_share: float
    correct_bias: bool
