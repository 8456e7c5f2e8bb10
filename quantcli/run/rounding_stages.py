"""What a run that rounds layer by layer needs: gradients, each layer, the head, training.

The stages follow one another as `quantcli.run.layer_rounding` works; each part's own statement
stands next to its code (``*_needs.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from quantcli.formats.base import BlockFormat
from quantcli.plan.layer_sizes import LayerSize, MatrixSize, measure_sizes
from quantcli.plan.needs import Stage, Work
from quantcli.rounding.codecs import BlockCodec, GridCodec, WeightCodec
from quantcli.rounding.options import Options
from quantcli.run.outputs import Planned
from quantcli.run.writing_stage import codecs_of, encoder_name

if TYPE_CHECKING:
    from quantcli.layerwise.pass_needs import Passes
    from quantcli.layerwise.windows import Windows
    from quantcli.model import Model
    from quantcli.run.methods import Chain

Rounded = Mapping[str, Mapping[str, WeightCodec]]
"""Codecs by tensor and by their identity."""
Fits = Callable[[WeightCodec], bool]


def products_dtype(model: Model, options: Options | None = None) -> str:
    """The dtype that products are computed in, as `begin_rounding` chooses it."""
    from quantcli.layerwise.devices import choose_device
    from quantcli.layerwise.model_run import choose_dtype

    if options is not None and (options.propagate or options.trainer or options.e2e):
        return "float32"
    return choose_dtype(None, choose_device(None), model)


def passes_of(model: Model, windows: Windows, dtype: str) -> Passes | None:
    """How ``model`` is passed by these windows; None for one whose names do not tell its sizes."""
    from quantcli.layerwise.pass_needs import Passes

    sizes = measure_sizes(model)
    if sizes is None:
        return None
    count, tokens = windows.ids.shape
    return Passes(sizes, count, tokens, 4 if dtype == "float32" else 2)


def gradient_windows(passes: Passes, options: Options) -> int:
    """Windows that are run backwards."""
    from quantcli.statistics.layer_gradients import count_windows

    names = [matrix.name for layer in passes.sizes.layers for matrix in layer.matrices]
    return min(passes.windows, count_windows(options.fisher_windows, names))


def rounding_stages(
    batch: Sequence[Planned], chain: Chain, options: Options, *, in_memory: bool, surveyed: bool
) -> list[Stage]:
    """Gradients, each layer's pass and rounding, the head, training end to end."""
    from quantcli.layerwise.pass_needs import committed_states, states_stage
    from quantcli.rounding.base import ROUNDERS
    from quantcli.statistics.input_needs import embedding_stage, gradients_stage
    from quantcli.training.train_needs import code_bytes, end_to_end_stage

    run = batch[0].run
    if run is None:
        raise ValueError(f"{batch[0].path} has no method")
    codecs = [codecs_of(each.artifact.plan, run.model) for each in batch]
    dtype = products_dtype(run.model, options)
    passes = passes_of(run.model, run.windows, dtype)
    if passes is None:
        return []
    sizes = passes.sizes
    rounded = _by_identity(own for own, _ in codecs)
    # What goes to its place in the output at once is no scratch.
    filed = _by_identity(
        own for each, (own, _) in zip(batch, codecs, strict=True) if not each.in_place
    )
    fits = ROUNDERS.get(options.rounder).fits
    fisher = bool("fisher" in ROUNDERS.get(options.rounder).needs and options.fisher_windows)
    stages: list[Stage] = []
    outside = sizes.embedding.name in rounded or sizes.head.name in rounded
    measured = (fisher or outside) and not (surveyed and not chain.transforms)
    gradients = gradients_stage(passes, gradient_windows(passes, options))
    # Those of the head alone are taken when its turn comes.
    late = measured and not fisher and sizes.tied
    if measured and not late:
        stages.append(gradients)
    if sizes.embedding.name in rounded and not sizes.tied:
        embedding = embedding_stage(passes)
        part = _rounding(sizes.embedding, rounded, fits, options, fisher=False)
        stages.append(
            Stage(
                "embedding", max(embedding.memory, part.memory), 0,
                _filed_bytes([sizes.embedding], filed), embedding.work + part.work,
            )
        )  # fmt: skip
    in_memory = in_memory and not options.trainer
    states = states_stage(passes, in_memory=in_memory)
    held = states.memory * (2 if options.propagate else 1)
    stages.append(states)
    if options.propagate:
        stages.append(states_stage(passes, in_memory=in_memory))
    for number, layer in enumerate(sizes.layers):
        stage = _layer_stage(
            passes, layer, f"layer {number}", rounded, fits, options, held, fisher=fisher
        )
        stages.append(replace(stage, kept=_filed_bytes(layer.matrices, filed)))
        for _ in range(2 if options.propagate else 1):
            stages += committed_states(passes, number, in_memory=in_memory)
    if late:
        stages.append(replace(gradients, memory=gradients.memory + held))
    head = _head_stage(passes, rounded, fits, options, held)
    if head is not None:
        stages.append(replace(head, kept=_filed_bytes([sizes.head], filed)))
    if options.e2e:
        for _, every in codecs:
            moved = code_bytes(_packed(run.model, every)) if options.e2e_codes else 0
            factors = _count_factors(run.model, every)
            stages.append(end_to_end_stage(passes, options.e2e_steps, factors, moved))
    return stages


