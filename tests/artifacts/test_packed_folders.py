"""Packed folders as their consumers read them: transformers with compressed-tensors runs them.

GPTQ and AWQ folders are read by unpackers that follow the layouts' definitions; GPTQModel, which
does not install quickly, has read the same folders by hand.
"""

import json
import math
import re

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file
from support.gguf_files import write_imatrix
from support.model_folders import CHECKPOINT, TEXT, linear_names, make_folder
from support.tiny_models import build
from support.unpackers import unpack_awq, unpack_gptq

from quantcli.formats.integer import GridCodes as Codes
from quantcli.formats.integer import IntegerGrid, dequantize, encode, fit_tensor, quantize
from quantcli.types import Note

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")

pytestmark = pytest.mark.filterwarnings("ignore")

IDS = torch.randint(0, 4096, (1, 48), generator=torch.Generator().manual_seed(2))


def load(folder, **options):
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options)


def load_dequantized(folder):
    config = transformers.CompressedTensorsConfig(dequantize=True)
    return load(folder, quantization_config=config)


@torch.inference_mode()
def logits(model) -> np.ndarray:
    return model(IDS).logits.float().numpy()


def meant(weights, grid, search="mse"):
    """The blocks' linear weights as the grid rounds them, float32."""
    found = {}
    for name in linear_names(weights):
        rows = weights[name]
        if grid.strategy == "tensor":
            scales, zeros = fit_tensor(lambda rows=rows: [rows], grid, None, search)
            coded = Codes(quantize(rows, scales, zeros, grid), scales, zeros)
        else:
            coded = encode(rows, grid, search=search)
        found[name] = dequantize(coded, grid)
    return found


def model_of(values):
    """The small model with these weights in the place of its own."""
    model = load(CHECKPOINT)
    state = {n: torch.from_numpy(np.ascontiguousarray(v)).bfloat16() for n, v in values.items()}
    model.load_state_dict(state, strict=False)
    return model


def grid_of(bits, size, zero="middle", dtype="BF16", lowest=0):
    if isinstance(size, str):
        return IntegerGrid(bits, zero, size, None, dtype, lowest)
    return IntegerGrid(bits, zero, "group", size, dtype, lowest)


@pytest.mark.parametrize(
    ("bits", "size"),
    [(4, 128), (4, "channel"), (4, "tensor"), (8, 128), (3, 64), (2, 32), (5, 128)],
)
def test_transformers_runs_symmetric_weights(folder, weights, bits, size):
    path = folder("compressed-tensors", bits=bits, group_size=size)
    expected = logits(model_of(meant(weights, grid_of(bits, size))))
    assert np.array_equal(logits(load(path)), expected)


@pytest.mark.parametrize("size", [128, "channel", "tensor"])
def test_transformers_dequantizes_asymmetric_weights(folder, weights, size):
    path = folder("compressed-tensors", group_size=size, symmetric=False)
    expected = logits(model_of(meant(weights, grid_of(4, size, "integer"))))
    assert np.array_equal(logits(load_dequantized(path)), expected)


