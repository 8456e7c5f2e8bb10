"""Scales that are found on texts: of activations, and of key-value caches.

What they should be is measured with hooks on transformers, and made by compressed-tensors' own
functions of it.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import quantcli
from quantcli.errors import PlanError, SourceError, UsageError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")

pytestmark = pytest.mark.filterwarnings("ignore")

TEXT = Path(__file__).parents[1] / "golden" / "calibration.txt"
WINDOWS = {"calibrate": TEXT, "chunks": 2}
PROJECTION = re.compile(r"model\.layers\..*(_proj|w[123])")
TOKENS = np.random.default_rng(0).integers(2, 4000, 64).tolist()


def make(source: Path, folder: Path, *schemes: str, **options: Any) -> Any:
    given = {"to": "compressed-tensors"} | ({"scheme": schemes} if schemes else {}) | options
    return quantcli.quantize(source, folder, **given)


def tensors(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    found: dict[str, Any] = load_file(folder / "model.safetensors")
    return found


def settings(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def windows(folder: Path) -> list[list[int]]:
    """The text's first windows, as a quantization cuts it."""
    from quantcli.layerwise.texts import read_texts
    from quantcli.layerwise.windows import Tokenizer, make_windows
    from quantcli.model import open_model

    with open_model(folder) as model:
        found = make_windows(Tokenizer(model), read_texts([str(TEXT)]), ctx=512, chunks=2).ids
    return found.tolist()


class Seen:
    """What a model's linear layers take and its cache holds, as transformers runs it."""

    def __init__(self, folder: Path, text: list[list[int]], monkeypatch: Any) -> None:
        self.inputs: dict[str, list[Any]] = defaultdict(list)
        self.caches: dict[int, list[Any]] = defaultdict(list)
        update = transformers.Cache.update

        def watch(cache: Any, keys: Any, values: Any, layer: int, *rest: Any, **more: Any) -> Any:
            self.caches[layer].append((float(keys.abs().max()), float(values.abs().max())))
            return update(cache, keys, values, layer, *rest, **more)

        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for name, module in model.named_modules():
            if PROJECTION.fullmatch(name):
                module.register_forward_pre_hook(
                    lambda _, args, name=name: self.inputs[name].append(args[0].aminmax())
                )
        with monkeypatch.context() as patch, torch.inference_mode():
            patch.setattr(transformers.Cache, "update", watch)
            for window in text:
                model(input_ids=torch.tensor([window]), use_cache=True)

    def extremes(self, module: str) -> tuple[Any, Any]:
        found = self.inputs[module]
        return min(part.min for part in found), max(part.max for part in found)

    def largest(self, module: str) -> float:
        return float(max(map(abs, self.extremes(module))))

    def cache(self, layer: int) -> tuple[float, float]:
        keys, values = zip(*self.caches[layer], strict=True)
        return max(keys), max(values)


