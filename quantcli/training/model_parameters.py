"""All that end-to-end training moves in a model: block scales, norms, biases, and codes if asked.

A quantized model reads its weights through this while it is trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from quantcli.formats import get_format
from quantcli.formats.base import Bytes, Floats
from quantcli.ranks.group import Group
from quantcli.rounding.block_scales import Halves, count_factors
from quantcli.rounding.packed_matrix import has_lattice
from quantcli.rounding.run_store import EncodedStore
from quantcli.training.code_parameters import CodeParameters, ReadRows
from quantcli.training.scale_parameters import ScaleParameters


class ModelParameters:
    """Parameters behind the tensors in ``store``: `Changes` in training.

    ``formats`` names the block format of each packed tensor, ``vectors`` gives norms and biases;
    ``original`` reads unquantized rows, or is None where codes stay as they are.
    """

    def __init__(
        self, store: EncodedStore, formats: Mapping[str, str], vectors: Mapping[str, Floats],
        original: ReadRows | None, folder: Path,
    ) -> None:  # fmt: skip
        self._store = store
        self._codes: CodeParameters | None = None
        if original is not None:
            coded = {name: kind for name, kind in formats.items() if has_lattice(kind)}
            self._codes = CodeParameters(store, coded, original, folder)
        scaled = {name: kind for name, kind in formats.items() if count_factors(get_format(kind))}
        path = folder / "scales.bin"
        self._scales = ScaleParameters(store, scaled, vectors, path, self.read_packed)

    def __contains__(self, name: str) -> bool:
        return name in self._scales or name in self.codes

    @property
    def vectors(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes of norms and biases."""
        return self._scales.vectors

    @property
    def factors(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes (rows, blocks, factors) of the packed tensors that have factors."""
        return self._scales.factors

    @property
    def codes(self) -> Mapping[str, tuple[int, int]]:
        """Shapes (rows, row bytes) of the packed tensors whose codes are trained."""
        names = () if self._codes is None else self._codes.names
        return {name: self._store.shape(name) for name in names}

    def read_vector(self, name: str) -> Floats:
        """A norm or bias as it now is, float32."""
        return self._scales.read_vector(name)

    def read_factors(self, name: str, start: int, stop: int) -> Halves:
        """Factors of rows as they now are."""
        return self._scales.read_factors(name, start, stop)

    def read_packed(self, name: str, start: int, stop: int) -> Bytes:
        """Packed rows with the present codes, under the factors that were stored."""
        if self._codes is not None and name in self._codes:
            return self._codes.read_packed(name, start, stop)
        return self._store.read_stored(name, start, stop)

    def forget(self) -> None:
        """Set all gradients to zero."""
        self._scales.forget()
        if self._codes is not None:
            self._codes.forget()

    def add_rows(self, name: str, first: int, gradient: Floats) -> None:
        """Add the gradient by consecutive rows (n, columns) of a packed tensor."""
        if name in self._scales:
            self._scales.add_rows(name, first, gradient)
        if self._codes is not None and name in self._codes:
            self._codes.add_rows(name, first, gradient)

    def add_vector(self, name: str, gradient: Floats) -> None:
        """Add the gradient by a norm or bias."""
        self._scales.add_vector(name, gradient)

    def add_up(self, group: Group) -> None:
        """Have the gradients be those of all ranks together."""
        self._scales.add_up(group)
        if self._codes is not None:
            self._codes.add_up(group)

    def descend(self, rate: float, code_rate: float) -> bool:
        """Move all by about these rates; False, and nothing moved, if a gradient is not finite.

        ``rate`` is a share of a factor's, norm's or bias's size, ``code_rate`` one of the mean gap
        between two codes.
        """
        if not self._scales.finite or not (self._codes is None or self._codes.finite):
            return False
        self._scales.descend(rate)
        if self._codes is not None:
            self._codes.descend(code_rate)
        return True

    def keep(self) -> None:
        """Remember the present state."""
        self._scales.keep()
        if self._codes is not None:
            self._codes.keep()

    def restore(self) -> None:
        """Take up the state that was kept."""
        self._scales.restore()
        if self._codes is not None:
            self._codes.restore()

    def close(self) -> None:
        """Remove the files."""
        self._scales.close()
        if self._codes is not None:
            self._codes.close()
