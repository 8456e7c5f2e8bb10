"""Decoded folders: transformers on them computes what llama.cpp does on the same GGUF."""

import json

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file
from support.llama_logits import llama_logits
from support.model_folders import CHECKPOINT, make_folder
from support.tiny_models import build

from quantcli.artifacts.gguf_file import prepare_gguf
from quantcli.artifacts.write import write_artifact
from quantcli.model import open_model
from quantcli.plan.recipe import Recipe

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")

IDS = np.random.default_rng(2).integers(2, 4000, 40)


def logits(folder) -> np.ndarray:
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.inference_mode():
        return model(torch.from_numpy(IDS)[None]).logits[0].float().numpy()


def quantize(source, output, **recipe):
    with open_model(source) as model:
        list(write_artifact(prepare_gguf(model, Recipe(**recipe), output), threads=2))
    return output


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("bookworm-mini", "Q4_K_M"),
        ("llama-biases", "Q4_0"),
        ("gemma2", "Q5_0"),
        ("gpt2", "Q8_0"),
        ("qwen3", "Q4_1"),
        ("qwen3-moe-stacked", "Q8_0"),
    ],
)
def test_transformers_computes_what_llama_cpp_does(name, kind, tmp_path):
    source = CHECKPOINT if name == "bookworm-mini" else build(name, tmp_path / name)
    make_folder(source, tmp_path / "hf", to="hf", type=kind, dtype="F32")
    packed = quantize(source, tmp_path / "packed.gguf", type=kind)
    plain = quantize(packed, tmp_path / "plain.gguf", type="F32", allow_requantize=True)
    expected = llama_logits(plain, IDS.tolist())
    assert np.abs(logits(tmp_path / "hf") - expected).max() < 2e-3 * np.abs(expected).max()


def test_a_plain_folder_is_the_checkpoint(folder):
    stored = load_file(CHECKPOINT / "model.safetensors")
    made = load_file(folder("hf", type="BF16") / "model.safetensors")
    assert made.keys() == stored.keys()
    assert all(np.array_equal(made[n].view(np.int16), stored[n].view(np.int16)) for n in stored)


@pytest.mark.parametrize(("kind", "theirs"), [("F16", "float16"), ("F32", "float32")])
def test_a_plain_folder_in_another_dtype(folder, kind, theirs):
    stored = load_file(CHECKPOINT / "model.safetensors")
    path = folder("hf", type=kind)
    for name, values in load_file(path / "model.safetensors").items():
        assert np.array_equal(values, stored[name].astype(theirs))
    assert json.loads((path / "config.json").read_text())["dtype"] == theirs


def test_a_weight_that_a_dtype_cannot_hold_is_named(tmp_path):
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file

    from quantcli.errors import WeightError

    source = build("llama-tied", tmp_path / "source")
    tensors = load_torch(source / "model.safetensors")
    tensors["model.norm.weight"][7] = 1e6
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeightError, match=r"model\.norm\.weight: the weight 1000000\.0 .*column 7"):
        make_folder(source, tmp_path / "hf", to="hf", type="F16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def _columns(values, names):
    """What the stored experts hold of llama.cpp's tensors, each matrix with its inputs as rows."""
    gate, up, down = (values[f"blk.1.ffn_{part}_exps.weight"] for part in ("gate", "up", "down"))
    halves = [np.swapaxes(part, 1, 2) for part in (gate, up)]
    join = np.stack if names == "in turns" else np.concatenate
    both = join(halves, axis=-1)
    return {"gate_up_proj": both.reshape(*both.shape[:2], -1), "down_proj": np.swapaxes(down, 1, 2)}


@pytest.mark.parametrize("slab", [1, 4 << 20])
@pytest.mark.parametrize(
    ("name", "halves"),
    [("gpt-oss", "in turns"), ("llama4", "side by side"), ("qwen3-vl-moe", "side by side")],
)
def test_stacks_that_are_stored_turned_hold_what_the_gguf_decodes_to(
    name, halves, slab, tmp_path, monkeypatch
):
    monkeypatch.setattr("quantcli.artifacts.slabs.SLAB_BYTES", slab)
    source = build(name, tmp_path / "source")
    types = {"type": "Q4_0", "tensor_types": ("ffn_gate_exps=Q8_0", "ffn_down_exps=Q5_1")}
    packed = quantize(source, tmp_path / "packed.gguf", **types)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(packed).tensors}
    assert tensors["blk.1.ffn_gate_exps.weight"].tensor_type.name == "Q8_0"
    decoded = {
        found: gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        for found, tensor in tensors.items()
        if "_exps.weight" in found
    }
    make_folder(source, tmp_path / "hf", to="hf", dtype="F32", **types)
    made = load_file(tmp_path / "hf/model.safetensors")
    for leaf, expected in _columns(decoded, halves).items():
        (held,) = (made[n] for n in made if "layers.1." in n and n.endswith(f"experts.{leaf}"))
        assert np.array_equal(held, expected), leaf


def test_a_weight_of_a_turned_stack_that_no_block_holds_is_named(tmp_path):
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file

    from quantcli.errors import WeightError

    source = build("gpt-oss", tmp_path / "source")
    tensors = load_torch(source / "model.safetensors")
    name = "model.layers.1.mlp.experts.gate_up_proj"
    experts, height, _ = tensors[name].shape
    tensors[name][experts - 1, 5, 3] = float("inf")
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    where = f"{name}: the weight inf at row {(experts - 1) * height + 5}, column 3"
    with pytest.raises(WeightError, match=where.replace(".", r"\.")):
        make_folder(source, tmp_path / "hf", to="hf", type="Q4_0")
