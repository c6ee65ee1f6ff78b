"""Compare frequencies of random events with their probabilities.

Seeds are fixed, so that nothing here fails now and then. With new seeds, a correct implementation
would fail with a probability below FALSE_ALARMS: every mean of N independent draws is compared
with its expectation within Chernoff's bound (for 0 or 1) or Hoeffding's (between two limits), and
the rate is divided by the number of comparisons.
"""

import math

import torch

from . import by_hand

FALSE_ALARMS = 1e-6
COMPARISONS = 5000  # more than are made of one implementation
THRESHOLD = math.log(2 * COMPARISONS / FALSE_ALARMS)
DRAWS = 10_000

PATTERNS = [(1, 2), (2, 4), (3, 8), (16, 32)]


def gradients(m):
    """Return groups of m values, by name of their contents."""
    normal = torch.randn(m, generator=torch.Generator().manual_seed(m)).tolist()
    zeros = [g if i % 3 else 0.0 for i, g in enumerate(normal)]
    signs = [(-1.0) ** i for i in range(m)]
    return {
        "normal": normal,
        "zeros": zeros,
        "ties": [2 * sign for sign in signs],
        "two sizes": [sign if i % 2 else 5 * sign for i, sign in enumerate(signs)],
        "one of them": [0.0] * (m - 1) + [-3.0],
        "one above all": [1e30, *normal[1:]],
        "huge ratios": [sign * 10.0 ** (-30 + 60 * i // m) for i, sign in enumerate(signs)],
    }


CASES = [(n, m, kind) for n, m in PATTERNS for kind in gradients(2)]


def probabilities(row, n, prune):
    """Return each value's probability of being kept."""
    if prune == "random":
        return [n / len(row) if g else 0.0 for g in row]  # A zero that is kept can't be seen.
    return [float(p) for p in by_hand.probabilities([abs(g) for g in row], n)]


def divergence(q, p):
    """Compute the Kullback-Leibler divergence of 0 or 1 with probability q from p.

    It is infinite for what can't happen.
    """
    if (q > 0 and p == 0) or (q < 1 and p == 1):
        return math.inf
    return sum(a * math.log(a / b) for a, b in ((q, p), (1 - q, 1 - p)) if a > 0)


def assert_frequencies(happened, probabilities):
    """Compare frequencies with probabilities.

    Args:
        happened: A row of events for each trial.
    """
    trials = len(happened)
    frequencies = happened.double().mean(0).flatten().tolist()
    for frequency, p in zip(frequencies, probabilities, strict=True):
        assert trials * divergence(frequency, p) <= THRESHOLD
