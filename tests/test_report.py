"""The report of a run: what stands on the page, and that it needs nothing else."""

import re
import sys
from html import unescape
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
import torch

import polyak
from polyak import landscape
from polyak.errors import CheckpointError, MissingExtraError, NotStartedError, OptionError, OutputExistsError
from polyak.inspection import measure_movement
from polyak.report import write_report
from polyak.report._answer import answer
from polyak.report._charts import profile_chart
from recorded_runs import RecordedWalk

VOID = {"meta", "link"}


class Page(HTMLParser):
    """Text and pictures of a page, and whether every tag is closed in its place."""

    def __init__(self, path):
        super().__init__()
        self.source = path.read_text("utf-8")
        self.open, self.text, self.links = [], [], []
        drawn = re.findall(r'<div role="img" aria-label="([^"]*)">(<svg.*?</svg>)', self.source, re.DOTALL)
        self.pictures = {unescape(title): svg for title, svg in drawn}
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.links += [attributes[name] for name in ("src", "href", "xlink:href") if name in attributes]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def __contains__(self, text):
        return text in " ".join("".join(self.text).split())

    def words(self, title):
        """What is written in the picture whose title begins so."""
        (svg,) = (svg for name, svg in self.pictures.items() if name.startswith(title))
        root = ElementTree.fromstring(svg.replace("<svg", '<svg xmlns:xlink="x"'))
        return ["".join(element.itertext()) for element in root.iter("text")]


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
    return lambda model: (model[0].weight - target["0.weight"].float()).square().flatten().repeat(4)


def chosen(walk, trajectory, **options):
    batches = [torch.randn(16, 3)]
    options = {"score": score_of(walk), "recalibrate": batches, "progress": False, **options}
    return polyak.select(trajectory, walk.model, **options)


def test_a_recording_alone_gives_its_course(trajectory, tmp_path):
    write_report(trajectory, tmp_path / "page.html")
    page = Page(tmp_path / "page.html")
    assert page.open == []
    assert "12 blocks of 60 samples" in page and "optimizer steps 0 to 60" in page
    assert "Nothing was scored yet" in page and "--score my.data:losses" in page
    assert "(55, 60]" in page and "58" in page  # the mean of the last block's metric
    assert "loss" in page.words("loss rose from 3 to 58")
    assert [re.sub(":.*| is .*| rose.*", "", title) for title in page.pictures] == [
        "loss",
        "Relative distance from block to block",
        "Turn from block to block",
        "decay",
    ]


def test_what_to_ship_stands_first_and_how_to_write_it(walk, trajectory, tmp_path):
    others = lambda model: score_of(walk)(model) + 0.1  # noqa: E731
    selection = chosen(walk, trajectory, holdout=others)
    best = selection.best
    weights = {selection.baseline.name: trajectory.live(), "best": trajectory.average(best.profile)}
    line = landscape.path(
        walk.model, weights, score_of(walk), recalibrate=[torch.randn(16, 3)], progress=False
    )
    write_report(trajectory, tmp_path / "page.html", selection=selection, line=line)
    page = Page(tmp_path / "page.html")
    verdict = page.source[
        page.source.index('<section class="answer average">') : page.source.index("</section>")
    ]
    assert "<h1>Ship the average</h1>" in verdict and "Confirmed on a holdout, 48 other examples" in verdict
    assert f"{selection.baseline.score:.4g}" in verdict and f"{best.score:.4g}" in verdict
    assert f"{best.difference:+.3g}".replace("-", "\N{MINUS SIGN}") in verdict
    assert "caveat" not in verdict and 'class="caveat"' not in page.source
    assert f"run.average(&#34;{best.name}&#34;)" in verdict and "polyak.update_bn" in verdict
    assert (
        f"{len(selection.table) - 2} averages and the live weights, on 48 examples; lower is better" in page
    )
    assert all(candidate.name in page for candidate in selection.table)
    assert "best" in page.words("The best score on the line")
    dots = page.words(f"{best.name} is better than {selection.baseline.name} beyond noise")
    assert best.name in dots and sum(name.endswith("≈") or ":" in name for name in dots) <= 8
    assert best.name in page.words(f"{best.name} is a mean of the weights of steps")


