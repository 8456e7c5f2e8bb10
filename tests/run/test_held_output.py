"""What a method rounds goes to its place in the output at once; a resumed run finds it there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest

import quantcli
from quantcli.errors import OutputError
from quantcli.events import PhaseBegun
from quantcli.types import Event

pytest.importorskip("torch")
pytest.importorskip("transformers")

pytestmark = pytest.mark.slow

TEXT = str(Path(__file__).parents[1] / "golden" / "calibration.txt")
GPTQ: dict[str, Any] = {
    "type": "Q4_0", "method": "gptq", "calibrate": [TEXT], "chunks": 2, "fisher_windows": 0,
    "threads": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a run that nothing stopped."""
    path = tmp_path_factory.mktemp("whole") / "m.gguf"
    quantcli.quantize(small, path, **GPTQ)
    return path


def _stop_at(phase: str, look: Callable[[], None] = lambda: None) -> Callable[[Event], None]:
    def stop(event: Event) -> None:
        if isinstance(event, PhaseBegun) and event.name == phase:
            look()
            raise KeyboardInterrupt

    return stop


def _interrupt(small: Path, path: Path, **more: Any) -> None:
    """A run that is stopped when all is rounded and nothing is written."""
    with pytest.raises(KeyboardInterrupt):
        quantcli.quantize(small, path, on_event=_stop_at("quantizing"), **(GPTQ | more))


def test_all_that_is_rounded_is_there_before_the_writing(
    small: Path, whole: Path, tmp_path: Path
) -> None:
    path = tmp_path / "m.gguf"
    _interrupt(small, path)
    held = (tmp_path / ".m.gguf.partial-output" / "file").read_bytes()
    wanted = whole.read_bytes()
    assert len(held) == len(wanted)
    rounded = 0
    for tensor in gguf.GGUFReader(whole).tensors:
        start, stop = tensor.data_offset, tensor.data_offset + tensor.n_bytes
        rounded += held[start:stop] == wanted[start:stop] and any(held[start:stop])
    assert rounded >= 14  # seven matrices in each of two layers
    # The run's folder has nothing of the size of a layer's rows but hidden states.
    records = (tmp_path / ".m.gguf.partial-run").glob("encoded-*")
    assert sum(record.stat().st_size for record in records) < len(wanted) // 10
    quantcli.quantize(small, path, resume=True, **GPTQ)
    assert path.read_bytes() == wanted
    assert [each.name for each in tmp_path.iterdir()] == ["m.gguf"]


def test_what_is_replaced_stays_until_all_is_there(
    small: Path, whole: Path, tmp_path: Path
) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"older")
    _interrupt(small, path, force=True)
    assert path.read_bytes() == b"older"
    quantcli.quantize(small, path, resume=True, force=True, **GPTQ)
    assert path.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("how", ["changed", "cut", "gone"])
def test_a_damaged_file_is_not_gone_on_with(
    small: Path, whole: Path, tmp_path: Path, how: str
) -> None:
    path, held = tmp_path / "m.gguf", tmp_path / ".m.gguf.partial-output" / "file"
    _interrupt(small, path)
    tensor = next(t for t in gguf.GGUFReader(whole).tensors if t.name == "blk.1.ffn_up.weight")
    content = bytearray(held.read_bytes())
    content[tensor.data_offset + 5] ^= 1
    if how == "changed":
        held.write_bytes(content)
    elif how == "cut":
        held.write_bytes(content[:-1])
    else:
        held.unlink()
    said = r"blk\.1\.ffn_up\.weight is not as" if how == "changed" else "was filling, is gone"
    with pytest.raises(OutputError, match=said) as refused:
        quantcli.quantize(small, path, resume=True, **GPTQ)
    assert refused.value.hint == "--force starts anew"
    assert not path.exists()
    quantcli.quantize(small, path, force=True, **GPTQ)
    assert path.read_bytes() == whole.read_bytes()


def test_several_files_of_which_one_has_its_name_already(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped between the renames of a set, the next run finds all of it."""
    split = GPTQ | {"split_max_size": "200K"}
    (tmp_path / "whole").mkdir()
    quantcli.quantize(small, tmp_path / "whole" / "m.gguf", **split)
    wanted = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    assert len(wanted) > 2
    out = tmp_path / "out"
    out.mkdir()
    replace, seen = Path.replace, []

    def stopped(self: Path, target: Path) -> Path:
        if ".partial-output" in str(self):
            seen.append(target)
            if len(seen) == 2:
                raise KeyboardInterrupt
        return replace(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", stopped)
        with pytest.raises(KeyboardInterrupt):
            quantcli.quantize(small, out / "m.gguf", **split)
    assert len(list(out.glob("*.gguf"))) == 1
    quantcli.quantize(small, out / "m.gguf", resume=True, force=True, **split)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == wanted
