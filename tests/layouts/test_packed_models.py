"""Whole quantized models: logits as their own runtimes give them, and what becomes of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader, quants
from numpy.typing import NDArray
from support import packed_layouts

from quantcli.artifacts.gguf_file import prepare_gguf
from quantcli.artifacts.write import write_artifact
from quantcli.errors import ArchitectureError, WeightError
from quantcli.model import open_model
from quantcli.plan.recipe import Recipe
from quantcli.report.document import model_document
from quantcli.report.opening import open_subject
from quantcli.sources.resolve import resolve
from quantcli.types import Note

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from safetensors.torch import load_file, save_file  # noqa: E402 - after the skip

MINI = Path(__file__).parents[1] / "data" / "bookworm-mini"
IDS = list(range(5, 69))
GROUP = 64


def is_linear(name: str) -> bool:
    return name.endswith("_proj.weight")


def write_model(folder: Path, tensors: dict[str, Any], quantization: dict[str, Any]) -> Path:
    """bookworm-mini with other tensors and a ``quantization_config``."""
    folder.mkdir()
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    config = json.loads((MINI / "config.json").read_text())
    config |= {"dtype": "float32", "quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MINI / name, folder / name)
    return folder


def floats() -> dict[str, Any]:
    return {name: tensor.float() for name, tensor in load_file(MINI / "model.safetensors").items()}


def our_logits(folder: Path) -> NDArray[np.float32]:
    from quantcli.evals.engines.torch import TorchEngine
    from quantcli.evals.windows import Window

    with open_model(folder) as model:
        engine = TorchEngine(model, model.config, SimpleNamespace(begin=None), label="packed")
        (logits,) = engine.run([Window(np.array(IDS, np.int32), 0, np.array(IDS))])
        engine.close()
    return np.asarray(logits)


def logits_of(model: Any) -> NDArray[np.float32]:
    with torch.no_grad():
        found: NDArray[np.float32] = model(torch.tensor([IDS])).logits[0].float().numpy()
    return found


def check_logits(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> None:
    """Equal up to rounding, and of a model that quantization has changed."""
    scale = np.abs(theirs).max()
    np.testing.assert_allclose(ours, theirs, atol=2e-5 * scale)
    plain = logits_of(
        transformers.AutoModelForCausalLM.from_pretrained(MINI, dtype=torch.float32).eval()
    )
    assert np.abs(plain - theirs).max() > 1e-3 * scale


SCHEMES: dict[str, tuple[str, dict[str, Any], dict[str, Any] | None]] = {
    "W4A16": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": GROUP}, None),
    "W8A16": ("pack-quantized", {"num_bits": 8, "strategy": "channel"}, None),
    "W8A8": (
        "int-quantized",
        {"num_bits": 8, "strategy": "channel"},
        {"num_bits": 8, "strategy": "token", "dynamic": True},
    ),
    "FP8": (
        "float-quantized",
        {"num_bits": 8, "type": "float", "strategy": "channel"},
        {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True},
    ),
}


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
@pytest.mark.parametrize("name", SCHEMES)
def test_compressed_tensors_in_transformers(name: str, tmp_path: Path) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
    )
    from compressed_tensors.quantization.utils import calculate_qparams

    layout, weights, inputs = SCHEMES[name]
    args = QuantizationArgs(**weights)
    scheme = QuantizationScheme(
        targets=["Linear"], weights=args, format=layout,
        input_activations=QuantizationArgs(**inputs) if inputs else None,
    )  # fmt: skip
    tensors = {}
    for key, tensor in floats().items():
        if not is_linear(key):
            tensors[key] = tensor
            continue
        groups = tensor.reshape(len(tensor), -1, weights.get("group_size", tensor.shape[1]))
        scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
        compressor = BaseCompressor.get_value_from_registry(layout)
        stored = compressor.compress({"weight": tensor, "weight_scale": scale}, scheme)
        tensors |= {f"{key.removesuffix('weight')}{part}": v for part, v in stored.items()}
    settings = QuantizationConfig(
        config_groups={"group_0": scheme}, format=layout, ignore=["lm_head"],
        quantization_status="compressed",
    )  # fmt: skip
    folder = write_model(tmp_path / "model", tensors, settings.model_dump(mode="json"))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        # Activations stay as they are: the weights are compared.
        quantization_config=transformers.CompressedTensorsConfig(dequantize=True),
    ).eval()
    check_logits(our_logits(folder), logits_of(model))


@pytest.mark.parametrize("nested", [False, True], ids=["plain scales", "nested scales"])
def test_nf4_in_bitsandbytes(nested: bool, tmp_path: Path) -> None:
    """The library's own layers in place of the model's, and their state as it is saved."""
    from bitsandbytes.nn import Linear4bit

    model = transformers.AutoModelForCausalLM.from_pretrained(MINI, dtype=torch.float32).eval()
    for name, module in list(model.named_modules()):
        if not is_linear(f"{name}.weight"):
            continue
        layer = Linear4bit(
            module.in_features, module.out_features, bias=False, compute_dtype=torch.float32,
            compress_statistics=nested, quant_type="nf4",
        )  # fmt: skip
        layer.load_state_dict({"weight": module.weight.data})
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer.to("cpu"))
    state = {name: value for name, value in model.state_dict().items() if name != "lm_head.weight"}
    settings = {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": nested,
    }  # fmt: skip
    folder = write_model(tmp_path / "model", state, settings)
    check_logits(our_logits(folder), logits_of(model))


@pytest.fixture(scope="module")
def gptq(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, NDArray[np.float32]]]:
    """bookworm-mini in GPTQ's 4 bits, and what its matrices stand for."""
    tensors: dict[str, Any] = {}
    meant: dict[str, NDArray[np.float32]] = {}
    for name, tensor in floats().items():
        if not is_linear(name):
            tensors[name] = tensor
            continue
        order = np.arange(tensor.shape[1]) // GROUP
        codes, zeros, scales = packed_layouts.quantize(tensor.numpy(), 4, order, symmetric=True)
        stored = packed_layouts.gptq(codes, zeros, scales, 4, version=1)
        module = name.removesuffix(".weight")
        tensors |= {f"{module}.{key}": torch.from_numpy(value) for key, value in stored.items()}
        tensors[f"{module}.g_idx"] = torch.from_numpy(order.astype(np.int32))
        meant[name] = packed_layouts.dequantize(codes, zeros, scales, order)
    settings = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False}
    folder = tmp_path_factory.mktemp("gptq") / "model"
    return write_model(folder, tensors, settings | {"sym": True, "lm_head": False}), meant


