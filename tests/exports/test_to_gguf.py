"""Split, merged and plain GGUF files: the same tensor bytes, and llama.cpp loads them."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, dequantize

import quantcli
from quantcli.artifacts.imatrix_container import Calibration, pack_gguf
from quantcli.errors import OutputError, SourceError, UsageError


def tensors(*paths: Path) -> dict[str, tuple[int, str]]:
    """Type and digest of every tensor, by gguf's own reader."""
    return {
        tensor.name: (int(tensor.tensor_type), hashlib.sha256(tensor.data.tobytes()).hexdigest())
        for path in paths
        for tensor in GGUFReader(path).tensors
    }


def logits(path: Path) -> np.ndarray:
    pytest.importorskip("llama_cpp")
    from support.llama_logits import llama_logits

    return llama_logits(path, [7, 300, 5, 1200, 42, 9])


@pytest.fixture(scope="module")
def whole(mini: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "mini.gguf"
    return quantcli.quantize(mini, path, type="Q4_K_M").paths[0]


def test_split_and_merged_again(whole: Path, tmp_path: Path) -> None:
    done = quantcli.export(whole, tmp_path / "s.gguf", to="gguf", split_max_size="1M")
    assert len(done.paths) == 3
    assert done.paths[1] == tmp_path / "s-00002-of-00003.gguf"
    assert done.nbytes == sum(path.stat().st_size for path in done.paths)
    assert tensors(*done.paths) == tensors(whole)
    assert np.array_equal(logits(done.paths[0]), logits(whole))
    for number in (0, 2):
        merged = tmp_path / f"merged-{number}.gguf"
        quantcli.export(done.paths[number], merged, to="gguf")
        assert merged.read_bytes() == whole.read_bytes()


def test_the_division_is_gguf_splits_own(whole: Path, tmp_path: Path) -> None:
    """As the quantizer's own split of the same model, which follows the same rule."""
    split = quantcli.export(whole, tmp_path / "s.gguf", to="gguf", split_max_size="700K").paths
    held = [[tensor.name for tensor in GGUFReader(path).tensors] for path in split]
    sizes = {tensor.name: tensor.n_bytes for tensor in GGUFReader(whole).tensors}
    order = [tensor.name for tensor in GGUFReader(whole).tensors]
    assert [name for group in held for name in group] == order
    for group, following in itertools.pairwise(held):
        filled = sum(sizes[name] for name in group)
        assert len(group) == 1 or filled <= 700_000
        assert filled + sizes[following[0]] > 700_000


def test_a_checkpoint_in_its_own_precision(mini: Path, tmp_path: Path) -> None:
    (path,) = quantcli.export(mini, tmp_path / "m.gguf", to="gguf").paths
    assert {t.tensor_type.name for t in GGUFReader(path).tensors} == {"BF16", "F32"}
    (same,) = quantcli.quantize(mini, tmp_path / "q.gguf", type="BF16").paths
    assert path.read_bytes() == same.read_bytes()
    done = quantcli.export(mini, tmp_path / "f.gguf", to="gguf", dtype="f32", split_max_size="8M")
    assert len(done.paths) > 1
    assert {t.tensor_type.name for p in done.paths for t in GGUFReader(p).tensors} == {"F32"}
    assert logits(done.paths[0]).shape == (6, 4096)


def test_quantized_weights_are_decoded(whole: Path, tmp_path: Path) -> None:
    (path,) = quantcli.export(whole, tmp_path / "m.gguf", to="gguf", dtype="f32").paths
    plain = {tensor.name: tensor.data for tensor in GGUFReader(path).tensors}
    for tensor in GGUFReader(whole).tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(plain[tensor.name], values.reshape(plain[tensor.name].shape))


def test_defaults_are_named_after_the_artifact(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = quantcli.export(whole, to="gguf", split_max_size="2M")
    assert [path.name for path in done.paths] == [
        "mini-00001-of-00002.gguf", "mini-00002-of-00002.gguf",
    ]  # fmt: skip
    assert quantcli.export(done.paths[0], to="gguf").paths == (Path("mini.gguf"),)


def test_a_card_beside_it(whole: Path, tmp_path: Path) -> None:
    import yaml

    done = quantcli.export(whole, tmp_path / "s.gguf", to="gguf", split_max_size="8M", card=True)
    assert [path.name for path in done.paths] == ["s.gguf", "s.md"]
    text = (tmp_path / "s.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front == {"library_name": "gguf", "tags": ["gguf", "quantcli"]}
    assert "| bits per weight | 5.26 |" in text
    assert "24 x Q4_K" in text
    with pytest.raises(OutputError, match=r"s\.md exists already"):
        quantcli.export(whole, to="card", output=tmp_path / "s.md")


def test_what_is_refused_before_the_work(
    whole: Path, mini: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="is one GGUF file already"):
        quantcli.export(whole, to="gguf")
    with pytest.raises(UsageError, match="there is no export format named 'ggud'"):
        quantcli.export(whole, to="ggud")
    with pytest.raises(UsageError, match="written over the file that is read"):
        quantcli.export(whole, whole, to="gguf", split_max_size="9G", force=True)
    with pytest.raises(SourceError, match="no such file"):
        quantcli.export(tmp_path / "none.gguf", to="gguf")
    split = quantcli.export(whole, to="gguf", split_max_size="1M").paths
    with pytest.raises(OutputError, match="exists already"):
        quantcli.export(whole, to="gguf", split_max_size="1M")
    split[1].unlink()
    with pytest.raises(SourceError, match="this shard of"):
        quantcli.export(split[0], to="gguf")
    monkeypatch.setattr("quantcli.plan.budget.free_disk", lambda path: 1000)
    with pytest.raises(OutputError, match="not enough disk"):
        quantcli.export(whole, tmp_path / "x.gguf", to="gguf", split_max_size="1M")
    assert not list(tmp_path.glob("x*"))


def test_shards_must_belong_together(
    whole: Path, gguf: Callable[..., Path], tmp_path: Path
) -> None:
    from quantcli.exports.job import make_options, open_export

    one = quantcli.export(whole, tmp_path / "a.gguf", to="gguf", split_max_size="1M").paths
    options = make_options("gguf", output=tmp_path / "m.gguf")
    with open_export(list(one), "gguf", options) as prepared:
        assert prepared.paths == (tmp_path / "m.gguf",)
    with (
        pytest.raises(SourceError, match="is not a shard of the model"),
        open_export([*one, whole], "gguf", options),
    ):
        pass


def test_nothing_is_written_over_what_is_read(whole: Path, tmp_path: Path) -> None:
    """Whatever is made of it, and by whichever of its names."""
    own = tmp_path / "own.gguf"
    own.write_bytes(whole.read_bytes())
    link = tmp_path / "link.gguf"
    link.symlink_to(own)
    for output in (own, link):
        with pytest.raises(UsageError, match="written over the file that is read"):
            quantcli.quantize(own, output, type="Q4_0", allow_requantize=True, force=True)
        for to, more in (("gguf", {"dtype": "f16"}), ("ollama", {}), ("card", {})):
            with pytest.raises(UsageError, match="written over the file that is read"):
                quantcli.export(own, output, to=to, force=True, **more)
    assert own.read_bytes() == whole.read_bytes()


def test_an_importance_matrix_is_not_replaced_by_what_it_helps_to_make(
    mini: Path, tmp_path: Path
) -> None:
    matrix = tmp_path / "imatrix.gguf"
    name = "blk.0.attn_q.weight"
    sums = {name: np.ones((1, 256))}
    matrix.write_bytes(pack_gguf(Calibration(sums, {name: np.array([1])}, ("t",), 1, 512)))
    before = matrix.read_bytes()
    with pytest.raises(UsageError, match="written over the file that is read"):
        quantcli.quantize(mini, matrix, type="Q4_0", imatrix=str(matrix), force=True)
    assert matrix.read_bytes() == before


def _set_ids(paths: Iterable[Path]) -> set[str]:
    return {str(GGUFReader(p).fields["quantcli.split.id"].contents()) for p in paths}


@pytest.mark.parametrize("reader", ["verify", "merge", "quantize"])
def test_a_mixture_of_two_runs_is_not_read(mini: Path, tmp_path: Path, reader: str) -> None:
    """Recipes that differ in the last shard alone, whose files have the same tensors."""
    sets = []
    for name, rules in (("a", ()), ("b", ("blk.3.ffn_down=Q4_1",))):
        output = tmp_path / name / "m.gguf"
        output.parent.mkdir()
        done = quantcli.quantize(
            mini, output, type="Q4_0", tensor_types=rules, split_max_size="500K"
        )
        sets.append(done.paths)
    assert [path.name for path in sets[0]] == [path.name for path in sets[1]]
    mixed = sets[0][0].with_name(sets[0][1].name)
    mixed.write_bytes(sets[1][1].read_bytes())
    with pytest.raises(SourceError, match=r"-00002-of-.*is of another run than m-00001-of-"):
        if reader == "verify":
            quantcli.export(sets[0][0], verify=True)
        elif reader == "merge":
            quantcli.export(sets[0][0], tmp_path / "merged.gguf", to="gguf")
        else:
            quantcli.quantize(sets[0][0], tmp_path / "q.gguf", type="Q2_K", allow_requantize=True)


def test_a_set_made_with_another_importance_matrix_has_another_id(
    mini: Path, tmp_path: Path
) -> None:
    """Of the same name, so that nothing but the weights' codes tells the two apart."""
    name = "blk.0.attn_q.weight"
    found = []
    for label, top in (("a", 1.0), ("b", 9.0), ("c", 1.0)):
        folder = tmp_path / label
        folder.mkdir()
        sums = {name: np.linspace(1, top, 256).reshape(1, -1)}
        matrix = folder / "m.imatrix.gguf"
        matrix.write_bytes(pack_gguf(Calibration(sums, {name: np.array([1])}, ("t",), 1, 512)))
        done = quantcli.quantize(
            mini, folder / "m.gguf", type="Q4_0", imatrix=str(matrix), split_max_size="500K"
        )
        found.append((_set_ids(done.paths), [path.read_bytes() for path in done.paths]))
    assert len(found[0][0]) == 1
    assert found[0][0] != found[1][0]
    assert found[0] == found[2]
    mixed = tmp_path / "a" / done.paths[1].name
    mixed.write_bytes((tmp_path / "b" / done.paths[1].name).read_bytes())
    with pytest.raises(SourceError, match="is of another run than"):
        quantcli.export(tmp_path / "a" / done.paths[0].name, verify=True)


def test_a_set_has_the_same_id_whenever_it_is_made(whole: Path, tmp_path: Path) -> None:
    """And another one where a weight differs, though nothing else does."""
    damaged = tmp_path / "other.gguf"
    data = bytearray(whole.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    found = []
    for name, source in (("a", whole), ("b", whole), ("c", damaged)):
        paths = quantcli.export(
            source, tmp_path / f"{name}.gguf", to="gguf", split_max_size="1M"
        ).paths
        found.append(_set_ids(paths))
        merged = tmp_path / f"{name}-whole.gguf"
        quantcli.export(paths[0], merged, to="gguf")
        assert merged.read_bytes() == source.read_bytes()
    assert [len(ids) for ids in found] == [1, 1, 1]
    assert found[0] == found[1] != found[2]
