"""Biases that give back the mean of what rounding takes, and where llama.cpp adds them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf as library
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from safetensors.numpy import load_file

import quantcli
from quantcli.errors import PlanError, QuantcliError, SourceError, UsageError
from quantcli.tensor_biases import TAKES

TOKENS = [7, 300, 5, 1200, 42, 9, 77, 500]
TEXT = str(Path(__file__).parents[1] / "data" / "pride-and-prejudice.txt")
MODULES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip
PERMUTED = ("llama", "mistral3", "granite")
"""Architectures whose GGUFs have the rows of q and k in ggml's order of rotary pairs."""


def _as_stored(rows: np.ndarray, leaf: str, arch: str, heads: dict[str, int]) -> np.ndarray:
    """Rows of a GGUF in the order of the checkpoint."""
    if arch not in PERMUTED or leaf not in heads:
        return rows
    parts = rows.reshape(heads[leaf], -1, 2, *rows.shape[1:])
    return np.ascontiguousarray(parts.swapaxes(1, 2)).reshape(rows.shape)


def _with_biases(source: Path, target: Path, draw: np.random.Generator) -> dict[str, np.ndarray]:
    """A copy of ``source`` with biases beside all matrices that take one; what was added."""
    reader = library.GGUFReader(source)
    arch = reader.fields["general.architecture"].contents()
    writer = library.GGUFWriter(target, arch)
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            kind = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), field.types[0], kind)
    tensors = {
        t.name: np.array(t.data).reshape([int(n) for n in t.shape][::-1]) for t in reader.tensors
    }
    added = {}
    for name, values in list(tensors.items()):
        stem = name.removesuffix(".weight")
        if name.startswith("blk.") and stem.rpartition(".")[2] in TAKES[arch] and stem != name:
            added[stem] = draw.normal(0, 0.2, len(values)).astype(np.float32)
            tensors[f"{stem}.bias"] = tensors.get(f"{stem}.bias", 0) + added[stem]
    for name, values in tensors.items():
        writer.add_tensor(name, values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return added


def _transformers_logits(folder: Path, biases: dict[str, np.ndarray], arch: str) -> np.ndarray:
    """Logits of the checkpoint with biases added to what its linear modules put out."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    config = model.config
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    modules = dict(model.named_modules())
    for stem, bias in biases.items():
        _, layer, leaf = stem.split(".")
        own = torch.from_numpy(_as_stored(bias, leaf, arch, heads))
        module = next(
            m for n, m in modules.items() if n.endswith(f"layers.{layer}.{MODULES[leaf]}")
        )
        module.register_forward_hook(lambda _, __, out, own=own: out + own)
    with torch.no_grad():
        logits: np.ndarray = model(torch.tensor([TOKENS])).logits[0].numpy()
    return logits


@pytest.mark.slow
@pytest.mark.parametrize("arch", TAKES)
def test_llama_cpp_adds_every_bias_that_we_write(
    arch: str, gguf: Callable[[str, str], Path], checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    pytest.importorskip("llama_cpp")
    from support.llama_logits import llama_logits

    name = {"mistral3": "ministral3"}.get(arch, arch)
    source = gguf(name, "F32")
    biases = _with_biases(source, tmp_path / "biased.gguf", np.random.default_rng(4))
    assert {stem.rpartition(".")[2] for stem in biases} == TAKES[arch]
    want = _transformers_logits(checkpoint(name), biases, arch)
    found = llama_logits(tmp_path / "biased.gguf", TOKENS)
    assert np.abs(found - want).max() < 2e-3 * want.std()
    plain = llama_logits(source, TOKENS)
    assert np.abs(plain - want).max() > 0.05 * want.std()


def _read(path: Path) -> dict[str, np.ndarray]:
    return {
        t.name: library.quants.dequantize(t.data, t.tensor_type)
        for t in library.GGUFReader(path).tensors
    }


@pytest.fixture(scope="module")
def made(mini: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Q2_K with biases, of a short text; the statistics lie beside it."""
    path = tmp_path_factory.mktemp("biases") / "m.gguf"
    quantcli.quantize(mini, type="Q2_K", calibrate=[TEXT], chunks=2, correct_bias=True, output=path)
    return path


def test_a_bias_is_what_rounding_takes_from_the_mean(made: Path, mini: Path) -> None:
    """By the checkpoint's own weights, gguf's decoder, and the mean inputs that were measured."""
    found = _read(made)
    stored = _read_stored(mini)
    means = load_file(made.with_name("m.calib.stats.safetensors"))
    biases = [name for name in found if name.endswith(".bias")]
    assert len(biases) == 4 * 7
    for name in biases:
        _, layer, leaf, _ = name.split(".")
        weight = name.replace(".bias", ".weight")
        mean = means[f"{weight}.mean"][0]
        rounded = _as_stored(found[weight], leaf, "llama", {"attn_q": 4, "attn_k": 2})
        lost = (stored[f"model.layers.{layer}.{MODULES[leaf]}.weight"] - rounded) @ mean
        bias = _as_stored(found[name], leaf, "llama", {"attn_q": 4, "attn_k": 2})
        np.testing.assert_allclose(bias, lost, atol=1e-5)
        assert np.abs(bias).max() > 1e-4


def _read_stored(folder: Path) -> dict[str, np.ndarray]:
    from safetensors.torch import load_file as load

    tensors = load(folder / "model.safetensors")
    return {name: tensor.float().numpy() for name, tensor in tensors.items()}


def test_weights_keep_their_bytes_and_the_size_is_foretold(
    made: Path, mini: Path, tmp_path: Path
) -> None:
    matrix, means = made.with_name("m.calib.gguf"), made.with_name("m.calib.stats.safetensors")
    options: dict[str, Any] = {"type": "Q2_K", "imatrix": matrix}
    plain = quantcli.quantize(mini, output=tmp_path / "plain.gguf", **options)
    again = tmp_path / "again.gguf"
    options |= {"correct_bias": True, "statistics": means, "output": again}
    planned = quantcli.quantize(mini, dry_run=True, **options)
    threads = quantcli.quantize(mini, threads=3, **options)
    assert planned.document["bytes"] == again.stat().st_size == made.stat().st_size
    assert threads.paths == (again,)
    first, second = (library.GGUFReader(path).tensors for path in (made, again))
    for one, two in zip(first, second, strict=True):
        assert one.name == two.name
        np.testing.assert_array_equal(one.data, two.data)
    own = {t.name: t.data for t in library.GGUFReader(plain.paths[0]).tensors}
    biased = {t.name: t.data for t in second}
    assert own.keys() == {name for name in biased if not name.endswith(".bias")}
    for name, data in own.items():
        np.testing.assert_array_equal(data, biased[name])


def test_a_bias_that_is_there_is_moved(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    folder = checkpoint("qwen2")
    means = tmp_path / "m.stats.safetensors"
    quantcli.calibrate(folder, [TEXT], ctx=32, chunks=2, collect="mean", output=tmp_path / "m.gguf")
    plain, biased = tmp_path / "plain.gguf", tmp_path / "biased.gguf"
    quantcli.quantize(folder, type="Q4_0", output=plain)
    quantcli.quantize(folder, type="Q4_0", output=biased, correct_bias=True, statistics=means)
    before, after, exact = _read(plain), _read(biased), load_file(means)
    original = _read_stored(folder)
    assert before.keys() == after.keys()
    for leaf in ("attn_q", "attn_k", "attn_v"):
        weight = original[f"model.layers.0.{MODULES[leaf]}.weight"]
        lost = (weight - after[f"blk.0.{leaf}.weight"]) @ exact[f"blk.0.{leaf}.weight.mean"][0]
        moved = after[f"blk.0.{leaf}.bias"] - before[f"blk.0.{leaf}.bias"]
        np.testing.assert_allclose(moved, lost, atol=1e-5)
        assert np.abs(moved).max() > 1e-4


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({}, UsageError, "--correct-bias needs a text to run the model on"),
        ({"method": "gptq"}, UsageError, "the error on the inputs as they are, mean included"),
        ({"to": "gptq", "bits": 4}, UsageError, "--correct-bias is not for --to gptq"),
        ({"statistics": "s", "calibrate": TEXT}, UsageError, "both tell the inputs' means"),
        ({"type": "F16", "statistics": "s"}, PlanError, "finds no matrix to add a bias to"),
        ({"statistics": "other"}, SourceError, "has no mean of blk.0.attn_k.weight"),
    ],
)  # fmt: skip
def test_what_is_refused(
    options: dict[str, Any], error: type[QuantcliError], sentence: str, mini: Path, tmp_path: Path
) -> None:
    if options.get("statistics") == "other":
        name = "m.gguf"
        options = {"statistics": tmp_path / "m.stats.safetensors"}
        quantcli.calibrate(mini, [TEXT], chunks=1, collect="abs_max", output=tmp_path / name)
    given = {"type": "Q4_0", "correct_bias": True, **options}
    if "to" in options:
        del given["type"]
    with pytest.raises(error, match=sentence):
        quantcli.quantize(mini, output=tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


def test_a_graph_without_biases_is_refused(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(PlanError, match="graph of gemma3 takes none") as caught:
        quantcli.quantize(
            checkpoint("gemma3"), type="Q4_0", correct_bias=True, statistics="s",
            output=tmp_path / "out.gguf",
        )  # fmt: skip
    assert "llama, mistral3, qwen2, qwen3" in (caught.value.hint or "")
