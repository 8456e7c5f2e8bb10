"""Encoders: llama.cpp's embeddings and scores are transformers', on the same weights and tokens."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support.gguf_models import read_config, write_model
from support.results import Record, record_error
from support.tiny_models import ENCODERS, TRANSLATORS

import quantcli
from quantcli.errors import ArchitectureError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("llama_cpp")

BOUND, GELU_BOUND = 1e-4, 4e-3
"""Of the deviation. Measured: 1e-5; 2.2e-3 with GELU, whose table has float16 entries."""

CLASSIFIERS = [name for name, tiny in ENCODERS.items() if "Classification" in tiny.model]
LENGTHS = (40, 300)
_SILU = ("nomic-bert", "modern-bert-silu", "eurobert", "qwen3")


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("count", LENGTHS)
def test_float32_embeddings_are_those_of_transformers(
    name: str,
    count: int,
    checkpoint: Callable[..., Path],
    tmp_path: Path,
    record_property: Record,
) -> None:
    """Each token's, in texts shorter and longer than a window."""
    from support.llama_embeddings import llama_embeddings

    file = write_model(checkpoint(name), tmp_path / "model.gguf", dtype="F32")
    found, expected = llama_embeddings(file, _tokens(count)), _reference(checkpoint(name), count)[0]
    assert expected.std() > 0.1, "flat embeddings would hide a fault"
    bound = BOUND if name.startswith(_SILU) else GELU_BOUND
    assert record_error(record_property, checkpoint(name), found, expected) < bound


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_scores_are_those_of_transformers(
    name: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Without being told how to pool."""
    from support.llama_embeddings import llama_embeddings

    file = write_model(checkpoint(name), tmp_path / "model.gguf", dtype="F32")
    found = llama_embeddings(file, _tokens(40), pooling=-1)
    _, expected = _reference(checkpoint(name), 40)
    assert expected is not None
    if name.startswith("qwen3"):
        # llama.cpp makes probabilities of them.
        expected = torch.softmax(torch.tensor(expected), dim=-1).numpy()
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=2e-3)


@pytest.mark.parametrize("name", TRANSLATORS)
@pytest.mark.parametrize("count", LENGTHS)
def test_translators_logits_are_those_of_transformers(
    name: str,
    count: int,
    checkpoint: Callable[..., Path],
    tmp_path: Path,
    record_property: Record,
) -> None:
    """The head's scale included, which llama.cpp does not compute."""
    from support.llama_logits import llama_logits

    file = write_model(checkpoint(name), tmp_path / "model.gguf", dtype="F32")
    read, written = _tokens(count), _tokens(30)[::-1]
    found = llama_logits(file, written, context=320, before=read)
    expected = _translated(checkpoint(name), read, written)
    assert expected.std() > 0.1, "flat logits would hide a fault"
    assert record_error(record_property, checkpoint(name), found, expected) < GELU_BOUND


@pytest.mark.parametrize("name", TRANSLATORS)
def test_a_translator_comes_back(
    name: str, checkpoint: Callable[..., Path], gguf: Callable[..., Path], tmp_path: Path
) -> None:
    folder = quantcli.export(gguf(name, "F32"), tmp_path / "hf", to="hf", threads=2).paths[0]
    read, written = _tokens(40), _tokens(30)[::-1]
    expected = _translated(checkpoint(name), read, written)
    found = _translated(folder, read, written)
    np.testing.assert_allclose(found, expected, atol=1e-4 * expected.std())


def _translated(folder: Path, read: list[int], written: list[int]) -> NDArray[np.float32]:
    model = getattr(transformers, read_config(folder)["architectures"][0]).from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    for module in model.modules():
        if "gelu" in type(module).__name__.lower():
            module.register_forward_hook(_gelu_over_float16)
    with torch.no_grad():
        return (
            model(input_ids=torch.tensor([read]), decoder_input_ids=torch.tensor([written]))
            .logits[0]
            .numpy()
        )


@pytest.mark.parametrize("mode", ["mean", "cls", "lasttoken"])
def test_pooling_is_that_of_sentence_transformers(
    mode: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """One vector a text, without being told how."""
    from support.llama_embeddings import llama_embeddings

    folder = tmp_path / "model"
    shutil.copytree(checkpoint("bert"), folder)
    stages = [{"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"}]
    (folder / "modules.json").write_text(json.dumps(stages))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": mode}))
    file = quantcli.quantize(folder, tmp_path / "model.gguf", type="F32").paths[0]
    tokens = _reference(folder, 40)[0]
    expected = {"mean": tokens.mean(axis=0), "cls": tokens[0], "lasttoken": tokens[-1]}[mode]
    found = llama_embeddings(file, _tokens(40), pooling=-1)
    np.testing.assert_allclose(found, expected[None], atol=2e-3)


@pytest.mark.parametrize("name", ENCODERS)
def test_a_file_comes_back_as_a_model_of_the_same_embeddings(
    name: str, checkpoint: Callable[..., Path], gguf: Callable[..., Path], tmp_path: Path
) -> None:
    """As BERT, where the file does not tell which of its kin it was."""
    folder = quantcli.export(gguf(name, "F32"), tmp_path / "hf", to="hf", threads=2).paths[0]
    for found, expected in zip(
        _reference(folder, 40), _reference(checkpoint(name), 40), strict=True
    ):
        assert (found is None) == (expected is None)
        if found is not None and expected is not None:
            np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "IQ4_NL", "BF16"])
@pytest.mark.parametrize("name", ["bert-classifier", "roberta", "nomic-bert", "modern-bert"])
def test_quantized_encoders_run(
    name: str, kind: str, checkpoint: Callable[..., Path], gguf: Callable[..., Path]
) -> None:
    from support.llama_embeddings import llama_embeddings

    found, expected = (
        llama_embeddings(gguf(name, kind), _tokens(40)),
        _reference(checkpoint(name), 40)[0],
    )
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > (0.7 if "4" in kind else 0.99)


