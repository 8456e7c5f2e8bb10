"""One tensor through a method: rounded with feedback, compared, and the better one taken.

The comparison is with the encoder alone, importance weights and all, on inputs that the fit has not
seen: no method can make a tensor worse there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quantcli.formats import get_format, native
from quantcli.formats.base import BlockFormat, Bytes, Floats
from quantcli.methods.blocks import Coded, Workers, has_lattice
from quantcli.methods.descent import sweep
from quantcli.methods.gptq import encode_columns, round_with_feedback
from quantcli.methods.hessian import Hessian, output_error
from quantcli.methods.options import Options, Outcome

Mean = NDArray[np.float32]


@dataclass(frozen=True)
class Statistics:
    """What is known of one matrix's inputs: the factored fit, and means of x x^T.

    ``held_out`` judges; it is ``fit`` where no input was held out.
    """

    hessian: Hessian
    fit: Mean
    held_out: Mean
    correction: Mean | None = None
    """C H^-1, where a quantized prefix changes what the weights should be."""

    @property
    def importance(self) -> Floats:
        """Mean squares of the inputs, one per column."""
        return np.ascontiguousarray(self.fit.diagonal(), np.float32)


@dataclass(frozen=True)
class Rounded:
    """Packed rows of one matrix and its two losses, relative to the outputs' squares."""

    packed: Bytes
    before: float
    after: float
    kept: bool


def round_matrix(
    fmt: BlockFormat, rows: Floats, statistics: Statistics, options: Options, crew: Workers
) -> Rounded:
    """Round ``rows`` (n, columns), float32, towards what gives the original outputs."""
    aim = rows
    if statistics.correction is not None:
        aim = rows + rows @ statistics.correction
    plain = encode_columns(fmt, rows, statistics.importance, crew)
    scale = output_error(rows, statistics.held_out)

    def loss(packed: Bytes) -> float:
        errors = aim - native.decode(fmt, packed)
        return output_error(errors, statistics.held_out) / scale if scale > 0 else 0.0

    before = loss(plain)
    if not options.feedback:
        return Rounded(plain, before, before, kept=False)
    if not has_lattice(fmt.name):
        return Rounded(plain, before, before, kept=True)
    packed = descend(fmt, aim, statistics, options, crew).pack()
    after = loss(packed)
    if after <= before:
        return Rounded(packed, before, after, kept=False)
    return Rounded(plain, before, before, kept=True)


def descend(
    fmt: BlockFormat, rows: Floats, statistics: Statistics, options: Options, crew: Workers
) -> Coded:
    """GPTQ and the sweeps after it."""
    coded = round_with_feedback(fmt, rows, statistics.hessian, statistics.importance, crew)
    for _ in range(options.sweeps):
        sweep(coded, statistics.hessian, crew)
    return coded


def round_tensor(
    name: str, format_name: str, matrices: int, read: Callable[[int], Floats],
    statistics: Callable[[int], Statistics | None], options: Options, crew: Workers,
) -> tuple[Bytes, Outcome]:  # fmt: skip
    """All matrices of a tensor; ``read`` gives a matrix's rows, ``statistics`` what is known."""
    fmt = get_format(format_name)
    parts, before, after, kept = [], 0.0, 0.0, 0
    for matrix in range(matrices):
        rows = read(matrix)
        known = statistics(matrix)
        if known is None:
            parts.append(encode_columns(fmt, rows, np.ones(rows.shape[1], np.float32), crew))
            kept += 1
            continue
        found = round_matrix(fmt, rows, known, options, crew)
        parts.append(found.packed)
        before += found.before
        after += found.after
        kept += found.kept
    method = "gptq" if options.feedback and has_lattice(fmt.name) else "importance"
    outcome = Outcome(
        name, fmt.name, method, before / matrices, after / matrices, matrices, kept
    )  # fmt: skip
    return np.concatenate(parts), outcome
