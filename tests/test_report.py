"""The report of a run: what stands on the page, and that it needs nothing else."""

import sys
from base64 import b64decode
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
import torch

import polyak
from polyak import landscape
from polyak.errors import CheckpointError, MissingExtraError, NotStartedError, OptionError, OutputExistsError
from polyak.report import profile_chart, write_report
from recorded_runs import RecordedWalk

VOID = {"meta", "img"}


class Page(HTMLParser):
    """Text and pictures of a page, and whether every tag is closed in its place."""

    def __init__(self, path):
        super().__init__()
        self.source = path.read_text("utf-8")
        self.open, self.text, self.images, self.links = [], [], {}, []
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.links += [attributes[name] for name in ("src", "href") if name in attributes]
        if tag == "img":
            self.images[attributes["alt"]] = attributes["src"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def __contains__(self, text):
        return text in " ".join("".join(self.text).split())

    def words(self, alt):
        """What is written in a picture; matplotlib leaves the text beside the outlines as comments."""
        prefix = "data:image/svg+xml;base64,"
        assert self.images[alt].startswith(prefix)
        svg = b64decode(self.images[alt].removeprefix(prefix))
        ElementTree.fromstring(svg)
        return svg.decode()


@pytest.fixture
def walk(tmp_path):
    found = RecordedWalk(tmp_path / "walk", block=5, max_blocks=16)
    found.run(60)
    found.recorder.close()
    return found


@pytest.fixture
def trajectory(walk):
    return walk.recorder.trajectory


def score_of(walk):
    target = walk.mean(range(31, 61))
    return lambda model: (model[0].weight - target["0.weight"].float()).square().flatten()


def chosen(walk, trajectory, **options):
    batches = [torch.randn(16, 3)]
    options = {"score": score_of(walk), "recalibrate": batches, "progress": False, **options}
    return polyak.select(trajectory, walk.model, **options)


def test_a_recording_alone_gives_its_course(trajectory, tmp_path):
    write_report(trajectory, tmp_path / "page.html")
    page = Page(tmp_path / "page.html")
    assert page.open == []
    assert "12 blocks, optimizer steps 0 to 60, 60 samples; an average takes" in page
    assert "Nothing was scored" in page and "polyak select" in page
    assert "(55, 60]" in page and "58" in page  # the mean of the last block's metric
    assert page.words("loss over optimizer steps").count("<!-- loss -->") == 2  # the title and the axis
    assert set(page.images) == {
        "loss over optimizer steps",
        "relative distance from block to block",
        "turn from block to block",
        "Weights of optimizer steps under each profile",
    }


def test_what_was_chosen_stands_first(walk, trajectory, tmp_path):
    selection = chosen(walk, trajectory, holdout=score_of(walk))
    best = next(candidate for candidate in selection.table if candidate.profile is not None)
    weights = {"live": trajectory.live(), "best": trajectory.average(best.profile)}
    line = landscape.path(
        walk.model, weights, score_of(walk), recalibrate=[torch.randn(16, 3)], progress=False
    )
    write_report(trajectory, tmp_path / "page.html", selection=selection, line=line)
    page = Page(tmp_path / "page.html")
    assert selection.verdict in page and str(line) in page
    assert all(candidate.name in page for candidate in selection.table)
    assert f"<!-- {best.name} -->" in page.words("Weights of optimizer steps under each profile")
    assert "<!-- best -->" in page.words("The score along the line")
    assert best.name in page.words("Scores of all candidates minus that of the live weights")


def test_the_weights_of_steps_are_shown_as_they_are(trajectory):
    (axes,) = profile_chart([trajectory.explain("tail:0.5")]).get_axes()
    (line,) = axes.get_lines()
    heights = dict(zip(*line.get_data(), strict=True))
    assert (heights[5], heights[40], heights[60]) == (0.0, pytest.approx(2.0), pytest.approx(2.0))


def test_a_page_needs_nothing_from_elsewhere_and_is_the_same_every_time(trajectory, tmp_path):
    for name in ("one.html", "two.html"):
        write_report(trajectory, tmp_path / name, title="same")
    one, two = Page(tmp_path / "one.html"), Page(tmp_path / "two.html")
    assert one.source == two.source
    assert one.links and all(link.startswith("data:") for link in one.links)
    assert "<script" not in one.source and "http" not in one.source


def test_names_are_text_never_markup(tmp_path):
    model = torch.nn.Linear(1, 1)
    with polyak.Recorder(model, tmp_path / "run", block=1) as run:
        for value in (1.0, 2.0, 1.5):
            model.weight.data.fill_(value)
            run.update(**{"<b>loss": value, "$x_{y$": value})
    write_report(run.trajectory, tmp_path / "page.html", title="<script>alert()</script>")
    page = Page(tmp_path / "page.html")
    assert page.open == [] and "<script" not in page.source and "<b>" not in page.source
    assert "<script>alert()</script>" in page and "<b>loss over optimizer steps" in page.images
    assert "$x_{y$ over optimizer steps" in page.images  # nor is it mathematics


def test_a_damaged_block_is_named_and_the_rest_is_shown(walk, tmp_path):
    block = walk.recorder.trajectory.blocks[3]
    (tmp_path / "walk" / block.file_name).write_bytes(b"no block")
    write_report(polyak.Trajectory(tmp_path / "walk"), tmp_path / "page.html")
    page = Page(tmp_path / "page.html")
    assert block.file_name in page and "relative distance from block to block" in page.images


def test_damage_that_only_the_checksum_shows_is_no_movement(walk, tmp_path):
    block = walk.recorder.trajectory.blocks[3]
    path = tmp_path / "walk" / block.file_name
    data = bytearray(path.read_bytes())
    data[-4:] = b"\x00\x24\x74\x49"  # a million
    path.write_bytes(data)
    write_report(polyak.Trajectory(tmp_path / "walk"), tmp_path / "page.html")
    page = Page(tmp_path / "page.html")
    assert f"{block.file_name} is corrupt" in page
    assert "1000000" not in page.words("relative distance from block to block")


def test_the_newest_block_may_be_damaged_but_not_all(walk, tmp_path):
    folder = tmp_path / "walk"
    *others, newest = sorted(folder.glob("block-*"))
    newest.write_bytes(b"")
    write_report(polyak.Trajectory(folder), tmp_path / "page.html")
    assert newest.name in Page(tmp_path / "page.html")
    for path in others:
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="no block can be read"):
        write_report(polyak.Trajectory(folder), tmp_path / "none.html")


