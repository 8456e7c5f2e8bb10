"""What the outputs of a run will need, before it begins: the statements of its parts put together.

Each part has its own statement next to its code (``*_needs.py``). Here they follow one another as
the run does: a survey for the choice of types, statistics for transforms and static scales, the
search for scales, gradients, each layer's Hessians and rounding, training, and the writing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from quantcli.artifacts.write import default_threads, peak_memory
from quantcli.formats import get_format
from quantcli.formats.base import BlockFormat
from quantcli.plan.budget import BASE_BYTES
from quantcli.plan.folders import FolderPlan
from quantcli.plan.layer_sizes import LayerSize, MatrixSize, measure_sizes
from quantcli.plan.needs import Forecast, Stage, UnitCosts, Work
from quantcli.plan.planner import Plan
from quantcli.plan.recipe import is_allocated
from quantcli.plan.recipe_defaults import USUAL_ROUNDER
from quantcli.rounding.codecs import BlockCodec, GridCodec, WeightCodec, find_codecs
from quantcli.rounding.options import Options
from quantcli.run.check_needs import refuse_memory, refuse_scratch
from quantcli.run.outputs import Planned, needed_statistics, needs_text
from quantcli.systems import resident_memory

if TYPE_CHECKING:
    from quantcli.layerwise.pass_needs import Passes
    from quantcli.layerwise.windows import Windows
    from quantcli.model import Model
    from quantcli.run.methods import Chain
    from quantcli.run.request import Request


Rounded = Mapping[str, Mapping[str, WeightCodec]]
"""Codecs by tensor and by their identity."""
Fits = Callable[[WeightCodec], bool]


def codecs_of(
    plan: Plan | FolderPlan, model: Model
) -> tuple[Mapping[str, WeightCodec], Mapping[str, WeightCodec]]:
    """`find_codecs`; a folder of types rather than grids has none."""
    if not isinstance(plan, Plan) and not plan.schemes:
        return {}, {}
    return find_codecs(plan, model)


def plain_stage(planned: Sequence[Planned]) -> Stage:
    """Writing outputs from one read: slabs on threads, digests, each format's encoder once."""
    threads = min(each.threads for each in planned)
    memory = max(peak_memory(each.artifact, threads) for each in planned) - BASE_BYTES
    work = Work()
    encoded: set[tuple[str, str]] = set()
    for each in planned:
        artifact = each.artifact
        for tensor, name, count in _encodings(each):
            if (tensor, name) not in encoded:
                encoded.add((tensor, name))
                work += Work(encoded={name: count})
        work += Work(written=float(artifact.nbytes))
    source = float(planned[0].artifact.source_bytes)
    return Stage("writing", memory, work=work + Work(read=source, hashed=source))


def _encodings(planned: Planned) -> list[tuple[str, str, float]]:
    """Tensor, what its encoder is called and its weights, of what is encoded as it is written."""
    plan = planned.artifact.plan
    rounded = set()
    if planned.run is not None and method_chain(planned).rounds:
        rounded = set(codecs_of(plan, planned.run.model)[0])
    if isinstance(plan, Plan):
        return [
            (item.tensor.name, _name(item.format, weighted=item.importance),
             float(item.tensor.elements))
            for item in plan.items if item.tensor.name not in rounded
        ]  # fmt: skip
    found = []
    for item in plan.items:
        kind = item.scheme.label if item.scheme is not None else item.format
        if kind and item.matrix.tensor not in rounded:
            name = _name(kind, weighted=item.importance)
            found.append((item.matrix.module, name, float(item.matrix.elements)))
    return found


def _name(kind: str, *, weighted: bool) -> str:
    return f"{kind}, weighted" if weighted else kind


