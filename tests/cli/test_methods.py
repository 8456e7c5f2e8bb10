"""``quantize --method`` as a user meets it: names, refusals, and one whole run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import gguf
import pytest

from quantcli.cli.app import run

pytestmark = pytest.mark.slow

pytest.importorskip("torch")
pytest.importorskip("transformers")

TEXT = Path(__file__).parents[1] / "golden" / "calibration.txt"


def _call(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    code = run(["quantize", *args])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize(
    ("args", "method"),
    [
        (["--quality", "high"], "gptq"),
        (["--quality", "high", "--type", "Q2_K"], "gptq"),
        (["--method", "best", "--type", "IQ3_S"], "gptq"),
        (["--quality", "high", "--to", "awq"], "gptq"),
        (["--quality", "max", "--to", "awq"], "gptq"),
        (["--quality", "max"], "gptq"),
        (["--quality", "good"], "nearest"),
        (["--quality", "high", "--method", "awq"], "awq"),
        (["--quality", "fast"], None),
    ],
)
def test_best_is_what_was_measured_to_win(
    args: list[str], method: str | None, mini: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, shown, _ = _call(capsys, str(mini), *args, "--print-recipe")
    assert code == 0
    assert (f'method = "{method}"' in shown) == (method is not None)
    assert "best" not in shown
    assert ("allocate = true" in shown) == (method in ("gptq", "nearest") and "--to" not in args)
    assert ('tune = "e2e"' in shown) == ("max" in args and "--to" not in args)
    assert ("sample_share = " in shown) == ('tune = "e2e"' in shown)


def test_what_is_given_wins_over_a_quality(mini: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--quality", "max", "--e2e-steps", "7", "--random-share", "0.1", "--print-recipe"]
    args += ["--sample-share", "0"]
    code, shown, _ = _call(capsys, str(mini), *args)
    assert code == 0
    assert "e2e_steps = 7" in shown
    assert "random_share = 0.1" in shown
    assert "sample_share = 0.0" in shown


def test_a_quality_that_a_layout_lacks_is_said(
    mini: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["--quality", "max", "--to", "awq", "--dry-run", "-o", str(tmp_path / "o")]
    code, _, said = _call(capsys, str(mini), *args, "--calibrate", str(TEXT))
    assert code == 0
    assert "--quality max for --to awq is --method gptq alone" in " ".join(said.split())


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--quality", "higher"], "fast or good or high or max"),
        (["--method", "gtpq"], "did you mean gptq"),
        (["--method", "gptq,awq"], "--method awq,gptq"),
        (["--method", "gptq,gptq"], "names gptq twice"),
        (["--method", "gptq", "--imatrix", "m.gguf"], "instead of --imatrix"),
        (["--method", "gptq", "--damping", "2"], "--damping 2 is out of range"),
        (["--method", "gptq", "--tune-steps", "5"], "gptq,tune"),
        (["--sweeps", "2"], "belongs to a method"),
        (["--method", "gptq", "--target-size", "small"], "is not a size"),
        (["--method", "gptq", "--allocate", "--to", "awq"], "allocate"),
        (["--method", "gptq", "--fisher-windows", "-1"], "--fisher-windows -1 is out of range"),
        (["--method", "awq", "--resume"], "nothing to resume"),
        (["--method", "awq,gptq", "--to", "hf"], "--method awq"),
        (["--method", "gptq,tune", "--to", "gptq"], "--method gptq"),
        (["--tune", "e2e"], "add --method gptq"),
        (["--method", "awq", "--tune", "e2e"], "--method awq,gptq"),
        (["--method", "gptq", "--tune", "all"], "tune: invalid enum value 'all'"),
        (["--method", "gptq", "--e2e-steps", "5"], "add --tune e2e"),
        (
            ["--method", "gptq", "--tune", "e2e", "--e2e-steps", "0"],
            "e2e-steps 0 is out of range",
        ),
        (["--method", "gptq", "--tune", "e2e", "--to", "mlx"], "--tune is not for --to mlx"),
    ],
)
def test_refusals(
    args: list[str], said: str, mini: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    code, _, complaint = _call(capsys, str(mini), *args, "--calibrate", str(TEXT))
    assert code == 2
    assert said in complaint
    assert not list(tmp_path.iterdir())


def test_a_whole_run_tells_every_tensor(
    mini: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "m.gguf"
    args = [str(mini), "--type", "Q4_K_S", "--method", "awq,gptq", "--calibrate", str(TEXT)]
    code, shown, _ = _call(
        capsys, *args, "--chunks", "2", "--threads", "1", "--json", "-o", str(path)
    )
    assert code == 0
    tensors = json.loads(shown)["tensors"]
    assert len(tensors) == 4 * 7 + 1
    assert all(line["loss_after"] <= line["loss_before"] for line in tensors)
    assert list(tmp_path.iterdir()) == [path]
    code, shown, _ = _call(capsys, *args, "--dry-run", "--json", "-o", str(path))
    assert code == 0
    assert json.loads(shown)["schema"].startswith("quantcli.plan/")


def test_training_end_to_end_tells_what_it_was_worth(
    mini: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By a recipe, as its own output records it."""
    path, recipe = tmp_path / "m.gguf", tmp_path / "mine.toml"
    args = ["--type", "Q2_K", "--method", "tune", "--tune-steps", "1", "--tune", "e2e"]
    code, shown, _ = _call(capsys, str(mini), *args, "--e2e-steps", "3", "--print-recipe")
    assert code == 0
    recipe.write_text(shown)
    code, shown, said = _call(
        capsys, str(mini), "--recipe", str(recipe), "--calibrate", str(TEXT), "--chunks", "2",
        "--threads", "1", "--json", "-v", "-o", str(path),
    )  # fmt: skip
    assert code == 0
    worth = json.loads(shown)["end_to_end"]
    assert worth["steps"] == 3
    assert worth["taken"] == (worth["held_out_kld_after"] < worth["held_out_kld_before"])
    assert "end to end" in said
    assert sorted(tmp_path.iterdir()) == [path, recipe]


