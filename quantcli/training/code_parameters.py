"""Codes of packed tensors as parameters of end-to-end training: each state is one of the grid.

Behind every weight stands a latent number, in the units of its block's own grid; the weight is the
grid's point nearest to it, and gradients pass that projection as if it were not there (a
straight-through estimator, arXiv:1308.3432). Where a code is a point of a codebook for four or
eight weights, these have a latent vector together. Latents begin inside their code's cell, leaning
towards the original weight, so nothing changes before the first crossing. They move by Adam
(arXiv:1412.6980), which is blind to the blocks' scales; those are `ScaleParameters`' to train.

Training weights of a quantized model on its outputs is PV-Tuning's aim (arXiv:2405.14852) and that
of EfficientQAT (arXiv:2407.11062); latents in the units of the grid are SignRound's
(arXiv:2309.05516). Everything lies in files in the run's folder, so that memory is the page
cache's to give: 16 bytes for each weight, and its packed rows twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from quantcli.artifacts.scratch import create_array
from quantcli.formats import get_format
from quantcli.formats.base import Bytes, Floats
from quantcli.formats.codebook_lattice import CODEBOOKS
from quantcli.formats.lattice import LATTICES, Parts
from quantcli.layerwise.steady import steady
from quantcli.ranks.group import Group
from quantcli.rounding.run_store import EncodedStore
from quantcli.training.projections import projection_of

ReadRows = Callable[[str, int, int], Floats]
"""A tensor's original rows ``start:stop``, float32."""

LEAN = 0.35
"""How far from its code a latent starts at most, in the grid's mean gap."""
_BETAS = (0.9, 0.99)
_LATENT, _MEAN, _SQUARE, _GRADIENT = range(4)
_AT_ONCE = 1 << 20
"""Weights that one operation takes."""
_DEAR = 64
"""Products for a weight from which on a step projects every fourth row alone."""


class CodeParameters:
    """Latents of the tensors in ``store``, by block format in ``formats``.

    ``original`` gives their unquantized rows. Each tensor has files of its own in ``folder``.
    """

    def __init__(
        self, store: EncodedStore, formats: Mapping[str, str], original: ReadRows, folder: Path
    ) -> None:
        self._tensors = {
            name: _Tensor(store, name, kind, original, folder / f"codes-{number}")
            for number, (name, kind) in enumerate(formats.items())
        }
        self._count = 0

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors whose codes are trained."""
        return tuple(self._tensors)

    def read_packed(self, name: str, start: int, stop: int) -> Bytes:
        """Packed rows with the present codes, under the scales that were stored."""
        found: Bytes = self._tensors[name].packed[start:stop]
        return found

    def forget(self) -> None:
        """Set all gradients to zero."""
        for each in self._tensors.values():
            each.planes[_GRADIENT] = 0

    def add_rows(self, name: str, first: int, gradient: Floats) -> None:
        """Add the gradient by consecutive rows (n, columns) of a tensor."""
        self._tensors[name].planes[_GRADIENT, first : first + len(gradient)] += gradient

    def add_up(self, group: Group) -> None:
        """Have the gradients be those of all ranks together."""
        for each in self._tensors.values():
            group.add_up(each.planes[_GRADIENT])

    @property
    def finite(self) -> bool:
        """Whether every gradient is a number."""
        sums = (each.planes[_GRADIENT].sum(dtype=np.float64) for each in self._tensors.values())
        return all(np.isfinite(total) for total in sums)

    @steady()
    def descend(self, rate: float) -> None:
        """Move every latent by about ``rate`` of its grid's mean gap."""
        self._count += 1
        for each in self._tensors.values():
            each.descend(rate, self._count)

    def keep(self) -> None:
        """Remember the present codes."""
        for each in self._tensors.values():
            each.best[:] = each.packed

    def restore(self) -> None:
        """Take up the codes that were kept; latents stay, training is over."""
        for each in self._tensors.values():
            each.packed[:] = each.best

    def close(self) -> None:
        """Remove the files."""
        for each in self._tensors.values():
            each.close()
        self._tensors.clear()


