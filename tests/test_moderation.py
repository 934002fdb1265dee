"""Moderated variances: against loops written out, and by what they are for."""

import numpy as np
import pytest
import torch
from scipy.stats import t as student
from tests import reference

from trak.score_computers.moderation import ScoredRows, learned


class World:
    """Scores that are means over checkpoints, of unlike examples and targets."""

    def __init__(self, seed, n=300, m=6, p=32, *, count=3, unlike=0.3, grows=0.5):
        rng = np.random.default_rng(seed)
        self.peers = rng.permutation(n)[:p]
        self.degrees = count - 1
        size = np.exp(rng.normal(size=(n, 1)) + 0.7 * rng.normal(size=(1, m + p)))
        self.truth = size * rng.standard_t(3, size=(n, m + p))
        usual = size * np.exp(unlike * rng.normal(size=(n, m + p)))
        spread = np.hypot(usual, grows * self.truth)
        each = self.truth + spread * rng.normal(size=(count, n, m + p))
        self.scores, self.squares = each.mean(0), each.var(0, ddof=1) / count
        self.m = m

    def peers_part(self):
        parts = (self.scores[:, self.m :], self.squares[:, self.m :])
        return torch.arange(len(self.scores)), *map(torch.from_numpy, parts)

    def learned(self):
        peers = torch.from_numpy(self.peers)
        return learned(*self.peers_part(), peers, self.degrees)

    def moderated(self):
        found = self.learned()
        stretch = ScoredRows(
            found.effects(*self.peers_part()),
            torch.from_numpy(self.scores[:, : self.m]),
            torch.from_numpy(self.squares[:, : self.m]),
        )
        half = len(self.scores) // 2
        levels = found.target_levels([
            ScoredRows(*(p[s] for p in stretch)) for s in (slice(half), slice(half, None))
        ])
        return found.moderated(levels, stretch).numpy(), found.degrees


@pytest.mark.parametrize("count", [2, 3, 6])
@pytest.mark.parametrize("unlike", [0.0, 0.6])
def test_against_loops(count, unlike):
    world = World(1, count=count, unlike=unlike)
    found, degrees = world.moderated()
    expected = reference.moderated(world.scores, world.squares, world.peers, count - 1)
    np.testing.assert_allclose(degrees, expected[1], rtol=1e-6)
    np.testing.assert_allclose(found, expected[0], rtol=1e-7)


@pytest.mark.parametrize("m", [1, 10])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_intervals_cover_and_are_shorter(count, m):
    inside, strong, reach, plain = [], [], [], []
    for seed in range(40 // m):
        world = World(seed, m=m, count=count)
        squares, degrees = world.moderated()
        own = np.sqrt(world.squares[:, :m]) * student.ppf(0.95, count - 1)
        half = np.sqrt(squares) * student.ppf(0.95, degrees)
        held = np.abs(world.scores - world.truth)[:, :m] < half
        order = np.argsort(-np.abs(world.truth[:, :m]), axis=0)
        inside.append(held.mean())
        strong.append(np.take_along_axis(held, order[:20], axis=0).mean())
        reach.append(half.mean())
        plain.append(own.mean())
    assert 0.85 < np.mean(inside) < 0.95
    assert 0.82 < np.mean(strong) < 0.98
    assert np.mean(reach) < {2: 0.5, 3: 0.8, 5: 0.95}[count] * np.mean(plain)


def test_a_score_of_a_target_knows_no_other_target():
    world = World(3, m=5)
    both, degrees = world.moderated()
    world.scores, world.squares = world.scores[:, 3:], world.squares[:, 3:]
    world.m = 2
    alone, also = world.moderated()
    np.testing.assert_allclose(alone, both[:, 3:], rtol=1e-12)
    assert also == pytest.approx(degrees)


def test_unlike_variances_are_hardly_moderated():
    _, alike = World(4, unlike=0.0, count=5).moderated()
    world = World(4, unlike=2.0, count=5)
    found, unlike = world.moderated()
    assert unlike < 7 < 20 < alike
    ratio = np.log(found / world.squares[:, :6])
    assert np.abs(ratio).mean() < 1.5


def test_no_spread_stays_none():
    world = World(5)
    world.scores[7], world.squares[7] = 0.0, 0.0  # an example that pulls at nothing
    world.squares[9, 2] = 0.0
    world.squares[:, 4] = 0.0  # a target without a gradient
    world.squares[:, 8] = 0.0  # and such a peer
    world.squares[11] *= 1e-40  # rounding
    found, _ = world.moderated()
    assert not found[7].any()
    assert found[9, 2] == 0
    assert not found[:, 4].any()
    np.testing.assert_array_equal(found[11], world.squares[11, :6])
    rest = np.delete(np.delete(found, [7, 11], axis=0), 4, axis=1)
    assert (rest > 0).sum() == rest.size - 1
    assert np.isfinite(found).all()


def test_too_little_to_learn_from():
    assert World(6, n=6, p=6).learned() is None
    world = World(7)
    world.squares[:] = 0.0  # the same checkpoint twice
    assert world.learned() is None


def test_a_target_of_which_nothing_was_learned_is_left_alone():
    world = World(8)
    found = world.learned()
    effects = found.effects(*world.peers_part())
    scores, squares = (torch.from_numpy(a[:, :6]) for a in (world.scores, world.squares))
    silent = squares.clone()
    silent[:, 2] = 0.0  # in the rows that levels are told from

    levels = found.target_levels([ScoredRows(effects, scores, silent)])
    assert levels.isnan().tolist() == [False, False, True, False, False, False]
    after = found.moderated(levels, ScoredRows(effects, scores, squares))
    torch.testing.assert_close(after[:, 2], squares[:, 2])
    assert not torch.isclose(after[:, 3], squares[:, 3]).all()


def test_chance_that_a_whole_checkpoint_shares_is_no_knowledge():
    world = World(9, count=2)
    rng = np.random.default_rng(0)
    apart = np.exp(rng.normal(size=(300, 1))) * np.exp(rng.normal(size=(1, 38)))
    world.squares = (0.01 * apart) ** 2  # all scores deviate by one common number
    found = world.learned()
    assert found.degrees < 5
