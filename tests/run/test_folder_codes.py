"""Model folders whose codes a method chose: what runtimes read, and how a broken run goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from support import tiny_models
from support.model_folders import CHECKPOINT, TEXT, linear_names, make_folder

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")

import torch
import transformers

from quantcli.api.quantize import quantize
from quantcli.artifacts.model_folder import ModelFolder, prepare_folder
from quantcli.artifacts.write import write_artifact
from quantcli.cli.app import run as quantcli
from quantcli.errors import OutputError, SourceError, UsageError
from quantcli.layerwise.texts import Text
from quantcli.model import Model, open_model
from quantcli.plan.recipe import Recipe
from quantcli.rounding.options import Options, Outcome
from quantcli.rounding.run_store import EncodedStore
from quantcli.run.calibrated_run import begin_rounding, prepare_run, round_tensors
from quantcli.run.folder_codes import stored_codes

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

_WORDS = TEXT.read_text()
KNOWN, UNSEEN = _WORDS[:-8000], _WORDS[-8000:]


@dataclass
class Run:
    """One run's folder, its outcomes, and the weights that its codes stand for."""

    path: Path
    outcomes: list[Outcome]
    weights: dict[str, np.ndarray]


def _run(
    model: Model, path: Path, *, to: str = "compressed-tensors", options: Options | None = None,
    chunks: int = 16, stop: int | None = None, resume: bool = False, **recipe: object,
) -> Run:  # fmt: skip
    """Make a folder; ``stop`` ends the run after so many outcomes, as an interrupt does."""
    planned = prepare_run(model, [Text("a text", KNOWN)], ctx=128, chunks=chunks)
    wanted = Recipe(to=to, method="gptq", **recipe)
    job = prepare_folder(model, wanted, path, importance=planned.importance)
    encoding = begin_rounding(
        planned, job.plan, path, options or Options(), dtype="float32", resume=resume
    )
    events, outcomes, weights = round_tensors(encoding), [], {}
    for event in events:
        if isinstance(event, Outcome):
            outcomes.append(event)
        if len(outcomes) == stop:
            break
    else:
        for _ in write_artifact(replace(job, codes=stored_codes(job, encoding.store)), threads=2):
            pass
        weights = _weights(job, encoding.store)
        encoding.checkpoint.remove()
    events.close()
    encoding.store.close()
    return Run(path, outcomes, weights)


def _weights(job: ModelFolder, store: EncodedStore) -> dict[str, np.ndarray]:
    codes, found = stored_codes(job, store), {}
    for item in job.plan.items:
        rows = np.zeros((item.rows, item.columns), np.float32)
        found[item.matrix.module] = item.scheme.grid.dequantize(codes(item.matrix, 0, rows))
    return found


@pytest.fixture(scope="module")
def mini() -> Iterator[Model]:
    with open_model(CHECKPOINT, vocabulary=False) as model:
        yield model


