"""Transforms in model folders: the checkpoint's own tensors, as transformers reads them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from support import tiny_models
from support.folds import random_folds, random_orders
from support.model_folders import CHECKPOINT, TEXT
from support.transformed_logits import transformers_logits

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")

import torch
import transformers

from quantcli.artifacts.model_folder import prepare_folder
from quantcli.artifacts.write import write_artifact
from quantcli.cli.app import run as quantcli
from quantcli.errors import ArchitectureError, SourceError
from quantcli.events import drain
from quantcli.layerwise.texts import Text
from quantcli.model import Model, open_model
from quantcli.plan.recipe import Recipe
from quantcli.rounding.options import Options, Outcome
from quantcli.run.calibrated_run import begin_rounding, prepare_run, round_tensors
from quantcli.run.find_transforms import find_transforms
from quantcli.run.folder_codes import stored_codes
from quantcli.run.methods import parse_methods
from quantcli.run.text_statistics import text_statistics
from quantcli.transforms.norm_limits import fit_norms
from quantcli.transforms.rotate import rotate
from quantcli.transforms.transformed_checkpoint import as_checkpoint
from quantcli.transforms.transformed_model import apply_transform

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

NOISE = 2e-5
"""Of the logits' deviation, from float32 weights; measured: at most 6e-6."""

STRUCTURES = [
    "llama", "llama-tied", "llama-biases", "llama-llama3", "mistral", "mixtral", "mixtral-stacked",
    "qwen2", "qwen3", "qwen3-moe", "gemma2", "gemma3-full", "gemma3-images", "phi3", "gpt2",
]  # fmt: skip
NORM_ENDINGS = ("norm.weight", "ln_1.weight", "ln_2.weight", "ln_f.weight")
_WORDS = TEXT.read_text()
KNOWN, UNSEEN = _WORDS[:-8000], _WORDS[-8000:]


def _load(folder: Path, **options: object) -> torch.nn.Module:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model, told = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, **options
    )
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    return model.eval()


@torch.inference_mode()
def _logits(folder: Path) -> NDArray[np.float64]:
    model = _load(folder, dtype=torch.float64, experts_implementation="eager")
    ids = np.random.default_rng(0).integers(2, 4000, 40)
    found: NDArray[np.float64] = model(torch.tensor(ids[None])).logits[0].numpy()
    return found


def _write(model: Model, output: Path, **recipe: object) -> None:
    for _ in write_artifact(prepare_folder(model, Recipe(**recipe), output), threads=2):
        pass


@pytest.mark.parametrize("name", STRUCTURES)
def test_a_transformed_folder_gives_transformers_the_same_logits(
    checkpoint: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    source, output = checkpoint(name), tmp_path / "made"
    with open_model(source, vocabulary=False) as model:
        changed = model
        if not name.startswith(("gemma", "gpt2")):
            changed = apply_transform(changed, rotate(changed, seed=3))
        changed = apply_transform(changed, random_orders(changed))
        _write(as_checkpoint(changed), output, to="hf", type="F32")
    expected, found = _logits(source), _logits(output)
    assert expected.std() > 1, "flat logits would hide a fault"
    assert np.abs(found - expected).max() / expected.std() < NOISE
    before, after = (load_file(f / "model.safetensors") for f in (source, output))
    changed_names = [n for n in before if n in after and not np.array_equal(before[n], after[n])]
    assert len(changed_names) >= 8


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "qwen3-moe"])
def test_scales_move_to_what_a_norm_holds_in_sixteen_bits(
    checkpoint: Callable[..., Path], name: str
) -> None:
    ids = list(range(300, 340))
    with open_model(checkpoint(name, "bfloat16"), vocabulary=False) as model:
        wanted = random_folds(model)
        moved = fit_norms(model, wanted, dict.fromkeys(model.store.tensors, "BF16"))
        changed = as_checkpoint(apply_transform(model, moved))
        norms = [n for n in changed.store.uses if n.endswith(NORM_ENDINGS)]
        assert len(norms) >= 4
        lost = {"moved": 0.0, "wanted": 0.0}
        for what, transform in (("moved", moved), ("wanted", wanted)):
            store = as_checkpoint(apply_transform(model, transform)).store
            for norm in norms:
                rows = store.read_rows(norm, 0, 1)
                error = np.abs(rows.astype(ml_dtypes.bfloat16).astype(np.float32) - rows)
                lost[what] = max(lost[what], float(error.max()))
        assert lost["moved"] < 1e-6 < 1e-3 < lost["wanted"]
        expected, found = (transformers_logits(one, ids) for one in (model, changed))
    assert np.abs(found - expected).max() / expected.std() < NOISE
    operations = moved.operations
    ratios = [operations[n].columns / o.columns for n, o in wanted.operations.items()
              if o.columns is not None and operations[n].columns is not o.columns]  # fmt: skip
    assert ratios
    assert np.median(np.abs(np.concatenate(ratios, axis=None) - 1)) < 0.01