@pytest.mark.parametrize("name", ["FP8", "NVFP4", "W8A8_STATIC", "W8A8_STATIC_ASYM"])
def test_scales_are_the_librarys_of_what_transformers_sees(
    name: str, checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    source = checkpoint("llama")
    folder = make(source, tmp_path / "out", name, range="minmax", **WINDOWS).paths[0]
    found, seen = tensors(folder), Seen(source, windows(source), monkeypatch)
    (group,) = QuantizationConfig.model_validate(settings(folder)).config_groups.values()
    args = group.input_activations
    ends = ("input_scale", "input_zero_point", "input_global_scale")
    assert len([key for key in found if key.endswith(ends)]) == 14 * (1 + (not args.symmetric))
    for module in seen.inputs:
        low, high = seen.extremes(module)
        if name == "NVFP4":
            wanted = {"input_global_scale": generate_gparam(low, high)}
        else:
            scale, zero = calculate_qparams(low, high, args)
            wanted = {"input_scale": scale} | ({} if args.symmetric else {"input_zero_point": zero})
        for part, value in wanted.items():
            ours = found[f"{module}.{part}"]
            assert (ours.dtype, ours.shape) == (value.dtype, value.shape)
            torch.testing.assert_close(ours, value, rtol=1e-5, atol=0)


def test_fp8_weights_share_a_scale_where_servers_fuse_them(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Of q, k and v the largest magnitude of all becomes 448, rounded to nearest and with GPTQ."""
    source = checkpoint("llama")
    stored = tensors(source)
    for options in ({}, {"method": "gptq", "random_share": 0.0}):
        folder = make(source, tmp_path / f"out{len(options)}", "FP8", **WINDOWS, **options).paths[0]
        found = tensors(folder)
        for parts in (("q_proj", "k_proj", "v_proj"), ("o_proj",)):
            modules = [f"model.layers.1.self_attn.{part}" for part in parts]
            most = max(stored[f"{module}.weight"].abs().max() for module in modules)
            for module in modules:
                assert torch.equal(found[f"{module}.weight_scale"], most.reshape(1) / 448)
        if not options:
            weight = stored["model.layers.1.self_attn.k_proj.weight"]
            scale = found["model.layers.1.self_attn.k_proj.weight_scale"]
            ours = found["model.layers.1.self_attn.k_proj.weight"]
            codes = (weight / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
            assert torch.equal(ours.view(torch.uint8), codes.view(torch.uint8))


@pytest.mark.parametrize(
    ("to", "schemes"),
    [
        ("compressed-tensors", ["FP8"]),
        ("compressed-tensors", ["W4A16"]),
        ("compressed-tensors", [r"mlp\.=NVFP4", "UNQUANTIZED"]),
        ("compressed-tensors", ["UNQUANTIZED"]),
        ("fp8", []),
    ],
)
def test_scales_of_a_cache(
    to: str, schemes: list[str], mini: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within 1 % of the largest key and value that transformers puts into its cache."""
    folder = make(mini, tmp_path / "out", *schemes, to=to, kv_cache="fp8", **WINDOWS).paths[0]
    found, seen = tensors(folder), Seen(mini, windows(mini), monkeypatch)
    assert len(seen.caches) == 4
    for layer in seen.caches:
        for part, largest in zip("kv", seen.cache(layer), strict=True):
            scale = found[f"model.layers.{layer}.self_attn.{part}_scale"]
            assert scale.shape == (1,)
            assert float(scale) * 448 == pytest.approx(largest, rel=0.01)
    assert "key-value cache in FP8" in (folder / "README.md").read_text()
    said = settings(folder)["kv_cache_scheme"]
    if to == "fp8":
        assert said == "static"
    if schemes == ["UNQUANTIZED"]:
        own = tensors(mini)
        assert found.keys() - own.keys() == {key for key in found if key.endswith("_scale")}
        assert all(torch.equal(found[key], own[key]) for key in own)


@pytest.mark.parametrize("schemes", [["UNQUANTIZED"], ["FP8"], ["NVFP4A16"]])
def test_transformers_computes_with_a_cache_of_fp8(
    schemes: list[str], mini: Path, tmp_path: Path
) -> None:
    """It loads every scale and gives the decoded model's logits but for its cache's rounding."""
    from compressed_tensors.quantization import QuantizationConfig

    folder = make(mini, tmp_path / "out", *schemes, kv_cache="fp8", **WINDOWS).paths[0]
    scheme = QuantizationConfig.model_validate(settings(folder)).kv_cache_scheme
    assert (scheme.num_bits, scheme.type, scheme.strategy) == (8, "float", "tensor")
    assert (scheme.dynamic, scheme.symmetric) == (False, True)
    decoded = quantcli.quantize(folder, tmp_path / "decoded", to="hf", type="F32").paths[0]
    load = transformers.AutoModelForCausalLM.from_pretrained
    model, told = load(folder, dtype=torch.bfloat16, output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    attention = model.model.layers[2].self_attn
    stored = tensors(folder)["model.layers.2.self_attn.k_scale"]
    assert torch.equal(attention.k_scale.data.reshape(1), stored)
    tokens = torch.tensor([TOKENS])
    with torch.inference_mode():
        ours = model(tokens).logits.float()
        wanted = load(decoded, dtype=torch.bfloat16)(tokens).logits.float()
    assert 0 < float((ours - wanted).norm() / wanted.norm()) < 0.03


def test_a_statistics_file_gives_the_same_folder(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source = checkpoint("llama")
    quantcli.calibrate(
        source, TEXT, output=tmp_path / "m.calib.gguf", chunks=2, collect="min_max,kv_max"
    )
    for name in ("FP8", "W8A8_STATIC_ASYM"):
        one = make(source, tmp_path / f"{name}-a", name, kv_cache="fp8", range="minmax", **WINDOWS)
        other = make(
            source, tmp_path / f"{name}-b", name, kv_cache="fp8", range="minmax",
            statistics=tmp_path / "m.calib.stats.safetensors",
        )  # fmt: skip
        both = [tensors(done.paths[0]) for done in (one, other)]
        assert both[0].keys() == both[1].keys()
        for key, value in both[0].items():
            assert torch.equal(value.view(torch.uint8), both[1][key].view(torch.uint8)), key


def test_scales_are_of_the_transformed_model(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoint("llama")
    options = {"method": "smoothquant", **WINDOWS}
    folder = make(source, tmp_path / "out", activations="int8:static", **options).paths[0]
    moved = quantcli.quantize(folder, tmp_path / "moved", to="hf", type="F32").paths[0]
    found = tensors(folder)
    own, plain = (Seen(path, windows(source), monkeypatch) for path in (moved, source))
    module = "model.layers.0.self_attn.q_proj"
    scale = float(found[f"{module}.input_scale"]) * 127.5
    # No rounding comes before the first layer's attention.
    assert scale == pytest.approx(own.largest(module), rel=1e-4)
    assert scale != pytest.approx(plain.largest(module), rel=0.01)


def test_experts_that_saw_little_take_the_widest_of_their_layer(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoint("qwen3-moe")
    done = make(source, tmp_path / "out", "FP8", **WINDOWS)
    found = tensors(done.paths[0])
    few = [
        note.message for note in done.notes if "experts saw fewer than 512 tokens" in note.message
    ]
    assert few
    scales = {
        key: float(value) for key, value in found.items()
        if "layers.0.mlp.experts" in key and key.endswith("gate_proj.input_scale")
    }  # fmt: skip
    assert len(scales) > 2
    from safetensors.numpy import load_file

    seen = load_file(tmp_path / "out.calib.stats.safetensors")
    counts = seen["blk.0.ffn_gate_exps.weight.counts"]
    low, high = (seen[f"blk.0.ffn_gate_exps.weight.{kind}"] for kind in ("min", "max"))
    largest = np.maximum(np.abs(low), high).max(1)
    assert (counts < 512).any()
    for index, count in enumerate(counts):
        wanted = largest.max() if count < 512 else largest[index]
        scale = scales[f"model.layers.0.mlp.experts.{index}.gate_proj.input_scale"]
        assert scale == pytest.approx(wanted / 448, rel=1e-5)


def test_a_dry_run_knows_the_exact_size(mini: Path, tmp_path: Path) -> None:
    options = {"kv_cache": "fp8", "range": "minmax"}
    planned = make(mini, tmp_path / "out", "NVFP4", dry_run=True, **options)
    assert any("static scales are found as it runs" in note.message for note in planned.notes)
    made = make(mini, tmp_path / "out", "NVFP4", **WINDOWS, **options)
    weights = planned.document["files"]["model.safetensors"]
    assert weights == (made.paths[0] / "model.safetensors").stat().st_size
    static = planned.document["static_scales"]
    assert (static["activations"], static["caches"]) == (28, 4)


@pytest.mark.parametrize(
    ("schemes", "options", "sentence"),
    [
        (["FP8"], {}, "needs a text to run the model on"),
        (["W4A16"], {"kv_cache": "fp8"}, "--kv-cache needs a text"),
        ([], {"activations": "int8:static"}, "needs a text"),
        ([], {"activations": "int8:statik"}, "--activations int8:statik is not known"),
        (["UNQUANTIZED"], {}, "alone quantizes nothing"),
        (["W4A16"], {"statistics": "x"}, "tells static scales, or .* means, and neither is"),
        (["FP8"], {"statistics": "x", "calibrate": TEXT}, "both tell static scales"),
        (["FP8"], {"statistics": "x", "method": "awq"}, "--method awq changes the activations"),
        (["FP8"], {"to": "gptq"}, "--to gptq has no scheme 'FP8'"),
        ([], {"to": "mlx", "kv_cache": "fp8"}, "--kv-cache is not for --to mlx"),
    ],
)
def test_what_is_refused(
    schemes: list[str], options: dict[str, Any], sentence: str, mini: Path, tmp_path: Path
) -> None:
    with pytest.raises((UsageError, PlanError), match=sentence):
        make(mini, tmp_path / "out", *schemes, **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "modules"),
    [
        ("phi3", ["model.layers.0.self_attn", "model.layers.1.self_attn"]),
        ("qwen35", ["model.layers.3.self_attn"]),
        ("nemotron-h", ["backbone.layers.2.mixer"]),
        ("gemma3-images", [f"model.language_model.layers.{n}.self_attn" for n in range(6)]),
    ],
)
def test_attention_is_found_by_its_names_in_the_checkpoint(
    name: str, modules: list[str], checkpoint: Callable[..., Path]
) -> None:
    from quantcli.model import open_model
    from quantcli.plan.caches import find_caches

    with open_model(checkpoint(name)) as model:
        assert [owner.module for owner in find_caches(model)] == modules


def test_attention_that_servers_name_otherwise(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(PlanError, match="finds no attention in GPTNeoXForCausalLM"):
        make(checkpoint("gptneox"), tmp_path / "out", "UNQUANTIZED", kv_cache="fp8", **WINDOWS)


def test_latent_attention_has_no_such_cache(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(PlanError, match="latent vectors in the cache"):
        make(checkpoint("deepseek-v3"), tmp_path / "out", "UNQUANTIZED", kv_cache="fp8", **WINDOWS)


def test_inputs_that_were_all_zero_are_refused(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """A norm with weights of zero silences what comes after it."""
    import shutil

    from safetensors.torch import save_file

    source = tmp_path / "silent"
    shutil.copytree(checkpoint("llama"), source)
    weights = tensors(source)
    weights["model.layers.1.post_attention_layernorm.weight"][:] = 0
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SourceError, match=r"inputs of model.layers.1.mlp.\w+ were all zero") as no:
        make(source, tmp_path / "out", "FP8", **WINDOWS)
    assert "--keep 'model.layers.1.mlp." in str(no.value.hint)
    assert not (tmp_path / "out").exists()


def test_statistics_of_another_model(
    checkpoint: Callable[..., Path], mini: Path, tmp_path: Path
) -> None:
    quantcli.calibrate(
        checkpoint("llama"), TEXT, output=tmp_path / "m.calib.gguf", chunks=2, collect="min_max"
    )
    with pytest.raises(SourceError, match=r"columns there, and 1 x 768 in the model") as refused:
        make(mini, tmp_path / "out", "FP8", statistics=tmp_path / "m.calib.stats.safetensors")
    assert refused.value.hint == "the statistics belong to another model"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("collected", ["abs_max", "mean_abs", "kv_max"])
def test_a_statistics_file_that_lacks_something(
    collected: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """The largest magnitudes alone serve symmetric scales, and no others."""
    source, path = checkpoint("llama"), tmp_path / "m.calib.gguf"
    quantcli.calibrate(source, TEXT, output=path, chunks=2, collect=collected)
    statistics = tmp_path / "m.calib.stats.safetensors"
    if collected == "abs_max":
        make(source, tmp_path / "out", "FP8", statistics=statistics)
    else:
        with pytest.raises(SourceError, match="has no min of blk"):
            make(source, tmp_path / "out", "FP8", statistics=statistics)
    with pytest.raises(SourceError, match="has no min of blk") as lacking:
        make(source, tmp_path / "other", "W8A8_STATIC_ASYM", statistics=statistics)
    assert "--collect min_max" in str(lacking.value.hint)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["W8A8_STATIC", "W8A8_STATIC_ASYM"])
def test_ranges_of_least_error_are_closer_than_extremes(
    name: str, mini: Path, tmp_path: Path
) -> None:
    """By transformers with compressed-tensors: within 3 % of the norm of a novel's logits."""
    load = transformers.AutoModelForCausalLM.from_pretrained
    windows = {"calibrate": "built-in", "chunks": 16}
    novel = (Path(__file__).parents[1] / "data" / "pride-and-prejudice.txt").read_text()[:9000]
    tokens = transformers.AutoTokenizer.from_pretrained(mini)(novel, return_tensors="pt").input_ids
    tokens, distance = tokens[:, :1024].reshape(2, -1), {}
    for kind in ("mse", "minmax"):
        folder = make(mini, tmp_path / kind, name, range=kind, **windows).paths[0]
        decoded = quantcli.quantize(folder, tmp_path / f"{kind}-f32", to="hf", type="F32").paths[0]
        with torch.inference_mode():
            wanted = load(decoded, dtype=torch.float32)(tokens).logits
            distance[kind] = float(
                (load(folder, dtype=torch.float32)(tokens).logits - wanted).norm() / wanted.norm()
            )
    (group,) = settings(tmp_path / "mse")["config_groups"].values()
    assert group["input_activations"]["observer"] == "mse"
    assert distance["mse"] < 0.03
    assert distance["mse"] < 0.8 * distance["minmax"]


def test_statistics_without_a_histogram_give_extremes_with_a_remark(
    mini: Path, tmp_path: Path
) -> None:
    quantcli.calibrate(mini, TEXT, output=tmp_path / "m.calib.gguf", chunks=1, collect="min_max")
    statistics = tmp_path / "m.calib.stats.safetensors"
    told = make(mini, tmp_path / "mse", "W8A8_STATIC", statistics=statistics, range="mse")
    assert any("has no histogram of the inputs of 28 matrices" in n.message for n in told.notes)
    plain = make(mini, tmp_path / "minmax", "W8A8_STATIC", statistics=statistics, range="minmax")
    assert not any("histogram" in note.message for note in plain.notes)
    ours, wanted = (tensors(done.paths[0]) for done in (told, plain))
    scales = [name for name in wanted if name.endswith("input_scale")]
    assert len(scales) == 28
    assert all(torch.equal(ours[name], wanted[name]) for name in scales)
