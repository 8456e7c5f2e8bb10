"""Every architecture through calibration, a method and a packed folder, on its tiny model.

What the tables alone promise is proven elsewhere: logits (test_logits), the way back
(exports/test_to_hf), whole files and token ids (test_end_to_end).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader
from support.results import Record, record
from support.tiny_models import MODELS

import quantcli
from quantcli.errors import PlanError
from quantcli.model import open_model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.slow

NOVEL = Path(__file__).parent.parent / "data" / "pride-and-prejudice.txt"
"""Held out: calibration takes the built-in text."""

UNSEEN = 2e-5
"""Below this divergence the embeddings make the logits, and layers show in their rounding only."""

FOLDER_NOISE = 1e-5
"""Of the logits' deviation. Measured: 1e-6, float32 sums in another order."""


@pytest.mark.parametrize("name", MODELS)
def test_gptq_leaves_less_divergence_than_the_encoder(
    name: str,
    checkpoint: Callable[..., Path],
    tmp_path: Path,
    record_property: Record,
) -> None:
    """On held-out text, and every matrix of a layer that the encoder rounds is rounded by it.

    But for those of multi-token prediction, which nothing runs.
    """
    before, after, missed = compare_gptq(checkpoint(name), tmp_path, chunks=MODELS[name].chunks)
    with open_model(checkpoint(name), vocabulary=False) as model:
        unseen = {tensor.name for tensor in model.mtp_tensors}
    if before > UNSEEN:
        record(record_property, checkpoint(name), gptq=after / before)
    assert missed <= unseen
    assert after < max(before, UNSEEN)


@pytest.mark.parametrize("name", MODELS)
def test_a_packed_folder_is_the_decoded_model_in_transformers(
    name: str,
    checkpoint: Callable[..., Path],
    tmp_path: Path,
    record_property: Record,
) -> None:
    pytest.importorskip("compressed_tensors")
    if MODELS[name].transposed:
        with pytest.raises(PlanError, match="is stored transposed"):
            compare_folder(checkpoint(name), tmp_path)
        return
    if not MODELS[name].loads_packed:
        done = quantcli.quantize(
            checkpoint(name), tmp_path / "w4", to="compressed-tensors", bits=4, group_size=16
        )
        assert any("transformers cannot load" in note.message for note in done.notes)
        return
    error = compare_folder(checkpoint(name), tmp_path)
    record(record_property, checkpoint(name), folder=error)
    assert error < FOLDER_NOISE


def compare_gptq(source: Path, folder: Path, chunks: int = 12) -> tuple[float, float, set[str]]:
    """KL divergences of Q4_0 by the encoder and by gptq, and matrices that gptq did not round."""
    nearest = quantcli.quantize(source, folder / "nearest.gguf", type="Q4_0").paths[0]
    done = quantcli.quantize(
        source,
        folder / "gptq.gguf",
        type="Q4_0",
        method="gptq",
        calibrate=["built-in"],
        chunks=chunks,
    )
    rounded = {tensor["tensor"] for tensor in done.document["tensors"]}
    encoded = {t.name for t in GGUFReader(nearest).tensors if t.tensor_type.name == "Q4_0"}
    missed = {name for name in encoded if name.startswith("blk.")} - rounded
    found = quantcli.evaluate(
        [nearest, *done.paths], NOVEL, reference=source, ctx=128, chunks=8, engine="torch"
    )
    before, after = (result["kld"]["value"] for result in found.document["results"])
    return before, after, missed


def compare_folder(source: Path, folder: Path) -> float:
    """The largest difference of a packed folder's logits from its decoded weights', in
    transformers, of the logits' deviation."""
    packed = quantcli.quantize(
        source, folder / "w4", to="compressed-tensors", bits=4, group_size=16
    ).paths[0]
    decoded = quantcli.quantize(packed, folder / "decoded", to="hf", type="F32").paths[0]
    found, expected = (_logits(path) for path in (packed, decoded))
    assert expected.std() > 1, "flat logits would hide a fault"
    return float(np.abs(found - expected).max() / expected.std())


def _logits(folder: Path) -> Any:
    config = json.loads((folder / "config.json").read_text())
    model = getattr(transformers, config["architectures"][0]).from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    tokens = np.random.default_rng(0).integers(2, 4000, 48).tolist()
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].numpy()
