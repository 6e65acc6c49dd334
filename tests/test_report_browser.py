"""The report in a real browser: nothing cut off, no error, no request, every number that of report.json."""

from __future__ import annotations

import json
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from browser import CLIPPED, DESKTOP, MARKS, OUTSIDE, OVERLAPPING, PAPER, PHONE, TABLES, Watched, chromium
from report_runs import write_run

from bam_lora.report import collect, compare, render_html
from bam_lora.report.plots import plot_documents

LONG = "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft" * 4
EVIL = "<script>alert(1)</script></style></title>]]>--><img src=x onerror=alert(2)>\"'&amp;{{ 7 * 7 }}"
ARABIC = "كان يا ما كان في قديم الزمان، <b>سلام</b> 👩‍👩‍👧‍👦🇧🇬"


def hostile(report: dict[str, Any]) -> dict[str, Any]:
    """The report with names and texts as nobody would choose them."""
    report = deepcopy(report)
    names = {
        name: f"{name} {text}"
        for name, text in zip(("docs.de", "stories.de", "docs.en"), (EVIL, ARABIC, LONG), strict=True)
    }
    for score in report["scores"]:
        score["set"] = names[score["set"]]
    report["name"] = f"run {ARABIC} {EVIL} {LONG}"
    report["base"] = f"{LONG}/{EVIL}"
    report["data"]["sources"][0]["path"] = f"漢字漢字漢字漢字漢字 {EVIL} {LONG}"
    report["samples"] = [
        {"iteration": iteration, "prompt": prompt, "text": f"{prompt} {text}"}
        for prompt in (ARABIC, LONG)
        for iteration, text in ((0, EVIL), (2, f"{ARABIC}\n\t{EVIL} {LONG}"))
    ]
    report["recipe"]["data"]["target"][0]["path"] = f"{EVIL} {LONG}"
    report["environment"]["command"] = f"{EVIL} {LONG}"
    return report


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """{name of a page: (reports, comparison or None)}."""
    root = tmp_path_factory.mktemp("runs")
    plain = write_run(root / "bam", others=True, learned=2, paired=True)
    single = write_run(
        root / f"WWW漢字漢字漢字 {ARABIC[:30]} <b>x", strategy="single", iterations=1, branches=1, others=True
    )
    many = collect(write_run(root / "many", iterations=16, branches=3, layers=40, total_tokens=48_000_000_000))
    comparison = compare([single, plain])
    return {
        "plain": ([collect(plain)], None),
        "hostile": ([hostile(collect(plain))], None),
        "many": ([many], None),
        "comparison": (comparison["runs"], comparison),
    }


