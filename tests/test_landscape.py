"""Lines, planes and rays around weights, against losses that are known everywhere."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from polyak import landscape
from polyak._evaluate import try_weights
from polyak._plots import levels_around
from polyak.errors import OptionError, StructureError

QUIET = {"progress": False}
LOWER = {"mode": "min", **QUIET}
TWO = {"live": (0.0, 0.0), "averaged": (3.0, 4.0)}
CORNERS = {"first": (1.0, -2.0), "second": (4.0, 2.0), "third": (-1.0, 3.0)}


def pair_of_numbers():
    return nn.Linear(2, 1, bias=False)


def weights_at(places):
    return {name: {"weight": torch.tensor([place])} for name, place in places.items()}


def bowl(model):
    """(x - 1)² + 10 (y + 2)², whose values on any line or plane are known."""
    x, y = model.weight[0].double().tolist()
    return (x - 1) ** 2 + 10 * (y + 2) ** 2


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def unchanged(model, before):
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# Lines.


def test_scores_along_a_line_are_those_of_the_weights_there():
    found = landscape.path(
        pair_of_numbers(), weights_at(TWO), bowl, positions=np.linspace(-1, 2, 13).tolist(), **LOWER
    )
    expected = [(3 * t - 1) ** 2 + 10 * (4 * t + 2) ** 2 for t in found.positions]
    np.testing.assert_allclose(found.scores, expected, rtol=1e-6)
    assert found.distance == pytest.approx(5.0) and found.names == ("live", "averaged")
    assert found.barrier == 0.0  # a bowl is nowhere above its chords


def test_a_wall_between_two_valleys_is_a_barrier():
    ends = weights_at({"left": (-1.0, 0.0), "right": (1.0, 0.0)})
    double_well = lambda model: (model.weight[0, 0].item() ** 2 - 1) ** 2  # noqa: E731
    found = landscape.path(pair_of_numbers(), ends, double_well, **LOWER)
    assert found.barrier == 1.0 and found.best in (0.0, 1.0)
    upside_down = landscape.path(pair_of_numbers(), ends, lambda m: -double_well(m), mode="max", **QUIET)
    assert (upside_down.barrier, upside_down.best) == (found.barrier, found.best)


def test_ends_are_the_weights_themselves_whatever_the_rounding():
    torch.manual_seed(0)
    ends = {name: {"weight": torch.randn(1, 2) * 10.0**size} for name, size in (("a", 3), ("b", -4))}
    seen = []
    landscape.path(
        pair_of_numbers(), ends, lambda m: seen.append(m.weight.clone()) or 0.0, positions=[0.5], **LOWER
    )
    assert torch.equal(seen[0], ends["a"]["weight"]) and torch.equal(seen[-1], ends["b"]["weight"])


def test_a_line_of_a_half_precision_model_is_worked_out_in_fp32():
    model = pair_of_numbers().bfloat16()
    ends = {"a": {"weight": torch.tensor([[256.0, 0.0]])}, "b": {"weight": torch.tensor([[260.0, 0.0]])}}
    places = []
    landscape.path(
        model, ends, lambda m: places.append(m.weight[0, 0].item()) or 0.0, positions=[0.5], **LOWER
    )
    assert places == [256.0, 258.0, 260.0]


def test_ends_with_batchnorm_score_as_they_do_alone():
    model, data = network(), torch.randn(64, 3)
    ends = {"a": state_of(network(1)), "b": state_of(network(2))}
    loss = lambda m: m(data).square().mean(dim=1)  # noqa: E731
    before = state_of(model)
    found = landscape.path(model, ends, loss, positions=[0.5], recalibrate=[data], **LOWER)
    alone = [try_weights(model, weights, loss, [data]).value for weights in ends.values()]
    assert [found.scores[0], found.scores[-1]] == alone
    assert unchanged(model, before) and model.training


def test_stale_batchnorm_statistics_are_warned_of():
    ends = {"a": state_of(network(1)), "b": state_of(network(2))}
    with pytest.warns(UserWarning, match="BatchNorm layers, whose statistics do not fit"):
        landscape.path(network(), ends, lambda m: 0.0, positions=[], **LOWER)


def test_a_mask_of_infinities_is_no_reason_for_nan():
    def masked():
        model = nn.Linear(2, 2, bias=False)
        model.register_buffer("mask", torch.triu(torch.full((2, 2), -torch.inf), 1))
        return model

    score = lambda m: (m.weight + m.mask).softmax(dim=1).square().mean()  # noqa: E731
    weights = {name: state_of(masked()) for name in ("a", "b", "c")}
    three = landscape.plane(masked(), weights, score, size=2, **LOWER)
    two = landscape.path(masked(), {name: weights[name] for name in "ab"}, score, **LOWER)
    assert np.isfinite([*two.scores, *np.ravel(three.scores)]).all() and math.isfinite(two.barrier)


def test_an_end_that_is_broken_breaks_no_other_and_is_no_basin():
    ends = weights_at({"broken": (math.inf, 1.0), "whole": (1.0, -2.0)})
    found = landscape.path(pair_of_numbers(), ends, bowl, positions=[0.5], **LOWER)
    assert found.scores[-1] == 0.0 and found.best == 1.0
    assert math.isnan(found.barrier) and "no barrier to speak of" in str(found)


@pytest.mark.parametrize(
    ("optimum", "words"),
    [
        (0.0, "lies at live"),
        (0.5, "lies at 0.5 of the way"),
        (1.5, "beyond averaged, by 0.5"),
        (-0.5, "beyond live, by 0.5"),
    ],
)
def test_where_the_best_score_lies_is_said_in_words(optimum, words):
    ends = weights_at({"live": (0.0, 0.0), "averaged": (1.0, 0.0)})
    found = landscape.path(pair_of_numbers(), ends, lambda m: (m.weight[0, 0] - optimum) ** 2, **LOWER)
    assert words in str(found)


def test_of_equal_scores_the_end_is_best():
    assert landscape.path(pair_of_numbers(), weights_at(TWO), lambda m: 1.0, **LOWER).best == 1.0


@pytest.mark.parametrize("wrap", [lambda m: torch.compile(m, backend="eager"), nn.DataParallel])
def test_state_dicts_of_wrapped_models_are_weights_too(wrap):
    class WithExtra(nn.Linear):
        def get_extra_state(self):
            return {"not": "a tensor"}

        def set_extra_state(self, state):
            pass

    model = WithExtra(2, 1, bias=False)
    wrapped = wrap(model)
    other = {"weight": torch.zeros(1, 2)}
    found = landscape.path(
        wrapped, {"own": wrapped.state_dict(), "other": other}, lambda m: model.weight.sum(), **LOWER
    )
    assert found.scores[-1] != found.scores[found.positions.index(1.0)] == 0.0


def test_tied_weights_move_together_and_count_once():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    ends = {name: {"0.weight": torch.full((2, 2), value)} for name, value in (("a", 0.0), ("b", 1.0))}
    found = landscape.path(model, ends, lambda m: m[1].weight.sum(), positions=[0.5], **LOWER)
    assert found.scores == (0.0, 2.0, 4.0) and found.distance == pytest.approx(2.0)


def test_the_models_own_weights_may_be_an_end():
    model = network()
    before = state_of(model)
    found = landscape.path(
        model,
        {"now": model.state_dict(), "other": state_of(network(1))},
        lambda m: m[0].weight.sum(),
        positions=[0.5],
        recalibrate=[torch.randn(8, 3)],
        **LOWER,
    )
    ends = before["0.weight"].sum().item(), network(1)[0].weight.sum().item()
    assert found.scores == pytest.approx([ends[0], sum(ends) / 2, ends[1]], abs=1e-5)
    assert unchanged(model, before)


def test_a_score_that_raises_leaves_the_model_as_it_was():
    model = network().eval()
    before, calls = state_of(model), []

    def fails_at_the_third(m):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("out of data")
        return 0.0

    for look, count in ((landscape.path, 2), (landscape.plane, 3), (landscape.rays, 1)):
        calls.clear()
        weights = {str(seed): state_of(network(seed)) for seed in range(1, count + 1)}
        with pytest.raises(RuntimeError, match="out of data"):
            look(model, weights, fails_at_the_third, recalibrate=[torch.randn(8, 3)], **LOWER)
        assert unchanged(model, before) and not model.training


# Planes.


def test_scores_over_a_plane_are_those_of_the_weights_there():
    found = landscape.plane(pair_of_numbers(), weights_at(CORNERS), bowl, size=7, margin=0.3, **LOWER)
    corners = np.array(list(CORNERS.values()))
    right = (corners[1] - corners[0]) / np.linalg.norm(corners[1] - corners[0])
    up = np.array([-right[1], right[0]])  # the third corner lies to the left of the first two
    for row, y in zip(found.scores, found.y, strict=True):
        places = [corners[0] + x * right + y * up for x in found.x]
        expected = [(a - 1) ** 2 + 10 * (b + 2) ** 2 for a, b in places]
        np.testing.assert_allclose(row, expected, rtol=1e-5, atol=1e-5)
    assert found.at_places == {name: (x - 1) ** 2 + 10 * (y + 2) ** 2 for name, (x, y) in CORNERS.items()}


def test_a_plane_needs_to_know_which_scores_are_better():
    options = {"size": 2, **QUIET}
    with pytest.raises(OptionError, match='one number .* give mode="min" if lower is better'):
        landscape.plane(pair_of_numbers(), weights_at(CORNERS), lambda m: 0.9, **options)
    losses = landscape.plane(
        pair_of_numbers(), weights_at(CORNERS), lambda m: torch.tensor([0.5, 0.7]), **options
    )
    assert losses.mode == "min"


def test_distances_on_a_plane_are_those_of_the_weights():
    found = landscape.plane(pair_of_numbers(), weights_at(CORNERS), bowl, size=2, **LOWER)
    for one in CORNERS:
        for other in CORNERS:
            assert math.dist(found.places[one], found.places[other]) == pytest.approx(
                math.dist(CORNERS[one], CORNERS[other])
            )


def test_three_weights_on_one_line_are_refused():
    line = weights_at({"a": (0.0, 0.0), "b": (1.0, 1.0), "c": (3.0, 3.0)})
    with pytest.raises(OptionError, match="lie on one line"):
        landscape.plane(pair_of_numbers(), line, bowl, **LOWER)
    with pytest.raises(OptionError, match="lie on one line"):
        landscape.plane(pair_of_numbers(), line | weights_at({"b": (0.0, 0.0)}), bowl, **LOWER)


# Rays.


def test_rays_of_a_round_bowl_rise_with_the_square_of_the_radius():
    centre = torch.tensor([[3.0, 4.0]])
    around = lambda m: (m.weight - centre).square().sum()  # noqa: E731
    found = landscape.rays(
        pair_of_numbers(), {"centre": {"weight": centre}}, around, radii=[0.1, 0.2], directions=5, **LOWER
    )
    np.testing.assert_allclose(found.rise("centre"), [[0.25, 1.0]] * 5, rtol=1e-5)


def test_a_rescaled_network_is_as_wide_as_before():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8, bias=False), nn.ReLU(), nn.Linear(8, 1, bias=False))
    one = state_of(model)
    # The same function: what a layer gains the next one loses.
    other = {"0.weight": one["0.weight"] * 16, "2.weight": one["2.weight"] / 16}
    data = torch.randn(64, 3)
    found = landscape.rays(model, {"one": one, "other": other}, lambda m: m(data).square().mean(), **LOWER)
    np.testing.assert_allclose(found.rise("one"), found.rise("other"), rtol=1e-4, atol=1e-6)


def test_directions_are_the_same_in_every_precision():
    centre = torch.randn(4, 5)
    model = nn.Linear(5, 4, bias=False).double()
    seen = []

    def look(m):
        seen.append(m.weight.detach().clone())
        return 0.0

    weights = {"single": {"weight": centre}, "double": {"weight": centre.double()}}
    landscape.rays(model, weights, look, directions=1, radii=[0.5], **LOWER)
    torch.testing.assert_close(seen[1], seen[3], rtol=1e-5, atol=1e-6)


def test_accuracies_fall_where_losses_rise():
    centres = weights_at({"centre": (1.0, 2.0)})
    losses = landscape.rays(pair_of_numbers(), centres, bowl, **LOWER)
    gains = landscape.rays(pair_of_numbers(), centres, lambda m: -bowl(m), mode="max", **QUIET)
    np.testing.assert_array_equal(losses.rise("centre"), gains.rise("centre"))
    with pytest.raises(OptionError, match="rays from centre, not from 'live'"):
        losses.rise("live")


def test_a_thin_triangle_has_a_margin_on_every_side():
    thin = weights_at({"a": (0.0, 0.0), "b": (10.0, 0.0), "c": (5.0, 0.1)})
    found = landscape.plane(pair_of_numbers(), thin, bowl, size=2, margin=0.5, **LOWER)
    assert found.x == pytest.approx((-5.0, 15.0)) and found.y == pytest.approx((-5.0, 5.1))


def test_weights_that_are_not_finite_span_no_plane():
    broken = weights_at({**CORNERS, "third": (math.nan, 0.0)})
    with pytest.raises(OptionError, match="not all finite"):
        landscape.plane(pair_of_numbers(), broken, bowl, **LOWER)


def test_all_weights_may_be_moved_by_the_same_vectors():
    centres = weights_at({"long": (30.0, 40.0), "short": (0.3, 0.4)})
    moved = {}

    def look(m):
        places.append(m.weight[0].clone())
        return 0.0

    for size_of in (None, "long"):
        places = []
        landscape.rays(pair_of_numbers(), centres, look, radii=[0.1], directions=1, size_of=size_of, **LOWER)
        moved[size_of] = [
            (there - centre).norm().item() for centre, there in zip(places[::2], places[1::2], strict=True)
        ]
    assert moved[None] == pytest.approx([5.0, 0.05], rel=1e-4)
    assert moved["long"] == pytest.approx([5.0, 5.0], rel=1e-4)
    with pytest.raises(OptionError, match="size_of must be one of long, short, got 'live'"):
        landscape.rays(pair_of_numbers(), centres, look, size_of="live", **LOWER)


def test_vectors_and_frozen_parameters_stay_where_they_are():
    model = network()
    model[3].weight.requires_grad_(False)
    centre = state_of(model)
    moved = []

    def look(m):
        moved.append({name for name, value in m.named_parameters() if not torch.equal(value, centre[name])})
        return 0.0

    landscape.rays(
        model, {"centre": centre}, look, directions=1, radii=[0.1], recalibrate=[torch.randn(8, 3)], **LOWER
    )
    assert moved == [set(), {"0.weight"}]


def test_the_seed_decides_the_directions():
    def found(seed):
        centres = weights_at({"centre": (1.0, 2.0)})
        return landscape.rays(pair_of_numbers(), centres, bowl, seed=seed, directions=3, **LOWER).scores

    assert found(0) == found(0) != found(1)


def test_two_rows_of_errors_and_rises_are_shown():
    centres = weights_at({"live": (1.0, 2.0), "averaged": (1.0, -2.0)})
    found = landscape.rays(pair_of_numbers(), centres, bowl, radii=[0.5], **LOWER)
    text = str(found)
    rise = found.rise("averaged")[:, 0]
    assert f"{rise.mean():+.4g} ± {rise.std(ddof=1) / math.sqrt(10):.2g}" in text
    assert "live, rise ± error" in text
    less = (found.rise("averaged") < found.rise("live")).sum()
    assert "averaged rises less than live" in text and f"in {less} of 10 directions" in text


# All three.


@pytest.mark.parametrize(
    ("look", "names"),
    [(landscape.path, ["a"]), (landscape.plane, ["a", "b"]), (landscape.rays, [])],
)
def test_another_number_of_weights_is_refused(look, names):
    with pytest.raises(OptionError, match="names and their weights"):
        look(pair_of_numbers(), weights_at(dict.fromkeys(names, (0.0, 0.0))), bowl, **QUIET)


def test_weights_without_names_are_refused():
    with pytest.raises(OptionError, match="names and their weights"):
        landscape.rays(pair_of_numbers(), {"weight": torch.zeros(1, 2)}, bowl, **LOWER)


def test_weights_of_another_model_are_named():
    weights = weights_at(TWO) | {"averaged": {"weight": torch.zeros(3, 3)}}
    with pytest.raises(StructureError, match=r"weights\['averaged'\].*has 'weight' as"):
        landscape.path(pair_of_numbers(), weights, bowl, **LOWER)


@pytest.mark.parametrize(
    ("look", "option", "value", "message"),
    [
        (landscape.path, "positions", [math.nan], "finite"),
        (landscape.path, "mode", "best", "mode must be"),
        (landscape.path, "recalibrate", iter([]), "only once"),
        (landscape.plane, "size", 1, r"\[2, inf\)"),
        (landscape.plane, "margin", -1.0, r"\[0, inf\)"),
        (landscape.rays, "radii", [0.0], "above 0"),
        (landscape.rays, "radii", 0.1, "must be numbers"),
        (landscape.rays, "seed", "a", "seed must be"),
        (landscape.path, "positions", "12", "must be numbers"),
        (landscape.path, "positions", 11, "must be numbers"),
        (landscape.path, "recalibrate", list, "call it"),
        (landscape.rays, "directions", 0, r"\[1, inf\)"),
    ],
)
def test_options_out_of_range_are_refused(look, option, value, message):
    with pytest.raises(OptionError, match=message):
        look(pair_of_numbers(), weights_at(CORNERS), bowl, **{option: value}, **QUIET)


def test_a_model_of_vectors_has_no_rays():
    model = nn.LayerNorm(3)
    with pytest.raises(OptionError, match="no filters"):
        landscape.rays(model, {"only": model.state_dict()}, lambda m: 0.0, **LOWER)


def test_every_finding_is_drawn_and_is_plain_values():
    import json

    model = pair_of_numbers()
    findings = [
        landscape.path(model, weights_at(TWO), bowl, **LOWER),
        landscape.plane(model, weights_at(CORNERS), bowl, size=3, **LOWER),
        landscape.rays(model, weights_at(TWO), bowl, **LOWER),
    ]
    names = [{"live", "averaged"}, set(CORNERS), {"live", "averaged"}]
    for found, expected in zip(findings, names, strict=True):
        assert json.loads(json.dumps(found.to_dict(), allow_nan=False))
        (axes, *_) = found.plot().get_axes()
        assert {text.get_text() for text in axes.texts} == expected
        assert str(found)
    line, plane, rays = (found.plot().get_suptitle().replace("\n", " ") for found in findings)
    assert "The best score on the line" in line and "Of the three" in plane and "averaged worse by" in rays


@pytest.mark.parametrize(("sign", "mode"), [(1, "min"), (-1, "max")])
def test_levels_of_a_plane_show_the_difference_between_live_and_averaged(sign, mode):
    """Walls a million times as high as that difference would give both the same colour."""
    model = pair_of_numbers()
    corners = {"live": (0.0, 0.0), "averaged": (0.02, 0.0), "other": (0.0, 9.0)}

    def score(model):
        x, y = next(iter(model.parameters())).flatten().tolist()[:2]
        return sign * ((x - 0.02) ** 2 + y**6)

    found = landscape.plane(model, weights_at(corners), score, mode=mode, size=7, **QUIET)
    live, averaged = found.at_places["live"], found.at_places["averaged"]
    levels = levels_around(found.scores, [live, averaged], mode)
    between = [level for level in levels if min(live, averaged) < level < max(live, averaged)]
    assert levels == sorted(levels) and len(between) == 3 and len(levels) < 20
    assert ("averaged" in found.plot().get_suptitle().split("is the best")[0]) and found.mode == mode


def test_radii_are_looked_at_once_each_in_order():
    found = landscape.rays(
        pair_of_numbers(), weights_at(TWO), bowl, radii=[0.5, 0.1, 0.5], directions=1, **LOWER
    )
    assert found.radii == (0.1, 0.5) and len(found.scores["live"][0]) == 2


def test_scores_that_are_not_finite_are_said_not_warned_of():
    beyond = lambda m: math.inf if m.weight.abs().sum() > 0 else 0.0  # noqa: E731
    rays = landscape.rays(pair_of_numbers(), weights_at({"a": (1.0, 2.0)}), beyond, directions=2, **LOWER)
    assert np.isnan(rays.rise("a")).all() and "nan" in str(rays)
    plane = landscape.plane(pair_of_numbers(), weights_at(CORNERS), lambda m: math.nan, size=2, **LOWER)
    assert "4 have no finite score" in str(plane)


def test_names_are_no_markup_and_many_of_them_have_room():
    centres = weights_at(dict.fromkeys(("[/x]", "[red]a[/red]", "c", "d", "e"), (1.0, 2.0)))
    found = landscape.rays(pair_of_numbers(), centres, bowl, radii=[0.5], directions=2, **LOWER)
    text = str(found)
    assert "[/x], rise ± error" in text and "[red]a[/red] rises less than [/x]" in text
    assert text.count("in 0 of 2 directions") == 4 and "…" not in text
    assert "its own filters" in text
    same = landscape.rays(pair_of_numbers(), centres, bowl, directions=1, size_of="c", **LOWER)
    assert "the filters of c, for all" in str(same) and same.to_dict()["size_of"] == "c"