@pytest.fixture
def line_of_numbers(tmp_path):
    model = torch.nn.Linear(1, 1, bias=False)
    with polyak.Recorder(model, tmp_path / "numbers", block=1) as run:
        for value in (1.0, 3.0, 1.0, 3.0):
            model.weight.data.fill_(value)
            run.update()
    return run.trajectory


NOISE = torch.linspace(-1, 1, 40)


def loss_around(place, noise=0.0):
    """Losses of 40 examples that like weights near ``place``, and differ about how much."""
    return lambda m: (0.1 + (m.weight.flatten() - place).square()) * (1 + noise * NOISE)


@pytest.mark.parametrize(
    ("score", "holdout", "mode", "headline", "sentence", "caveat"),
    [
        (loss_around(2), loss_around(2.1), None, "Ship the average", "✓ Confirmed", None),
        (loss_around(2), loss_around(3), None, "Keep the live weights", "✗ Not confirmed", None),
        (
            loss_around(2),
            None,
            None,
            "Ship the average",
            ", beyond the noise of these 40 examples",
            "Not yet confirmed",
        ),
        (
            loss_around(2.4, 20.0),
            None,
            None,
            "Keep the live weights",
            "but not beyond the noise",
            "Not yet confirmed",
        ),
        (loss_around(3), None, None, "Keep the live weights", "None of 2 averages", None),
        (
            lambda m: (m.weight - 2).square().item(),
            None,
            "min",
            "Not decided yet",
            "cannot tell",
            "Not yet confirmed",
        ),
        (
            lambda m: -(m.weight - 2).square().item(),
            lambda m: -(m.weight - 2.1).square().item(),
            "max",
            "Ship the average",
            "✓ Confirmed",
            "how large noise is stays unknown",
        ),
        (lambda m: float("nan"), None, "min", "Not decided yet", "No candidate has a finite score", None),
    ],
)
def test_the_headline_follows_the_evidence(line_of_numbers, score, holdout, mode, headline, sentence, caveat):
    choice = polyak.select(
        line_of_numbers,
        torch.nn.Linear(1, 1, bias=False),
        score=score,
        holdout=holdout,
        mode=mode,
        profiles=["uniform", "tail:0.5"],
        progress=False,
    )
    found = answer(line_of_numbers, choice, None)
    assert found.headline == headline and sentence in f"{found.lead} {found.check}"
    assert len(found.caveats) == (caveat is not None) and (caveat or "") in "".join(found.caveats)
    assert bool(found.writing) == (headline != "Keep the live weights") and len(found.figures) == 3


def test_live_weights_may_only_need_their_statistics(walk, trajectory):
    batches = [torch.randn(16, 3)]
    walk.model.load_state_dict(trajectory.live(), strict=False)
    polyak.update_bn(batches, walk.model)
    right = walk.model[1].running_mean.clone()
    choice = chosen(
        walk,
        trajectory,
        recalibrate=batches,
        profiles=["uniform"],
        score=lambda model: (model[1].running_mean - right).square() + torch.linspace(0.1, 0.2, 4),
    )
    found = answer(trajectory, choice, None)
    assert found.headline == "Keep the live weights, with recomputed BatchNorm statistics"
    assert found.writing == "polyak.update_bn(train_loader, model)"
    assert found.figures[0].label == "Live, recalibrated" == choice.baseline.name.capitalize()


def test_the_line_that_writes_the_weights_writes_them(line_of_numbers, tmp_path, monkeypatch):
    model = torch.nn.Linear(1, 1, bias=False)
    choice = polyak.select(line_of_numbers, model, score=loss_around(2), profiles=["uniform"], progress=False)
    monkeypatch.chdir(tmp_path)
    exec(answer(line_of_numbers, choice, None).writing, {})
    assert polyak.checkpoints.open("averaged.safetensors").read("weight").item() == 2.0


