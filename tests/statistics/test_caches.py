"""The largest keys and values equal those that transformers stores in its own cache."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from support.calibrations import TEXT, run

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


def stored_by_transformers(
    folder: Path, windows: Any, monkeypatch: pytest.MonkeyPatch
) -> dict[int, list[Any]]:
    """By layer, the largest |k| and |v| of each head of all that goes into its cache."""
    seen: dict[int, list[Any]] = defaultdict(list)
    update = transformers.Cache.update

    def watch(self: Any, keys: Any, values: Any, layer: int, *args: Any, **kwargs: Any) -> Any:
        seen[layer].append([part.abs().amax((0, 2, 3)) for part in (keys, values)])
        return update(self, keys, values, layer, *args, **kwargs)

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with monkeypatch.context() as patch, torch.inference_mode():
        patch.setattr(transformers.Cache, "update", watch)
        for window in windows:
            model(input_ids=torch.tensor([window.tolist()]), use_cache=True)
    return {
        layer: [torch.stack(part).amax(0).numpy() for part in zip(*found, strict=True)]
        for layer, found in seen.items()
    }


@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "phi3",
        "qwen3-moe",
        "gemma3",
        "qwen35",
        "gemma4-small",
        "gpt-oss",
        "minimax",
        "diffllama",
    ],
)
def test_the_largest_keys_and_values(
    name: str, checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quantcli.layerwise.texts import read_texts
    from quantcli.layerwise.windows import Tokenizer, make_windows
    from quantcli.model import open_model

    folder = checkpoint(name)
    run(folder, tmp_path / "m.gguf", collect=["kv_max"])
    found = load_file(tmp_path / "m.stats.safetensors")
    with open_model(folder, table=False) as model:
        windows = make_windows(Tokenizer(model), read_texts([str(TEXT)]), ctx=64, chunks=6).ids
    expected = stored_by_transformers(folder, windows, monkeypatch)
    assert expected
    for layer, (keys, values) in expected.items():
        assert found[f"blk.{layer}.cache.counts"].tolist() == [windows.size]
        for kind, largest in (("k_max", keys), ("v_max", values)):
            ours = found[f"blk.{layer}.cache.{kind}"]
            np.testing.assert_allclose(ours, largest[None], rtol=1e-4)
    others = {int(key.split(".")[1]) for key in found if ".cache." in key} - expected.keys()
    if name != "gemma4-small":
        assert not others
        return
    # Layers that attend to an earlier one's have that one's.
    assert others
    for layer in others:
        sharer = found[f"blk.{layer}.cache.k_max"]
        assert any(np.array_equal(sharer, found[f"blk.{each}.cache.k_max"]) for each in expected)


def test_merged_statistics_hold_the_extremes_of_all(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    from quantcli.calibration import merge

    folder, parts = checkpoint("llama"), [tmp_path / "a.gguf", tmp_path / "b.gguf"]
    for seed, path in enumerate(parts):
        run(folder, path, collect=["min_max", "kv_max"], chunks=2, seed=seed)
    for _ in merge(parts, tmp_path / "c.gguf"):
        pass
    one, other, both = (load_file(tmp_path / f"{name}.stats.safetensors") for name in "abc")
    assert both["blk.0.cache.counts"] == one["blk.0.cache.counts"] + other["blk.0.cache.counts"]
    for key in ("blk.0.attn_q.weight.max", "blk.1.cache.k_max", "blk.1.cache.v_max"):
        np.testing.assert_array_equal(both[key], np.maximum(one[key], other[key]))
        assert not np.array_equal(one[key], other[key])
    key = "blk.1.ffn_down.weight.min"
    np.testing.assert_array_equal(both[key], np.minimum(one[key], other[key]))
