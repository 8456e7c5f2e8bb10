"""What can turn windows of tokens into logits, by the name that ``--engine`` takes."""

from quantcli.registry import Registry

ENGINES = Registry(
    "engine",
    "engines",
    {
        "llama.cpp": "quantcli.evals.engines.llama_cpp:open_engine",
        "torch": "quantcli.evals.engines.torch:open_engine",
    },
)
"""Functions (source, context, threads) -> `quantcli.evals.engines.base.Engine`."""