def perplexity(model) -> float:
    tokenizer = transformers.AutoTokenizer.from_pretrained(CHECKPOINT)
    ids = torch.tensor(tokenizer(TEXT.read_text())["input_ids"])
    windows = ids[: len(ids) // 256 * 256].view(-1, 256)
    with torch.inference_mode():
        scores = torch.log_softmax(model(windows).logits[:, :-1].float(), -1)
    return math.exp(-scores.gather(-1, windows[:, 1:, None]).mean().item())


@pytest.mark.parametrize("size", ["channel", "tensor"])
def test_transformers_runs_int8_activations(folder, weights, size):
    path = folder("compressed-tensors", activations="int8", group_size=size)
    expected = logits(model_of(meant(weights, grid_of(8, size))))
    assert np.array_equal(logits(load_dequantized(path)), expected)
    running = logits(load(path))
    assert not np.array_equal(running, expected)
    assert np.linalg.norm(running - expected) < 0.03 * np.linalg.norm(expected)


def test_int8_activations_keep_the_perplexity_within_a_hundredth(folder):
    before = perplexity(load(CHECKPOINT))
    after = perplexity(load(folder("compressed-tensors", activations="int8")))
    assert abs(after / before - 1) < 0.01


@pytest.mark.parametrize("to", ["gptq", "gptq-v2"])
@pytest.mark.parametrize(
    ("bits", "size", "symmetric"),
    [(4, 128, True), (4, 128, False), (4, "channel", True), (8, 64, False), (3, 32, False),
     (2, 32, True)],
)  # fmt: skip
def test_gptq_folders_say_what_was_meant(folder, weights, to, bits, size, symmetric):
    path = folder(to, bits=bits, group_size=size, symmetric=symmetric)
    config = json.loads((path / "config.json").read_text())["quantization_config"]
    layout = to.replace("-", "_")
    assert (config["quant_method"], config["checkpoint_format"]) == ("gptq", layout)
    assert (config["bits"], config["sym"], config["desc_act"]) == (bits, symmetric, False)
    assert config["group_size"] == (-1 if size == "channel" else size)
    zero = "middle" if symmetric else "integer"
    lowest = int(to == "gptq" and not symmetric)
    stored = load_file(path / "model.safetensors")
    for name, expected in meant(weights, grid_of(bits, size, zero, "F16", lowest)).items():
        assert np.array_equal(unpack_gptq(stored, name.removesuffix(".weight"), config), expected)


@pytest.mark.parametrize("size", [32, 128, "channel"])
def test_awq_folders_say_what_was_meant(folder, weights, size):
    path = folder("awq", group_size=size)
    config = json.loads((path / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["version"], config["zero_point"]) == (
        "awq",
        "gemm",
        True,
    )
    assert config["modules_to_not_convert"] == ["lm_head"]
    stored = load_file(path / "model.safetensors")
    for name, expected in meant(weights, grid_of(4, size, "integer", "F16")).items():
        assert np.array_equal(unpack_awq(stored, name.removesuffix(".weight"), config), expected)


@pytest.mark.parametrize("to", ["compressed-tensors", "gptq", "awq"])
def test_what_is_kept_is_copied_bit_for_bit(folder, to):
    path = folder(to, keep=(r"layers\.0\.", "o_proj"))
    source, stored = (
        load_file(CHECKPOINT / "model.safetensors"),
        load_file(path / "model.safetensors"),
    )
    names = [n for n in source if ".layers.0." in n or "o_proj" in n or "_proj" not in n]
    assert all(np.array_equal(stored[n].view(np.int16), source[n].view(np.int16)) for n in names)
    config = json.loads((path / "config.json").read_text())["quantization_config"]
    modules = {n.removesuffix(".weight") for n in names if "_proj" in n}
    if to == "compressed-tensors":
        assert set(config["ignore"]) == modules | {"lm_head"}
        assert np.isfinite(logits(load(path))).all()
    elif to == "awq":
        assert set(config["modules_to_not_convert"]) == modules | {"lm_head"}
    else:
        assert all(sum(bool(re.search(p[2:], m)) for p in config["dynamic"]) == 1 for m in modules)
        assert len(config["dynamic"]) == len(modules)
        (listed,) = config["modules_in_block_to_quantize"]
        linear = {name.removesuffix(".weight") for name in linear_names(source)}
        quantized = {name for name in linear if any(name.endswith(ending) for ending in listed)}
        assert quantized == linear - modules


def test_importance_reaches_the_columns_it_is_of(folder, weights, tmp_path):
    generator = np.random.default_rng(8)
    names = {"q_proj": "attn_q", "k_proj": "attn_k", "down_proj": "ffn_down"}
    entries = {}
    for block in range(4):
        for theirs, ours in names.items():
            part = "mlp" if theirs == "down_proj" else "self_attn"
            columns = weights[f"model.layers.{block}.{part}.{theirs}.weight"].shape[1]
            entries[f"blk.{block}.{ours}.weight"] = np.exp(
                generator.normal(size=(1, columns))
            ).astype(np.float32)
    matrix = tmp_path / "imatrix.gguf"
    one = np.ones((1, 1), np.float32)
    write_imatrix(matrix, {name: (values, one) for name, values in entries.items()})
    path = folder("gptq", imatrix=str(matrix))
    config = json.loads((path / "config.json").read_text())["quantization_config"]
    stored = load_file(path / "model.safetensors")
    grid = grid_of(4, 128, "middle", "F16")
    for name, rows in weights.items():
        theirs = name.split(".")[-2]
        if not theirs.endswith("_proj"):
            continue
        key = f"blk.{name.split('.')[2]}.{names.get(theirs)}.weight"
        weight = entries[key][0] if key in entries else None
        expected = dequantize(encode(rows, grid, weight, "mse"), grid)
        assert np.array_equal(unpack_gptq(stored, name.removesuffix(".weight"), config), expected)


def test_scales_have_the_dtype_of_the_rest(folder):
    for dtype, array in (("F16", np.float16), ("F32", np.float32)):
        path = folder("compressed-tensors", dtype=dtype)
        stored = load_file(path / "model.safetensors")
        assert stored["model.norm.weight"].dtype == array
        assert stored["model.layers.0.mlp.up_proj.weight_scale"].dtype == array
        assert np.isfinite(logits(load(path))).all()
    assert (
        ml_dtypes.bfloat16
        == load_file(folder("compressed-tensors") / "model.safetensors")[
            "model.layers.0.mlp.up_proj.weight_scale"
        ].dtype
    )


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "phi3", "gemma3-images"])
def test_transformers_runs_other_architectures(name, tmp_path):
    source = build(name, tmp_path / name)
    make_folder(source, tmp_path / "made", to="compressed-tensors", bits=8, group_size=32)
    make_folder(source, tmp_path / "plain", to="hf", type="F32")
    # An eight-bit model is near its source, one with an unset or misplaced layer is not.
    found, expected = logits(load(tmp_path / "made")), logits(load(tmp_path / "plain"))
    assert np.linalg.norm(found - expected) < 0.1 * np.linalg.norm(expected)


@pytest.mark.parametrize("to", ["gptq", "awq"])
def test_experts_that_transformers_would_leave_unset_are_warned_of(to, tmp_path):
    source = build("qwen3-moe", tmp_path / "source")
    events = make_folder(source, tmp_path / "made", to=to, group_size=32)
    assert any(
        isinstance(e, Note) and e.level == "warning" and "experts" in e.message for e in events
    )
