"""The grids that are tried by default."""

import pytest

from polyak import EMA, Decay, Power, Tail, Uniform, parse
from polyak.selection._select import coarse_grid, fine_grid


@pytest.mark.parametrize("steps", [1, 7, 2000, 10**7])
def test_the_grid_holds_every_kind_and_can_be_written_down(steps):
    grid = coarse_grid(steps)
    assert len(set(grid)) == len(grid)
    assert {type(profile) for profile in grid} == {Tail, Decay, EMA, Power}
    assert [parse(str(profile)) for profile in grid] == grid


def test_half_lives_follow_the_length_of_the_run():
    half_lives = [profile.half_life for profile in coarse_grid(2000) if isinstance(profile, EMA)]
    assert half_lives == [20, 50, 100, 200, 400]


@pytest.mark.parametrize("best", coarse_grid(2000))
def test_finer_values_lie_around_the_best_and_in_its_family(best):
    near = fine_grid(best, 2000)
    assert len(set(near)) == len(near) >= 2
    assert all(type(profile) is type(best) and profile not in coarse_grid(2000) for profile in near)
    if isinstance(best, Decay):
        assert {profile.shape for profile in near} == {best.shape}


def test_at_an_end_of_the_grid_the_finer_values_reach_beyond_it():
    assert min(profile.fraction for profile in fine_grid(Tail(0.02), 2000)) < 0.02
    assert max(profile.gamma for profile in fine_grid(Power(gamma=32), 2000)) > 32
    assert max(profile.fraction for profile in fine_grid(Tail(1.0), 2000)) < 1


def test_there_is_nothing_finer_around_what_is_not_on_the_grid():
    assert fine_grid(Uniform(), 2000) == []