def _quantize(source: Path, output: Path, *args: str, code: int = 0) -> None:
    data = ["--calibrate", str(TEXT), "--chunks", "4"] if "--method" in args else []
    args = ("quantize", str(source), *args, *data, "-o", str(output), "-q", "-t", "2")
    assert quantcli(list(args)) == code


@torch.inference_mode()
def _scores(model: torch.nn.Module) -> torch.Tensor:
    tokenizer = transformers.AutoTokenizer.from_pretrained(CHECKPOINT)
    ids = torch.tensor(tokenizer(UNSEEN)["input_ids"])
    windows = ids[: len(ids) // 128 * 128].view(-1, 128)
    return torch.log_softmax(model(windows).logits.float(), -1)


def _divergence(original: torch.Tensor, folder: Path) -> float:
    found = _scores(_load(folder, dtype=torch.float32))
    return float((original.exp() * (original - found)).sum(-1).mean())


@pytest.fixture(scope="module")
def original() -> torch.Tensor:
    return _scores(_load(CHECKPOINT, dtype=torch.float32))


@pytest.fixture(scope="module")
def outliers(original: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Channels behind norms that are 64 times larger, the function being the same."""
    source = tmp_path_factory.mktemp("outliers")
    for path in CHECKPOINT.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    stored = load_file(CHECKPOINT / "model.safetensors")
    readers = {
        "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
    }
    for layer in range(4):
        for number, (norm, names) in enumerate(readers.items()):
            outliers = np.random.default_rng(2 * layer + number).choice(256, 3, replace=False)
            stored[f"model.layers.{layer}.{norm}.weight"][outliers] *= 64
            for name in names:
                stored[f"model.layers.{layer}.{name}.weight"][:, outliers] /= 64
    save_file(stored, source / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(_scores(_load(source, dtype=torch.float32)), original)
    return source


def test_awq_makes_a_better_folder_of_the_same_layout(
    original: torch.Tensor, outliers: Path, tmp_path: Path
) -> None:
    grid = ("--to", "compressed-tensors", "--range", "minmax")
    _quantize(outliers, tmp_path / "plain", *grid)
    _quantize(outliers, tmp_path / "awq", *grid, "--method", "awq")
    assert _divergence(original, tmp_path / "awq") < 0.95 * _divergence(
        original, tmp_path / "plain"
    )
    shapes = [
        {n: (w.dtype, w.shape) for n, w in load_file(tmp_path / name / "model.safetensors").items()}
        for name in ("plain", "awq")
    ]
    assert shapes[0] == shapes[1]
    manifest = json.loads((tmp_path / "awq" / "quantcli.json").read_text())
    assert [entry["method"] for entry in manifest["transforms"]] == ["reorder", "awq"]
    assert 'range = "minmax"' in manifest["recipe"]


def test_a_rotated_folder_has_a_head_of_its_own(
    original: torch.Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["quantize", str(CHECKPOINT), "--to", "compressed-tensors", "--bits", "8"]
    args += ["--method", "rotate", "--calibrate", str(TEXT), "--chunks", "4"]
    assert quantcli([*args, "-o", str(tmp_path / "made")]) == 0
    said = capsys.readouterr().err
    assert "2 matrices that are not quantized were transformed and are rounded to BF16" in said
    assert json.loads((CHECKPOINT / "config.json").read_text())["tie_word_embeddings"]
    assert (
        json.loads((tmp_path / "made" / "config.json").read_text())["tie_word_embeddings"] is False
    )
    stored = load_file(tmp_path / "made" / "model.safetensors")
    head, embedding = stored["lm_head.weight"], stored["model.embed_tokens.weight"]
    assert head.dtype == embedding.dtype == ml_dtypes.bfloat16
    assert not np.array_equal(head, embedding)
    assert (stored["model.norm.weight"] == 1).all()
    # Head and embedding are rotated and rounded to bfloat16 again, which costs about 1e-4.
    assert _divergence(original, tmp_path / "made") < 1e-3


def test_smoothquant_takes_outliers_from_eight_bit_activations(
    original: torch.Tensor, outliers: Path, tmp_path: Path
) -> None:
    grid = ("--to", "compressed-tensors", "--activations", "int8")
    _quantize(outliers, tmp_path / "plain", *grid)
    _quantize(outliers, tmp_path / "smooth", *grid, "--method", "smoothquant")
    plain, smooth = (_divergence(original, tmp_path / name) for name in ("plain", "smooth"))
    assert smooth < 0.1 * plain


def _run(
    model: Model, path: Path, method: str, *, stop: int | None = None, resume: bool = False
) -> None:
    """What the command does; ``stop`` ends the rounding after so many outcomes."""
    planned = prepare_run(model, [Text("a text", KNOWN)], ctx=64, chunks=8)
    recipe = Recipe(to="gptq", method=method, group_size=32)
    job = prepare_folder(model, recipe, path, importance=planned.importance)
    chain = parse_methods(method)
    with text_statistics(path, max_memory=1 << 30, threads=2) as statistics:
        found = find_transforms(planned, chain, job.plan, statistics, threads=2)
        moved, _ = drain(found, lambda event: None)
    planned = planned.with_model(as_checkpoint(moved))
    job = prepare_folder(planned.model, recipe, path, importance=planned.importance)
    encoding = begin_rounding(planned, job.plan, path, Options(), threads=2, resume=resume)
    events = round_tensors(encoding)
    outcomes = 0
    for event in events:
        outcomes += isinstance(event, Outcome)
        if outcomes == stop:
            break
    else:
        for _ in write_artifact(replace(job, codes=stored_codes(job, encoding.store)), threads=2):
            pass
        encoding.checkpoint.remove()
    events.close()
    encoding.store.close()


def test_an_interrupted_run_searches_again_and_goes_on(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    method = "rotate,awq,gptq"
    with open_model(checkpoint("llama-tied", "bfloat16"), vocabulary=False) as model:
        _run(model, tmp_path / "once", method)
        path = tmp_path / "twice"
        _run(model, path, method, stop=9)
        assert not path.exists()
        with pytest.raises(SourceError, match="model"):
            _run(model, path, "rotate,gptq", resume=True)
        _run(model, path, method, resume=True)
    for name in ("model.safetensors", "quantcli.json", "config.json"):
        assert (path / name).read_bytes() == (tmp_path / "once" / name).read_bytes()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["once", "twice"]
    stored = load_file(path / "model.safetensors")
    assert "lm_head.weight" in stored
    assert "model.layers.1.mlp.down_proj.qweight" in stored


REFUSED = {
    "trained": (["--to", "gptq", "--method", "awq,tune"], "--method awq,tune is not for --to gptq"),
    "decoded": (["--to", "hf", "--method", "awq,gptq"], "--method awq,gptq is not for --to hf"),
    "range": (["--to", "mlx", "--method", "awq,gptq", "--range", "mse"], "--range is not for"),
    "order": (
        ["--to", "mlx", "--method", "rotate,smoothquant"],
        "smoothquant after rotate finds no outlier channels",
    ),
    "one scale": (
        ["--to", "compressed-tensors", "--group-size", "tensor", "--method", "awq"],
        "one scale for a whole tensor leaves nothing to gain",
    ),
}


PLANNED = ("order", "one scale")


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(capsys: pytest.CaptureFixture[str], tmp_path: Path, case: str) -> None:
    args, message = REFUSED[case]
    _quantize(CHECKPOINT, tmp_path / "made", *args, code=1 if case in PLANNED else 2)
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_architecture_that_cannot_be_rotated_is_refused(tmp_path: Path) -> None:
    source = tiny_models.build("gemma2", tmp_path / "model")
    with open_model(source, vocabulary=False) as model:
        planned = prepare_run(model, [Text("a text", KNOWN)], ctx=128, chunks=2)
        recipe = Recipe(to="gptq", method="rotate", group_size=32)
        plan = prepare_folder(model, recipe, tmp_path / "made", importance=planned.importance).plan
        with (
            text_statistics(tmp_path / "made", max_memory=1 << 30, threads=1) as statistics,
            pytest.raises(ArchitectureError, match="cannot be rotated, because"),
        ):
            list(find_transforms(planned, parse_methods("rotate"), plan, statistics, threads=1))
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]