def test_chunks_need_a_text(mini: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, complaint = _call(capsys, str(mini), "--chunks", "3")
    assert code == 2
    assert "--calibrate TEXT" in complaint


def test_chunks_cut_a_plain_calibration_too(
    mini: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "m.gguf"
    code, _, said = _call(
        capsys, str(mini), "--calibrate", str(TEXT), "--chunks", "2", "-o", str(path)
    )
    assert code == 0
    assert "2 windows of 512 tokens" in said


def test_types_are_chosen_within_a_size(
    mini: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file is no larger than its type's, and the real llama.cpp predicts better from it."""
    args = [str(mini), "--type", "Q3_K_S", "--method", "gptq", "--calibrate", str(TEXT),
            "--chunks", "8", "--fisher-windows", "8", "--threads", "1"]  # fmt: skip
    plain, chosen, small = (tmp_path / name for name in ("plain.gguf", "chosen.gguf", "s.gguf"))
    assert _call(capsys, *args, "-o", str(plain))[0] == 0
    code, _, said = _call(capsys, *args, "--allocate", "-o", str(chosen))
    assert code == 0
    assert "types chosen for 29 tensors" in said
    assert chosen.stat().st_size <= plain.stat().st_size
    assert len({str(t.tensor_type) for t in gguf.GGUFReader(chosen).tensors}) > 3
    assert _call(capsys, *args, "--target-size", "1.9M", "-o", str(small))[0] == 0
    assert 1_800_000 < small.stat().st_size <= 1_900_000
    code, _, complaint = _call(
        capsys, *args, "--target-size", "1M", "-o", str(tmp_path / "no.gguf")
    )
    assert code == 1
    assert "with the smallest types the output takes" in complaint
    assert {path.name for path in tmp_path.iterdir()} == {"plain.gguf", "chosen.gguf", "s.gguf"}

    novel = Path(__file__).parents[1] / "data" / "pride-and-prejudice.txt"
    text = tmp_path / "some.txt"
    text.write_text(novel.read_text()[:20000])
    found = {}
    for path in (plain, chosen):
        args = [str(path), "--reference", str(mini), "--data", str(text), "--json"]
        assert run(["eval-ppl", *args]) == 0
        found[path] = json.loads(capsys.readouterr().out)["results"][0]["kld"]["value"]
    assert found[chosen] < 0.8 * found[plain]


def test_the_smallest_size_that_is_named_can_be_had(
    mini: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "m.gguf"
    args = [str(mini), "--type", "Q4_K_S", "--method", "gptq", "--calibrate", str(TEXT)]
    args += ["--chunks", "2", "--fisher-windows", "0", "-o", str(path)]
    code, _, said = _call(capsys, *args, "--target-size", "10K")
    assert code == 1
    least = int(re.findall(r"ask for (\S+) bytes or more", said)[0].replace(",", ""))
    assert _call(capsys, *args, "--target-size", str(least - 1))[0] == 1
    assert list(tmp_path.iterdir()) == []
    assert _call(capsys, *args, "--target-size", str(least))[0] == 0
    assert path.stat().st_size <= least


def test_a_dry_run_says_that_types_are_not_chosen_yet(
    mini: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    args = [str(mini), "--type", "Q3_K_S", "--method", "gptq", "--calibrate", str(TEXT)]
    for extra, said in ((["--allocate"], True), (["--target-size", "2M"], True), ([], False)):
        code, shown, told = _call(capsys, *args, *extra, "--dry-run")
        assert code == 0
        assert "Q3_K" in shown
        assert ("types are chosen as it runs" in told) == said
    assert not list(tmp_path.iterdir())
