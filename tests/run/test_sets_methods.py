"""Sets whose outputs are rounded by a method, or by one importance matrix: one run of the model."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import quantcli
from quantcli.errors import OutputError, SourceError
from quantcli.events import PhaseBegun
from quantcli.types import Event

pytest.importorskip("torch")
pytest.importorskip("transformers")

from quantcli.layerwise.layerwise_model import LayerwiseModel
from quantcli.statistics.layer_hessians import HessianAccumulator

pytestmark = pytest.mark.slow

TEXT = str(Path(__file__).parents[1] / "golden" / "calibration.txt")
GPTQ: dict[str, Any] = {
    "method": "gptq", "calibrate": [TEXT], "chunks": 2, "fisher_windows": 2, "threads": 1,
}  # fmt: skip


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def files(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which layers windows were taken through, and which Hessians were factored."""
    seen: list[str] = []
    run, prepare = LayerwiseModel.run, HessianAccumulator._prepare

    def watched(self: LayerwiseModel, index: int, *args: Any, **more: Any) -> Any:
        seen.append(f"layer {index}")
        return run(self, index, *args, **more)

    def factored(*args: Any, **more: Any) -> Any:
        seen.append("factored")
        return prepare(*args, **more)

    monkeypatch.setattr(LayerwiseModel, "run", watched)
    monkeypatch.setattr(HessianAccumulator, "_prepare", factored)
    return seen


def test_a_layer_s_hessians_serve_all(small: Path, here: Path, runs: list[str]) -> None:
    quantcli.quantize(small, "alone/", type="Q4_0", to="gguf", **GPTQ)
    alone, runs[:] = list(runs), []
    more = {"group_size": 32, "bits": 4}
    made = quantcli.quantize(
        small, "set/", type=["Q4_0", "Q5_1", "Q8_0"], to=["gguf", "gptq"], **more, **GPTQ
    )
    assert runs == alone
    for kind in ("Q5_1", "Q8_0"):
        quantcli.quantize(small, "alone/", type=kind, to="gguf", **GPTQ)
    quantcli.quantize(small, "alone/", to="gptq", **more, **GPTQ)
    assert files(Path("set")) == files(Path("alone"))
    # The folder leaves the embedding, which is also the head, as it is.
    assert [len(output.document["tensors"]) for output in made.outputs] == [15, 15, 15, 14]
    assert "Q5_1" in {tensor["type"] for tensor in made.outputs[1].document["tensors"]}


@pytest.mark.parametrize(
    "options",
    [
        {"method": "gptq,tune", "tune_steps": 2, "tune": "e2e", "e2e_steps": 2},
        {"method": "gptq", "propagate": True},
        {"method": "awq,gptq"},
        {"method": "gptq", "target_size": "520k"},
        {"method": "gptq", "allocate": True},
    ],
    ids=["trained", "propagated", "transformed", "sized", "allocated"],
)
def test_each_is_as_it_would_be_alone(small: Path, here: Path, options: dict[str, Any]) -> None:
    given, kinds = GPTQ | options, ["Q5_1", "Q8_0"]
    quantcli.quantize(small, "set/", type=kinds, **given)
    for kind in kinds:
        quantcli.quantize(small, "alone/", type=kind, **given)
    assert files(Path("set")) == files(Path("alone"))


def test_one_survey_for_all(small: Path, here: Path, runs: list[str]) -> None:
    """The model is run as often for two outputs as for one."""
    given = GPTQ | {"target_size": "520k"}
    quantcli.quantize(small, "alone/", type="Q5_1", **given)
    alone, runs[:] = list(runs), []
    quantcli.quantize(small, "set/", type=["Q5_1", "Q8_0"], **given)
    assert runs == alone


def test_one_calibration_for_all_transforms(small: Path, here: Path, runs: list[str]) -> None:
    given = {"to": ["awq"], "group_size": 32, "method": "awq", "calibrate": [TEXT], "chunks": 2}
    quantcli.quantize(small, "alone/", **given)
    alone, runs[:] = list(runs), []
    quantcli.quantize(small, "set/", **(given | {"to": ["awq", "gptq", "mlx"]}))
    assert runs == alone
    for to in ("gptq", "mlx"):
        quantcli.quantize(small, "alone/", **(given | {"to": to}))
    assert files(Path("set")) == files(Path("alone"))


def test_one_importance_matrix_for_all(small: Path, here: Path) -> None:
    events: list[Event] = []
    kinds = ["Q4_0", "IQ4_NL", "IQ2_XXS"]
    made = quantcli.quantize(
        small, "set/", type=kinds, calibrate=[TEXT], chunks=1, on_event=events.append
    )
    phases = [event.name for event in events if isinstance(event, PhaseBegun)]
    assert phases == ["calibrating", "quantizing"]
    matrix = Path("set/small.calib.gguf")
    assert len(files(Path("set"))) == 4
    for kind, path in zip(kinds, made.paths, strict=True):
        alone = quantcli.quantize(small, "alone/", type=kind, imatrix=matrix).paths[0]
        assert path.read_bytes() == alone.read_bytes()


