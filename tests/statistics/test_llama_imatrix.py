"""What quantcli collects is what llama-imatrix collects, and llama.cpp's quantizer takes it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.calibrations import TEXT, run

pytest.importorskip("torch")
pytest.importorskip("transformers")

GOLDEN = TEXT.parent
MINI = GOLDEN.parent / "data" / "bookworm-mini"
BOUND = 1e-4
"""Of each value's relative deviation. Measured: 4e-5, in the first layer, where epsilon counts;
llama-imatrix adds squares in float32."""


@pytest.mark.parametrize("name", ["bookworm-mini", "mixtral"])
def test_sums_are_those_of_llama_imatrix(
    name: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    wanted = np.load(GOLDEN / f"imatrix-{name}.npz")
    folder = MINI if name == "bookworm-mini" else checkpoint(name)
    # Where the processor has it, bfloat16 would be chosen, which llama-imatrix did not use.
    found = run(folder, tmp_path / "m.gguf", ctx=128, chunks=int(wanted["chunks"]), dtype="float32")
    names = {n.removesuffix(".in_sum2") for n in wanted.files if n.endswith(".in_sum2")}
    # llama-imatrix cannot see a tied head; everything else is the same set.
    assert set(found.squares) - names <= {"token_embd.weight"}
    assert found.chunks == 8
    for tensor in names:
        squares = wanted[f"{tensor}.in_sum2"]
        assert (found.counts[tensor] == wanted[f"{tensor}.counts"]).all(), tensor
        assert (np.abs(found.squares[tensor] - squares) <= BOUND * squares).all(), tensor


@pytest.mark.parametrize(("name", "kind"), [("llama-tied", "Q4_0"), ("llama", "Q4_K_M")])
def test_llama_cpp_quantizes_with_the_file_to_the_same_bytes(
    name: str,
    kind: str,
    checkpoint: Callable[..., Path],
    gguf: Callable[..., Path],
    tmp_path: Path,
) -> None:
    oracle = pytest.importorskip("support.llama_quantize")
    from gguf import GGUFReader

    from quantcli.artifacts.gguf_file import prepare_gguf
    from quantcli.artifacts.write import write_artifact
    from quantcli.model import open_model
    from quantcli.plan.recipe import Recipe
    from quantcli.sources.imatrix import read_importance

    matrix, ours, theirs = (tmp_path / n for n in ("m.gguf", "ours.gguf", "theirs.gguf"))
    run(checkpoint(name), matrix)
    importance = read_importance(matrix)
    entries = {tensor: means.reshape(-1) for tensor, means in importance.entries.items()}
    oracle.llama_quantize(gguf(name, "F32"), theirs, kind, imatrix=entries)
    with open_model(gguf(name, "F32")) as model:
        for _ in write_artifact(
            prepare_gguf(model, Recipe(type=kind), ours, importance=importance)
        ):
            pass
    wanted = {t.name: t for t in GGUFReader(theirs).tensors}
    for tensor in GGUFReader(ours).tensors:
        assert tensor.tensor_type == wanted[tensor.name].tensor_type
        assert (tensor.data == wanted[tensor.name].data).all(), tensor.name


def test_the_legacy_form_holds_the_same_means(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    from quantcli.sources.imatrix import read_importance

    oracle = pytest.importorskip("support.llama_quantize")
    run(checkpoint("mixtral"), tmp_path / "m.gguf")
    run(checkpoint("mixtral"), tmp_path / "m.dat", legacy=True)
    wanted = read_importance(tmp_path / "m.gguf").entries
    found = oracle.read_dat(tmp_path / "m.dat")
    assert found.keys() == wanted.keys()
    for name, means in wanted.items():
        np.testing.assert_allclose(found[name], means.reshape(-1), rtol=1e-6)


def test_gguf_library_reads_the_file(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    from gguf import GGUFReader

    calibration = run(checkpoint("mixtral"), tmp_path / "m.gguf")
    reader = GGUFReader(tmp_path / "m.gguf")
    assert reader.fields["general.type"].contents() == "imatrix"
    assert reader.fields["imatrix.chunk_count"].contents() == 6
    assert reader.fields["imatrix.chunk_size"].contents() == 64
    assert reader.fields["imatrix.datasets"].contents() == [str(TEXT)]
    names = [tensor.name for tensor in reader.tensors]
    assert names == [
        name + suffix for name in sorted(calibration.squares) for suffix in (".in_sum2", ".counts")
    ]
    counts = {t.name: t.data for t in reader.tensors}["blk.0.ffn_down_exps.weight.counts"]
    assert counts.shape == (4, 1)
    assert counts.sum() == 6 * 64 * 2
