"""Means of inputs, from a calibration's statistics, for the biases of a GGUF."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from quantcli.artifacts.bias_corrections import BiasCorrections, corrected_weights
from quantcli.artifacts.gguf_file import Encoder, GgufFile
from quantcli.errors import SourceError
from quantcli.formats.base import Floats
from quantcli.statistics.statistics_file import StatisticsFile


def take_means(artifact: GgufFile) -> GgufFile:
    """The file with the means that its recipe's statistics have for its biases, if it has some.

    SourceError where a mean is not there.
    """
    model, plan, found = artifact.model, artifact.plan, dict[str, Floats]()
    if not plan.recipe.correct_bias or plan.recipe.statistics is None:
        return artifact
    path = Path(plan.recipe.statistics)
    with StatisticsFile(path) as statistics:
        for name, item in corrected_weights(plan, model).items():
            mean = statistics.mean(name)
            if mean.shape != (item.tensor.columns,):
                raise SourceError(
                    f"{path}: {name} has {mean.size} columns there, and {item.tensor.columns} in "
                    "the model",
                    hint="the statistics belong to another model",
                )
            if not np.isfinite(mean).all():
                raise SourceError(f"{path}: the mean of {name} is not finite")
            found[name] = mean
    corrections = BiasCorrections(model, plan, artifact.importance, found)
    encoders: dict[str, Encoder] = dict.fromkeys(corrections.names, corrections)
    return replace(artifact, encoders={**artifact.encoders, **encoders})