@pytest.mark.parametrize("steps", [(0,), (0, 100, 200, 300)])
def test_a_checkpoint_of_step_0_stands_for_no_steps(tmp_path, steps):
    for step in steps:
        torch.save({"w": torch.full((2,), float(step % 3))}, tmp_path / f"step-{step}.pt")
    write_report(polyak.Trajectory.from_checkpoints(tmp_path.glob("*.pt")), tmp_path / "page.html")
    assert f"optimizer steps 0 to {steps[-1]}" in Page(tmp_path / "page.html")


def test_metrics_may_have_any_name(tmp_path):
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    names = ["learning rate", "\x01control", "\u4e2d\u6587", "long " * 40, ""]
    with polyak.Recorder(model, tmp_path / "run", block=1, optimizer=optimizer) as run:
        for value in (7.0, 8.0, 7.5):
            model.weight.data.fill_(value)
            run.update(**dict.fromkeys(names, value))
    write_report(run.trajectory, tmp_path / "page.html")
    page = Page(tmp_path / "page.html")
    pictures = [page.words(alt) for alt in page.images if alt.endswith("over optimizer steps")]
    assert len(page.images) == 2 + len(names) and all(pictures)
    assert (
        page.source.count('alt="learning rate over optimizer steps"') == 2
    )  # the optimizer's, and the metric
    assert "0.25" in page and page.source.count("<th>learning rate</th>") == 2


