import re
import subprocess
import sys
from io import BytesIO
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.image import imread

from polyak._plots import (
    Dot,
    Line,
    Mark,
    Panel,
    contour_chart,
    dot_chart,
    inline_svg,
    line_panels,
    png_bytes,
    within_reach,
)
from polyak.errors import MissingExtraError, OptionError

X = [1, 2, 3]
LIVE = Line("live", X, [[3.0, 2.0, 1.0], [5.0, 2.0, 1.0]], "live")
SWA = Line("SWA", X, [[1.0, 1.0, 0.5]])


def test_lines_are_means_in_bands_of_one_standard_error():
    (axes,) = line_panels("title", "epoch", [Panel("NLL", [LIVE, SWA])]).get_axes()
    live, swa = axes.get_lines()
    np.testing.assert_allclose(live.get_ydata(), [4, 2, 1])
    np.testing.assert_allclose(swa.get_ydata(), [1, 1, 0.5])
    (band,) = axes.collections
    corners = band.get_paths()[0].vertices
    # std([3, 5], ddof=1) / √2 = 1
    assert corners[:, 1].max() == pytest.approx(5) and corners[corners[:, 0] == 1, 1].min() == pytest.approx(
        3
    )
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("epoch", "NLL")


def test_a_label_keeps_its_colour_across_panels_and_stands_beside_its_line():
    figure = line_panels("title", "epoch", [Panel("NLL", [LIVE, SWA]), Panel("accuracy", [SWA, LIVE])])
    first, second = figure.get_axes()
    colour = [{line.get_label(): line.get_color() for line in axes.get_lines()} for axes in (first, second)]
    assert colour[0] == colour[1]
    assert len(set(colour[0].values())) == 2
    for axes in (first, second):
        named = {text.get_text(): text.get_color() for text in axes.texts}
        assert named == {line.get_label(): line.get_color() for line in axes.get_lines()}


def test_names_of_lines_that_end_together_do_not_lie_on_each_other():
    lines = [Line(f"line {n}", X, [[1.0, 1.0, 2.0]]) for n in range(4)]
    (axes,) = line_panels("title", "epoch", [Panel("NLL", lines)]).get_axes()
    heights = sorted(text.xy[1] for text in axes.texts)
    assert min(np.diff(heights)) > 0.07 and heights[-1] <= 1


def test_one_colour_for_one_thing_across_figures():
    chosen = Line("tail:0.4", X, [[1.0, 1.0, 1.0]], "chosen")
    (axes,) = line_panels("title", "epoch", [Panel("NLL", [SWA, chosen, LIVE])]).get_axes()
    lines = {line.get_label(): line.get_color() for line in axes.get_lines()}
    (rows,) = dot_chart(
        "title", "x", [Dot("tail:0.4", -1, role="chosen"), Dot("live", 0, role="live")]
    ).get_axes()
    assert [dot.get_color() for dot in rows.get_lines()[1:]] == [lines["tail:0.4"], lines["live"]]


def test_a_broken_average_sets_no_scale():
    dots = [Dot("tail:0.4", -0.2, -0.3, -0.1, "chosen"), Dot("live", 0.0, role="live"), Dot("uniform", 1e9)]
    (axes,) = dot_chart("title", "x", dots).get_axes()
    low, high = axes.get_xlim()
    assert -0.4 < low < -0.3 and 0 < high < 0.1
    assert [text.get_text() for text in axes.texts] == ["+1e+09 ▸"]
    (axes,) = line_panels(
        "title", "x", [Panel("y", [Line("y", range(9), [[1, 2, 3, 2, 1, 2, 3, 2, 1e9]])])]
    ).get_axes()
    assert axes.get_ylim() == pytest.approx((0.9, 3.1))
    assert within_reach([float("nan"), float("inf")]) == (0.0, 1.0)


def test_y_limits_cut_off_what_would_squeeze_the_rest():
    (axes,) = line_panels("title", "epoch", [Panel("NLL", [LIVE], y_limits=(0.5, 2.5))]).get_axes()
    assert axes.get_ylim() == (0.5, 2.5)


