"""``quantcli quantize --to``: what it prints, what it refuses before the work, what it leaves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.gguf_files import write_imatrix
from support.model_folders import CHECKPOINT
from support.tiny_models import build

from quantcli.cli.app import run


def call(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    code = run(["quantize", *map(str, args)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("args", "name"),
    [
        (["--to", "compressed-tensors"], "bookworm-mini-compressed-tensors-4bit"),
        (["--to", "compressed-tensors", "--activations", "int8"],
         "bookworm-mini-compressed-tensors-w8a8"),
        (["--to", "gptq", "--bits", "3"], "bookworm-mini-gptq-3bit"),
        (["--to", "MLX"], "bookworm-mini-mlx-4bit"),
        (["--to", "mlx", "--mode", "mxfp4"], "bookworm-mini-mlx-mxfp4"),
        (["--to", "fp8"], "bookworm-mini-fp8_block"),
        (["--to", "compressed-tensors", "--scheme", "FP8_DYNAMIC"],
         "bookworm-mini-compressed-tensors-fp8_dynamic"),
        (["--to", "compressed-tensors", "--bits", "4", "--activations", "fp8"],
         "bookworm-mini-compressed-tensors-w4afp8"),
        (["--to", "compressed-tensors", "--scheme", "mlp=NVFP4A16", "--scheme", "W8A16"],
         "bookworm-mini-compressed-tensors-mixed"),
        (["--to", "hf", "--bits", "5"], "bookworm-mini-hf-Q5_K_M"),
    ],
)  # fmt: skip
def test_quiet_prints_the_folder_alone(capsys, tmp_path, args, name):
    assert call(capsys, CHECKPOINT, *args, "-q") == (0, f"{name}\n", "")
    files = {path.name for path in (tmp_path / name).iterdir()}
    assert files == {
        "README.md", "config.json", "generation_config.json", "model.safetensors",
        "quantcli.json", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_the_dry_run_is_exact(capsys, tmp_path):
    args = [CHECKPOINT, "--to", "gptq", "--max-shard-size", "1M", "--keep", "o_proj", "-o", "made"]
    code, out, _ = call(capsys, *args, "--dry-run", "--json")
    planned = json.loads(out)
    assert (code, list(tmp_path.iterdir())) == (0, [])
    code, out, _ = call(capsys, *args, "--json")
    done = json.loads(out)
    assert done["paths"] == planned["paths"] == ["made"]
    assert done["bytes"] == planned["bytes"]
    assert done["bits_per_weight"] == planned["bits_per_weight"]
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "made").iterdir()}
    assert sizes == planned["files"]
    assert len([name for name in sizes if name.startswith("model-")]) == 4
    tensors = {tensor["name"]: tensor for tensor in planned["tensors"]}
    assert tensors["model.layers.0.self_attn.o_proj.weight"]["type"] == "BF16"
    assert tensors["model.layers.0.self_attn.q_proj"]["type"] == "int4 g128"
    headers = sum(
        8 + int.from_bytes((tmp_path / "made" / name).read_bytes()[:8], "little")
        for name in sizes
        if name.startswith("model-")
    )
    weights = sum(size for name, size in sizes.items() if name.startswith("model-"))
    assert sum(tensor["bytes"] for tensor in tensors.values()) == weights - headers


def test_the_printed_recipe_makes_the_same_folder(capsys, tmp_path):
    args = ["--to", "gptq-v2", "--bits", "8", "--group-size", "channel", "--asymmetric"]
    _, recipe, _ = call(capsys, CHECKPOINT, *args, "--keep", "k_proj", "--print-recipe")
    Path("recipe.toml").write_text(recipe)
    assert "type" not in recipe
    call(capsys, CHECKPOINT, *args, "--keep", "k_proj", "-o", "a")
    call(capsys, CHECKPOINT, "--recipe", "recipe.toml", "-o", "b")
    for path in Path("a").iterdir():
        assert path.read_bytes() == (Path("b") / path.name).read_bytes()


def test_flags_win_over_a_recipe(capsys):
    Path("recipe.toml").write_text('to = "mlx"\nbits = 8\n')
    code, out, _ = call(
        capsys, CHECKPOINT, "--recipe", "recipe.toml", "--bits", 3, "--print-recipe"
    )
    assert (code, out) == (0, 'to = "mlx"\nbits = 3\n')


def test_asymmetric_compressed_tensors_are_explained(capsys):
    code, _, err = call(capsys, CHECKPOINT, "--to", "compressed-tensors", "--asymmetric")
    assert code == 0
    assert "CompressedTensorsConfig(dequantize=True)" in err
    assert "dequantize" not in call(capsys, CHECKPOINT, "--to", "compressed-tensors")[2]


USAGE = {
    "unknown format": (["--to", "gptk"], "there is no output format named 'gptk'", "gptq"),
    "bits of gptq": (["--to", "gptq", "--bits", "5"], "has no 5-bit weights", "2, 3, 4, 8"),
    "bits of awq": (["--to", "awq", "--bits", "8"], "--to awq has no 8-bit weights", "it has 4"),
    "bits of mlx": (["--to", "mlx", "--bits", "7"], "--to mlx has no 7-bit weights", "5, 6, 8"),
    "bits of w8a8": (
        ["--to", "compressed-tensors", "--activations", "int8", "--bits", "6"],
        "has no 6-bit weights with int8 activations", "it has 8",
    ),
    "symmetric awq": (["--to", "awq", "--symmetric"], "--to awq has no symmetric", "leave it out"),
    "symmetric mlx": (["--to", "mlx", "--symmetric"], "--to mlx has no symmetric", "leave it out"),
    "asymmetric w8a8": (
        ["--to", "compressed-tensors", "--activations", "int8", "--asymmetric"],
        "with int8 activations has no asymmetric", "leave it out",
    ),
    "groups of w8a8": (
        ["--to", "compressed-tensors", "--activations", "int8", "--group-size", "128"],
        "--group-size 128 is not for --to compressed-tensors", "one of: channel, tensor",
    ),
    "groups of mlx": (["--to", "mlx", "--group-size", "16"], "16 is not for", "32, 64, 128"),
    "groups of gptq": (["--to", "gptq", "--group-size", "tensor"], "tensor is not", "channel"),
    "groups of none": (["--to", "gptq", "--group-size", "0"], "--group-size 0 is not", "channel"),
    "groups of words": (["--to", "gptq", "--group-size", "many"], "many is not", "channel"),
    "activations of gptq": (
        ["--to", "gptq", "--activations", "int8"],
        "--activations is not for --to gptq", "for: compressed-tensors",
    ),
    "other activations": (
        ["--to", "compressed-tensors", "--activations", "int2"], "--activations int2",
        "int8, int8:asymmetric",
    ),
    "bits of FP8": (
        ["--to", "compressed-tensors", "--activations", "fp8", "--bits", "6"],
        "no 6-bit weights with fp8 activations", "4 and 8",
    ),
    "type of gptq": (["--to", "gptq", "--type", "Q4_0"], "--type is not for", "for: gguf, hf"),
    "groups of gguf": (["--group-size", "32"], "--group-size is not for --to gguf", "gptq, "),
    "methods": (
        ["--to", "hf", "--method", "gptq", "--calibrate", "x"],
        "gptq is not for --to hf",
        "for: gguf",
    ),
    "range": (["--to", "gptq", "--range", "best"], "--range best is not one of", ""),
    "range without": (["--to", "gptq", "--range", "imatrix"], "needs an importance", "--imatrix"),
    "dtype": (["--to", "gptq", "--dtype", "F8"], "--dtype F8 is not one of BF16, F16, F32", ""),
    "keys": (["--to", "hf", "--override-kv", "a=int:1"], "--override-kv is not for", "for: gguf"),
}  # fmt: skip


@pytest.mark.parametrize("case", USAGE)
def test_what_is_wrong_by_itself(capsys, tmp_path, case):
    args, message, hint = USAGE[case]
    code, out, err = call(capsys, CHECKPOINT, *args)
    assert (code, out) == (2, "")
    assert message in err
    assert hint in err
    assert err.count("\n") <= 2
    assert list(tmp_path.iterdir()) == []


def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path, *args: object) -> str:
    before = sorted(tmp_path.rglob("*"))
    code, out, err = call(capsys, *args)
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    assert err.count("\n") <= 2
    assert sorted(tmp_path.rglob("*")) == before
    return err


def test_groups_that_do_not_divide(capsys, tmp_path):
    model = build("llama-tied", tmp_path / "model")
    stop = ("--on-fallback", "error")
    err = refused(capsys, tmp_path, model, "--to", "compressed-tensors", *stop)
    assert "groups of 128 do not divide the 64 columns of model.layers.0." in err
    # 64 divides these columns, but not the 96 below.
    assert "--group-size 32 does" in err
    err = refused(capsys, tmp_path, model, "--to", "gptq", "--group-size", "64", *stop)
    assert "the 96 columns of model.layers.0.mlp.down_proj.weight" in err
    assert "--group-size 32 does" in err


def test_weights_that_are_stored_transposed(capsys, tmp_path):
    model = build("gpt2", tmp_path / "model")
    err = refused(capsys, tmp_path, model, "--to", "awq")
    assert "is stored transposed, which --to awq does not do" in err


def test_a_gguf(capsys, tmp_path):
    call(capsys, CHECKPOINT, "--type", "Q8_0", "-o", "mini.gguf")
    err = refused(capsys, tmp_path, "mini.gguf", "--to", "gptq")
    assert "mini.gguf is a GGUF, and --to gptq takes a checkpoint" in err
    assert "export" in err


def test_modules_to_keep_that_are_not_there(capsys, tmp_path):
    err = refused(capsys, tmp_path, CHECKPOINT, "--to", "gptq", "--keep", "experts")
    assert "--keep experts matches no linear module" in err


@pytest.mark.parametrize("pattern", ["(", "*"])
def test_a_pattern_that_is_none(capsys, pattern):
    code, _, err = call(capsys, CHECKPOINT, "--to", "gptq", "--keep", pattern)
    assert code == 2
    assert f"--keep {pattern} is not a regular expression" in err


def test_an_importance_matrix_of_another_model(capsys, tmp_path):
    import numpy as np

    one = np.ones((1, 1), np.float32)
    entry = {"blk.0.attn_q.weight": (np.ones((1, 300), np.float32), one)}
    matrix = write_imatrix(tmp_path / "imatrix.gguf", entry)
    err = refused(capsys, tmp_path, CHECKPOINT, "--to", "gptq", "--imatrix", matrix)
    assert "does not fit the tensor: expected 256 weights, found 300 weights" in err


def test_a_folder_that_is_there(capsys, tmp_path):
    target = tmp_path / "made"
    assert call(capsys, CHECKPOINT, "--to", "gptq", "-o", target)[0] == 0
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    err = refused(capsys, tmp_path, CHECKPOINT, "--to", "awq", "-o", target)
    assert f"{target} exists already" in err
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    assert call(capsys, CHECKPOINT, "--to", "awq", "-o", target, "--force")[0] == 0
    assert json.loads((target / "quantcli.json").read_text())["to"] == "awq"
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_a_folder_that_is_not_ours_is_never_replaced(capsys, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    err = refused(capsys, tmp_path, CHECKPOINT, "--to", "gptq", "-o", "thesis", "--force")
    assert "thesis is not a folder that quantcli wrote" in err
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"


def test_the_model_itself_is_never_replaced(capsys, tmp_path):
    assert call(capsys, CHECKPOINT, "--to", "hf", "--type", "BF16", "-o", "made")[0] == 0
    err = refused(capsys, tmp_path, "made", "--to", "gptq", "-o", "made", "--force")
    assert "made holds the model itself" in err


def test_a_full_disk_is_seen_before_the_work(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("quantcli.plan.budget.free_disk", lambda path: 1000)
    err = refused(capsys, tmp_path, CHECKPOINT, "--to", "gptq", "-o", "made")
    assert "not enough disk" in err
    assert "1,000 bytes free" in err


def test_too_little_memory_is_seen_before_the_work(capsys, tmp_path):
    err = refused(capsys, tmp_path, CHECKPOINT, "--to", "gptq", "--max-memory", "1M")
    assert "bytes of memory even on one thread" in err


@pytest.mark.parametrize("to", ["compressed-tensors", "gptq", "awq"])
@pytest.mark.parametrize(
    ("pattern", "together"),
    [
        ("k_proj", ("q_proj", "k_proj", "v_proj")),
        (r"layers\.1\..*up_proj", ("gate_proj", "up_proj")),
    ],
)
def test_what_servers_fuse_is_kept_together(to, pattern, together, capsys, tmp_path):
    """vLLM refuses a folder in which the parts of one matrix have different schemes."""
    from safetensors import safe_open

    code, _, err = call(capsys, CHECKPOINT, "--to", to, "--keep", pattern, "-o", tmp_path / "out")
    assert code == 0
    assert "are kept as they are, because vLLM and SGLang run them as one" in " ".join(err.split())
    with safe_open(tmp_path / "out" / "model.safetensors", "np") as file:
        names = set(file.keys())
    for part in together:
        assert any(name.endswith(f"layers.1.{_block(part)}.{part}.weight") for name in names)
    layer = 0 if "layers" in pattern else 1
    assert not any(name.endswith(f"layers.{layer}.mlp.down_proj.weight") for name in names)


def _block(part: str) -> str:
    return "self_attn" if part in ("q_proj", "k_proj", "v_proj") else "mlp"


def test_a_group_that_divides_nothing_is_answered_by_a_hint_that_works(capsys, tmp_path):
    source = tmp_path / "m"
    pytest.importorskip("transformers")
    from support.tiny_models import build

    build("llama", source, changes={"intermediate_size": 608}, dtype="bfloat16")
    stop = ("--on-fallback", "error")
    code, _, err = call(capsys, source, "--to", "compressed-tensors", *stop, "-o", tmp_path / "a")
    assert code == 1
    hint = " ".join(err.split())
    pattern = hint.partition("--keep '")[2].partition("'")[0]
    assert "--group-size 32 does" in hint
    code, _, _ = call(
        capsys, source, "--to", "compressed-tensors", "--keep", pattern, "-o", tmp_path / "b"
    )
    assert code == 0
    code, _, err = call(capsys, source, "--to", "mlx", *stop, "-o", tmp_path / "c")
    assert code == 1
    assert "--group-size 32 does" in " ".join(err.split())