GGUF_NAMES: dict[str, str] = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip


def in_gguf(name: str, values: NDArray[np.float32]) -> tuple[str, NDArray[np.float32]]:
    """A matrix under GGUF's name, the halves of rotated heads of 64 interleaved."""
    _, _, layer, module = name.removesuffix(".weight").split(".", 3)
    if module.endswith(("q_proj", "k_proj")):
        rows, columns = values.shape
        values = values.reshape(-1, 2, 32, columns).swapaxes(1, 2).reshape(rows, columns)
    return f"blk.{layer}.{GGUF_NAMES[module]}.weight", values


def test_gptq_becomes_q8_0(
    gptq: tuple[Path, dict[str, NDArray[np.float32]]], tmp_path: Path
) -> None:
    folder, meant = gptq
    output = tmp_path / "out.gguf"
    with open_model(folder) as model:
        events = list(write_artifact(prepare_gguf(model, Recipe(type="Q8_0"), output), threads=2))
    (warning,) = [e.message for e in events if isinstance(e, Note) and e.level == "warning"]
    assert f"{len(meant)} tensors are stored as GPTQ int4, groups of {GROUP}" in warning
    assert "rounded a second time" in warning
    found = {t.name: t for t in GGUFReader(output).tensors}
    for name, values in meant.items():
        gguf_name, expected = in_gguf(name, values)
        stored = found[gguf_name]
        assert stored.tensor_type.name == "Q8_0"
        decoded = quants.dequantize(stored.data, stored.tensor_type)
        blocks = expected.reshape(-1, 32)
        # Half a step of a block whose largest magnitude has the code 127, and the scale's rounding.
        bound = np.abs(blocks).max(1, keepdims=True) * (0.5 / 127 + 2**-11)
        assert (np.abs(decoded.reshape(-1, 32) - blocks) <= bound).all()


