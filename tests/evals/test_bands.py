"""Words for figures, held against the tables that they come from."""

from __future__ import annotations

from dataclasses import replace

import pytest

from quantcli.evals.bands import LIKE, WORDS, judge_divergence
from quantcli.evals.summary import Divergence, Estimate

# llama.cpp, tools/perplexity/README.md: type, mean KLD, perplexity, "same top p" where measured.
LLAMA_3_8B = (
    ("Q8_0", 0.001355, 6.234284, 97.674),
    ("Q6_K", 0.005452, 6.253382, 96.031),
    ("Q5_K_M", 0.010762, 6.288607, None),
    ("Q4_K_M", 0.031273, 6.407115, 91.901),
    ("Q3_K_M", 0.101913, 6.888498, None),
    ("Q2_K", 0.445132, 9.751568, 71.138),
    ("IQ1_M", 1.393084, 25.493722, None),
)
FLOAT16 = 6.231636


def divergence(kld: float, ratio: float, top: float) -> Divergence:
    none = Estimate(0.0, 0.0)
    return Divergence(
        none, 1.0, none, Estimate(ratio, 0.0), none, Estimate(kld, 0.0), {}, Estimate(top, 0.0),
        none, none, {},
    )  # fmt: skip


@pytest.mark.parametrize(("name", "kld", "perplexity", "top"), LLAMA_3_8B)
def test_the_ladder_is_judged_as_itself(name, kld, perplexity, top):
    agreement = top / 100 if top is not None else 1.0
    found = judge_divergence(divergence(kld, perplexity / FLOAT16, agreement))
    assert name in LIKE[found.divergence].split(" or ")
    assert name in LIKE[found.perplexity].split(" or ")
    if top is not None:
        assert name in LIKE[found.agreement].split(" or ")
    assert found.overall == found.divergence


def test_the_worse_of_two_counts_and_a_perplexity_does_not():
    same = divergence(0.0, 0.9, 1.0)
    assert WORDS[judge_divergence(same).overall] == "the same"
    assert WORDS[judge_divergence(replace(same, ratio=Estimate(9.0, 0.0))).overall] == "the same"
    assert WORDS[judge_divergence(replace(same, same_top=Estimate(0.92, 0.0))).overall] == "close"
    assert WORDS[judge_divergence(replace(same, mean=Estimate(0.02, 0.0))).overall] == "close"


def test_what_is_no_number_is_broken():
    nan = Estimate(float("nan"), 0.0)
    found = judge_divergence(replace(divergence(0.0, 1.0, 1.0), mean=nan))
    assert WORDS[found.overall] == "broken"
