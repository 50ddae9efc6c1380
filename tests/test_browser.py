"""The report in a real browser: nothing cut off on a telephone, nothing faint in the dark, nothing fetched."""

import pytest
import torch

import browser
import polyak
from polyak import landscape
from polyak.report import write_report
from recorded_runs import RecordedWalk

pytestmark = pytest.mark.skipif(browser.chromium() is None, reason=browser.INSTALL)


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A page with everything on it, long names and caveats too, and one of a run that was not scored."""
    folder = tmp_path_factory.mktemp("pages")
    walk = RecordedWalk(folder / "a-run-with-a-name-that-is-longer-than-a-telephone-is-wide", block=5)
    optimizer = torch.optim.SGD(walk.model.parameters(), lr=0.1)
    walk.recorder = polyak.Recorder(walk.model, folder / ("run-" * 30), block=5, optimizer=optimizer)
    walk.run(60)
    walk.recorder.close()
    run, target = walk.recorder.trajectory, walk.mean(range(31, 61))

    def losses(model):
        return (model[0].weight - target["0.weight"].float()).square().flatten()

    long = polyak.Weights([0.5, *[0.25] * (len(run.blocks) - 1)])
    choice = polyak.select(
        run,
        walk.model,
        score=losses,
        profiles=[long, "tail:0.5", "uniform", "ema:half_life=10", "decay:1-sqrt:0.4"],
        recalibrate=[torch.randn(16, 3)],
        progress=False,
    )
    ends = {choice.baseline.name: run.live(), "best": run.average(choice.best_average.profile)}
    line = landscape.path(walk.model, ends, losses, recalibrate=[torch.randn(16, 3)], progress=False)
    write_report(run, folder / "scored.html", selection=choice, line=line, command="polyak " + "long " * 40)
    write_report(run, folder / "unscored.html")
    return {path.stem: path.read_text("utf-8") for path in sorted(folder.glob("*.html"))}


@pytest.mark.parametrize("scheme", browser.SCHEMES)
def test_nothing_is_cut_off_faint_or_fetched(pages, scheme):
    assert all(part in pages["scored"] for part in ('class="caveat"', "<details>", "<pre>", "≈"))
    found = browser.measure(pages, scheme)
    assert [(one["page"], one["width"]) for one in found] == [
        (page, width) for page in pages for width in browser.WIDTHS
    ]
    for one in found:
        assert one["dark"] == (scheme == "dark") and one["texts"] > 1000
        assert one["scrolls"] == 0 and one["beyond"] == [] and one["cut"] == []
        assert one["faint"] == [] and one["requests"] == []


def test_the_measurements_see_what_is_wrong(pages):
    wrong = pages["unscored"].replace(
        "</main>",
        '<img src="https://example.invalid/a.png">'
        f'<pre class="wide-box" style="width:500px;white-space:pre;color:#aaa;background:#fff">{"wide " * 60}</pre>'
        "<svg viewBox='0 0 9 9' style='width:90px'><text>left of it</text></svg></main>",
    )
    narrow, _ = browser.measure({"wrong": wrong}, "light")
    assert narrow["scrolls"] > 0 and "wide-box" in "".join(narrow["beyond"])
    assert [text for text in narrow["faint"] if text.startswith("wide wide")] and "left of it" in narrow[
        "cut"
    ]
    assert narrow["requests"] == ["https://example.invalid/a.png"]