def test_the_line_for_a_model_with_statistics_recomputes_them(walk, trajectory, tmp_path, monkeypatch):
    batches = [torch.randn(16, 3)]
    choice = chosen(walk, trajectory, recalibrate=batches)
    names = {"model": walk.model, "train_loader": batches}
    monkeypatch.chdir(tmp_path)
    exec(answer(trajectory, choice, None).writing, names)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))
    choice.apply(model)
    for name, value in torch.load("averaged.pt").items():
        torch.testing.assert_close(value, model.state_dict()[name])


def test_what_was_constant_is_a_line_of_text(tmp_path):
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    with polyak.Recorder(model, tmp_path / "run", block=1, optimizer=optimizer) as run:
        for value in (1.0, 2.0, 1.5):
            model.weight.data.fill_(value)
            run.update(loss=value, temperature=7.0)
    write_report(run.trajectory, tmp_path / "page.html")
    page = Page(tmp_path / "page.html")
    assert "learning rate: 0.25 throughout" in page and "temperature: 7 throughout" in page
    assert [title for title in page.pictures if " from 1 to 1.5" in title] == ["loss rose from 1 to 1.5"]


def test_the_weights_of_steps_are_shown_as_they_are(trajectory):
    (axes,) = profile_chart([trajectory.explain("tail:0.5")], None).get_axes()
    (line,) = axes.get_lines()
    heights = dict(zip(*line.get_data(), strict=True))
    assert (heights[5], heights[40], heights[60]) == (0.0, pytest.approx(2.0), pytest.approx(2.0))


def test_nothing_of_a_run_that_diverged_is_shipped(tmp_path):
    model = torch.nn.Linear(1, 1, bias=False)
    with polyak.Recorder(model, tmp_path / "run", block=1) as run:
        for value in (1.0, 3.0, 1.0, 3.0, 1.0, 50.0, 2000.0, 1e5):
            model.weight.data.fill_(value)
            run.update()
    choice = polyak.select(run.trajectory, model, score=loss_around(2), progress=False)
    assert choice.beats_baseline  # and yet
    write_report(run.trajectory, tmp_path / "page.html", selection=choice)
    page = Page(tmp_path / "page.html")
    assert "Ship neither: the run diverged" in page and "Ship the average" not in page
    assert (
        "In steps (5, 6] the weights moved by more than 5 times their own size" in page
        and "window:0,5" in page
    )


def test_the_live_part_of_a_blend_is_drawn(trajectory):
    blend, average = trajectory.explain("blend:0.4:tail:0.5"), trajectory.explain("tail:0.5")
    drawn = profile_chart([blend, average], blend.profile)
    assert "60% live weights" in [text.get_text() for text in drawn.axes[0].texts]
    assert not [t for t in profile_chart([average], None).axes[0].texts if "live" in t.get_text()]


def test_what_was_prepared_is_said(walk, trajectory, tmp_path):
    for prepare in (None, lambda model: None):
        write_report(
            trajectory,
            tmp_path / "page.html",
            selection=chosen(walk, trajectory, profiles=["uniform"], prepare=prepare),
            overwrite=True,
        )
        assert ("each as prepare made it" in Page(tmp_path / "page.html")) == (prepare is not None)


def test_a_page_needs_nothing_from_elsewhere_and_is_the_same_every_time(trajectory, tmp_path):
    for name in ("one.html", "two.html"):
        write_report(trajectory, tmp_path / name, title="same")
    one, two = Page(tmp_path / "one.html"), Page(tmp_path / "two.html")
    assert one.source == two.source
    assert one.links and all(link.startswith(("data:", "#")) for link in one.links)
    assert "default-src 'none'" in one.source and "url(#" in one.source and "url(h" not in one.source
    assert "<script" not in one.source and "http:" not in one.source and "https:" not in one.source