@pytest.fixture(scope="module")
def whole(mini: Model, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return _run(mini, tmp_path_factory.mktemp("whole") / "made", chunks=40)


def _load(folder: Path) -> torch.nn.Module:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


@torch.inference_mode()
def _scores(model: torch.nn.Module) -> torch.Tensor:
    tokenizer = transformers.AutoTokenizer.from_pretrained(CHECKPOINT)
    ids = torch.tensor(tokenizer(UNSEEN)["input_ids"])
    windows = ids[: len(ids) // 128 * 128].view(-1, 128)
    return torch.log_softmax(model(windows).logits.float(), -1)


def test_transformers_runs_what_was_rounded(whole: Run, tmp_path: Path) -> None:
    found = _scores(_load(whole.path))
    model = _load(CHECKPOINT)
    original = _scores(model)
    state = {f"{n}.weight": torch.from_numpy(w).bfloat16() for n, w in whole.weights.items()}
    assert len(state) == len(linear_names(dict(model.named_parameters()))) == 28
    for name, weight in state.items():
        own = model.get_parameter(name).detach().float()
        # Each row in its own place: feedback moves a weight by a few steps of its grid.
        near = torch.nn.functional.cosine_similarity(own, weight.float(), dim=1)
        assert near.min() > 0.9, name
    model.load_state_dict(state, strict=False)
    assert torch.equal(_scores(model), found)
    make_folder(CHECKPOINT, tmp_path / "nearest", to="compressed-tensors")
    nearest = _scores(_load(tmp_path / "nearest"))

    def divergence(scores: torch.Tensor) -> float:
        return float((original.exp() * (original - scores)).sum(-1).mean())

    assert divergence(found) < 0.6 * divergence(nearest)


def test_every_matrix_has_an_outcome_and_the_manifest_its_method(whole: Run) -> None:
    assert len(whole.outcomes) == 28
    assert all(o.after <= o.before for o in whole.outcomes)
    assert {(o.format, o.method) for o in whole.outcomes} == {("int4 g128", "gptq")}
    manifest = json.loads((whole.path / "quantcli.json").read_text())
    assert 'method = "gptq"' in manifest["recipe"]


def _same(one: Path, other: Path) -> bool:
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


@pytest.mark.parametrize("propagate", [False, True])
def test_an_interrupted_run_goes_on(mini: Model, tmp_path: Path, propagate: bool) -> None:
    options = Options(propagate=propagate)
    once = _run(mini, tmp_path / "once", options=options)
    path = tmp_path / "twice"
    _run(mini, path, options=options, stop=16)
    assert not path.exists()
    with pytest.raises(OutputError, match="interrupted"):
        _run(mini, path, options=options)
    with pytest.raises(SourceError, match="choice of types"):
        _run(mini, path, options=options, resume=True, group_size=64)
    _run(mini, path, options=options, resume=True)
    assert _same(path, once.path)
    assert sorted(tmp_path.iterdir()) == [once.path, path]


@pytest.mark.parametrize(
    ("name", "to", "recipe"),
    [
        ("qwen2", "mlx", {"group_size": 32}),
        ("mixtral", "compressed-tensors", {"group_size": "tensor", "symmetric": False}),
        ("qwen3", "awq", {"group_size": 32}),
        ("phi3", "gptq", {"group_size": 8, "symmetric": False}),
        ("gemma2", "gptq-v2", {"group_size": "channel", "bits": 3}),
        ("llama", "compressed-tensors", {"activations": "int8"}),
        ("qwen35", "compressed-tensors", {"group_size": 16, "symmetric": False}),
        ("qwen35-moe", "gptq", {"group_size": "channel"}),
        ("qwen3-next", "compressed-tensors", {"group_size": 16}),
    ],
)
def test_other_formats_and_architectures(
    tmp_path: Path, name: str, to: str, recipe: dict[str, object]
) -> None:
    """Every row is in its own place: it stays near what it was."""
    source = tiny_models.build(name, tmp_path / "model")
    with open_model(source, vocabulary=False) as model:
        made = _run(model, tmp_path / "made", to=to, chunks=8, **recipe)
    assert made.outcomes
    assert all(o.after <= o.before for o in made.outcomes)
    assert np.mean([o.after / o.before for o in made.outcomes]) < 0.98
    stored = load_file(source / "model.safetensors")
    with open_model(made.path, vocabulary=False) as model:
        names = {f"{module}.weight" for module in made.weights}
        names &= stored.keys() & model.store.tensors.keys()
        assert len(names) >= 8
        for weight in names:
            before = stored[weight].astype(np.float32)
            after = model.store.read_rows(weight, 0, len(before)).astype(np.float32)
            norms = np.linalg.norm(before, axis=1) * np.linalg.norm(after, axis=1)
            assert ((before * after).sum(axis=1) > 0.6 * norms).all(), weight


def test_groups_across_columns_that_gguf_has_elsewhere_are_rounded_to_nearest(
    tmp_path: Path,
) -> None:
    """Heads of 16 values stand by turns in llama.cpp, so that groups of 32 are no neighbours."""
    source = tiny_models.build("qwen35", tmp_path / "model")
    done = quantize(
        source, tmp_path / "made", to="gptq", group_size=32, method="gptq", calibrate=[TEXT],
        chunks=4,
    )  # fmt: skip
    rounded = {row["tensor"] for row in done.document["tensors"]}
    assert "blk.0.attn_qkv.weight" in rounded
    assert "blk.0.ssm_out.weight" not in rounded
    said = [note.message for note in done.notes if "rounded to nearest" in note.message]
    assert len(said) == 1
    assert said[0].startswith("3 matrices such as model.layers.0.linear_attn.out_proj")
    before = load_file(source / "model.safetensors")["model.layers.0.linear_attn.out_proj.weight"]
    with open_model(tmp_path / "made", vocabulary=False) as model:
        after = model.store.read_rows("model.layers.0.linear_attn.out_proj.weight", 0, len(before))
    assert np.abs(after - before).max() < np.abs(before).max() / 7


REFUSED = {
    "decoded": (["--to", "hf", "--method", "gptq"], "--method gptq is not for --to hf"),
    "range": (["--to", "mlx", "--method", "gptq", "--range", "mse"], "--range is not for --method"),
    "alone": (["--to", "gptq", "--sweeps", "3"], "--sweeps belongs to a method"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(capsys: pytest.CaptureFixture[str], tmp_path: Path, case: str) -> None:
    args, message = REFUSED[case]
    code = quantcli(
        ["quantize", str(CHECKPOINT), *args, "--calibrate", str(TEXT), "-o", str(tmp_path / "made")]
    )
    said = capsys.readouterr().err
    assert code == 2
    assert message in said
    assert not list(tmp_path.iterdir())


def test_the_function_does_what_the_command_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tiny_models.build("llama", tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).write_bytes((CHECKPOINT / name).read_bytes())
    cases: dict[str, tuple[list[str], dict[str, object]]] = {
        "folder": (
            ["--to", "gptq", "--group-size", "32", "--method", "awq,gptq"],
            {"to": "gptq", "group_size": 32, "method": "awq,gptq"},
        ),
        "file.gguf": (["--type", "Q4_0", "--method", "gptq"], {"type": "Q4_0", "method": "gptq"}),
    }
    for name, (args, recipe) in cases.items():
        told, called = tmp_path / "told" / name, tmp_path / "called" / name
        for path in (told, called):
            path.parent.mkdir(exist_ok=True)
        data = ["--calibrate", str(TEXT), "--chunks", "2", "-t", "1", "-q", "-o", str(told)]
        assert quantcli(["quantize", str(source), *args, *data]) == 0
        done = quantize(source, called, calibrate=[TEXT], chunks=2, threads=1, **recipe)
        assert done.paths == (called,)
        pairs = [(told, called)]
        if told.is_dir():
            pairs = [(path, called / path.name) for path in told.iterdir()]
        for one, other in pairs:
            assert one.read_bytes() == other.read_bytes(), one.name
        assert [path.name for path in called.parent.iterdir()].count(name) == 1
    capsys.readouterr()


def test_the_function_refuses_what_belongs_to_a_method(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not for --to hf"):
        quantize(CHECKPOINT, tmp_path / "made", to="hf", method="gptq")
    with pytest.raises(UsageError, match="leaves nothing to resume"):
        quantize(CHECKPOINT, tmp_path / "made", to="gptq", method="awq", resume=True)
    assert not list(tmp_path.iterdir())


def test_the_command_lists_every_tensor(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    source = tiny_models.build("llama", tmp_path / "model")
    args = ["quantize", str(source), "--to", "mlx", "--group-size", "32", "--method", "gptq"]
    output = tmp_path / "made"
    # The tiny model has no tokenizer of its own.
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).write_bytes((CHECKPOINT / name).read_bytes())
    code = quantcli([*args, "--calibrate", str(TEXT), "--chunks", "4", "-o", str(output), "--json"])
    told = json.loads(capsys.readouterr().out)
    assert code == 0
    assert {row["tensor"] for row in told["tensors"]} > {"token_embd.weight", "blk.0.ffn_up.weight"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "model"]
