"""What checkpoints hold beside the model: heads for training, adapters, a tied head once more."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import quantcli
from quantcli.model import open_model

torch = pytest.importorskip("torch")

Checkpoint = Callable[..., Path]


def _changed(folder: Path, path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of ``folder`` whose tensors are changed."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, path)
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


def _notes(folder: Path) -> tuple[set[str], list[str]]:
    with open_model(folder, vocabulary=False, gguf_only=True) as model:
        return {tensor.name for tensor in model.tensors}, [note.message for note in model.notes]


def test_a_head_equal_to_the_tied_embeddings_is_one_matrix(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    def add(tensors: dict[str, Any]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    folder = _changed(checkpoint("llama-tied"), tmp_path / "equal", add)
    names, notes = _notes(folder)
    assert "output.weight" not in names
    assert notes == [
        "lm_head.weight and model.embed_tokens.weight hold the same values and are tied, so they "
        "are one matrix"
    ]
    files = [
        quantcli.quantize(source, tmp_path / f"{i}.gguf", type="Q4_0").paths[0]
        for i, source in enumerate((folder, checkpoint("llama-tied")))
    ]
    with open_model(files[0]) as one, open_model(files[1]) as other:
        for ours, theirs in zip(one.tensors, other.tensors, strict=True):
            assert ours.name == theirs.name
            pair = (m.read_rows(t, 0, t.rows) for m, t in ((one, ours), (other, theirs)))
            assert np.array_equal(*pair)


def test_a_head_that_differs_in_one_value_is_written(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    def add(tensors: dict[str, Any]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["lm_head.weight"][-1, -1] += 1

    names, notes = _notes(_changed(checkpoint("llama-tied"), tmp_path / "other", add))
    assert "output.weight" in names
    assert notes == []


def test_a_value_head_is_left_out(checkpoint: Checkpoint, tmp_path: Path) -> None:
    def add(tensors: dict[str, Any]) -> None:
        tensors["v_head.summary.weight"] = torch.zeros(1, 64)
        tensors["v_head.summary.bias"] = torch.zeros(1)

    names, notes = _notes(_changed(checkpoint("qwen2"), tmp_path / "trained", add))
    assert not any("v_head" in name for name in names)
    assert notes == ["v_head, which TRL trains models with, is left out"]


def test_an_adapter_beside_a_model_is_remarked(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = tmp_path / "adapted"
    shutil.copytree(checkpoint("qwen2"), folder)
    (folder / "adapter_model.safetensors").write_bytes(b"")
    (note,) = _notes(folder)[1]
    assert note.startswith(f"{folder / 'adapter_model.safetensors'} is an adapter, which is left")
    assert "peft: merge_and_unload" in note


@pytest.mark.parametrize("tied", [True, False])
def test_a_reranker_known_by_its_name_ranks(tied: bool, tmp_path: Path) -> None:
    """llama.cpp's scores are the softmax of the two answers' logits at the last token."""
    transformers = pytest.importorskip("transformers")
    from support.llama_embeddings import llama_embeddings
    from support.llama_logits import llama_logits
    from support.tiny_models import build

    folder = build("qwen3", tmp_path / "Qwen3-Reranker-tiny",
                   changes={"tie_word_embeddings": tied})  # fmt: skip
    # The tiny tokenizer has no "yes", so what its last merge makes is called so.
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    ids, merges = tokenizer["model"]["vocab"], tokenizer["model"]["merges"]
    last = merges.pop()
    ids["yes"] = ids.pop("".join(last.split() if isinstance(last, str) else last))
    yes, no = ids["yes"], ids["no"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    done = quantcli.quantize(folder, tmp_path / "m.gguf", type="F32")
    assert any("by its name this is Qwen3-Reranker" in note.message for note in done.notes)
    tokens = np.random.default_rng(0).integers(3, 4000, 40).tolist()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0]
    scores = llama_embeddings(done.paths[0], tokens, pooling=-1)
    expected = logits[-1, [yes, no]].softmax(-1).numpy()
    np.testing.assert_allclose(scores[0], expected, atol=1e-4)
    # It writes text as before.
    found = llama_logits(done.paths[0], tokens)
    np.testing.assert_allclose(found, logits.numpy(), atol=1e-3)