def test_the_users_own_matplotlib_style_is_no_part_of_the_page(trajectory, tmp_path):
    import matplotlib

    write_report(trajectory, tmp_path / "one.html")
    with matplotlib.rc_context({"figure.facecolor": "black", "svg.fonttype": "none", "font.size": 30}):
        write_report(trajectory, tmp_path / "two.html")
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "two.html").read_bytes()


def test_long_profiles_are_cut_in_pictures(walk, trajectory, tmp_path):
    long = polyak.Weights([0.5, *[0.25] * (len(trajectory.blocks) - 1)])
    selection = chosen(walk, trajectory, profiles=[long])
    write_report(trajectory, tmp_path / "page.html", selection=selection)
    page = Page(tmp_path / "page.html")
    for alt in (
        "Scores of all candidates minus that of the live weights",
        "Weights of optimizer steps under each profile",
    ):
        words = page.words(alt)
        assert str(long) not in words and str(long)[:27] + "\N{HORIZONTAL ELLIPSIS}" in words


def test_advice_leaves_the_decision_to_scores(walk, trajectory, tmp_path):
    write_report(trajectory, tmp_path / "without.html")
    write_report(trajectory, tmp_path / "with.html", selection=chosen(walk, trajectory))
    without, scored = Page(tmp_path / "without.html"), Page(tmp_path / "with.html")
    assert "validation" in without and "on validation data" not in scored


def test_folders_of_checkpoints_are_runs_too(tmp_path):
    for step in (1, 2, 3):
        torch.save({"w": torch.full((2,), float(step % 2))}, tmp_path / f"step-{step}.pt")
    run = polyak.Trajectory.from_checkpoints(tmp_path.glob("*.pt"))
    write_report(run, tmp_path / "page.HTML")
    page = Page(tmp_path / "page.HTML")
    assert f"{tmp_path.name}" in page and "3 blocks" in page and "3 samples" in page


def test_one_block_is_a_page_with_little_on_it(tmp_path):
    model = torch.nn.Linear(1, 1)
    with polyak.Recorder(model, tmp_path / "run", block=2) as run:
        for _ in range(2):
            run.update(loss=float("nan"))
    write_report(run.trajectory, tmp_path / "page.html")
    page = Page(tmp_path / "page.html")
    assert "1 block, optimizer steps 0 to 2, 2 samples" in page
    assert "Three different weights are needed" in page


def test_bad_output_is_refused_and_nothing_is_written(trajectory, tmp_path):
    (tmp_path / "there.html").write_text("mine")
    (tmp_path / "folder.html").mkdir()
    for path, error, message in (
        ("report.pdf", OptionError, "must end in .html"),
        ("there.html", OutputExistsError, "exists"),
        ("no/where.html", CheckpointError, "no folder"),
        ("folder.html", OptionError, "must end in .html"),
    ):
        with pytest.raises(error, match=message):
            write_report(trajectory, tmp_path / path)
    assert (tmp_path / "there.html").read_text() == "mine"
    write_report(trajectory, tmp_path / "there.html", overwrite=True)
    assert "mine" not in (tmp_path / "there.html").read_text()


def test_a_run_without_blocks_is_refused(tmp_path):
    with polyak.Recorder(torch.nn.Linear(1, 1), tmp_path / "run", block=100) as run:
        trajectory = run.trajectory
        with pytest.raises(NotStartedError, match="no block"):
            write_report(trajectory, tmp_path / "page.html")


@pytest.mark.parametrize("module", ["jinja2", "matplotlib"])
def test_what_is_missing_is_one_pip_command_away(trajectory, tmp_path, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=r"pip install 'polyak\[report\]'"):
        write_report(trajectory, tmp_path / "page.html")