def find_encoders(planned: Sequence[Planned]) -> dict[str, tuple[WeightCodec, bool]]:
    """All codecs that work is counted for, by the name that it is counted under."""
    found: dict[str, tuple[WeightCodec, bool]] = {}
    for each in planned:
        plan = each.artifact.plan
        kinds: dict[str, WeightCodec] = {}
        if isinstance(plan, Plan):
            kinds = {item.format: BlockCodec(get_format(item.format)) for item in plan.items}
        else:
            for item in plan.items:
                if item.format:
                    kinds[item.format] = BlockCodec(get_format(item.format))
            if plan.schemes:
                codecs = codecs_of(plan, each.artifact.model)[1].values()
                kinds |= {codec.name: codec for codec in codecs}
        for kind, codec in kinds.items():
            for weighted in (False, True):
                found[_name(kind, weighted=weighted)] = (codec, weighted)
    return found


def method_chain(planned: Planned) -> Chain:
    """The methods of an output."""
    from quantcli.run.methods import parse_methods

    return parse_methods(planned.artifact.plan.recipe.method or USUAL_ROUNDER)


@dataclass(frozen=True)
class Limits:
    """How a run is kept small: hidden states ``in_memory`` or in a file."""

    in_memory: bool = True


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


def method_stages(batch: Sequence[Planned], limits: Limits, threads: int) -> list[Stage]:
    """The stages of outputs that one run of the model serves, the last one writes them."""
    from quantcli.layerwise.pass_needs import primitives_bytes
    from quantcli.run.recipe_options import read_options
    from quantcli.statistics.input_needs import collecting_stages, statistics_bytes
    from quantcli.transforms.chain import needed_statistics as transform_statistics
    from quantcli.transforms.search_needs import search_stage

    first = batch[0]
    run = first.run
    if run is None:
        raise ValueError(f"{first.path} has no method")
    chain, options = method_chain(first), read_options(first.artifact.plan.recipe)
    dtype = products_dtype(run.model)
    passes = passes_of(run.model, run.windows, dtype)
    if passes is None:
        return [plain_stage(batch)]
    stages = []
    surveyed = any(is_allocated(each.artifact.plan.recipe) for each in batch)
    if surveyed:
        stages += survey_stages(passes, options, batch, limits)
    for each in batch:
        needs = transform_statistics(chain.transforms) if chain.transforms else ()
        if needs and not chain.rounds and "hessian" not in needs:
            needs = ("hessian", *needs)
        if needs:
            beside = statistics_bytes(passes, needs)
            stages += _gone(
                collecting_stages(passes, needs, in_memory=limits.in_memory, beside=beside), beside
            )
            names = {
                name: _name(codec.name, weighted=True)
                for name, codec in codecs_of(each.artifact.plan, run.model)[0].items()
            }
            stages.append(search_stage(passes.sizes, threads, names))
        if needs_text(each.artifact) and each.artifact.scales is None:
            own = needed_statistics(each.artifact)
            beside = statistics_bytes(passes, own)
            found = collecting_stages(passes, own, in_memory=limits.in_memory, beside=beside)
            stages += _gone(found, beside)
    if chain.rounds:
        stages += rounding_stages(batch, chain, options, limits, surveyed=surveyed)
    more = primitives_bytes(passes)
    return [replace(stage, memory=stage.memory + more) for stage in (*stages, plain_stage(batch))]


def _gone(stages: Sequence[Stage], stays: int) -> list[Stage]:
    """Stages in a folder of their own, of which in the end only ``stays`` bytes are left."""
    kept, found = 0, []
    for stage in stages:
        kept += stage.kept
        found.append(Stage(stage.name, stage.memory, kept + stage.scratch, 0, stage.work))
    return [*found, Stage("statistics", kept=stays)]


