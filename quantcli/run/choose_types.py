"""Types by what they cost: measure them, then choose within a size."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from quantcli.artifacts.gguf_file import GgufFile, prepare_gguf
from quantcli.artifacts.staging import own_folder
from quantcli.errors import PlanError
from quantcli.events import Events
from quantcli.formats import get_format
from quantcli.plan.allocate import Allocation, allocate, find_candidates
from quantcli.plan.recipe import merge_recipe
from quantcli.plan.size_text import parse_size
from quantcli.rounding.codecs import BlockCodec
from quantcli.rounding.options import Options
from quantcli.run.calibrated_run import CalibratedRun, costs_folder, plan_passes, remove_costs
from quantcli.run.type_costs import measure_type_costs
from quantcli.types import Note


def choose_types(
    run: CalibratedRun, artifact: GgufFile, output: Path, options: Options, *,
    max_memory: int = 1 << 62, threads: int = 1,
) -> Events[GgufFile]:  # fmt: skip
    """The same file with a recipe that gives every tensor that had a choice its type by name.

    Within the recipe's target_size, or the size that ``artifact`` has. What was measured stays in
    `costs_folder`, so a second call is quick. PlanError when nothing can be chosen or the size
    is too small.
    """
    plan = artifact.plan
    candidates = find_candidates(plan)
    if not candidates:
        raise PlanError(
            f"{plan.label} quantizes nothing whose type could be chosen",
            hint="leave out --allocate or --quality high, or choose another type",
        )
    target = plan.recipe.target_size
    limit = parse_size(target) if target else artifact.nbytes
    # Before the long run: whether anything can be that small. The recipe in the file names the
    # types, and takes bytes itself.
    free = {name: dict.fromkeys(kinds, 0.0) for name, kinds in candidates.items()}
    smallest = allocate(plan, free, 1 << 62)
    overhead = _with_types(run, artifact, output, smallest).nbytes - smallest.nbytes
    allocate(plan, free, limit - overhead, beside=overhead)
    folder = costs_folder(output)
    own_folder(folder, empty=False)
    passes = plan_passes(run, folder, None, None, max_memory, threads)
    try:
        codecs = {
            name: {kind: BlockCodec(get_format(kind)) for kind in kinds}
            for name, kinds in candidates.items()
        }
        costs = yield from measure_type_costs(passes, codecs, options)
    except BaseException:
        remove_costs(output)
        raise
    while True:
        found = allocate(plan, costs, limit - overhead, beside=overhead)
        chosen = _with_types(run, artifact, output, found)
        if chosen.nbytes <= limit:
            break
        overhead += chosen.nbytes - limit
    left = len(candidates) - len(costs)
    yield Note(
        f"types chosen for {len(costs)} tensors: {found.nbytes:,} bytes of weights, for a KL "
        f"divergence of about {found.cost:.3g}; {plan.label} has {plan.data_bytes:,}, for about "
        f"{found.before:.3g}" + (f"; {left} others keep its types" if left else "")
    )
    return chosen


def _with_types(
    run: CalibratedRun, artifact: GgufFile, output: Path, found: Allocation
) -> GgufFile:
    types = [f"^{re.escape(name)}$={kind}" for name, kind in sorted(found.types.items())]
    named = merge_recipe(artifact.plan.recipe, tensor_types=types)
    named = replace(named, allocate=False, target_size=None)
    return prepare_gguf(run.model, named, output, importance=run.importance, force=artifact.force)