def _by_identity(
    outputs: Iterable[Mapping[str, WeightCodec]],
) -> dict[str, dict[str, WeightCodec]]:
    """The codecs of all outputs, those that are the same once."""
    found: dict[str, dict[str, WeightCodec]] = {}
    for own in outputs:
        for name, codec in own.items():
            found.setdefault(name, {})[codec.identity] = codec
    return found


def _filed_bytes(matrices: Iterable[MatrixSize], filed: Rounded) -> int:
    """What files of the run hold of tensors."""
    return sum(
        _stored_bytes(codec, one) for one in matrices for codec in filed.get(one.name, {}).values()
    )


def _count_factors(model: Model, codecs: Mapping[str, WeightCodec]) -> int:
    from quantcli.rounding.block_scales import count_factors

    total = 0
    for tensor in model.tensors:
        codec = codecs.get(tensor.name)
        if isinstance(codec, BlockCodec):
            fmt = codec.format
            if len(tensor.shape) > 1:
                total += tensor.elements // fmt.block * count_factors(fmt)
            elif codec.name == "F32":
                total += tensor.elements
    return total


def _packed(model: Model, codecs: Mapping[str, WeightCodec]) -> Iterator[tuple[int, BlockFormat]]:
    """Elements and format of each tensor in blocks that training end to end can move."""
    for tensor in model.tensors:
        codec = codecs.get(tensor.name)
        if isinstance(codec, BlockCodec) and codec.rounds and len(tensor.shape) > 1:
            yield tensor.elements, codec.format


