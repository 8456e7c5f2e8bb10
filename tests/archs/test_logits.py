"""Every architecture: llama.cpp's logits are transformers', on the same weights and tokens.

The weights are exact in both files, so what differs is arithmetic alone. Two roundings of ggml's
are repeated in the reference, since they would hide small faults otherwise: its GELU is a table
over float16, and a product with a bfloat16 matrix rounds the other operand to bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support.gguf_models import write_model
from support.results import Record, record
from support.tiny_models import MODELS

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("llama_cpp")

from torch.overrides import TorchFunctionMode  # noqa: E402

BEYOND = [name for name, tiny in MODELS.items() if tiny.beyond]

F32_BOUND = 1e-3
"""Of the logits' deviation. Measured: 1e-4 without GELU (float32 sums in another order, after
300 tokens), 6e-4 with it (values at the edge between two table entries)."""

BF16_BOUND = 0.06
"""Measured: 0.036; a value at the edge between two bfloat16 is off by 2**-8, and 14 products
follow. Without repeating the rounding it would be 0.15."""

Q8_BOUND = 0.08
"""Of a token's mean error, the median over tokens: weights and inputs are rounded to 8 bits.
Measured: 0.01 to 0.055. A router near a tie moves single tokens by more."""


@pytest.mark.parametrize("name", MODELS)
def test_float32_logits_are_those_of_transformers(
    name: str,
    checkpoint: Callable[..., Path],
    tmp_path: Path,
    record_property: Record,
) -> None:
    errors = _compare(checkpoint(name), name, tmp_path, "F32", count=64)
    record(record_property, checkpoint(name), logits=errors.max())
    assert errors.max() < F32_BOUND


@pytest.mark.parametrize("name", BEYOND)
def test_float32_logits_beyond_the_original_context(
    name: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    errors = _compare(checkpoint(name), name, tmp_path, "F32", count=300, context=512)
    assert errors.max() < F32_BOUND


@pytest.mark.parametrize("name", [name for name, tiny in MODELS.items() if not tiny.folded])
def test_bfloat16_logits_are_those_of_transformers(
    name: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    # Weights times a folded multiplier are rounded once more.
    errors = _compare(checkpoint(name, "bfloat16"), name, tmp_path, "BF16", count=64)
    if MODELS[name].routed:
        # A router near a tie sends a token to another expert; that is right in its own way. Of 64
        # tokens through six layers five were met.
        errors = np.sort(errors)[:-6]
    if MODELS[name].absorbed:
        # Other operands are rounded than in the reference, so routers differ more often.
        assert np.median(errors) < 1.5 * BF16_BOUND
        return
    assert errors.max() < BF16_BOUND


@pytest.mark.parametrize("name", MODELS)
def test_eight_bits_leave_their_own_noise(
    name: str, checkpoint: Callable[..., Path], gguf: Callable[..., Path]
) -> None:
    from support.llama_logits import llama_logits

    tokens = np.random.default_rng(0).integers(2, 4000, 64).tolist()
    found = llama_logits(gguf(name, "Q8_0"), tokens)
    expected = _reference(checkpoint(name), name, tokens, round_inputs=False)
    errors = np.abs(found - expected).mean(axis=1) / expected.std()
    assert np.median(errors) < Q8_BOUND


def _compare(
    folder: Path, name: str, tmp_path: Path, dtype: str, *, count: int, context: int = 256
) -> NDArray[np.float32]:
    """Each token's largest difference of a logit, in standard deviations of all logits."""
    from support.llama_logits import llama_logits

    tokens = np.random.default_rng(0).integers(2, 4000, count).tolist()
    found = llama_logits(
        write_model(folder, tmp_path / "model.gguf", dtype=dtype), tokens, context=context
    )
    expected = _reference(folder, name, tokens, round_inputs=dtype == "BF16")
    assert expected.std() > 1, "flat logits would hide a fault"
    return np.asarray(np.abs(found - expected).max(axis=1) / expected.std())


def _reference(
    folder: Path, name: str, tokens: list[int], *, round_inputs: bool
) -> NDArray[np.float32]:
    # Eager attention alone applies Gemma 2's soft cap.
    model = getattr(transformers, MODELS[name].model).from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    for module in model.modules():
        kind = type(module).__name__
        if "gelu" in kind.lower():
            module.register_forward_hook(_gelu_over_float16)
        if hasattr(module, "_gaussian_topk"):
            module._gaussian_topk = _over_one_less
        if round_inputs and (kind in ("Linear", "Conv1D") or kind.endswith("Experts")):
            module.register_forward_pre_hook(_round_input)
    with torch.no_grad(), _RoundedColumns() if round_inputs else nullcontext():
        logits: NDArray[np.float32] = model(torch.tensor([tokens])).logits[0].numpy()
    return logits


def _gelu_over_float16(module: Any, inputs: Any, output: Any) -> Any:
    """ggml_vec_gelu_f32: a table from float16 to float16 between -10 and 10."""
    x = inputs[0]
    table = torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()
    return torch.where(x >= 10, x, torch.where(x <= -10, torch.zeros_like(x), table))


def _over_one_less(inputs: Any) -> Any:
    """llama.cpp's gaussian_topk: the deviation over one value less than there are."""
    mean, deviation = inputs.mean(-1, keepdim=True), inputs.std(-1, keepdim=True)
    return torch.relu(inputs - mean - 1.6448535 * deviation)


def _round_input(module: Any, inputs: Any) -> Any:
    """ggml's BF16 product takes both operands in bfloat16."""
    return (inputs[0].bfloat16().float(), *inputs[1:])


class _RoundedColumns(TorchFunctionMode):
    """The same where the weight stands first, as when Mamba makes its steps."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.matmul and isinstance(args[0], torch.nn.Parameter):
            args = (args[0], args[1].bfloat16().float())
        return func(*args, **(kwargs or {}))