def test_gptq_becomes_f32(
    gptq: tuple[Path, dict[str, NDArray[np.float32]]], tmp_path: Path
) -> None:
    """Nothing is rounded, so nothing is warned of."""
    folder, meant = gptq
    output = tmp_path / "out.gguf"
    with open_model(folder) as model:
        events = list(write_artifact(prepare_gguf(model, Recipe(type="F32"), output), threads=2))
    assert not [e for e in events if isinstance(e, Note) and e.level == "warning"]
    found = {t.name: t for t in GGUFReader(output).tensors}
    for name, values in meant.items():
        gguf_name, expected = in_gguf(name, values)
        np.testing.assert_array_equal(found[gguf_name].data, expected)


def test_inspect_shows_what_is_stored(
    gptq: tuple[Path, dict[str, NDArray[np.float32]]],
) -> None:
    folder, meant = gptq
    with open_subject(resolve(str(folder)), "gptq") as subject:
        listing = model_document(subject, subject.tensors)
    lines = {entry["name"]: entry for entry in listing["tensors"]}
    for name, values in meant.items():
        entry = lines[name]
        assert entry["dtype"] == f"GPTQ int4, groups of {GROUP}"
        assert entry["shape"] == list(values.shape)
        rows, columns = values.shape
        groups = columns // GROUP
        # Codes, float16 scales, four-bit zero points, and the group of each column.
        assert entry["bytes"] == rows * columns // 2 + rows * groups * 5 // 2 + 4 * columns
    assert not [name for name in lines if name.endswith(("qweight", "qzeros", "scales", "g_idx"))]


def test_a_scale_that_is_no_number(
    gptq: tuple[Path, dict[str, NDArray[np.float32]]], tmp_path: Path
) -> None:
    """The refusal names the weight as it would be named in a plain checkpoint."""
    folder, _ = gptq
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.scales"][2, 7] = torch.nan
    config = json.loads((folder / "config.json").read_text())
    broken = write_model(tmp_path / "model", tensors, config["quantization_config"])
    sentence = r"tensor model.layers.1.mlp.up_proj.weight: the weight nan at row 7, column 128 "
    with open_model(broken) as model, pytest.raises(WeightError, match=sentence):
        list(write_artifact(prepare_gguf(model, Recipe(type="Q4_0"), tmp_path / "out.gguf")))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_biases_of_zeros_that_belong_to_no_model(
    gptq: tuple[Path, dict[str, NDArray[np.float32]]], tmp_path: Path
) -> None:
    """AutoGPTQ gave every matrix a bias; one that is not zero is part of the model."""
    folder, meant = gptq
    tensors = load_file(folder / "model.safetensors")
    for name, values in meant.items():
        tensors[name.replace("weight", "bias")] = torch.zeros(len(values), dtype=torch.float16)
    config = json.loads((folder / "config.json").read_text())
    biased = write_model(tmp_path / "model", tensors, config["quantization_config"])
    np.testing.assert_array_equal(our_logits(biased), our_logits(folder))
    tensors["model.layers.0.mlp.up_proj.bias"][3] = 0.5
    other = write_model(tmp_path / "other", tensors, config["quantization_config"])
    with pytest.raises(ArchitectureError, match=r"up_proj.bias of .* is not part of Llama"):
        open_model(other)