def survey_stages(
    passes: Passes, options: Options, batch: Sequence[Planned], limits: Limits
) -> list[Stage]:
    """The choice of types: gradients, and a pass of their windows through each layer."""
    from quantcli.layerwise.pass_needs import Passes, states_stage
    from quantcli.rounding.round_needs import preparing_bytes
    from quantcli.statistics.input_needs import (
        factor_work,
        fisher_bytes,
        fisher_work,
        gradients_stage,
        parts_of,
        resident_sums,
        sums_bytes,
        sums_work,
        waiting_bytes,
    )

    count = gradient_windows(passes, options)
    few = Passes(passes.sizes, count, passes.tokens, passes.itemsize)
    stages = [gradients_stage(few, count)]
    held = few.states if limits.in_memory else 0
    states = states_stage(few, in_memory=limits.in_memory)
    stages.append(states)
    kinds = {name for each in batch for name in find_encoders([each]) if "weighted" in name}
    for number, layer in enumerate(passes.sizes.layers):
        fisher, in_files = fisher_bytes(layer.matrices)
        sums = sums_bytes(layer, parts_of(count))
        there = resident_sums(layer, parts_of(count))
        most = max((preparing_bytes(m) for m in layer.matrices), default=0)
        running = max(passes.forward_bytes(layer), passes.backward_bytes(layer))
        running += waiting_bytes(passes, layer, count)
        work = passes.forward_work(layer, count) + sums_work(passes, layer, count)
        work += fisher_work(passes, layer, layer.matrices, count)
        for one in layer.inputs.values():
            work += factor_work(one.columns).times(one.matrices)
        tried = sum(min(one.elements, 1 << 22) for one in layer.matrices)
        work += Work(encoded=dict.fromkeys(kinds, float(tried)))
        memory = held + fisher + there + max(most, running)
        stages.append(Stage(f"costs, layer {number}", memory, sums + in_files, 0, work))
    return stages


def gradient_windows(passes: Passes, options: Options) -> int:
    """Windows that are run backwards."""
    from quantcli.statistics.layer_gradients import count_windows

    names = [matrix.name for layer in passes.sizes.layers for matrix in layer.matrices]
    return min(passes.windows, count_windows(options.fisher_windows, names))


def rounding_stages(
    batch: Sequence[Planned], chain: Chain, options: Options, limits: Limits, *, surveyed: bool
) -> list[Stage]:
    """Gradients, each layer's pass and rounding, the head, training end to end."""
    from quantcli.layerwise.pass_needs import committed_states, states_stage
    from quantcli.rounding.base import ROUNDERS
    from quantcli.statistics.input_needs import embedding_stage, gradients_stage
    from quantcli.training.train_needs import code_bytes, end_to_end_stage

    run = batch[0].run
    if run is None:
        raise ValueError(f"{batch[0].path} has no method")
    plans = [each.artifact.plan for each in batch]
    codecs = [codecs_of(plan, run.model) for plan in plans]
    dtype = products_dtype(run.model, options)
    passes = passes_of(run.model, run.windows, dtype)
    if passes is None:
        return []
    sizes = passes.sizes
    rounded: dict[str, dict[str, WeightCodec]] = {}
    for own, _ in codecs:
        for name, codec in own.items():
            rounded.setdefault(name, {})[codec.identity] = codec
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
        stages.append(Stage("embedding", max(embedding.memory, part.memory), 0, part.kept,
                            embedding.work + part.work))  # fmt: skip
    in_memory = limits.in_memory and not options.trainer
    states = states_stage(passes, in_memory=in_memory)
    held = states.memory * (2 if options.propagate else 1)
    stages.append(states)
    if options.propagate:
        stages.append(states_stage(passes, in_memory=in_memory))
    for number, layer in enumerate(sizes.layers):
        stages.append(
            _layer_stage(
                passes, layer, f"layer {number}", rounded, fits, options, held, fisher=fisher
            )
        )
        for _ in range(2 if options.propagate else 1):
            stages += committed_states(passes, number, in_memory=in_memory)
    if late:
        stages.append(replace(gradients, memory=gradients.memory + held))
    head = _head_stage(passes, rounded, fits, options, held)
    if head is not None:
        stages.append(head)
    if options.e2e:
        for _, every in codecs:
            moved = code_bytes(_packed(run.model, every)) if options.e2e_codes else 0
            factors = _count_factors(run.model, every)
            stages.append(end_to_end_stage(passes, options.e2e_steps, factors, moved))
    return stages


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
    from quantcli.rounding.round_needs import matrix_work, rounding_bytes

    codecs = list(rounded.get(matrix.name, {}).values())
    names = {_name(c.name, weighted=True): c.has_codes and fits(c) for c in codecs}
    by_rows = fisher and any(codec.by_rows for codec in codecs)
    stored = sum(_stored_bytes(codec, matrix) for codec in codecs)
    work = matrix_work(matrix, names, options, fisher=by_rows) + Work(written=float(stored))
    memory = rounding_bytes(matrix, fisher=by_rows, drift=options.propagate)
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


