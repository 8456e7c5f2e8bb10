"""Verification finds what is broken, and measures errors as NumPy does over gguf's decoding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, dequantize

import quantcli
from quantcli.errors import WeightError
from quantcli.exports.verify import VerificationDone, verify
from quantcli.types import Note


def run(path: Path, against: Path | None = None) -> VerificationDone:
    with quantcli.open_model(path) as model:
        if against is None:
            *_, verdict = verify(model, threads=2)
        else:
            with quantcli.open_model(against, vocabulary=False) as source:
                *_, verdict = verify(model, source, threads=2)
    assert isinstance(verdict, VerificationDone)
    return verdict


@pytest.fixture
def file(mini: Path, tmp_path: Path) -> Path:
    return quantcli.quantize(mini, tmp_path / "m.gguf", type="Q4_K_M").paths[0]


def test_errors_are_those_of_decoded_weights(mini: Path, file: Path) -> None:
    from safetensors import safe_open

    verdict = run(file, mini)
    assert verdict.problems == ()
    assert verdict.made_from is True
    lines = {line.name: line for line in verdict.lines}
    stored = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    with safe_open(mini / "model.safetensors", "pt") as weights:
        for name, source in (
            ("blk.2.ffn_down.weight", "model.layers.2.mlp.down_proj.weight"),
            ("token_embd.weight", "model.embed_tokens.weight"),
        ):
            wanted = weights.get_tensor(source).float().numpy().astype(np.float64)
            values = dequantize(stored[name].data, stored[name].tensor_type).astype(np.float64)
            error = lines[name].error
            assert error is not None
            apart = values - wanted
            assert error.largest == np.abs(apart).max()
            np.testing.assert_allclose(
                error.relative, np.sqrt((apart**2).sum() / (wanted**2).sum()), rtol=1e-12
            )
    norm = lines["blk.0.attn_norm.weight"].error
    assert norm is not None
    assert (norm.relative, norm.largest) == (0.0, 0.0)


def test_an_exact_artifact_has_no_error(mini: Path, tmp_path: Path) -> None:
    (path,) = quantcli.quantize(mini, tmp_path / "m.gguf", type="F32").paths
    verdict = run(path, mini)
    assert verdict.overall is not None
    assert (verdict.overall.relative, verdict.overall.largest) == (0.0, 0.0)
    split = quantcli.export(path, tmp_path / "s.gguf", to="gguf", split_max_size="3M").paths
    assert run(split[1], mini).made_from is True


def test_another_source_is_told_apart(mini: Path, file: Path, tmp_path: Path) -> None:
    (other,) = quantcli.quantize(mini, tmp_path / "o.gguf", type="F32").paths
    verdict = run(file, other)
    assert verdict.made_from is False
    assert verdict.overall is not None
    assert run(file).made_from is None


BROKEN = {
    "a scale of K-quants": ("blk.1.ffn_up.weight", 144 * 5, b"\x00\x7c", r"row 5, column 0"),
    "a scale of Q6_K": ("token_embd.weight", 210 * 4 + 208, b"\xff\xff", r"nan at row 4, column 0"),
    "a float": (
        "output_norm.weight",
        4 * 9,
        b"\x00\x00\xc0\x7f",
        r"a weight nan .*column 9",
    ),
}


@pytest.mark.parametrize("case", BROKEN.values(), ids=BROKEN.keys())
def test_what_is_not_finite_is_named(case: tuple[str, int, bytes, str], file: Path) -> None:
    name, offset, raw, words = case
    tensor = next(t for t in GGUFReader(file).tensors if t.name == name)
    with file.open("r+b") as stream:
        stream.seek(int(tensor.data_offset) + offset)
        stream.write(raw)
    (problem,) = run(file).problems
    assert name in problem
    import re

    assert re.search(words, problem)


def test_a_huge_weight_that_became_nothing_is_a_problem(mini: Path, tmp_path: Path) -> None:
    """As of a source with a flipped exponent bit, and an artifact that an older version wrote."""
    (sound,) = quantcli.quantize(mini, tmp_path / "sound.gguf", type="F32").paths
    reader = GGUFReader(sound, "r+")
    weights = next(t for t in reader.tensors if t.name == "blk.1.ffn_up.weight").data
    kept = float(weights[2, 3])
    weights[2, 3] = 1e18
    weights.flush()
    del reader, weights
    (artifact,) = quantcli.quantize(mini, tmp_path / "m.gguf", type="Q8_0").paths
    assert kept < 1
    (problem,) = run(artifact, sound).problems
    assert "blk.1.ffn_up.weight (Q8_0) lost the weight 1e+18 of " in problem
    assert "at row 2, column 3" in problem
    with pytest.raises(WeightError, match=r"tensor blk\.1\.ffn_up\.weight: the weight 9\.99"):
        quantcli.quantize(sound, tmp_path / "again.gguf", type="Q6_K")


def test_missing_and_misshapen_tensors_are_problems(mini: Path, tmp_path: Path) -> None:
    from support.tiny_models import build

    pytest.importorskip("transformers")
    (path,) = quantcli.quantize(mini, tmp_path / "m.gguf", type="F16").paths
    other = build("llama-tied", tmp_path / "other")
    verdict = run(path, other)
    assert any("has shape (4096, 256)" in problem for problem in verdict.problems)
    assert any("has no tensor blk.3.attn_k.weight" in problem for problem in verdict.problems)
    assert verdict.made_from is False


def test_an_unfinished_digest_and_a_foreign_architecture(mini: Path, tmp_path: Path) -> None:
    from quantcli.artifacts.gguf_set import prepare_gguf_set
    from quantcli.artifacts.write import write_artifact
    from quantcli.sources.gguf import open_gguf
    from quantcli.types import array, text

    (path,) = quantcli.quantize(mini, tmp_path / "m.gguf", type="F16").paths
    store = open_gguf(path)
    store.metadata["quantcli.source.digest"] = text("sha256:" + "0" * 64)
    store.metadata["general.architecture"] = text("zebra")
    store.metadata["tokenizer.ggml.tokens"] = array("str", ["a", "b"])
    list(write_artifact(prepare_gguf_set(store, tmp_path / "b.gguf")))
    with quantcli.open_model(tmp_path / "b.gguf") as model:
        events = list(verify(model))
    verdict = events[-1]
    assert isinstance(verdict, VerificationDone)
    assert [problem.split(" ")[0] for problem in verdict.problems] == [
        "quantcli.source.digest", f"{tmp_path / 'b.gguf'}:",
    ]  # fmt: skip
    assert "2 tokens, but 4096 rows" in verdict.problems[1]
    (note,) = [event for event in events if isinstance(event, Note)]
    assert "not held against a table" in note.message


def test_the_digest_in_a_manifest(mini: Path, file: Path, tmp_path: Path) -> None:
    import json

    folder = tmp_path / "hf"
    quantcli.export(file, folder, to="hf")
    assert run(folder).problems == ()
    manifest = json.loads((folder / "quantcli.json").read_text())
    assert manifest["source"]["digest"].startswith("sha256:")
    manifest["source"]["digest"] = "sha256:none"
    (folder / "quantcli.json").write_text(json.dumps(manifest))
    (problem,) = run(folder).problems
    assert "is 'sha256:none', which is no SHA-256" in problem
