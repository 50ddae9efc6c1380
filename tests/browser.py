"""Pages in a real browser: Debian's chromium without a window, at two widths, light and dark.

``python tests/browser.py FOLDER`` trains the demo's digits once and takes screenshots of its report.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from html import escape, unescape
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

WIDTHS = (390, 1280)
SCHEMES = {"dark": 0, "light": 1}  # as Blink numbers them
INSTALL = "there is no chromium here; on Debian: apt-get install chromium"

# Run beside the pages rather than in them: they hold no scripts, and forbid any.
MEASURE = """
function light(colour) {
  const parts = colour.slice(0, 3).map(c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
}
function rgba(text) {
  const parts = text.match(/[0-9.]+/g).map(Number);
  return parts.length < 4 ? [...parts, 1] : parts;
}
function background(element, view) {
  for (; element; element = element.parentElement) {
    const colour = rgba(view.getComputedStyle(element).backgroundColor);
    if (colour[3] == 1) return colour;
  }
  return [255, 255, 255, 1];
}
function contrast(element, view) {
  const style = view.getComputedStyle(element);
  const ink = rgba(element instanceof view.SVGElement ? style.fill : style.color);
  const [low, high] = [light(ink), light(background(element, view))].sort((a, b) => a - b);
  return (high + 0.05) / (low + 0.05);
}
function measured(frame) {
  const view = frame.contentWindow, page = frame.contentDocument;
  for (const details of page.querySelectorAll("details")) details.open = true;
  const width = page.documentElement.clientWidth, found = {};
  found.page = frame.title;
  found.width = width;
  found.dark = view.matchMedia("(prefers-color-scheme: dark)").matches;
  found.scrolls = page.documentElement.scrollWidth - width;
  found.beyond = [], found.cut = [], found.faint = [];
  for (const element of page.body.querySelectorAll("*")) {
    const box = element.getBoundingClientRect();
    const of = element.closest("svg");
    if (!of || element == of) {
      if (box.right > width + 0.5 || box.left < -0.5) found.beyond.push(element.outerHTML.slice(0, 120));
    } else if (element.tagName == "text") {
      const frame = of.getBoundingClientRect();
      const [left, right] = [box.left - frame.left, frame.right - box.right];
      if (Math.min(left, right, box.top - frame.top, frame.bottom - box.bottom) < -1)
        found.cut.push(element.textContent);
    }
    const said = [...element.childNodes].some(node => node.nodeType == 3 && node.data.trim());
    if (said && box.width && contrast(element, view) < 4.5)
      found.faint.push(element.textContent.slice(0, 60) + ": " + contrast(element, view).toFixed(2));
  }
  found.texts = page.body.innerText.length + [...page.querySelectorAll("text")].length;
  found.requests = view.performance.getEntriesByType("resource").map(entry => entry.name);
  return found;
}
window.onload = () => {
  document.getElementById("found").textContent = JSON.stringify([...document.querySelectorAll("iframe")].map(measured));
};
"""


def chromium() -> str | None:
    """The browser's command; None where there is none."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)


def measure(pages: dict[str, str], scheme: str) -> list[dict[str, Any]]:
    """What a browser finds on each page at each width, with everything unfolded.

    What a page forbids itself to fetch is allowed: a request that is only prevented is one that is found.
    """
    frames = [
        f'<iframe title="{name}" style="width:{width}px;height:900px;border:0" srcdoc="{escape(source)}"></iframe>'
        for name, source in ((name, _unguarded(source)) for name, source in pages.items())
        for width in WIDTHS
    ]
    harness = f'<pre id="found"></pre>{"".join(frames)}<script>{MEASURE}</script>'
    printed = _run(harness, scheme, "--dump-dom", size=(1400, 900))
    (found,) = re.findall('<pre id="found">(.+?)</pre>', printed, re.DOTALL)
    return json.loads(unescape(found))


def screenshot(page: Path, width: int, height: int, scheme: str, output: Path) -> None:
    """A picture of the page as it opens."""
    frame = f'<iframe src="{page.resolve().as_uri()}" style="width:{width}px;height:{height}px;border:0"></iframe>'
    _run(frame, scheme, f"--screenshot={output.resolve()}", size=(max(width, 500), height))


def _unguarded(source: str) -> str:
    assert source.count('http-equiv="Content-Security-Policy"') == 1
    return re.sub('<meta http-equiv="Content-Security-Policy"[^>]*>', "", source)


def _run(body: str, scheme: str, action: str, size: tuple[int, int]) -> str:
    command = chromium()
    assert command is not None, INSTALL
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        harness = Path(folder) / "harness.html"
        # A page in a frame takes the scheme of what is around it.
        head = '<!doctype html><meta charset="utf-8"><meta name="color-scheme" content="light dark">'
        harness.write_text(f'{head}<body style="margin:0">{body}', "utf-8")
        arguments = [
            *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars"),
            *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
            "--host-resolver-rules=MAP * ~NOTFOUND",
            f"--user-data-dir={folder}/profile",
            f"--window-size={size[0]},{size[1]}",
            f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}",
        ]
        done = subprocess.run(
            [command, *arguments, action, harness.as_uri()],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
    return done.stdout


def main(folder: Path) -> None:
    """Screenshots of a scored report and of one without scores, of one run of the demo."""
    from polyak import landscape
    from polyak.demo import _study, _tasks
    from polyak.report import write_report

    folder.mkdir(parents=True, exist_ok=True)

    def look(trajectory: Any, model: Any, scoring: Any, selection: Any) -> None:
        best = selection.best_average.profile
        line = landscape.path(
            model,
            {selection.baseline.name: trajectory.live(), str(best): trajectory.average(best)},
            lambda m: _study._losses(m, scoring.split.validation),
            recalibrate=scoring.update_bn_batches[:1],
            positions=[step / 8 for step in range(-4, 13)],
            progress=False,
        )
        common: dict[str, Any] = {"title": "Handwritten digits", "overwrite": True}
        write_report(trajectory, folder / "scored.html", selection=selection, line=line, **common)
        write_report(trajectory, folder / "unscored.html", **common)

    _study.train(_tasks.TASKS["digits"], 0, record=True, look=look)
    for page in ("scored", "unscored"):
        for width, height in zip(WIDTHS, (4600, 2900), strict=True):
            for scheme in SCHEMES:
                output = folder / f"{page}-{width}-{scheme}.png"
                screenshot(folder / f"{page}.html", width, height, scheme, output)
                print(output)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
