import subprocess
import sys
from io import BytesIO

import numpy as np
import pytest
from matplotlib.image import imread

from polyak._plots import Line, Mark, Panel, contour_chart, line_chart, line_panels, png_bytes, svg_bytes
from polyak.errors import MissingExtraError, OptionError

X = [1, 2, 3]
LIVE = Line("live", X, [[3.0, 2.0, 1.0], [5.0, 2.0, 1.0]])
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


def test_a_label_keeps_its_colour_across_panels_and_stands_in_the_legend_once():
    figure = line_panels("title", "epoch", [Panel("NLL", [LIVE, SWA]), Panel("accuracy", [SWA, LIVE])])
    first, second = figure.get_axes()
    colour = [{line.get_label(): line.get_color() for line in axes.get_lines()} for axes in (first, second)]
    assert colour[0] == colour[1]
    assert len(set(colour[0].values())) == 2
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["live", "SWA"]


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
        ([Panel("NLL", [Line(str(n), X, [[1.0, 2.0, 3.0]]) for n in range(8)])], "8 labels"),
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
    (axes,) = line_chart(
        "title", "x", "y", {"one": ([0, 1], [2.0, 3.0]), "two": ([0.5], [1.0])}, [Mark("here", 0.5)]
    ).get_axes()
    assert [line.get_xydata().tolist() for line in axes.get_lines()[:2]] == [[[0, 2], [1, 3]], [[0.5, 1]]]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["one", "two"]
    assert [(text.get_text(), text.xy[0]) for text in axes.texts] == [("here", 0.5)]
    with pytest.raises(OptionError, match="nothing to draw"):
        line_chart("title", "x", "y", {})


def test_a_plane_is_coloured_by_its_scores_and_places_stand_where_they_are():
    figure = contour_chart("title", [0, 1, 2], [0, 1], [[1.0, 2.0, 3.0], [2.0, 3.0, 4.0]], {"live": (1, 0.5)})
    axes, colours = figure.get_axes()
    assert axes.get_lines()[0].get_xydata().tolist() == [[1, 0.5]]
    low, high = colours.get_ylim()
    assert low == pytest.approx(1, abs=0.15) and high == pytest.approx(4, abs=0.15)


def test_svg_is_the_same_every_time_and_names_are_no_mathematics():
    first, second = (svg_bytes(line_chart("$x_{y$", "x", "y", {"$": ([0, 1], [1.0, 2.0])})) for _ in range(2))
    assert first == second and b"<svg" in first
