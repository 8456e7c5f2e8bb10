"""What the outputs of a run will need, before it begins: the statements of its parts put together.

Each part has its own statement next to its code (``*_needs.py``). Here they follow one another as
the run does: a survey for the choice of types, statistics for transforms and static scales, the
search for scales, gradients, each layer's Hessians and rounding, training, and the writing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from quantcli.artifacts.write import default_threads
from quantcli.plan.needs import Forecast, Stage, UnitCosts, Work
from quantcli.plan.recipe import is_allocated
from quantcli.rounding.options import Options
from quantcli.run.check_needs import refuse_memory, refuse_samples, refuse_scratch
from quantcli.run.outputs import Planned, needed_statistics, needs_text
from quantcli.run.rounding_stages import (
    gradient_windows,
    passes_of,
    products_dtype,
    rounding_stages,
)
from quantcli.run.writing_stage import (
    codecs_of,
    encoder_name,
    find_encoders,
    method_chain,
    plain_stage,
)
from quantcli.systems import machine_memory, resident_memory

if TYPE_CHECKING:
    from quantcli.layerwise.pass_needs import Passes
    from quantcli.run.request import Request


def method_stages(batch: Sequence[Planned], threads: int, *, in_memory: bool) -> list[Stage]:
    """The stages of outputs that one run of the model serves, the last one writes them.

    ``in_memory``: hidden states are not in a file.
    """
    from quantcli.layerwise.pass_needs import primitives_bytes
    from quantcli.layerwise.sample_needs import samples_stage
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
    stages = [samples_stage(passes, run.samples)] if run.samples else []
    surveyed = any(is_allocated(each.artifact.plan.recipe) for each in batch)
    if surveyed:
        stages += survey_stages(passes, options, batch, in_memory=in_memory)
    for each in batch:
        needs = transform_statistics(chain.transforms) if chain.transforms else ()
        if needs and not chain.rounds and "hessian" not in needs:
            needs = ("hessian", *needs)
        if needs:
            beside = statistics_bytes(passes, needs)
            stages += _gone(
                collecting_stages(passes, needs, in_memory=in_memory, beside=beside), beside
            )
            names = {
                name: encoder_name(codec.name, weighted=True)
                for name, codec in codecs_of(each.artifact.plan, run.model)[0].items()
            }
            stages.append(search_stage(passes.sizes, threads, names))
        if needs_text(each.artifact) and each.artifact.scales is None:
            own = needed_statistics(each.artifact)
            beside = statistics_bytes(passes, own)
            found = collecting_stages(passes, own, in_memory=in_memory, beside=beside)
            stages += _gone(found, beside)
    if chain.rounds:
        stages += rounding_stages(batch, chain, options, in_memory=in_memory, surveyed=surveyed)
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
    passes: Passes, options: Options, batch: Sequence[Planned], *, in_memory: bool
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
    held = few.states if in_memory else 0
    states = states_stage(few, in_memory=in_memory)
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


def make_forecast(
    stages: Sequence[Stage], *, runs: bool, rounds: bool = True, seconds: float | None = None
) -> Forecast:
    """The forecast of stages in turn; ``runs``: whether torch is at work in any of them.

    Where nothing ``rounds``, it is in forward passes alone.
    """
    base = resident_memory()
    if runs:
        from quantcli.layerwise.pass_needs import FORWARD_LIBRARIES, LIBRARIES

        base += LIBRARIES if rounds else FORWARD_LIBRARIES
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
    surveyed = any(is_allocated(each.artifact.plan.recipe) for each in batch)
    rounds = surveyed or method_chain(batch[0]).rounds
    stages = method_stages(batch, threads, in_memory=stay)
    forecast = make_forecast(stages, runs=True, rounds=rounds)
    if allowed is not None and stay and forecast.memory > allowed:
        stay = False
        stages = method_stages(batch, threads, in_memory=stay)
        forecast = make_forecast(stages, runs=True, rounds=rounds)
    refuse_samples(label, forecast, machine_memory() if allowed is None else allowed)
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
