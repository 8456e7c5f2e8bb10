"""The one sequence: several outputs of one model, what a stop leaves, and what it says."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.frozen_inputs import write_input

import quantcli
from quantcli.errors import OutputError, UsageError
from quantcli.events import PhaseBegun, drain
from quantcli.plan.recipe import Recipe
from quantcli.run.quantize import quantize
from quantcli.run.request import Request, Wanted
from quantcli.types import Event, Note, Progress

TEXT = str(Path(__file__).parents[1] / "golden" / "calibration.txt")


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_several_outputs_are_what_each_is_alone(mini: Path, tmp_path: Path) -> None:
    recipes = [Recipe(type="Q4_0"), Recipe(to="gptq"), Recipe(type="Q8_0", pure=True)]
    paths = [tmp_path / "a.gguf", tmp_path / "b", tmp_path / "c.gguf"]
    outputs = [Wanted(recipe, path) for recipe, path in zip(recipes, paths, strict=True)]
    events: list[Event] = []
    done = drain(quantize(Request(str(mini), outputs)), events.append)
    assert [each.artifact.paths[0] for each in done] == paths
    phases = [event.name for event in events if isinstance(event, PhaseBegun)]
    assert phases == ["quantizing"]
    for recipe, path in zip(recipes, paths, strict=True):
        alone = quantcli.quantize(mini, tmp_path / f"alone-{path.name}", recipe=recipe).paths[0]
        assert (_files(path) if path.is_dir() else path.read_bytes()) == (
            _files(alone) if path.is_dir() else alone.read_bytes()
        )


def test_nothing_is_written_when_one_output_is_refused(mini: Path, tmp_path: Path) -> None:
    (tmp_path / "b.gguf").write_bytes(b"something else")
    outputs = [Wanted(Recipe(type=kind), tmp_path / name) for kind, name in
               (("Q4_0", "a.gguf"), ("Q5_0", "b.gguf"))]  # fmt: skip
    with pytest.raises(OutputError, match=r"b\.gguf"):
        drain(quantize(Request(str(mini), outputs)), lambda event: None)
    assert [path.name for path in tmp_path.iterdir()] == ["b.gguf"]


def test_outputs_of_one_path_are_refused(mini: Path, tmp_path: Path) -> None:
    outputs = [Wanted(Recipe(type=kind), tmp_path / "a.gguf") for kind in ("Q4_0", "Q5_0")]
    with pytest.raises(UsageError, match=r"two outputs are called .*a\.gguf"):
        drain(quantize(Request(str(mini), outputs)), lambda event: None)


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    (tmp_path / "in").mkdir()
    write_input("small", tmp_path / "in")
    return tmp_path / "in" / "small"


def test_texts_make_one_importance_matrix(small: Path, tmp_path: Path) -> None:
    recipes = [Recipe(type="Q4_0"), Recipe(to="gptq", group_size=32), Recipe(type="Q4_1")]
    outputs = [Wanted(recipe, tmp_path / f"{number}.gguf") for number, recipe in enumerate(recipes)]
    events: list[Event] = []
    request = Request(str(small), outputs, [TEXT], chunks=1, threads=1)
    done = drain(quantize(request), events.append)
    phases = [event.name for event in events if isinstance(event, PhaseBegun)]
    assert phases == ["calibrating", "quantizing"]
    matrix = tmp_path / "0.calib.gguf"
    assert [each.artifact.plan.recipe.imatrix for each in done] == 3 * [str(matrix)]
    alone = quantcli.quantize(small, tmp_path / "alone.gguf", type="Q4_1", imatrix=matrix)
    assert alone.paths[0].read_bytes() == (tmp_path / "2.gguf").read_bytes()


class Stopped(Exception):
    """Raised where events are shown."""


def test_a_stopped_run_says_what_is_kept_and_goes_on(small: Path, tmp_path: Path) -> None:
    """Whoever shows events may stop the run, and still hears its last words."""
    options: dict[str, Any] = {
        "type": "Q4_0", "method": "gptq", "calibrate": [TEXT], "chunks": 2, "fisher_windows": 0,
        "threads": 1,
    }  # fmt: skip
    whole = quantcli.quantize(small, tmp_path / "whole.gguf", **options).paths[0].read_bytes()
    events: list[Event] = []

    def stop(event: Event) -> None:
        events.append(event)
        if isinstance(event, Progress) and "layer 1" in event.what:
            raise Stopped

    path = tmp_path / "m.gguf"
    with pytest.raises(Stopped):
        quantcli.quantize(small, path, on_event=stop, **options)
    assert isinstance(events[-1], Note)
    assert "--resume continues" in events[-1].message
    assert not path.exists()
    again = quantcli.quantize(small, path, resume=True, **options)
    assert any("continuing after layer" in note.message for note in again.notes)
    assert path.read_bytes() == whole
    assert sorted(each.name for each in tmp_path.iterdir()) == ["in", "m.gguf", "whole.gguf"]


def test_without_a_method_torch_stays_out(mini: Path, tmp_path: Path) -> None:
    code = (
        "import sys, quantcli\n"
        "from quantcli.cli.app import run\n"
        f"run(['quantize', {str(mini)!r}, '--type', 'Q4_K_M', '--dry-run'])\n"
        f"quantcli.quantize({str(mini)!r}, 'm.gguf', type='Q4_0', threads=1)\n"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path).returncode == 0
