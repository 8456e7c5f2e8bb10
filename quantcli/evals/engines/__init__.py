"""What can turn windows of tokens into logits, by the name that ``--engine`` takes."""

from quantcli.registry import Registry, not_callable

ENGINES = Registry(
    "engine",
    "engines",
    {
        "llama.cpp": "quantcli.evals.engines.llama_cpp:open_engine",
        "torch": "quantcli.evals.engines.torch:open_engine",
    },
    not_callable,
)
"""Functions (source, context, threads) -> `quantcli.evals.engines.base.Engine`."""