def make_forecast(stages: Sequence[Stage], *, runs: bool, seconds: float | None = None) -> Forecast:
    """The forecast of stages in turn; ``runs``: whether torch is at work in any of them."""
    base = resident_memory()
    if runs:
        from quantcli.layerwise.pass_needs import LIBRARIES

        base += LIBRARIES
    return Forecast(base, tuple(stages), seconds)


def add_forecasts(request: Request, planned: Sequence[Planned]) -> list[Planned]:
    """The outputs with what the runs that make them will need, as they will be run.

    Outputs that are written together, or that one run of the model serves, have one forecast; a
    dry run also tells how long it takes. PlanError where a run of the model needs more than
    ``request`` allows, however it is run.
    """
    plain = [each for each in planned if each.run is None and each.kept is None]
    methodical = [each for each in planned if each.run is not None and each.kept is None]
    found: dict[int, Forecast] = {}
    in_memory: dict[int, bool] = {}
    if plain and request.dry_run:
        forecast = _timed(plain, make_forecast([plain_stage(plain)], runs=False), request)
        found |= {id(each): forecast for each in plain}
    if methodical:
        from quantcli.run.apply_methods import group_runs

        for batch in group_runs(methodical):
            forecast, stay = _fitting(batch, request)
            if request.dry_run:
                forecast = _timed(batch, forecast, request)
            found |= {id(each): forecast for each in batch}
            in_memory |= {id(each): stay for each in batch}
    # Of those that are whole nothing is to be done.
    nothing = Forecast(resident_memory(), (), 0.0) if request.dry_run else None
    return [
        replace(
            each, forecast=found.get(id(each), nothing),
            states_in_memory=in_memory.get(id(each), True),
        )
        for each in planned
    ]  # fmt: skip


def _fitting(batch: Sequence[Planned], request: Request) -> tuple[Forecast, bool]:
    """The forecast of a run of the model, and whether its hidden states stay in memory.

    They do where they take no more than a share of the machine's, and the run is allowed to.
    """
    from quantcli.run.calibrate import states_memory

    threads = request.threads or default_threads()
    label, allowed = batch[0].artifact.label, request.max_memory
    run = batch[0].run
    if run is None:
        raise ValueError(f"{label} has no method")
    passes = passes_of(run.model, run.windows, "float32")
    stay = passes is None or passes.states <= states_memory()
    forecast = make_forecast(method_stages(batch, Limits(stay), threads), runs=True)
    if allowed is not None and stay and forecast.memory > allowed:
        stay = False
        forecast = make_forecast(method_stages(batch, Limits(stay), threads), runs=True)
    if allowed is not None:
        refuse_memory(label, forecast, allowed)
    if request.max_scratch is not None:
        refuse_scratch(label, forecast, request.max_scratch)
    return forecast, stay


def _timed(batch: Sequence[Planned], forecast: Forecast, request: Request) -> Forecast:
    """The forecast with its time."""
    costs = _unit_costs(batch, forecast.work, request.threads or default_threads())
    return replace(forecast, seconds=costs.seconds(forecast.work))


def _unit_costs(batch: Sequence[Planned], work: Work, threads: int) -> UnitCosts:
    from quantcli.run.unit_costs import measure_unit_costs

    first = batch[0]
    options, dtype = Options(), None
    if first.run is not None:
        from quantcli.run.recipe_options import read_options

        options = read_options(first.artifact.plan.recipe)
        dtype = products_dtype(first.run.model, options)
    encoders = find_encoders(batch)
    used = {
        name: found
        for name, found in encoders.items()
        if name in work.encoded or name in work.descended
    }
    stored = first.artifact.model.store.tensors.values()
    file = next((info.file for info in stored), None)
    return measure_unit_costs(
        used, work.descended, options, threads=threads, file=file, dtype=dtype
    )
