"""`ferret report`: a page says what the folder holds, whoever named things, and a browser shows it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from conftest import SMALL, read_metrics

from ferret_ext.federated import compare, page
from ferret_ext.federated.cli import main
from ferret_ext.federated.config import build

HOSTILE = (
    "</script><script>alert(1)</script><img src='http://x.example/y' onerror=alert(2)>\"'--> &amp; $\\frac{"
)
CHROMIUM = shutil.which("chromium")
PHONE, SCREEN = 400, 1200


class Reader(HTMLParser):
    """Elements, ids and tables of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self._rows: list[list[str]] = []
        self._cell = False
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        given = dict(attrs)
        self.ids += [str(given["id"])] if "id" in given else []
        self.links += [str(given[name]) for name in ("src", "href", "xlink:href") if name in given]
        if given.get("role") == "region":
            self._rows = self.tables.setdefault(str(given["aria-label"]), [])
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("th", "td"):
            self._rows[-1].append("")
            self._cell = True

    def handle_endtag(self, tag: str) -> None:
        self._cell = self._cell and tag not in ("th", "td")

    def handle_data(self, data: str) -> None:
        if self._cell:
            self._rows[-1][-1] += data


@pytest.fixture(scope="module")
def hostile_run(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose names and messages were made up by an attacker."""
    folder = tmp_path_factory.mktemp("page") / "<img src=x onerror=alert(3)> & $x_\\frac{$"
    shutil.copytree(small_run, folder)
    rows = read_metrics(folder)
    rows[1]["rejected"] = [{"client": 3, "reason": HOSTILE}]
    rows[2]["left_out"] = [1]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = json.loads((folder / "partition.json").read_text())
    told["column"] = f"_{HOSTILE}"
    for client in told["clients"]:
        client["name"] = f"_{client['client']}{HOSTILE}"
        client["by_key"] = {client["name"]: client["examples"]}
    (folder / "partition.json").write_text(json.dumps(told))
    about = json.loads((folder / "run.json").read_text())
    about["environment"][HOSTILE] = HOSTILE
    (folder / "run.json").write_text(json.dumps(about))
    assert main(["report", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def comparison(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    whole = tmp_path_factory.mktemp("whole") / "run"
    assert main(["simulate", *SMALL, "algorithm=fedavg", "--out", str(whole)]) == 0
    runs = [
        compare.read_run(compare.Run(variant, 0, build([("out", str(out))], required=())))
        for variant, out in (("ferret", small_run), ("fedavg", whole))
    ]
    compare.write(runs, compare.tabulate(runs, 5.0), 5.0, folder)
    return folder


def test_a_finished_run_has_its_page(small_run: Path) -> None:
    read, rows = Reader(small_run / page.PAGE), read_metrics(small_run)
    head, *rounds = read.tables["Rounds"]
    told = [dict(zip(head, cells, strict=True)) for cells in rounds]
    assert [it["evaluation loss"] for it in told] == [f"{row['eval_loss']:.4f}" for row in rows]
    assert [it["bytes up"] for it in told] == [f"{row['payload_bytes_up']:,}" for row in rows]
    assert ["ferret.K", "64", "4096"] in read.tables["Configuration"]
    assert len(read.tables["All settings"]) > len(read.tables["Configuration"]) > 10
    sent = read.tables["What was sent"]
    assert any("float32 [64]" in cells[2] for cells in sent)
    assert len({cells[0] for cells in sent if cells[0]}) == sum(cells[3] != "" for cells in sent) < len(sent)
    assert {"torch", "processor"} <= {cells[0] for cells in read.tables["Environment"]}
    assert [cells[0] for cells in read.tables["Who holds what"]] == ["client", "0", "1", "2", "3"]
    assert read.elements.count("svg") == 5


def test_a_page_refers_to_nothing_outside(small_run: Path, comparison: Path) -> None:
    for folder in (small_run, comparison):
        read = Reader(folder / page.PAGE)
        assert all(link.startswith("#") for link in read.links), read.links
        assert not {"script", "link", "img", "iframe"} & set(read.elements)
        assert len(set(read.ids)) == len(read.ids)
        assert {link[1:] for link in read.links} <= set(read.ids)


def test_what_strangers_wrote_is_text(hostile_run: Path) -> None:
    read = Reader(hostile_run / page.PAGE)
    assert not {"script", "img"} & set(read.elements)
    assert ["1", "3", f"rejected: {HOSTILE}"] in read.tables["Left out and rejected"]
    assert ["2", "1", "left out: its training failed"] in read.tables["Left out and rejected"]
    assert [HOSTILE, HOSTILE] in read.tables["Environment"]
    assert read.tables["Who holds what"][1][1] == f"_0{HOSTILE}"


def test_a_comparison_has_its_page(comparison: Path) -> None:
    read = Reader(comparison / page.PAGE)
    assert [cells[0] for cells in read.tables["Variants"]] == ["variant", "ferret", "fedavg"]
    (_, ferret, fedavg) = read.tables["What each variant sent"]
    assert float(ferret[2].replace(",", "")) > 100 > 1.1 > float(fedavg[2]) > 0.9
    assert read.elements.count("svg") == 3


def test_a_run_under_way_has_a_page(small_run: Path, tmp_path: Path) -> None:
    shutil.copy(small_run / "config.yaml", tmp_path)
    lines = (small_run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text("".join(lines[:2]))
    assert main(["report", str(tmp_path)]) == 0
    assert "1 of 3 rounds, not finished" in (tmp_path / page.PAGE).read_text()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("run.json", "[1]"),
        ("partition.json", '{"kind": "iid"}'),
        ("metrics.jsonl", "{"),
        ("metrics.jsonl", None),
        ("comparison.json", '{"rows": [], "runs": [], "target_loss": 1}'),
    ],
)
def test_damaged_folders_are_refused(
    small_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: str | None
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(small_run, folder)
    if content is None:  # a line with text for a number
        rows = read_metrics(folder)
        rows[1]["eval_loss"] = "<b>"
        content = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / name).write_text(content)
    before = (folder / page.PAGE).read_bytes()
    assert main(["report", str(folder)]) == 2
    assert "is damaged" in capsys.readouterr().err
    assert (folder / page.PAGE).read_bytes() == before


def test_other_folders_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "expected one of a run or a comparison" in capsys.readouterr().err


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    driver = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("chromium is not installed: apt-get install chromium")
    with driver.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.mark.parametrize("width", [PHONE, SCREEN])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("which", ["small_run", "hostile_run", "comparison"])
def test_a_browser_shows_the_page(
    browser: Any, request: pytest.FixtureRequest, tmp_path: Path, which: str, scheme: str, width: int
) -> None:
    """Without a word on the console, a request, a dialog, or anything wider than the window."""
    shown = tmp_path / "page.html"
    shutil.copy(request.getfixturevalue(which) / page.PAGE, shown)
    context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 800})
    tab, heard = context.new_page(), []
    for event in ("console", "pageerror", "dialog", "requestfailed"):
        tab.on(event, lambda what: heard.append(str(what)))
    tab.on("request", lambda asked: heard.append(asked.url))
    tab.goto(shown.as_uri())
    for summary in tab.locator("summary").all():
        summary.click()
    assert heard == [shown.as_uri()]
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.locator("table").count() == shown.read_text().count("<table>") >= 4
    sizes = tab.evaluate("[...document.querySelectorAll('svg')].map(it => it.getBoundingClientRect().width)")
    assert sizes
    assert all(width / 3 < size <= width for size in sizes)
    ink, paper = (
        tab.evaluate(f"getComputedStyle(document.body).{it}.match(/\\d+/g).map(Number)")
        for it in ("color", "backgroundColor")
    )
    assert (sum(ink) < sum(paper)) == (scheme == "light")
    texts = tab.evaluate("[...document.querySelectorAll('svg text')].map(it => getComputedStyle(it).fill)")
    assert f"rgb({', '.join(map(str, ink))})" in texts
    context.close()
