"""A transformed model's rows are what plain matrix products make of the original's."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from support.folds import random_folds

from quantcli.artifacts.gguf_file import prepare_gguf
from quantcli.artifacts.write import write_artifact
from quantcli.errors import ArchitectureError, SourceError
from quantcli.model import Model, open_model
from quantcli.plan.recipe import Recipe
from quantcli.transforms.orthogonal import Permutation, make_rotation
from quantcli.transforms.rotate import rotate
from quantcli.transforms.spec import Operation, RotationRef, TransformSpec, dump_transform
from quantcli.transforms.transformed_model import apply_transform

pytest.importorskip("torch")


def whole(model: Model, name: str) -> NDArray[np.float32]:
    tensor = next(tensor for tensor in model.tensors if tensor.name == name)
    return model.read_floats(tensor, 0, tensor.rows)


def test_a_rotated_matrix_is_a_product_of_three(checkpoint: Callable[..., Path]) -> None:
    with open_model(checkpoint("llama"), vocabulary=False) as model:
        transform = rotate(model, seed=2)
        changed = apply_transform(model, transform)
        before, after = (whole(one, "blk.1.attn_output.weight") for one in (model, changed))
    stream, head = (transform.rotations[name].matrix() for name in ("stream", "head.32"))
    expected = stream.T @ before @ np.kron(np.eye(8), head)
    np.testing.assert_allclose(after, expected, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "mixtral", "phi3", "llama-biases", "qwen2"])
def test_any_cut_into_slabs_gives_the_same_rows(name: str, checkpoint: Callable[..., Path]) -> None:
    with open_model(checkpoint(name), vocabulary=False) as model:
        rotated = apply_transform(model, rotate(model))
        changed = apply_transform(rotated, random_folds(rotated))
        for tensor in changed.tensors:
            expected = changed.read_rows(tensor, 0, tensor.rows)
            step = max(1, tensor.rows // 3 + 1)
            starts = range(0, tensor.rows, step)
            with ThreadPoolExecutor(3) as pool:
                parts = pool.map(
                    lambda a, t=tensor, s=step: changed.read_rows(t, a, min(a + s, t.rows)), starts
                )
                found = np.concatenate(list(parts))
            np.testing.assert_allclose(
                found.astype(np.float32), expected.astype(np.float32), rtol=1e-6, atol=1e-7
            )


def test_rows_are_the_callers_to_change(checkpoint: Callable[..., Path]) -> None:
    with open_model(checkpoint("llama"), vocabulary=False) as model:
        changed = apply_transform(model, rotate(model))
        for tensor in changed.tensors:
            first = changed.read_rows(tensor, 0, tensor.rows)
            kept = first.copy()
            first[:] = 0
            assert (changed.read_rows(tensor, 0, tensor.rows) == kept).all(), tensor.name


def test_a_tied_head_becomes_a_tensor_of_its_own(checkpoint: Callable[..., Path]) -> None:
    with open_model(checkpoint("llama-tied"), vocabulary=False) as model:
        assert "output.weight" not in {tensor.name for tensor in model.tensors}
        changed = apply_transform(model, rotate(model))
        assert changed.config["tie_word_embeddings"] is False
        assert model.config["tie_word_embeddings"] is True
        names = [tensor.name for tensor in changed.tensors]
        assert names[:3] == ["output.weight", "output_norm.weight", "token_embd.weight"]
        head, norm = whole(changed, "output.weight"), whole(model, "output_norm.weight")
        embedding = whole(model, "token_embd.weight")
        stream = rotate(model).rotations["stream"].matrix()
    np.testing.assert_allclose(head, embedding * norm @ stream, atol=1e-5)


def test_the_hash_of_a_transform_stays() -> None:
    """It is in the key-values of a transformed model, so another one would be another file."""
    ramp = np.arange(1, 5, dtype=np.float32)
    operations = {
        "a.weight": Operation(columns=ramp, rows_rotation=RotationRef("stream", 0, 4)),
        "b.weight": Operation(rows=ramp[:2], columns_rotation=RotationRef("order", 2, 4)),
        "c.weight": Operation(values=ramp),
        "d.weight": Operation(source="a.weight"),
    }
    rotations = {"stream": make_rotation(4, 7), "order": Permutation(np.array([1, 0]))}
    data = dump_transform(TransformSpec("x", operations, rotations, {"seed": 7}))
    assert hashlib.sha256(data).hexdigest() == (
        "4fbf564ce72dfc48ca93a15ca3a5f96fcf691de200884e45cb55ab455a32ff21"
    )


def test_a_transform_of_another_model_is_refused(checkpoint: Callable[..., Path]) -> None:
    with (
        open_model(checkpoint("llama"), vocabulary=False) as model,
        open_model(checkpoint("qwen2"), vocabulary=False) as other,
    ):
        with pytest.raises(ArchitectureError, match=r"64 factors .* but .* has 256"):
            apply_transform(model, random_folds(other))
        with pytest.raises(ArchitectureError, match=r"no tensor blk\.9\.x"):
            apply_transform(model, TransformSpec("x", {"blk.9.x": Operation()}))


def test_quantized_weights_are_not_quantized_twice(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    path = tmp_path / "m.gguf"
    with open_model(checkpoint("llama")) as model:
        for _ in write_artifact(prepare_gguf(model, Recipe(type="Q4_0"), path), threads=1):
            pass
    with open_model(path) as model, pytest.raises(SourceError, match="stored as Q4_0"):
        apply_transform(model, random_folds(model))


@pytest.mark.parametrize("kind", ["BF16", "Q8_0"])
def test_a_gguf_is_transformed_like_its_checkpoint(
    kind: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    path = tmp_path / "m.gguf"
    with open_model(checkpoint("llama", "bfloat16")) as model:
        for _ in write_artifact(prepare_gguf(model, Recipe(type=kind), path), threads=1):
            pass
        expected = whole(apply_transform(model, rotate(model)), "blk.0.ffn_down.weight")
    with open_model(path) as stored:
        changed = apply_transform(stored, rotate(stored))
        found = whole(changed, "blk.0.ffn_down.weight")
    bound = 0.02 if kind == "Q8_0" else 1e-6
    assert np.abs(found - expected).max() < bound