def test_names_are_text_never_markup(tmp_path):
    model = torch.nn.Linear(1, 1)
    with polyak.Recorder(model, tmp_path / "run", block=1) as run:
        for value in (1.0, 2.0, 1.5):
            model.weight.data.fill_(value)
            run.update(**{"<b>loss": value, "$x_{y$": value})
    write_report(run.trajectory, tmp_path / "page.html", title="<script>alert()</script>")
    page = Page(tmp_path / "page.html")
    assert page.open == [] and "<script" not in page.source and "<b>" not in page.source
    assert "<script>alert()</script>" in page and "<b>loss" in page.words("<b>loss rose from")
    assert "$x_{y$" in page.words("$x_{y$ rose from")  # nor is it mathematics


def test_names_turn_nothing_around_and_control_nothing(tmp_path):
    model = torch.nn.Linear(1, 1)
    name = 'a\u202eb\x1b[2J & "c"'
    with polyak.Recorder(model, tmp_path / name, block=1) as run:
        for value in (1.0, 2.0, 1.5):
            model.weight.data.fill_(value)
            run.update(**{name: value, "line\nbreak": value})
    write_report(run.trajectory, tmp_path / "page.html", command="first\nsecond")
    page = Page(tmp_path / "page.html")
    assert all(letter.isprintable() for letter in page.source.replace("\n", ""))
    assert 'a\\u202eb\\x1b[2J & "c"' in page


def test_a_block_that_is_merged_away_while_the_page_is_made_is_on_it(walk, tmp_path, monkeypatch):
    trajectory = polyak.Trajectory(tmp_path / "walk")

    def measured(read):
        (tmp_path / "walk" / trajectory.blocks[3].file_name).unlink()
        return measure_movement(read)

    monkeypatch.setattr("polyak.report.measure_movement", measured)
    write_report(trajectory, tmp_path / "page.html")
    assert Page(tmp_path / "page.html").words("Relative distance from block to block")


def test_a_damaged_block_is_named_and_the_rest_is_shown(walk, tmp_path):
    block = walk.recorder.trajectory.blocks[3]
    (tmp_path / "walk" / block.file_name).write_bytes(b"no block")
    write_report(polyak.Trajectory(tmp_path / "walk"), tmp_path / "page.html")
    page = Page(tmp_path / "page.html")
    assert block.file_name in page and page.words("Relative distance from block to block")


def test_damage_that_only_the_checksum_shows_is_no_movement(walk, tmp_path):
    block = walk.recorder.trajectory.blocks[3]
    path = tmp_path / "walk" / block.file_name
    data = bytearray(path.read_bytes())
    data[-4:] = b"\x00\x24\x74\x49"  # a million
    path.write_bytes(data)
    write_report(polyak.Trajectory(tmp_path / "walk"), tmp_path / "page.html")
    page = Page(tmp_path / "page.html")
    assert f"{block.file_name} is corrupt" in page
    assert "1000000" not in " ".join(page.words("Relative distance from block to block"))


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
    pictures = [title for title in page.pictures if " from 7 to 7.5" in title]
    assert len(pictures) == len(names) and all(map(page.words, pictures))
    assert "learning rate: 0.25 throughout" in page  # the optimizer's, beside the metric
    assert page.source.count("<th>learning rate</th>") == 2


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
    cut = str(long)[:27] + "\N{HORIZONTAL ELLIPSIS}"
    assert cut[:20] in " ".join(page.words(f"{cut} is a mean of")) and page.source.count(cut) > 4
    code = f'average("{long}")'  # there it has to be whole
    assert code in "".join(page.text) and str(long) not in "".join(page.text).replace(code, "")


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
    assert f"{tmp_path.name}" in page and "3 blocks of 3 samples" in page


def test_one_block_is_a_page_with_little_on_it(tmp_path):
    model = torch.nn.Linear(1, 1)
    with polyak.Recorder(model, tmp_path / "run", block=2) as run:
        for _ in range(2):
            run.update(loss=float("nan"))
    write_report(run.trajectory, tmp_path / "page.html")
    page = Page(tmp_path / "page.html")
    assert "1 block of 2 samples" in page and "optimizer steps 0 to 2" in page
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
