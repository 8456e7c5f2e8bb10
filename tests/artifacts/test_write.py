"""Several artifacts from one read of the source."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest

from quantcli.artifacts.gguf_file import prepare_gguf
from quantcli.artifacts.model_folder import prepare_folder
from quantcli.artifacts.slabs import Slab, cut_slabs, work_slabs
from quantcli.artifacts.write import ArtifactDone, write_artifact, write_artifacts
from quantcli.errors import WeightError
from quantcli.model import Model, open_model
from quantcli.plan.recipe import Recipe
from quantcli.sources.hf import HfCheckpoint
from quantcli.types import OutputTensor, Progress

MINI = Path(__file__).parents[1] / "data" / "bookworm-mini"


class Counted(Model):
    """A model that counts how often each of its rows is read."""

    def read_rows(self, tensor: OutputTensor, start: int, stop: int) -> np.ndarray:
        READ.update((tensor.name, row) for row in range(start, stop))
        rows = super().read_rows(tensor, start, stop)
        rows.flags.writeable = False
        return rows


READ: Counter[tuple[str, int]] = Counter()


def counted(model: Model) -> Model:
    READ.clear()
    return Counted(**{name: getattr(model, name) for name in Model.__dataclass_fields__})


def test_two_files_of_one_read_have_the_bytes_of_two_runs(tmp_path: Path) -> None:
    kinds = ("Q4_0", "Q8_0")
    with open_model(MINI) as model:
        for kind in kinds:
            list(write_artifact(prepare_gguf(model, Recipe(type=kind), tmp_path / f"{kind}.gguf")))
        once = counted(model)
        both = [prepare_gguf(once, Recipe(type=k), tmp_path / f"{k}-both.gguf") for k in kinds]
        events = list(write_artifacts(both, threads=2))
    assert READ
    assert set(READ.values()) == {1}
    done = [event for event in events if isinstance(event, ArtifactDone)]
    assert [event.paths for event in done] == [artifact.paths for artifact in both]
    assert done[0].source_digest == done[1].source_digest
    for kind in kinds:
        whole = (tmp_path / f"{kind}.gguf").read_bytes()
        assert (tmp_path / f"{kind}-both.gguf").read_bytes() == whole


def test_a_file_and_a_folder_are_written_together(tmp_path: Path) -> None:
    with open_model(MINI) as model:
        list(write_artifact(prepare_gguf(model, Recipe(type="Q4_0"), tmp_path / "a.gguf")))
        list(write_artifact(prepare_folder(model, Recipe(to="gptq"), tmp_path / "a")))
        file = prepare_gguf(model, Recipe(type="Q4_0"), tmp_path / "b.gguf")
        folder = prepare_folder(model, Recipe(to="gptq"), tmp_path / "b")
        list(write_artifacts([file, folder], threads=2))
    assert (tmp_path / "b.gguf").read_bytes() == (tmp_path / "a.gguf").read_bytes()
    for path in (tmp_path / "a").iterdir():
        assert (tmp_path / "b" / path.name).read_bytes() == path.read_bytes()


def test_a_file_and_a_folder_read_each_tensor_in_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    read = HfCheckpoint.read_rows

    def watched(self: HfCheckpoint, name: str, start: int, stop: int) -> np.ndarray:
        seen.append(name)
        return read(self, name, start, stop)

    monkeypatch.setattr(HfCheckpoint, "read_rows", watched)
    with open_model(MINI) as model:
        file = prepare_gguf(model, Recipe(type="Q4_0"), tmp_path / "a.gguf")
        folder = prepare_folder(model, Recipe(to="gptq"), tmp_path / "a")
        list(write_artifacts([file, folder], threads=1))
    runs = [name for name, _ in groupby(seen)]
    assert len(runs) == len(set(runs)) == len(model.store.tensors)
    assert len(seen) > len(runs)


def test_folders_of_one_read_have_the_bytes_of_their_own_runs(tmp_path: Path) -> None:
    recipes = {
        "mlx": Recipe(to="mlx"),
        "gptq": Recipe(to="gptq", keep=("k_proj",)),
        "hf": Recipe(to="hf", type="Q4_0"),
    }
    with open_model(MINI) as model:
        for name, recipe in recipes.items():
            list(write_artifact(prepare_folder(model, recipe, tmp_path / name)))
        together = [prepare_folder(model, r, tmp_path / f"{n}-too") for n, r in recipes.items()]
        list(write_artifacts(together, threads=2))
    for name in recipes:
        for path in (tmp_path / name).iterdir():
            assert (tmp_path / f"{name}-too" / path.name).read_bytes() == path.read_bytes()


def test_what_one_cannot_hold_leaves_neither(tmp_path: Path) -> None:
    def refuse(*_: object) -> np.ndarray:
        raise WeightError("no")

    with open_model(MINI) as model:
        first = prepare_gguf(model, Recipe(type="Q8_0"), tmp_path / "a.gguf")
        second = prepare_gguf(model, Recipe(type="Q4_0"), tmp_path / "b.gguf")
        second = replace(second, encoders={"output_norm.weight": refuse})
        with pytest.raises(WeightError):
            list(write_artifacts([first, second], threads=2))
    assert list(tmp_path.iterdir()) == []


def test_slabs_cover_the_rows_and_share_the_bytes_exactly() -> None:
    slabs = list(cut_slabs("a", range(10, 110), 1_000_003, row_bytes=1 << 20, matrix=25))
    assert [row for slab in slabs for row in range(slab.start, slab.stop)] == list(range(10, 110))
    assert sum(slab.nbytes for slab in slabs) == 1_000_003
    assert all((slab.start - 10) // 25 == (slab.stop - 11) // 25 for slab in slabs)
    assert max(slab.stop - slab.start for slab in slabs) == 4


def test_results_are_in_order_whatever_the_threads() -> None:
    tasks = [(Slab("a", i, i + 1, 2), lambda i=i: i * i) for i in range(50)]
    results = []

    def collect() -> Iterator[Progress]:
        results.extend((yield from work_slabs(tasks, 3)))

    progress = list(collect())
    assert results == [i * i for i in range(50)]
    assert [event.done for event in progress] == list(range(2, 102, 2))
    assert {event.total for event in progress} == {100}