def _tokens(count: int) -> list[int]:
    return np.random.default_rng(0).integers(3, 4000, count).tolist()


def _reference(folder: Path, count: int) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
    """The tokens' embeddings, and the scores of a classifier."""
    config = read_config(folder)
    name = config["architectures"][0]
    model = getattr(transformers, name).from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    for module in model.modules():
        if "gelu" in type(module).__name__.lower():
            module.register_forward_hook(_gelu_over_float16)
    with torch.no_grad():
        result = model(torch.tensor([_tokens(count)]), output_hidden_states=True)
    scores = result.logits.numpy() if "Classification" in name else None
    last = getattr(result, "last_hidden_state", None)
    if last is None:
        last = result.hidden_states[-1]
    return last[0].numpy(), scores


def _gelu_over_float16(module: Any, inputs: Any, output: Any) -> Any:
    """ggml_vec_gelu_f32: a table from float16 to float16 between -10 and 10."""
    x = inputs[0]
    table = torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()
    return torch.where(x >= 10, x, torch.where(x <= -10, torch.zeros_like(x), table))


@pytest.mark.parametrize("name", ["bert-classifier", "roberta", "modern-bert"])
def test_packed_encoders_load_or_the_remark_says_so(
    name: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    pytest.importorskip("compressed_tensors")
    done = quantcli.quantize(
        checkpoint(name), tmp_path / "w4", to="compressed-tensors", bits=4, group_size=16
    )
    decoded = quantcli.quantize(tmp_path / "w4", tmp_path / "decoded", to="hf", type="F32")
    expected = _reference(decoded.paths[0], 40)[0]
    if not ENCODERS[name].loads_packed:
        assert any("cannot load" in note.message for note in done.notes)
        return
    np.testing.assert_allclose(_reference(done.paths[0], 40)[0], expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "BF16"])
def test_quantized_translators_run(
    kind: str, checkpoint: Callable[..., Path], gguf: Callable[..., Path]
) -> None:
    from support.llama_logits import llama_logits

    read, written = _tokens(40), _tokens(30)[::-1]
    found = llama_logits(gguf("t5-gated", kind), written, context=320, before=read)
    expected = _translated(checkpoint("t5-gated"), read, written)
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > (0.7 if "4" in kind else 0.99)


@pytest.mark.parametrize(
    "name", ["bert", "modern-bert-classifier", "t5", "t5-encoder", "qwen3-classifier"]
)
def test_what_needs_a_next_token_is_refused(
    name: str, checkpoint: Callable[..., Path], gguf: Callable[..., Path], tmp_path: Path
) -> None:
    folder, text = checkpoint(name), tmp_path / "text.txt"
    text.write_text("One sentence, and another one.\n" * 400)
    encoder = r"(encoder|classifier),? (that |which )?predicts no next token, so it cannot be"
    with pytest.raises(ArchitectureError, match=f"{encoder} run layer by layer"):
        quantcli.calibrate(folder, [text], output=tmp_path / "importance.gguf")
    with pytest.raises(ArchitectureError, match=f"{encoder} run layer by layer"):
        quantcli.quantize(folder, tmp_path / "q.gguf", type="Q4_0", method="gptq", calibrate=[text])
    for model in (folder, gguf(name, "Q8_0")):
        with pytest.raises(ArchitectureError, match=f"{encoder} evaluated by its predictions"):
            quantcli.evaluate([model], text)


def test_the_layers_behind_pooling_are_sentence_transformers(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """EmbeddingGemma's two, from its size to another and back."""
    from safetensors.numpy import save_file
    from support.llama_embeddings import llama_embeddings

    folder = tmp_path / "model"
    shutil.copytree(checkpoint("gemma-embedding"), folder)
    kinds = ["Transformer", "Pooling", "Dense", "Dense", "Normalize"]
    stages = [
        {"type": f"sentence_transformers.models.{kind}", "path": f"{i}_{kind}" if i else ""}
        for i, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(stages))
    for stage in stages[1:4]:
        (folder / stage["path"]).mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": "mean"}))
    rng, expected = np.random.default_rng(3), _reference(folder, 40)[0].mean(axis=0)
    for path, (columns, rows) in (("2_Dense", (64, 96)), ("3_Dense", (96, 64))):
        settings = {
            "in_features": columns, "out_features": rows, "bias": False,
            "activation_function": "torch.nn.modules.linear.Identity",
        }  # fmt: skip
        (folder / path / "config.json").write_text(json.dumps(settings))
        weight = rng.normal(0, columns**-0.5, (rows, columns)).astype(np.float32)
        save_file({"linear.weight": weight}, folder / path / "model.safetensors")
        expected = weight @ expected
    done = quantcli.quantize(folder, tmp_path / "model.gguf", type="F32")
    assert not any("Dense" in note.message for note in done.notes)
    found = llama_embeddings(done.paths[0], _tokens(40), pooling=-1)
    assert np.abs(found - expected).max() < GELU_BOUND * expected.std()
    settings["activation_function"] = "torch.nn.modules.activation.Tanh"
    (folder / "3_Dense" / "config.json").write_text(json.dumps(settings))
    other = quantcli.quantize(folder, tmp_path / "other.gguf", type="F32")
    assert any("has the stage Dense" in note.message for note in other.notes)
    pooled = _reference(folder, 40)[0].mean(axis=0)
    found = llama_embeddings(other.paths[0], _tokens(40), pooling=-1)
    assert np.abs(found - pooled).max() < GELU_BOUND * pooled.std()
