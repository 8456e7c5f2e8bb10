"""The README.md of a set's repository, with its results where the Hub shows them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quantcli import __version__
from quantcli.artifacts.model_card import Card, fence, format_table, render_card
from quantcli.exports.report.facts import ArtifactFacts, ReportFacts, texts_of
from quantcli.exports.report.page import measured_table


def render_set_card(facts: ReportFacts) -> bytes:
    """Markdown with front matter: base model, license, and a model-index of what was measured."""
    from huggingface_hub import EvalResult, ModelCardData

    is_repo = facts.base is not None and "/" in facts.base
    metrics = {"perplexity": "Perplexity", "kld": "Mean KL divergence from the original"}
    results = [
        EvalResult(
            task_type="text-generation", dataset_type=Path(text).stem, dataset_name=Path(text).name,
            metric_type=key, metric_name=f"{name} of {each.name}",
            metric_value=each.measured[text][key]["value"],
        )
        for text, artifacts in texts_of(facts)
        for each in artifacts
        for key, name in metrics.items()
        if key in each.measured[text]
    ]  # fmt: skip
    more: dict[str, Any] = {"base_model_relation": "quantized"} if is_repo else {}
    data = ModelCardData(
        base_model=facts.base if is_repo else None,
        language=list(facts.languages) or None,
        license=facts.license,
        library_name="gguf" if _are_gguf(facts) else "transformers",
        tags=[*(["gguf"] if _are_gguf(facts) else []), "quantcli"],
        model_name=facts.title if results else None,
        eval_results=results or None,
        **more,
    )
    front: dict[str, Any] = data.to_dict()  # type: ignore[no-untyped-call]
    columns, rows = measured_table(facts)
    header = ["file", "size", "bits per weight", *columns]
    paragraphs = [f"\n# {facts.title}, quantized"]
    if facts.base and facts.base != facts.title:
        shown = f"[{facts.base}](https://huggingface.co/{facts.base})" if is_repo else facts.base
        paragraphs.append(f"Made from {shown} with quantcli {__version__}.")
    paragraphs.append(format_table(header, rows))
    if facts.reference:
        paragraphs.append(
            f"KLD is the KL divergence from the predictions of {Path(facts.reference).name}, in "
            "nats for each token: 0.01 and less is hardly noticed."
        )
    if _are_gguf(facts):
        paragraphs += ["## Use", fence(f"llama-cli -m {_recommended(facts).name}")]
    recipes = dict.fromkeys(each.recipe.strip() for each in facts.artifacts if each.recipe)
    if recipes:
        paragraphs += ["## Recipes", *(fence(recipe, "toml") for recipe in recipes)]
    return render_card(Card(front, paragraphs))


def _recommended(facts: ReportFacts) -> ArtifactFacts:
    """The smallest that is close to the original on every text; the largest where none is."""
    close = (
        each for each in facts.artifacts
        if each.measured
        and all(m.get("kld", {"value": 1})["value"] < 0.02 for m in each.measured.values())
    )  # fmt: skip
    return next(close, facts.artifacts[-1])


def _are_gguf(facts: ReportFacts) -> bool:
    return all(each.name.endswith(".gguf") for each in facts.artifacts)
