"""MLX folders as mlx_lm loads and runs them on the CPU."""

import json

import numpy as np
import pytest
from support.model_folders import CHECKPOINT, make_folder
from support.tiny_models import build

mx = pytest.importorskip("mlx.core")
mlx_lm = pytest.importorskip("mlx_lm")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

IDS = np.random.default_rng(2).integers(0, 4096, (1, 48))


def mlx_logits(model) -> np.ndarray:
    return np.array(model(mx.array(IDS)).astype(mx.float32))


def torch_logits(folder) -> np.ndarray:
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        return model(torch.from_numpy(IDS)).logits.numpy()


def quantized(model) -> dict:
    from mlx.utils import tree_flatten

    leaves = model.leaf_modules()
    is_leaf = mlx_lm.utils.nn.Module.is_module
    return {
        name: module
        for name, module in tree_flatten(leaves, is_leaf=is_leaf)
        if hasattr(module, "scales")
    }


def dequantized(module) -> np.ndarray:
    """In float32: mlx's own products are summed in it, its `dequantize` rounds each to bfloat16."""
    scales, biases = module.scales.astype(mx.float32), module.biases.astype(mx.float32)
    return np.array(mx.dequantize(module.weight, scales, biases, module.group_size, module.bits))


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize(("bits", "size"), [(2, 32), (3, 64), (4, 64), (5, 128), (6, 32), (8, 64)])
def test_mlx_lm_runs_the_weights_that_were_meant(folder, weights, bits, size):
    model, tokenizer = mlx_lm.load(str(folder("mlx", bits=bits, group_size=size, range="minmax")))
    assert tokenizer.encode("the sea")
    modules = quantized(model)
    assert len(modules) == 29  # Seven in each of four blocks, and the embedding that is the head.
    for name, module in modules.items():
        source = weights[f"{name}.weight"]
        # mlx's own rule in float32 is a bound for scales and edges that are rounded to bfloat16.
        theirs = mx.quantize(mx.array(source), group_size=size, bits=bits)
        bound = distance(np.array(mx.dequantize(*theirs, group_size=size, bits=bits)), source)
        assert distance(dequantized(module), source) < 1.02 * bound
    # What is left is the roundoff of products in bfloat16, and the quantization.
    allowed = {2: 0.6, 3: 0.25, 4: 0.12, 5: 0.08, 6: 0.05, 8: 0.05}[bits]
    assert distance(mlx_logits(model), torch_logits(CHECKPOINT)) < allowed


def test_searched_edges_beat_mlx_own_rule(folder, weights):
    model, _ = mlx_lm.load(str(folder("mlx", bits=3)))
    for name, module in quantized(model).items():
        source = weights[f"{name}.weight"]
        theirs = mx.quantize(mx.array(source), group_size=64, bits=3)
        plain = distance(np.array(mx.dequantize(*theirs, group_size=64, bits=3)), source)
        assert distance(dequantized(module), source) < 0.97 * plain


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
def test_experts_are_one_tensor_however_they_were_stored(name, tmp_path):
    made = []
    for stored in (name, f"{name}-stacked"):
        source = build(stored, tmp_path / stored)
        target = tmp_path / f"{stored}-mlx"
        make_folder(source, target, to="mlx", bits=8, group_size=32)
        made.append((target / "model.safetensors").read_bytes())
    assert made[0] == made[1]
    model, _ = mlx_lm.load(str(target))
    stacks = [module for label, module in quantized(model).items() if "switch_mlp" in label]
    assert len(stacks) == 6
    assert all(module.weight.ndim == 3 for module in stacks)
    assert distance(mlx_logits(model), torch_logits(source)) < 0.2


def test_the_config_says_what_mlx_lm_reads(folder, tmp_path):
    config = json.loads((folder("mlx") / "config.json").read_text())
    assert config["quantization"] == {"group_size": 64, "bits": 4, "mode": "affine"}
    assert config["quantization_config"] == config["quantization"]
    assert config["rope_theta"] == 10000.0
    source = build("llama-llama3", tmp_path / "llama3", dtype="bfloat16")
    make_folder(source, tmp_path / "mlx", to="mlx", bits=8, group_size=32)
    model, _ = mlx_lm.load(str(tmp_path / "mlx"))
    assert distance(mlx_logits(model), torch_logits(source)) < 0.2


def test_a_stored_head_beside_tied_embeddings_loads(tmp_path):
    """A tied model that stores its head too: mlx_lm would refuse the head of a tied model."""
    source = tmp_path / "source"
    source.mkdir()
    for file in CHECKPOINT.iterdir():
        if file.suffix != ".safetensors":
            (source / file.name).write_bytes(file.read_bytes())
    stored = mx.load(str(CHECKPOINT / "model.safetensors"))
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"]
    mx.save_safetensors(str(source / "model.safetensors"), stored, metadata={"format": "pt"})
    make_folder(source, tmp_path / "with", to="mlx", bits=8)
    make_folder(CHECKPOINT, tmp_path / "without", to="mlx", bits=8)
    with_head, without = (mlx_lm.load(str(tmp_path / name))[0] for name in ("with", "without"))
    np.testing.assert_allclose(mlx_logits(with_head), mlx_logits(without), rtol=1e-4, atol=1e-3)
