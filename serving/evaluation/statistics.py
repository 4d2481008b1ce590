"""How much a share of right answers says, and whether two shares differ.

Owns: two formulas.
Must not know: problems, endpoints.
"""

import math

_Z_95 = 1.959963984540054  # quantile of the normal distribution at 0.975


def wilson_interval(num_correct: int, num_asked: int) -> tuple[float, float]:
    """95 % confidence interval of the share of right answers, within [0, 1]; (0, 1) if nothing was asked.

    Source: E. B. Wilson, "Probable inference, the law of succession, and statistical inference", Journal of the
    American Statistical Association 22 (1927), 209-212.
    """
    if num_asked == 0:
        return 0.0, 1.0
    share, z2 = num_correct / num_asked, _Z_95**2
    center = (share + z2 / (2 * num_asked)) / (1 + z2 / num_asked)
    half = _Z_95 / (1 + z2 / num_asked) * math.sqrt(share * (1 - share) / num_asked + z2 / (4 * num_asked**2))
    # At the ends the bound is the end itself; rounding would miss it.
    low = 0.0 if num_correct == 0 else center - half
    high = 1.0 if num_correct == num_asked else center + half
    return low, high


def mcnemar_p(num_only_first: int, num_only_second: int) -> float:
    """Two-sided p-value of McNemar's exact test on the same problems solved twice.

    `num_only_first` problems were right the first time only, `num_only_second` the second time only; those that came
    out alike say nothing. If both are equally good, each discordant problem falls to either side with probability 1/2:
    p = min(1, 2 * P(Binomial(n, 1/2) <= min(b, c))) with n = b + c.
    Source: Q. McNemar, "Note on the sampling error of the difference between correlated proportions or percentages",
    Psychometrika 12 (1947), 153-157; exact conditional form as in Fagerland, Lydersen and Laake, BMC Medical Research
    Methodology 13:91 (2013).
    """
    num_discordant = num_only_first + num_only_second
    tail = sum(math.comb(num_discordant, i) for i in range(min(num_only_first, num_only_second) + 1))
    return min(1.0, 2 * tail / (1 << num_discordant))
