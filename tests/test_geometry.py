from itertools import permutations

import numpy as np
import pytest

from perception_r1.geometry import center, giou_matrix, iou, iou_matrix, match, point_distances, size_distances
from perception_r1.records import Box


def random_boxes(rng: np.random.Generator, count: int) -> list[Box]:
    corners = rng.uniform(0, 0.5, size=(count, 2))
    sides = rng.uniform(0.01, 0.5, size=(count, 2))
    return [(float(x), float(y), float(x + w), float(y + h)) for (x, y), (w, h) in zip(corners, sides, strict=True)]


def naive_overlap(a: Box, b: Box) -> tuple[float, float]:
    """IoU and GIoU with nothing but comparisons."""
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    intersection = width * height
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - intersection
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return intersection / union, intersection / union - (hull - union) / hull


def test_overlaps_agree_with_a_naive_loop():
    rng = np.random.default_rng(0)
    first, second = random_boxes(rng, 30), random_boxes(rng, 20)
    naive = np.array([[naive_overlap(a, b) for b in second] for a in first])
    np.testing.assert_allclose(iou_matrix(first, second), naive[..., 0], atol=1e-12)
    np.testing.assert_allclose(giou_matrix(first, second), naive[..., 1], atol=1e-12)
    assert iou(first[0], second[0]) == pytest.approx(naive[0, 0, 0])
    assert (naive[..., 0] == 0).any()
    assert (naive[..., 1] < 0).any()


def test_overlaps_worked_by_hand():
    left, right, both = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0), (0.0, 0.0, 1.0, 1.0)
    np.testing.assert_allclose(iou_matrix([left], [left, right, both]), [[1, 0, 0.5]])
    np.testing.assert_allclose(giou_matrix([left], [left, right, both]), [[1, 0, 0.5]])
    # two quarters in opposite corners: their hull is the whole, half of it empty
    np.testing.assert_allclose(giou_matrix([(0.0, 0.0, 0.5, 0.5)], [(0.5, 0.5, 1.0, 1.0)]), [[-0.5]])


def test_size_distances_agree_with_a_naive_loop():
    rng = np.random.default_rng(1)
    first, second = random_boxes(rng, 5), random_boxes(rng, 7)
    for i, a in enumerate(first):
        for j, b in enumerate(second):
            (ax, ay), (bx, by) = center(a), center(b)
            sizes = abs((a[2] - a[0]) - (b[2] - b[0])) + abs((a[3] - a[1]) - (b[3] - b[1]))
            assert size_distances(first, second)[i, j] == pytest.approx(abs(ax - bx) + abs(ay - by) + sizes)


def test_point_distances_worked_by_hand():
    np.testing.assert_allclose(point_distances([(0.0, 0.0)], [(0.3, 0.4), (1.0, 0.0)]), [[0.5, 1.0]])


@pytest.mark.parametrize("function", [iou_matrix, giou_matrix, size_distances, point_distances])
def test_no_boxes_give_an_empty_matrix(function):
    assert function([], []).shape == (0, 0)
    item = (0.0, 0.0) if function is point_distances else (0.0, 0.0, 1.0, 1.0)
    assert function([item, item], []).shape == (2, 0)
    assert function([], [item]).shape == (0, 1)


@pytest.mark.parametrize("shape", [(1, 1), (2, 5), (5, 2), (4, 4)])
def test_bipartite_matching_has_the_least_cost_of_all_assignments(shape):
    cost = np.random.default_rng(sum(shape)).normal(size=shape)
    pairs = match(cost, "bipartite")
    wide = cost if shape[0] <= shape[1] else cost.T
    least = min(
        sum(wide[row, column] for row, column in enumerate(columns))
        for columns in permutations(range(wide.shape[1]), wide.shape[0])
    )
    assert sum(cost[pair] for pair in pairs) == pytest.approx(least)
    assert len(pairs) == len({i for i, _ in pairs}) == len({j for _, j in pairs}) == min(shape)


def test_sequential_matching_ignores_the_cost():
    assert match(np.array([[9.0, 0.0, 0.0], [0.0, 9.0, 0.0]]), "sequential") == [(0, 0), (1, 1)]
    assert match(np.zeros((0, 3)), "sequential") == []
