"""The figure of the frontier: means over seeds in the order of their KL, and labels that do not overlap."""

import itertools

import pytest


@pytest.fixture(scope="module")
def draw_frontier(scripts):
    return scripts("draw_frontier")


def test_a_line_goes_through_the_means_of_the_seeds_in_the_order_of_their_kl(draw_frontier):
    def run(strength, kl, score):
        return {"method": "DPO", "strength": strength, "kl": kl, "B": score}

    runs = [run(0.1, 3.0, 0.5), run(0.3, 1.0, 0.2), run(0.1, 5.0, 0.7), run(0.3, 2.0, 0.4)]
    points, means = draw_frontier.lines({"runs": runs})["DPO"]
    assert points == [(3.0, 0.5), (1.0, 0.2), (5.0, 0.7), (2.0, 0.4)]
    assert means == [pytest.approx((1.5, 0.3)), pytest.approx((4.0, 0.6))]


def test_labels_keep_their_order_and_their_distance_unless_they_stand_side_by_side(draw_frontier):
    placed = draw_frontier.spread([(0, 0.0), (0, 0.1), (0, 3.0), (0, 0.05), (9, 0.1)], width=2.0, gap=1.0)
    assert placed[2] == pytest.approx(3.0, abs=0.35)
    assert placed[0] < placed[3] < placed[1] < placed[2]
    assert all(high - low > 0.99 for low, high in itertools.pairwise(sorted(placed[:4])))
    assert placed[4] == 0.1