def _rounding(
    matrix: MatrixSize, rounded: Rounded, fits: Fits, options: Options, *, fisher: bool,
) -> Stage:  # fmt: skip
    """A tensor's rounding: memory of one matrix of it, bytes that are stored of all."""
    from quantcli.rounding.base import ROUNDERS
    from quantcli.rounding.round_needs import matrix_work, parted_bytes, rounding_bytes

    codecs = list(rounded.get(matrix.name, {}).values())
    names = {encoder_name(c.name, weighted=True): c.has_codes and fits(c) for c in codecs}
    by_rows = fisher and any(codec.by_rows for codec in codecs)
    stored = sum(_stored_bytes(codec, matrix) for codec in codecs)
    work = matrix_work(matrix, names, options, fisher=by_rows) + Work(written=float(stored))
    memory = rounding_bytes(matrix, fisher=by_rows, drift=options.propagate)
    apart = getattr(ROUNDERS.get(options.rounder), "by_rows", False) and not options.propagate
    if apart and not by_rows and all(codec.by_rows for codec in codecs):
        # Several codecs' results are there at once, of which one copy is counted below.
        memory = min(memory, parted_bytes(matrix, stored // max(1, matrix.matrices)))
    # Packed rows wait for the whole layer, and those of a stack are put together.
    return Stage(matrix.name, memory + stored * (2 if matrix.matrices > 1 else 1), 0, stored, work)


def _stored_bytes(codec: WeightCodec, matrix: MatrixSize) -> int:
    if isinstance(codec, BlockCodec):
        return matrix.matrices * matrix.rows * codec.format.row_bytes(matrix.columns)
    if not isinstance(codec, GridCodec):
        return matrix.elements
    grid = codec.unbound
    each = 4 if grid.symmetric else 8
    return matrix.matrices * matrix.rows * (matrix.columns + each * grid.groups(matrix.columns))


def _layer_stage(
    passes: Passes, layer: LayerSize, name: str, rounded: dict[str, dict[str, WeightCodec]],
    fits: Callable[[WeightCodec], bool], options: Options, held: int, *, fisher: bool,
) -> Stage:  # fmt: skip
    """Windows there and back, sums of all inputs, one tensor after the other rounded, training."""
    from quantcli.rounding.round_needs import preparing_bytes
    from quantcli.statistics.input_needs import (
        fisher_bytes,
        fisher_work,
        held_bytes,
        parts_of,
        resident_sums,
        sums_bytes,
        sums_work,
        waiting_bytes,
        whole_bytes,
    )
    from quantcli.training.train_needs import tune_bytes, tune_work

    by_rows = [
        one for one in layer.matrices
        if fisher and any(codec.by_rows for codec in rounded.get(one.name, {}).values())
    ]  # fmt: skip
    outputs, in_files = fisher_bytes(by_rows)
    sums = sums_bytes(layer, parts_of(passes.windows))
    there = resident_sums(layer, parts_of(passes.windows))
    work = passes.forward_work(layer, passes.windows) + sums_work(passes, layer, passes.windows)
    back = 0
    if by_rows:
        count = gradient_windows(passes, options)
        work += fisher_work(passes, layer, by_rows, count)
        back = passes.backward_bytes(layer) + outputs
    widest = max((one.columns for one in layer.inputs.values()), default=0)
    running = passes.forward_bytes(layer) + 4 * passes.tokens * widest + outputs + there
    running += waiting_bytes(passes, layer, passes.windows)
    drift = 0
    if options.propagate:
        # Float64 sums of what the prefix's inputs differ by, in memory.
        drift = sums
        work += passes.forward_work(layer, passes.windows).times(2)
        running += passes.tokens * sum(one.columns for one in layer.inputs.values()) * 4
    kept, most, before = 0, 0, 0
    for one in sorted(layer.matrices, key=lambda m: (m.input, m.name)):
        part = _rounding(one, rounded, fits, options, fisher=one in by_rows)
        preparing = preparing_bytes(one, drift=options.propagate) if part.kept else 0
        whole = whole_bytes(one) + kept
        most = max(most, part.memory + whole, preparing + before + whole)
        kept += part.kept
        before = held_bytes(one.columns)
        work += part.work
    memory = held + max(back, running + drift, outputs + there + drift + most)
    if options.trainer:
        memory = max(memory, held + outputs + there + drift + tune_bytes(passes, layer))
        work += tune_work(passes, layer, options.tune_steps)
    return Stage(name, memory, sums + in_files, kept, work)


def _head_stage(
    passes: Passes, rounded: Rounded, fits: Fits, options: Options,
    held: int,
) -> Stage | None:  # fmt: skip
    from quantcli.statistics.input_needs import embedding_stage, parts_of

    sizes = passes.sizes
    if sizes.head.name not in rounded:
        return None
    part = _rounding(sizes.head, rounded, fits, options, fisher=False)
    sums = parts_of(passes.windows) * 8 * sizes.head.columns**2
    memory = held + sums + part.memory + (embedding_stage(passes).memory if sizes.tied else 0)
    flops = 2.0 * passes.windows * passes.tokens * sizes.head.columns**2
    return Stage("output head", memory, sums, part.kept, part.work + Work(float32=flops))