class _Tensor:
    """One tensor: planes (4, rows, columns) of latents, moments and gradient, and packed rows."""

    def __init__(
        self, store: EncodedStore, name: str, kind: str, original: ReadRows, path: Path
    ) -> None:
        self._format = get_format(kind)
        self._lattice = CODEBOOKS[kind] if kind in CODEBOOKS else LATTICES[kind]
        self._projection = projection_of(kind)
        rows, width = store.shape(name)
        columns = width // self._format.nbytes * self._format.block
        self._paths = [path.with_suffix(f".{kind}") for kind in ("planes", "packed", "best")]
        self.planes = create_array(self._paths[0], np.float32, (4, rows, columns))
        self.packed = create_array(self._paths[1], np.uint8, (rows, width))
        self.best = create_array(self._paths[2], np.uint8, (rows, width))
        self._each = max(1, _AT_ONCE // columns)
        for start in range(0, rows, self._each):
            stop = min(start + self._each, rows)
            self.packed[start:stop] = store.read_stored(name, start, stop)
            self._lean(start, stop, original(name, start, stop))
        self.best[:] = self.packed

    def _parts(self, start: int, stop: int) -> Parts:
        blocks = np.ascontiguousarray(self.packed[start:stop])
        return self._lattice.split(blocks.reshape(-1, self._format.nbytes))

    def _lean(self, start: int, stop: int, rows: Floats) -> None:
        """Latents at their codes' points, moved towards the original as far as the cell goes."""
        parts = self._parts(start, stop)
        step, low = self._lattice.steps(parts)
        steps = torch.from_numpy(step)[:, :, None]
        aim = torch.from_numpy(rows).view(*step.shape, -1) + torch.from_numpy(low)[:, :, None]
        aim = (aim / steps).nan_to_num(0, 0, 0)
        codes = torch.from_numpy(self._projection.ranks(parts.codes))
        points = self._projection.points(codes)
        flat = points.view(aim.shape)
        reach = LEAN * self._projection.gap
        aim = (flat + (aim - flat).clamp(-reach, reach)).view(points.shape)
        # A latent of a whole vector may have left its cell although none of its numbers went far.
        for _ in range(3):
            strays = (self._projection.project(aim) != codes).view(*codes.shape, 1)
            aim = torch.where(strays, (aim + points) / 2, aim)
        strays = (self._projection.project(aim) != codes).view(*codes.shape, 1)
        aim = torch.where(strays, points, aim)
        self.planes[_LATENT, start:stop] = aim.view(stop - start, -1).numpy()

    def descend(self, rate: float, count: int) -> None:
        """Move the latents, and project them."""
        first, second = (1 - beta**count for beta in _BETAS)
        pace = rate * self._projection.gap / first
        rows = self.planes.shape[1]
        for start in range(0, rows, self._each):
            stop = min(start + self._each, rows)
            latent, mean, square, gradient = (
                torch.from_numpy(plane) for plane in self.planes[:, start:stop]
            )
            parts = self._parts(start, stop)
            step, _ = self._lattice.steps(parts)
            by_code = gradient.view(*step.shape, -1) * torch.from_numpy(step)[:, :, None]
            by_code = by_code.view(gradient.shape)
            mean.lerp_(by_code, 1 - _BETAS[0])
            square.mul_(_BETAS[1]).addcmul_(by_code, by_code, value=1 - _BETAS[1])
            way = (mean / (square / second).sqrt()).nan_to_num_(0, 0, 0)
            latent.sub_(way, alpha=pace)
            latent.clamp_(*self._projection.bounds)
            self._project(start, stop, latent, parts, count)

    def _project(
        self, start: int, stop: int, latent: torch.Tensor, parts: Parts, count: int
    ) -> None:
        """Pack the codes nearest to the latents, where a row has another one than before."""
        rows = np.arange(start, stop)
        if self._projection.costs >= _DEAR:
            rows = rows[rows % 4 == count % 4]
        mine = np.isin(np.arange(start, stop), rows)
        old = self._projection.ranks(parts.codes).reshape(stop - start, -1)[mine]
        new = self._projection.project(latent[mine].view(*old.shape, -1)).numpy()
        changed = (new != old).any(axis=1)
        if not changed.any():
            return
        rows = rows[changed]
        taken = self._lattice.split(self.packed[rows].reshape(-1, self._format.nbytes))
        codes = self._projection.codes(new[changed]).reshape(taken.codes.shape)
        self.packed[rows] = self._lattice.join(replace(taken, codes=codes)).reshape(len(rows), -1)

    def close(self) -> None:
        """Remove the files."""
        del self.planes, self.packed, self.best
        for path in self._paths:
            path.unlink(missing_ok=True)
