"""What statistics of inputs and gradients take: Hessians, output Fisher information, gradients.

Bytes are those of `quantcli.statistics.collector` (sums in mapped files, float64), of
`quantcli.statistics.hessian` (what is alive while a Hessian is factored, and afterwards), of
`quantcli.statistics.output_fisher` and of `quantcli.statistics.layer_gradients`.
"""

from __future__ import annotations

from collections.abc import Collection

from quantcli.artifacts.scratch import LARGE
from quantcli.layerwise.pass_needs import Passes, committed_states, states_stage
from quantcli.plan.layer_sizes import LayerSize, MatrixSize
from quantcli.plan.needs import Stage, Work

_SUM = 8
"""Bytes of an element of a sum of x x^T."""
_NARROW, _FACTORED_NARROW, _FACTORED_WIDE = 2048, 48, 28
"""From so many columns on a Hessian is factored in float32: bytes for an element at the peak."""
_WAITING = 1 << 28
"""Bytes of inputs that wait to be added up together, in each part."""
_TOGETHER = 2048
"""Inputs of a wide matrix that are."""
_HELD_OUT = 8
_HELD = 16
"""Bytes for an element of a matrix's statistics: fit, held out, damped, factor."""
_PANELS, _BESIDE = 4, 6144
"""Of a wide one in its columns' own order: bytes for an element, and for a column; its means stay
in their files (`quantcli.statistics.panel_hessian`)."""
_STRIP = 4096
"""Rows that compensate one another's errors."""
_LOGITS = 5
"""Copies of logits in float32 when their gradient is taken, beside one as computed."""
_AT_ONCE = 1 << 23
"""Logits that are there at once."""


def parts_of(windows: int) -> int:
    """In how many parts sums are kept: every eighth window is held out."""
    return 2 if windows >= _HELD_OUT else 1


def sums_bytes(layer: LayerSize, parts: int = 2) -> int:
    """Sums of x x^T of all inputs of a layer, mapped files: ``parts`` are fit and held out."""
    return sum(_SUM * one.matrices * one.columns**2 * parts for one in layer.inputs.values())


def resident_sums(layer: LayerSize, parts: int = 2) -> int:
    """Those of them that stay in memory: of a large file pages are let go."""
    held = 0
    for one in layer.inputs.values():
        file = _SUM * one.matrices * one.columns**2
        held += parts * file if file < LARGE else 0
    return held


def whole_bytes(matrix: MatrixSize) -> int:
    """Sums over all of a stack's matrices, kept while it is rounded."""
    return 2 * _SUM * matrix.columns**2 if matrix.matrices > 1 else 0


