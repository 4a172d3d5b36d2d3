"""Agreement of annotators against published examples."""

import numpy as np
import pytest

from hybrid_jax.metrics.agreement import agreement

# Krippendorff 2011, "Computing Krippendorff's alpha-reliability": four observers, twelve units, gaps.
GAPS = [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3],
    [None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None],
]
# Fleiss 1971 as it is usually printed: how many of 14 raters put each of 10 subjects into five categories.
COUNTS = [
    [0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1],
    [7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7],
]  # fmt: skip


def votes_of(matrix):
    return [
        (f"o{observer}", f"u{unit}", label)
        for observer, row in enumerate(matrix)
        for unit, label in enumerate(row)
        if label is not None
    ]


@pytest.mark.parametrize(("level", "alpha"), [("nominal", 0.743), ("interval", 0.849)])
def test_krippendorffs_alpha_of_his_own_example_with_gaps(level, alpha):
    found = agreement(votes_of(GAPS), level)
    assert found["krippendorff_alpha"] == pytest.approx(alpha, abs=5e-4)
    assert "fleiss_kappa" not in found  # items have from one to four votes


def test_fleiss_kappa_of_the_printed_example():
    votes = [
        (f"r{rater}", f"s{subject}", label)
        for subject, counts in enumerate(COUNTS)
        for rater, label in enumerate(np.repeat(range(5), counts).tolist())
    ]
    assert agreement(votes)["fleiss_kappa"] == pytest.approx(0.210, abs=5e-4)


def test_cohens_kappa_of_two_readers_of_fifty_grants():
    cells = [("yes", "yes", 20), ("yes", "no", 5), ("no", "yes", 10), ("no", "no", 15)]
    pairs = [(a, b) for a, b, count in cells for _ in range(count)]
    found = agreement([(who, str(i), pair[k]) for i, pair in enumerate(pairs) for k, who in enumerate("AB")])
    assert found["observed"] == pytest.approx(0.7)
    assert found["cohen_kappa"] == pytest.approx(0.4)


def test_one_label_for_all_is_full_agreement_and_one_vote_an_item_is_none():
    assert agreement([(who, item, "x") for who in "AB" for item in "12"])["krippendorff_alpha"] == 1.0
    assert agreement([("A", "1", "x"), ("B", "2", "y")]) == {}
