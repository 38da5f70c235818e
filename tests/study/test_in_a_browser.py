"""The page in a real browser: nothing sticks out, no text over another, the explorer goes down to the leaf, nothing is fetched."""

import html
import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from sidrec_torchrec.study.comparison import compare
from sidrec_torchrec.study.explorer import Explorer
from sidrec_torchrec.study.report_html import write_comparison, write_html

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH; on Debian: apt-get install chromium")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-component-update"),
    *("--disable-background-networking", "--disable-sync", "--hide-scrollbars", "--disable-dev-shm-usage"),
)
LEAF = [1, 0, 2, 2]

# Runs in a page around the report, which stands in a frame of the width in question: browsers have no windows as narrow as a phone.
MEASURE = """
const page = frame.contentDocument, root = page.documentElement, said = {};
said.width = root.clientWidth;
said.scroll = root.scrollWidth;
said.wide = [...page.querySelectorAll("body *")]
  .filter((one) => one.getBoundingClientRect().right > root.clientWidth + 1 && !one.closest(".scroll, svg, .choices button"))
  .map((one) => `${one.tagName} ${one.className} ${one.textContent.slice(0, 40)}`);
said.overlaps = [];
for (const svg of page.querySelectorAll("figure svg")) {
  const texts = [...svg.querySelectorAll("text")].map((text) => [text.textContent, text.getBoundingClientRect()]);
  texts.forEach(([one, a], i) => texts.slice(i + 1).forEach(([other, b]) => {
    const across = Math.min(a.right, b.right) - Math.max(a.left, b.left), down = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
    if (across > 1 && down > 3) said.overlaps.push(`${svg.getAttribute("aria-label")}: ${one} | ${other}`);
  }));
}
said.letters = Math.min(...[...page.querySelectorAll("figure svg text")].map((text) => text.getBoundingClientRect().height));
said.figures = page.querySelectorAll("figure svg").length;
said.ground = getComputedStyle(page.body).backgroundColor;
said.ink = getComputedStyle(page.querySelector("h1")).color;
const explorer = page.getElementById("explorer");
if (explorer) {
  said.path = [];
  const heading = () => explorer.querySelector(".heading").textContent;
  said.path.push(heading());
  for (const digit of LEAF) {
    const choice = [...explorer.querySelectorAll(".choices button")].find((one) => one.firstChild.textContent.endsWith(`: ${digit}`));
    if (!choice) break;
    choice.click();
    said.path.push(heading());
  }
  said.leaf = explorer.querySelector(".members").textContent;
  said.crumbs = explorer.querySelectorAll(".path button").length;
  explorer.querySelector(".path button").click();
  said.back = heading();
  const search = explorer.querySelector("input");
  search.value = "TITLE 17";
  search.dispatchEvent(new Event("input"));
  said.found = explorer.querySelector(".members").textContent;
}
document.body.append(Object.assign(document.createElement("pre"), { id: "said", textContent: JSON.stringify(said) }));
"""


def browse(page: Path, *flags: str) -> str:
    with tempfile.TemporaryDirectory() as profile:
        command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "--virtual-time-budget=4000", *flags, page.as_uri()]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def measured(page: Path, width: int, *flags: str) -> dict:
    """What ``MEASURE`` says of the page in a frame of a width."""
    source = html.escape(page.read_text(), quote=True)
    around = page.with_name(f"around-{width}{len(flags)}.html")
    script = f'const frame = document.querySelector("iframe"); frame.onload = () => {{ {MEASURE} }};'
    around.write_text(
        f'<!doctype html><meta charset="utf-8"><body><iframe width="{width}" height="3000" style="border:0" srcdoc="{source}"></iframe>'
        f"<script>{script.replace('LEAF', json.dumps(LEAF))}</script>"
    )
    said = re.search(r'<pre id="said">(.*?)</pre>', browse(around, "--dump-dom", *flags), re.DOTALL)
    assert said, "the page did not load"
    return json.loads(html.unescape(said[1]))


@pytest.fixture(scope="module")
def explorer() -> Explorer:
    """81 items, one for each SID of four trits, but for two that share one."""
    sids = [[i // 27, i // 9 % 3, i // 3 % 3, i % 3] for i in range(81)] + [LEAF]
    texts = [f"title {i} <b>bold</b> and a long tail of words {'x' * 90}" for i in range(82)]
    return Explorer(5_000, ("title",), [f"item-{i}" for i in range(82)], texts, {"side": sids})


@pytest.fixture(scope="module")
def page(make_report, explorer, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_html(make_report(), path, explorer)
    return path


@pytest.mark.parametrize("width", [390, 1280])
def test_it_fits_and_nothing_overlaps(page, width):
    said = measured(page, width)
    assert said["width"] == width and said["scroll"] <= width, said["wide"]
    assert not said["wide"] and not said["overlaps"]
    assert said["figures"] >= 11 and said["letters"] >= 9  # pixels
    counts = (
        "82 items here, of which the first 25",
        "28 items here, of which the first 25",
        "10 items here",
        "4 items here",
    )
    assert said["path"] == [*counts, "2 items of this SID"]
    assert "item-35" in said["leaf"] and "item-81" in said["leaf"] and "<b>bold</b>" in said["leaf"]
    assert said["crumbs"] == 1 + len(LEAF) and said["back"] == said["path"][0]
    assert said["found"].startswith("item-17 ") and said["found"].count("item-") == 1


def test_it_follows_a_dark_ground(page):
    light, dark = (measured(page, 800, f"--blink-settings=preferredColorScheme={scheme}") for scheme in (1, 0))
    assert light["ground"] == "rgb(255, 255, 254)" and dark["ground"] == "rgb(23, 23, 26)"
    assert light["ink"] == "rgb(27, 27, 30)" and dark["ink"] == "rgb(236, 236, 239)"


def test_runs_side_by_side_fit_too(make_pipeline, tmp_path):
    runs = [make_pipeline(name, seeds=2) for name in ("a-run-with-a-long-name-of-many-words", "another")]
    write_comparison(compare(runs), tmp_path / "compared.html")
    for width in (390, 1280):
        said = measured(tmp_path / "compared.html", width)
        assert said["scroll"] <= width and not said["wide"] and not said["overlaps"]


def test_a_screenshot_shows_something(page, tmp_path):
    picture = tmp_path / "shot.png"
    browse(page, "--window-size=1280,2000", f"--screenshot={picture}")
    content = picture.read_bytes()
    assert [int.from_bytes(content[i : i + 4], "big") for i in (16, 20)] == [1280, 2000]
    assert len(content) > 60_000  # text and plots; an empty page of this size has some thousand bytes