def sums_work(passes: Passes, layer: LayerSize, windows: int) -> Work:
    """A product for each input and window, and its addition to the sum.

    Experts' products are of several windows' inputs together, and so are those of wide matrices.
    """
    flops = 0.0
    turns = -(-_stacked_bytes(passes, layer, windows) // _WAITING)
    for one in layer.inputs.values():
        rows = passes.tokens * one.used * windows
        updates = windows if one.matrices == 1 else min(one.matrices * turns, rows)
        if _waits(one):
            updates = min(windows, -(-rows // _TOGETHER))
        flops += 2.0 * rows * one.columns**2 + 20.0 * updates * one.columns**2
    return Work(float32=flops)


def waiting_bytes(passes: Passes, layer: LayerSize, windows: int) -> int:
    """Inputs of experts and of wide matrices that wait, those that are held out by themselves."""
    everything = _stacked_bytes(passes, layer, windows)
    apart = everything // _HELD_OUT
    wide = passes.itemsize * sum(one.columns for one in layer.inputs.values() if _waits(one))
    waiting = 0
    for stacked, count in ((everything - apart, windows), (apart, windows // _HELD_OUT)):
        waiting += min(stacked + min(_TOGETHER, passes.tokens * count) * wide, _WAITING)
    return waiting


def _waits(one: MatrixSize) -> bool:
    return one.matrices == 1 and one.columns >= _NARROW


def _stacked_bytes(passes: Passes, layer: LayerSize, windows: int) -> int:
    """All inputs of stacks, weighed and so in float32."""
    stacks = [one for one in layer.inputs.values() if one.matrices > 1]
    return sum(4 * passes.tokens * one.used * one.columns for one in stacks) * windows


def factor_bytes(columns: int, *, in_order: bool = True) -> int:
    """A Hessian of so many columns while it is factored, its means and result included.

    ``in_order`` tells that columns stay in their own order.
    """
    if in_order and columns >= _NARROW:
        return held_bytes(columns)
    each = _FACTORED_NARROW if columns < _NARROW else _FACTORED_WIDE
    return each * columns**2


def held_bytes(columns: int, *, in_order: bool = True) -> int:
    """The same once it is factored."""
    if in_order and columns >= _NARROW:
        return _PANELS * columns**2 + _BESIDE * columns
    return _HELD * columns**2


def factor_work(columns: int) -> Work:
    """Cholesky's third of a cube."""
    return Work(factors=columns**3 / 3)


def strips(rows: int) -> list[int]:
    """Rows of each strip of a matrix's output Fisher information."""
    count = -(-rows // _STRIP)
    return [rows // count + (number < rows % count) for number in range(count)]


def _is_shared(matrix: MatrixSize) -> bool:
    return matrix.matrices == 1 or matrix.name.endswith("ffn_down_exps.weight")


def fisher_bytes(matrices: Collection[MatrixSize]) -> tuple[int, int]:
    """Sums of g g^T of a layer's matrices: all bytes, and those of them that lie in files."""
    whole = files = 0
    for one in matrices:
        each = sum(4 * rows**2 for rows in strips(one.rows))
        if _is_shared(one):
            whole += each
        else:
            whole += one.matrices * each
            files += one.matrices * each
    return whole, files


def fisher_work(
    passes: Passes, layer: LayerSize, matrices: Collection[MatrixSize], windows: int
) -> Work:
    """Windows there and back through a filled layer, a product for each output."""
    back = passes.forward_work(layer, windows).times(3)
    flops = sum(
        2.0 * windows * passes.tokens * one.used * sum(rows**2 for rows in strips(one.rows))
        for one in matrices
    )
    return Work(products=back.products, float32=back.float32 + flops)


def head_bytes(passes: Passes) -> int:
    """The head's weights and a window's logits, there and back."""
    head = passes.sizes.head
    logits = min(passes.tokens * passes.sizes.vocabulary, max(_AT_ONCE, passes.sizes.vocabulary))
    return head.elements * passes.itemsize + logits * (4 * _LOGITS + passes.itemsize)


def gradients_bytes(passes: Passes, windows: int) -> int:
    """The file of gradients by every layer's input and by the last one's output."""
    return 4 * (len(passes.sizes.layers) + 1) * windows * passes.tokens * passes.sizes.hidden


def gradients_stage(passes: Passes, windows: int) -> Stage:
    """Windows forwards, through the head, and back; every state in between is in a file."""
    sizes = passes.sizes
    memory = max(head_bytes(passes), *(passes.backward_bytes(layer) for layer in sizes.layers))
    work = passes.head_work(windows).times(3)
    for layer in sizes.layers:
        work += passes.forward_work(layer, windows).times(4)
    nbytes = gradients_bytes(passes, windows)
    work += Work(written=2.0 * nbytes, read=2.0 * nbytes)
    return Stage("gradients", memory, kept=nbytes, work=work)


def embedding_stage(passes: Passes) -> Stage:
    """The embedding's Fisher information: two sums in float64 and the factor."""
    columns = passes.sizes.embedding.columns
    work = factor_work(columns)
    return Stage("embedding", 2 * _SUM * columns**2 + factor_bytes(columns), work=work)


def collecting_stages(
    passes: Passes, needs: Collection[str], *, in_memory: bool, beside: int = 0
) -> list[Stage]:
    """A calibration: windows pass every layer, sums are kept one file a layer, then written.

    ``beside`` are bytes that the result takes once more where it is scratch as well.
    """
    hessians, rows = "hessian" in needs, 6 if "mean" in needs else 5
    held = passes.states if in_memory else 0
    stages = [states_stage(passes, in_memory=in_memory)]
    whole = 0
    for number, layer in enumerate(passes.sizes.layers):
        totals = sum(8 * (1 + rows * one.columns) * one.matrices for one in layer.matrices)
        sums = sums_bytes(layer, 1) if hessians else 0
        file = totals + sums // 2
        whole += file
        work = passes.forward_work(layer, passes.windows)
        if hessians:
            work += sums_work(passes, layer, passes.windows)
        most = max((one.columns for one in layer.inputs.values()), default=0)
        product = 4 * most**2 if hessians else 0
        waiting = waiting_bytes(passes, layer, passes.windows) if hessians else 0
        memory = held + passes.forward_bytes(layer) + sums + product + totals + waiting
        work += Work(written=float(file))
        stages.append(Stage(f"layer {number}", memory, sums, file, work))
        stages += committed_states(passes, number, in_memory=in_memory)
    stages.append(Stage("statistics", held, kept=beside, work=Work(written=float(whole))))
    return stages


def statistics_bytes(passes: Passes, needs: Collection[str]) -> int:
    """The further statistics' file: vectors, and Hessians in float32."""
    whole = 0
    vectors = {"abs_max": 1, "mean_abs": 1, "mean": 1, "min_max": 2}
    each = 4 * sum(vectors.get(need, 0) for need in needs)
    for layer in passes.sizes.layers:
        whole += sum((8 + each * one.columns) * one.matrices for one in layer.matrices)
        if "hessian" in needs:
            whole += sums_bytes(layer, 1) // 2
    return whole