@pytest.fixture(scope="module")
def pages(reports: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    for name, (runs, comparison) in reports.items():
        (folder / f"{name}.html").write_text(render_html(runs, comparison), encoding="utf-8")
    return {name: folder / f"{name}.html" for name in reports}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.mark.parametrize("name", ["plain", "hostile", "many", "comparison"])
@pytest.mark.parametrize(("size", "scheme"), [(PHONE, "light"), (DESKTOP, "dark")], ids=["phone", "desktop"])
def test_nothing_is_cut_off_and_nothing_goes_wrong(
    browser: Any, pages: dict[str, Path], name: str, size: tuple[int, int], scheme: str
) -> None:
    watched = Watched(browser, pages[name], size, scheme)
    for open_all in (False, True):
        if open_all:
            watched.ask("document.querySelectorAll('details').forEach(one => one.open = true)")
        assert watched.ask("document.scrollingElement.scrollWidth") <= size[0]
        assert watched.ask(OUTSIDE) == []
        assert watched.ask(CLIPPED) == []
        assert watched.ask(OVERLAPPING) == []
    background = watched.ask("getComputedStyle(document.body).backgroundColor")
    assert background == {"light": "rgb(253, 253, 252)", "dark": "rgb(20, 22, 25)"}[scheme]
    watched.page.click("nav a[href='#cost']")
    top = watched.ask("document.getElementById('cost').getBoundingClientRect().top")
    assert 0 <= top < size[1]
    watched.close()
    assert watched.complaints == []


def test_the_summary_of_a_run_with_a_very_long_name_can_be_read_without_scrolling(
    browser: Any, pages: dict[str, Path]
) -> None:
    watched = Watched(browser, pages["hostile"], DESKTOP, "light")
    numbers = "[...document.querySelector('#result table').querySelectorAll('tbody td.n')]"
    right = watched.ask(f"{numbers}.map(one => one.getBoundingClientRect().right)")
    watched.close()
    assert len(right) > 8
    assert max(right) <= DESKTOP[0]


def test_a_broken_page_would_be_noticed(browser: Any, pages: dict[str, Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken.html"
    text = pages["hostile"].read_text(encoding="utf-8")
    style = ".scroll { overflow: visible } .facts { width: 500px } svg.plot text { font-size: 30px }"
    text = text.replace("</style>", f"{style}</style>", 1)
    broken.write_text(text.replace("<main>", "<main><img src='https://example.org/x.png'><script>1</script>"), "utf-8")
    watched = Watched(browser, broken, PHONE, "light")
    assert watched.ask("document.scrollingElement.scrollWidth") > PHONE[0]
    assert [bool(watched.ask(check)) for check in (OUTSIDE, CLIPPED, OVERLAPPING)] == [True] * 3
    watched.close()
    assert sum("Content Security Policy" in complaint for complaint in watched.complaints) == 2


@pytest.mark.parametrize("name", ["hostile", "many"])
def test_on_paper_everything_is_open_and_within_the_page(browser: Any, pages: dict[str, Path], name: str) -> None:
    watched = Watched(browser, pages[name], PAPER, "dark", media="print")
    assert watched.ask("document.scrollingElement.scrollWidth") <= PAPER[0]
    # A table that is too wide would be cut: on paper nothing scrolls.
    wide = (
        "[...document.querySelectorAll('table, pre')].filter(one => one.getBoundingClientRect().right > innerWidth + 1)"
    )
    assert watched.ask(f"{wide}.map(one => one.parentElement.getAttribute('aria-label') || one.tagName)") == []
    assert watched.ask(CLIPPED) == []
    assert watched.ask(
        "[...document.querySelectorAll('details pre')].every(one => one.getBoundingClientRect().height > 50)"
    )
    assert watched.ask("getComputedStyle(document.querySelector('nav')).display") == "none"
    # Whatever the screen's scheme: dark text on white.
    style = "getComputedStyle(document.body)"
    assert watched.ask(f"[{style}.color, {style}.backgroundColor]") == ["rgb(27, 29, 32)", "rgb(255, 255, 255)"]
    watched.close()
    assert watched.complaints == []


def test_html_in_names_and_texts_is_shown_as_text(browser: Any, pages: dict[str, Path]) -> None:
    watched = Watched(browser, pages["hostile"], DESKTOP, "light")
    assert (
        watched.ask("[document.scripts.length, document.images.length, document.querySelectorAll('b').length]")
        == [0] * 3
    )
    assert watched.ask("document.title").startswith(f"run {ARABIC} {EVIL}")
    assert EVIL in watched.page.inner_text("h1")
    shown = watched.ask("[...document.querySelectorAll('.sample')].map(one => one.textContent)")
    assert len(shown) == 2
    assert all(EVIL in text and ARABIC in text for text in shown)
    cells = [text for table in watched.ask(TABLES).values() for row in table for text, _ in row]
    assert any(EVIL in cell for cell in cells)
    assert EVIL in watched.ask("document.querySelector('pre').textContent")
    texts = "[...document.querySelectorAll('.sample .text')]"
    assert watched.ask(f"{texts}.map(one => getComputedStyle(one).direction)") == ["ltr", "rtl", "ltr", "rtl"]
    watched.close()
    assert watched.complaints == []


def rows_of(table: list[list[list[Any]]]) -> dict[str, list[Any]]:
    """{name of the row: exact numbers of its cells}."""
    return {row[0][0].replace("\N{NO-BREAK SPACE}", " "): [value for _, value in row[1:]] for row in table[1:]}


def test_every_number_of_the_tables_is_that_of_report_json(
    browser: Any, pages: dict[str, Path], reports: dict[str, Any]
) -> None:
    watched = Watched(browser, pages["plain"], DESKTOP, "light")
    tables = watched.ask(TABLES)
    watched.close()
    report = json.loads(json.dumps(reports["plain"][0][0]))
    summary, cost = report["summary"], report["cost"]
    ends = [
        (f"{role.capitalize()}, {when}", summary[f"{role}_{when}"])
        for role in ("target", "source")
        for when in ("before", "after")
    ]
    wanted = [*ends, ("Learned", summary["learned"]), ("Forgotten", summary["forgotten"])]
    wanted += [
        ("Change of the weights |ΔW|", summary["delta_norm"]),
        ("|ΔW| relative to |W|", summary["delta_relative"]),
    ]
    wanted += [
        ("Training tokens", cost["train_tokens"]),
        ("Wall time", cost["wall_seconds"]),
        ("Disk", cost["disk_bytes"]),
    ]
    wanted += [
        ("Peak memory", cost["peak_rss_bytes"]),
        ("Peak GPU memory", None),
        ("Strategy", None),
        ("Iterations", None),
    ]
    assert rows_of(tables["Summary"]) == {name: [value] for name, value in wanted}
    models: dict[str, list[float]] = {}
    for score in report["scores"]:
        part = "merged" if score["branch"] is None else f"branch {score['branch']}"
        name = f"iteration {score['iteration']}, {part}" if score["iteration"] else "base"
        models.setdefault(name, []).append(score["bits_per_byte"])
    assert rows_of(tables["Scores by set"]) == models
    stages = {stage.capitalize(): [seconds] for stage, seconds in cost["seconds_by_stage"].items()}
    others = {"Wall time": [cost["wall_seconds"]], "Loop overhead": [cost["loop_overhead"]["seconds"]]}
    assert rows_of(tables["Time by stage"]) == {**stages, **others}
    sources = {
        s["path"]: [None, s["documents"], s["tokens"], s["used_tokens"], s["bytes"], None]
        for s in report["data"]["sources"]
    }
    assert rows_of(tables["Training data"]) == sources
    seconds = ("train", "merge", "fold", "evaluate")
    assert rows_of(tables["Iterations"]) == {
        str(i["iteration"]): [
            i["tokens"],
            None,
            i["cosine"],
            None,
            i["merged_norm"],
            *(i["seconds"][s] for s in seconds),
        ]
        for i in report["iterations"]
    }
    nearby = [[p[k] for k in ("target", "source", "learned", "forgotten", "delta_norm")] for p in report["shrink"]]
    assert list(rows_of(tables["Models beside the run’s own"]).values()) == nearby


def test_every_mark_of_the_pictures_is_that_of_report_json(
    browser: Any, pages: dict[str, Path], reports: dict[str, Any]
) -> None:
    watched = Watched(browser, pages["plain"], PHONE, "dark")
    marks = watched.ask(MARKS)
    watched.close()
    report = json.loads(json.dumps(reports["plain"][0][0]))
    iterations = report["iterations"]
    models = [item["measured"] for item in iterations]
    nearby = [point for point in report["shrink"] if point["scale"] != 1.0]
    plane = [(0.0, 0.0), *((m["learned"], m["forgotten"]) for m in [*models, *nearby])]
    assert sorted((x, y) for _, x, y, _ in marks["plot-plane"]) == sorted(plane)
    tokens = [sum(item["tokens"] for item in iterations[:count]) for count in range(len(iterations) + 1)]
    for role in ("target", "source"):
        merged = [report["summary"][f"{role}_before"], *(one[role] for one in models)]
        branches = [(tokens[i], b["measured"][role]) for i, item in enumerate(iterations, 1) for b in item["branches"]]
        wanted = [*zip(tokens, merged, strict=True), *branches]
        assert sorted((x, y) for _, x, y, _ in marks[f"plot-{role}"]) == sorted(wanted)
    for name, key, number in (("step", "norm_by_layer", "merged_norm"), ("cosine", "cosine_by_layer", "cosine")):
        wanted = [(place, one[number]) for item in iterations for place, one in enumerate(item[key])]
        assert [(x, y) for _, x, y, _ in marks[f"plot-{name}-0"]] == wanted
    used = [source["used_tokens"] for source in report["data"]["sources"]]
    assert [value for _, _, _, value in marks["plot-data"]] == used
    assert [value for _, _, _, value in marks["plot-cost"]] == list(report["cost"]["seconds_by_stage"].values())


def test_plots_as_files_are_whole_in_the_browser(browser: Any, reports: dict[str, Any], tmp_path: Path) -> None:
    documents = {
        f"{page}-{name}": document
        for page in ("hostile", "many", "comparison")
        for name, document in plot_documents(*reports[page]).items()
    }
    assert len(documents) > 25
    body = "".join(document.replace('class="plot"', 'class="plot file"', 1) for document in documents.values())
    page = tmp_path / "plots.html"
    page.write_text(f"<!doctype html><meta charset=utf-8><link rel=icon href='data:,'><body>{body}", encoding="utf-8")
    watched = Watched(browser, page, DESKTOP, "dark")
    assert watched.ask("document.querySelectorAll('svg.file').length") == len(documents)
    assert watched.ask(CLIPPED) == []
    inks = "[...document.querySelectorAll('svg.file .heading')].map(one => getComputedStyle(one).fill)"
    assert set(watched.ask(inks)) == {"rgb(27, 29, 32)"}
    watched.close()
    assert watched.complaints == []