def test_png_is_a_picture_and_the_same_every_time():
    first, second = (png_bytes(line_panels("title", "epoch", [Panel("NLL", [LIVE, SWA])])) for _ in range(2))
    assert first == second
    height, width, _ = imread(BytesIO(first), format="png").shape
    assert width > height > 300


@pytest.mark.parametrize(
    ("panels", "message"),
    [
        ([], "nothing to draw"),
        ([Panel("NLL", [])], "nothing to draw"),
        ([Panel("NLL", [Line("live", X, [1.0, 2.0, 3.0])])], r"line 'live' needs .* got \[3\] and \[3\]"),
        ([Panel("NLL", [Line("live", X, [[1.0, 2.0]])])], r"got \[3\] and \[1, 2\]"),
        ([Panel("NLL", [Line(str(n), X, [[1.0, 2.0, 3.0]]) for n in range(8)])], "8 labels are more"),
    ],
)
def test_what_cannot_be_drawn_is_refused(panels, message):
    with pytest.raises(OptionError, match=message):
        line_panels("title", "epoch", panels)


def test_without_matplotlib_the_message_is_the_pip_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'polyak\[demo\]'"):
        line_panels("title", "epoch", [Panel("NLL", [SWA])])


def test_drawing_leaves_pyplot_and_the_backend_alone():
    code = (
        "import sys; from polyak._plots import *;"
        "assert 'matplotlib' not in sys.modules, 'imported before use';"
        "png_bytes(line_panels('title', 'epoch', [Panel('NLL', [Line('live', [1, 2], [[1., 2.]])])]));"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_lines_have_points_of_their_own_and_marks_have_names():
    lines = [Line("one", [0, 1], [[2.0, 3.0]]), Line("two", [0.5], [[1.0]])]
    (axes,) = line_panels("title", "x", [Panel("y", lines, marks=[Mark("here", 0.5)])]).get_axes()
    assert [line.get_xydata().tolist() for line in axes.get_lines()[:2]] == [[[0, 2], [1, 3]], [[0.5, 1]]]
    assert [line.get_marker() for line in axes.get_lines()[:2]] == ["", "o"]
    assert [text.get_text() for text in axes.texts] == ["here", "one", "two"] and axes.texts[0].xy[0] == 0.5


def test_a_plane_is_coloured_by_its_scores_and_places_stand_where_they_are():
    figure = contour_chart(
        "title",
        [0, 1, 2],
        [0, 1],
        [[1.0, 2.0, 3.0], [2.0, 3.0, 4.0]],
        {"live": (1, 0.5)},
        roles={"live": "live"},
    )
    axes, colours = figure.get_axes()
    (named,) = line_panels("title", "epoch", [Panel("NLL", [LIVE])]).get_axes()
    assert axes.get_lines()[0].get_color() == named.get_lines()[0].get_color()
    assert axes.get_lines()[0].get_xydata().tolist() == [[1, 0.5]]
    low, high = colours.get_ylim()
    assert low == pytest.approx(1, abs=0.2) and high == pytest.approx(4, abs=0.2)


def test_a_drawing_for_a_page_has_its_title_beside_it_and_colours_of_the_page():
    def drawn():
        return inline_svg(line_panels("Of $x_{y$", "x", [Panel("$x_{y$", [LIVE, SWA])]))

    (title, svg), again = drawn(), drawn()
    assert (title, svg) == again and title == "Of $x_{y$"
    assert svg.startswith("<svg") and svg.endswith("</svg>") and "http" not in svg and "Of" not in svg
    words = [
        "".join(text.itertext()) for text in ElementTree.fromstring(svg.replace("xlink:", "")).iter("text")
    ]
    assert {"$x_{y$", "live", "SWA"} <= set(words)
    # Nothing has a colour that a page in the dark could not change.
    assert "var(--live, #" in svg and not re.search(r"(?<!, )#[0-9a-f]{6}", svg)