def test_a_method_beside_none(small: Path, here: Path) -> None:
    """Outputs without a method are whole before the model is run for the others."""
    Path("set.toml").write_text(
        '[[outputs]]\ntype = "Q4_0"\nmethod = "gptq"\nfisher_windows = 0\n'
        '[[outputs]]\ntype = "Q8_0"\n[[outputs]]\ntype = "Q5_0"\nimatrix = "m.gguf"\n'
    )
    quantcli.calibrate(small, [TEXT], output="m.gguf", chunks=1)
    seen = []
    made = quantcli.quantize(
        small, "set/", recipe="set.toml", chunks=2, on_event=lambda event: seen.append(event)
    )
    phases = [event.name for event in seen if isinstance(event, PhaseBegun)]
    assert phases == ["quantizing", "rounding", "quantizing"]
    assert [path.name for path in made.paths] == [f"small-{k}.gguf" for k in
                                                  ("Q4_0", "Q8_0", "Q5_0")]  # fmt: skip


KILLED = """
import os, signal, sys
place, number = sys.argv[1], int(sys.argv[2])
from quantcli.artifacts.atomic import AtomicFiles
import quantcli.layerwise.checkpoint as checkpoint
owner, name = (AtomicFiles, "publish") if place == "write" else (checkpoint.Checkpoint, "commit")
real, count = getattr(owner, name), 0
def killed(self, *args):
    global count
    if place == "layer" or "partial-run" not in str(next(iter(self._sizes))):
        count += 1
    if count == number:
        os.kill(os.getpid(), signal.SIGKILL)
    real(self, *args)
setattr(owner, name, killed)
from quantcli.cli.app import run
sys.exit(run(sys.argv[3:]))
"""


@pytest.mark.parametrize(
    ("place", "number", "whole"), [("layer", 2, 0), ("write", 4, 1)], ids=["rounding", "writing"]
)
def test_a_killed_run_goes_on(
    small: Path, here: Path, place: str, number: int, whole: int, runs: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    args = ["quantize", str(small), "--type", "Q4_0,Q5_1", "--method", "gptq", "--calibrate", TEXT,
            "--chunks", "2", "--fisher-windows", "2", "--threads", "1", "-o", "set/"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", KILLED, place, str(number), *args], capture_output=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(list(Path("set").glob("*.gguf"))) == whole
    options = GPTQ | {"type": ["Q4_0", "Q5_1"]}
    if not whole:
        with pytest.raises(SourceError, match="was begun with another choice of types"):
            quantcli.quantize(small, "set/", resume=True, **(options | {"type": ["Q4_0", "Q4_1"]}))
    made = quantcli.quantize(small, "set/", resume=True, **options)
    assert any("continuing after layer" in note.message for note in made.notes)
    assert ("layer 0" in runs) is False
    for kind in ("Q4_0", "Q5_1"):
        quantcli.quantize(small, "alone/", **(options | {"type": kind}))
    assert files(Path("set")) == files(Path("alone"))


@pytest.mark.parametrize("kinds", ["Q4_0", "Q4_0,Q5_1"])
def test_a_killed_calibration_goes_on(small: Path, here: Path, kinds: str, runs: list[str]) -> None:
    args = ["quantize", str(small), "--type", kinds, "--calibrate", TEXT, "--chunks", "1",
            "--threads", "1", "-o", "made/"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", KILLED, "layer", "2", *args], capture_output=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    options: dict[str, Any] = {"type": kinds.split(","), "calibrate": [TEXT], "chunks": 1}
    with pytest.raises(OutputError, match="--resume continues it"):
        quantcli.quantize(small, "made/", threads=1, **options)
    quantcli.quantize(small, "made/", threads=1, resume=True, **options)
    assert "layer 0" not in runs
    quantcli.quantize(small, "alone/", threads=1, **options)
    assert files(Path("made")) == files(Path("alone"))


def test_a_matrix_of_somebody_else_stays(small: Path, here: Path) -> None:
    Path("small.calib.gguf").write_bytes(b"mine")
    with pytest.raises(OutputError, match=r"small\.calib\.gguf exists already"):
        quantcli.quantize(
            small, type=["Q4_0", "Q5_1"], calibrate=[TEXT], chunks=1, resume=True, threads=1
        )
    assert Path("small.calib.gguf").read_bytes() == b"mine"


def test_a_set_killed_after_its_calibration_calibrates_once(small: Path, here: Path) -> None:
    args = ["quantize", str(small), "--type", "Q4_0,IQ2_XXS", "--calibrate", TEXT, "--chunks", "1",
            "-o", "set/"]  # fmt: skip
    # Published are the matrix, the journal, then the first file.
    done = subprocess.run(
        [sys.executable, "-c", KILLED, "write", "3", *args], capture_output=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    matrix = Path("set/small.calib.gguf").read_bytes()
    events: list[Event] = []
    quantcli.quantize(
        small, "set/", type=["Q4_0", "IQ2_XXS"], calibrate=[TEXT], chunks=1, resume=True,
        on_event=events.append,
    )  # fmt: skip
    phases = [event.name for event in events if isinstance(event, PhaseBegun)]
    assert phases == ["quantizing"]
    assert Path("set/small.calib.gguf").read_bytes() == matrix
    assert len(files(Path("set"))) == 3
