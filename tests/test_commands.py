"""Every command and Python block of the documents runs, as it is shown and in the order of its page.

By default those of the README and of the pages that are quick; the slow tests run the other pages, the heads of all
recipes and the examples of `--help`. `shown_commands` says what counts as shown, `command_world` where it runs, and
`command_hub` what makes it quick.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_hub import world
from command_world import Failed, World
from shown_commands import DOCUMENTS, ROOT, Shown, commands_in, everything_shown, is_whole

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub's own, on upload

SHOWN = everything_shown()
EVERYTHING = [one for page in SHOWN.values() for one in page]
QUICK = {  # of the README and what costs seconds beside it
    "README.md", "CONTRIBUTING.md", "recipes/README.md", "docs/hub.md", "docs/init.md", "docs/languages.md",
    "docs/platforms.md", "docs/troubleshooting.md", "docs/using_the_result.md",
}  # fmt: skip
SERVER = "a server that is no part of this; docs/using_the_result.md says what was tried by hand"
NOT_HERE = {  # by the words that a command begins with
    "make setup": "makes the environment that these tests run in; .ci/run does it from nothing",
    "make test": "these tests; .ci/run does it",
    "make lint": ".ci/run does it",
    "make format": "rewrites the sources; what it would change fails in `make lint`",
    "make docs": "rewrites docs/recipe.md; tests/test_recipe_reference.py compares what it would write",
    "make site": "tests/test_site.py builds the site",
    "make quickstart": "minutes; .ci/run does it",
    "bam-lora quickstart": "minutes; .ci/run does it, tests/test_quickstart_driver.py for every language",
    "pip install": "the network; what it names is looked up below",
    "vllm serve": SERVER,
    "ollama": SERVER,
    "python llama.cpp/": "another project's programs; docs/using_the_result.md says what was tried by hand",
    "llama.cpp/": "another project's programs; docs/using_the_result.md says what was tried by hand",
}
PYTHON_ELSEWHERE = {"docs/trl.md": "tests/test_trl_documents.py runs its scripts"}


def why_not(shown: Shown) -> str | None:
    """Why it does not run here; None if it does."""
    if shown.kind == "python":
        return PYTHON_ELSEWHERE.get(shown.page)
    command = " ".join(shown.words)
    return next((why for begin, why in NOT_HERE.items() if command.startswith(begin)), None)


def pages() -> list[object]:
    """The pages with something to run; those that are not quick are marked slow."""
    slow = pytest.mark.slow
    return [pytest.param(page, marks=() if page in QUICK else slow)
            for page, shown in SHOWN.items() if any(why_not(one) is None for one in shown)]  # fmt: skip


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Iterator[World]:
    with world(tmp_path_factory.mktemp("commands"), tiny_base, EVERYTHING) as made:
        yield made


@pytest.mark.parametrize("page", pages())
def test_what_a_page_shows_runs(page: str, here: World) -> None:
    failed = []
    for shown in SHOWN[page]:
        if why_not(shown) is None:
            try:
                here.run(shown)
            except Failed as failure:
                failed.append(str(failure))
    assert not failed, "\n\n".join(["", *failed])


def test_the_shown_commands_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    quick = [one for page in QUICK for one in SHOWN.get(page, ()) if why_not(one) is None]
    run = [one for one in EVERYTHING if why_not(one) is None]
    elsewhere = [one for one in EVERYTHING if why_not(one) is not None]
    with capsys.disabled():
        print(
            f"\n{len(EVERYTHING)} commands and Python blocks shown on {len(SHOWN)} pages: {len(quick)} run by default,"
        )
        print(f"{len(run) - len(quick)} in the slow tests; {len(elsewhere)} are another's, or run elsewhere")
    assert len([one for one in SHOWN["README.md"] if why_not(one) is None]) >= 20
    assert len(quick) >= 35
    assert len(run) >= 180
    assert {page for page in SHOWN if page.startswith("recipes/") and page.endswith("pretrain.yaml")}


def test_what_does_not_work_fails_with_its_place_and_its_words(here: World) -> None:
    for text, words in (
        ("bam-lora status runs/nowhere", ("expected", "exit status 1")),
        ("bam-lora run recipes/german/pretrain.yaml --typo", ("--typo", "exit status 2")),
        ("bam-lora run recipes/german/nothing.yaml", ("expected a recipe",)),
        ("conda install bam-lora", ("neither run by the tests nor in the table",)),
    ):
        with pytest.raises(Failed) as failure:
            here.run(Shown("docs/page.md", 7, text))
        assert all(word in str(failure.value) for word in ("docs/page.md:7", text, *words)), failure.value
    with pytest.raises(Failed, match=r"docs/page\.md:9"):
        here.run(Shown("docs/page.md", 9, "import nothing_of_that_name", "python"))


def test_what_counts_as_a_command() -> None:
    block = (
        "bam-lora schema  # prints\n# a comment\n\nbam-lora run a.yaml \\\n  --extend\nA=1 hf download x && make site\n"
    )
    assert list(commands_in(block)) == [
        (0, "bam-lora schema  # prints"),
        (3, "bam-lora run a.yaml --extend"),
        (5, "A=1 hf download x"),
        (5, "make site"),
    ]
    shown = Shown("page", 1, "A=1 hf download 'x y'  # comment")
    assert (shown.words, shown.settings) == (("hf", "download", "x y"), {"A": "1"})
    assert all(map(is_whole, ("bam-lora schema", "bam-lora run a.yaml --set b=1", "HF_HUB_OFFLINE=1 bam-lora doctor")))
    names = (
        "bam-lora run",
        "bam-lora run RECIPE",
        "bam-lora compare RUN RUN...",
        "bam-lora fly x",
        "bam-lora",
        "run a",
    )
    assert not any(map(is_whole, names))


def test_the_table_of_what_is_not_run_is_needed() -> None:
    shown = [" ".join(one.words) for one in EVERYTHING if one.kind == "command"]
    for begin in NOT_HERE:
        assert any(command.startswith(begin) for command in shown), f"{begin}: no document shows it"
    assert not [page for page in (*QUICK, *PYTHON_ELSEWHERE) if not (ROOT / page).is_file()]


def test_what_a_reader_installs_is_declared() -> None:
    """Extras and files that `pip install` names in a document are there."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = [one for page in DOCUMENTS for one in re.findall(r"pip install[^\n`]*", page.read_text(encoding="utf-8"))]
    assert named
    for command in named:
        extras = re.findall(r"(?:bam-lora|\.)\[([\w,]+)\]", command)
        assert {extra for listed in extras for extra in listed.split(",")} <= set(declared["optional-dependencies"])
        assert all((ROOT / file).is_file() for file in re.findall(r"-c (\S+)", command)), command
