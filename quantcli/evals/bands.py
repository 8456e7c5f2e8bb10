"""What a figure means, in words: the step of a published ladder that it is nearest to.

The ladder is what llama.cpp's maintainers measured for Llama 3 8B on WikiText-2 against float16
(tools/perplexity/README.md of llama.cpp, "LLaMA 3 8b Scoreboard" and "LLaMA 2 vs. LLaMA 3"). Where
one word ends and the next begins is the geometric mean of two steps. They measured no agreement of
Q5_K_M and Q3_K_M; their steps are interpolated.

| word | as | KL divergence | perplexity | other top token |
|---|---|---|---|---|
| the same | Q8_0 | 0.0014 | + 0.04 % | 2.3 % |
| very close | Q6_K, Q5_K_M | 0.0055, 0.011 | + 0.35 %, 0.91 % | 4.0 % |
| close | Q4_K_M | 0.031 | + 2.8 % | 8.1 % |
| worse | Q3_K_M | 0.10 | + 10.5 % | (14 %) |
| much worse | Q2_K | 0.45 | + 56 % | 28.9 % |
| broken | IQ1_M | 1.39 | + 309 % | |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from quantcli.evals.summary import Divergence

WORDS = ("the same", "very close", "close", "worse", "much worse", "broken")
LIKE = ("Q8_0", "Q6_K or Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K", "IQ1_M")
"""The types of Llama 3 8B that the words stand for."""

_KLD = (0.0027, 0.018, 0.056, 0.21, 0.79)
_RATIO = (0.0012, 0.016, 0.054, 0.24, 1.3)
_OTHER_TOP = (0.030, 0.057, 0.107, 0.20, 0.45)
"""Where each word but the last ends."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """The place of each figure among `WORDS`, and the worse of divergence and agreement."""

    divergence: int
    perplexity: int
    agreement: int

    @property
    def overall(self) -> int:
        """A perplexity may fall by chance, so it does not count here."""
        return max(self.divergence, self.agreement)


def judge_divergence(found: Divergence) -> Judgement:
    """What the mean divergence, the perplexity's ratio and the agreement amount to."""
    return Judgement(
        _place(found.mean.value, _KLD),
        _place(found.ratio.value - 1, _RATIO),
        _place(1 - found.same_top.value, _OTHER_TOP),
    )


def _place(value: float, ends: Sequence[float]) -> int:
    # What is no number is above every end.
    return next((place for place, end in enumerate(ends) if value <= end), len(ends))
