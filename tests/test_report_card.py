"""The model card: the Hub can read it, its links lead somewhere, and it says no more than is known."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from report_runs import record, write_run
from test_report_html import Page

from bam_lora.base_card import BASE_CARD, keep_base_card, read_base_card
from bam_lora.report import adapter_card, collect, model_card, render_html, write_card
from bam_lora.report.data_tables import data_table
from bam_lora.report.language_codes import hub_code
from bam_lora.store import digest, read_record

FACTS = {"rank": 256, "rank_asked": None, "scale": 1.0, "error": 0.0}


def front_matter(card: str) -> dict[str, Any]:
    return dict(yaml.safe_load(card.split("---\n")[1]))


def carded(report: dict[str, Any], **changes: Any) -> str:
    return model_card({**report, **changes}, report["recipe"])


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return collect(write_run(tmp_path_factory.mktemp("run") / "bam"))


def test_model_card(tmp_path: Path) -> None:
    report = collect(write_run(tmp_path / "bam"))
    card = model_card(report, report["recipe"])
    front = front_matter(card)
    assert front["base_model"] == "example/en-docs-8m"
    assert front["library_name"] == "transformers"
    assert front["language"] == ["de"]
    assert "2 iterations of up to 2 LoRA branches" in card
    assert "Not compared with another way of training" in card
    assert "1.0034 ± 0.0093" in card
    assert "AutoModelForCausalLM.from_pretrained" in card


def test_model_card_keeps_folders_and_markup_to_itself(tmp_path: Path) -> None:
    folder = "/home/someone/secret/texts.jsonl"
    report = collect(write_run(tmp_path / "bam", base="/home/someone/models/base-8m", source=folder))
    report["scores"][0]["set"] = "<b>|`x"
    report["recipe"]["training"] = {"run_name": "```\nevil"}
    card = model_card(report, report["recipe"])
    assert "/home/someone" not in card
    assert "base_model" not in front_matter(card)
    assert "# base-8m, adapted with bam_lora" in card
    assert "texts.jsonl" in card
    assert "<b>" not in card
    assert card.count("\n````") == 2


def test_the_rows_that_were_chosen_stand_beside_their_source(tmp_path: Path) -> None:
    report = collect(write_run(tmp_path / "bam"))
    assert "Rows chosen" not in model_card(report, report["recipe"])
    report["data"]["sources"][0]["where"] = {"lang|<b>": ["<script>alert(1)</script>", "x\u202ey"], "stars": [4, 5]}
    words = r"lang|<b> is '<script>alert(1)</script>' or 'x\\u202ey' and stars is 4 or 5"
    table = data_table([report])
    assert table.columns[:3] == ["Source", "Rows chosen", "Role"]
    assert [row[1].text for row in table.rows] == [words, *["–"] * (len(table.rows) - 1)]
    card = model_card(report, report["recipe"]).split("## Training data")[1].split("## Recipe")[0]
    assert r"| lang\|&lt;b&gt; is '&lt;script&gt;alert(1)&lt;/script&gt;' or" in card
    assert "\u202e" not in card
    page = Page(render_html([report], None))
    assert words in "".join(page.texts)
    assert "script" not in [name for name, _ in page.elements]


@pytest.mark.parametrize(("strategy", "words"), [("single", "one LoRA adapter"), ("sequential", "in turn")])
def test_model_card_of_other_strategies(tmp_path: Path, strategy: str, words: str) -> None:
    report = collect(write_run(tmp_path / "run", strategy=strategy, branches=1))
    assert words in model_card(report, report["recipe"])


def test_the_hub_can_read_the_front_matter(report: dict[str, Any]) -> None:
    recipe = {**report["recipe"], "data": {"target": [{"path": "HuggingFaceFW/fineweb-2", "name": "bul_Cyrl"}]}}
    languages = {"target": ["bul", "xyz"], "source": ["eng", "deu"]}
    said = {"license": "other", "license_name": "tiny", "license_link": "LICENSE.md"}
    task = {"task": "arc_bg", "role": "target", "metric": "acc_norm", "base": 0.2, "base_stderr": 0.01, "result": 0.25}
    task |= {"result_stderr": 0.01, "difference": 0.05, "difference_stderr": 0.01, "paired_stderr": True}
    task |= {"documents": 100, "num_fewshot": 5, "precision": "4bit", "harness": "0.4.9", "higher_is_better": True}
    tasks = [{**task, "truncated": 0, "limit": None}]
    card = ModelCard(
        carded({**report, "recipe": recipe, "base_card": said, "tasks": tasks, "languages": languages}),
        ignore_metadata_errors=False,
    )
    data = card.data.to_dict()
    assert data["base_model"] == "example/en-docs-8m"
    assert data["base_model_relation"] == "finetune"
    assert data["language"] == ["bg", "xyz", "en", "de"]
    assert data["license"] == "other"
    assert data["license_name"] == "tiny"
    assert data["license_link"] == "https://huggingface.co/example/en-docs-8m/blob/main/LICENSE.md"
    assert data["datasets"] == ["HuggingFaceFW/fineweb-2"]
    assert (data["library_name"], data["pipeline_tag"]) == ("transformers", "text-generation")
    results = {(one.dataset_name, one.metric_type): one.metric_value for one in card.data.eval_results}
    last = [score for score in report["scores"] if score["iteration"] == 2 and score["branch"] is None]
    wanted = {(f"{score['set']} ({score['role']})", "bits_per_byte"): score["bits_per_byte"] for score in last}
    assert results == {**wanted, ("arc_bg (5-shot)", "acc_norm"): 0.25}
    assert "0.2500 ± 0.0100" in card.text
    assert {one.task_type for one in card.data.eval_results} == {"text-generation"}
    assert re.fullmatch(r"[\w.-]+", card.data.eval_results[0].dataset_type)


def test_an_unknown_licence_is_said_to_be_unknown(report: dict[str, Any]) -> None:
    for said in (None, {"license": None, "license_name": "x", "license_link": "LICENSE"}):
        card = carded(report, base_card=said)
        assert front_matter(card)["license"] == "unknown"
        assert "license_name" not in front_matter(card)
        assert "The licence of the base is not known" in card
    card = carded(report, base_card={"license": "apache-2.0", "license_name": None, "license_link": None})
    assert front_matter(card)["license"] == "apache-2.0"
    assert "The base's, carried over: apache-2.0." in card


def test_a_relative_link_to_a_licence_in_a_folder_leads_nowhere_and_is_left_out(tmp_path: Path) -> None:
    report = collect(write_run(tmp_path / "bam", base="/home/someone/base"))
    said = {"license": "other", "license_name": "tiny", "license_link": "LICENSE"}
    card = carded(report, base_card=said)
    assert "license_link" not in card
    assert "/home/someone" not in card


@pytest.mark.parametrize(
    ("word", "wanted"),
    [
        ("MIT", {"license": "mit"}),
        ("Apache-2.0", {"license": "apache-2.0"}),
        ("llama3.1", {"license": "llama3.1"}),
        ("My Own: Licence #2", {"license": "other", "license_name": "my-own-licence-2"}),
        ("mit\n---\nlicense: gemma", {"license": "other", "license_name": "mit-license-gemma"}),
        ("???", {"license": "other"}),
    ],
)
def test_the_licence_of_a_folder_is_one_that_the_hub_takes(
    report: dict[str, Any], word: str, wanted: dict[str, str]
) -> None:
    card = carded(report, base="/home/someone/base", base_card={"license": word})
    assert {key: value for key, value in front_matter(card).items() if key.startswith("license")} == wanted
    on_hub = front_matter(carded(report, base_card={"license": "newer-than-the-list"}))
    assert on_hub["license"] == "newer-than-the-list"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("---\nlicense: llama3.1\nlanguage: [en]\n---\n# A base", ["llama3.1", None, None]),
        ("---\nlicense: [mit]\nlicense_link: https://example.org\n---\n", ["mit", None, "https://example.org"]),
        ("\ufeff---\r\nlicense: other\r\nlicense_name: own\r\n---\r\n", ["other", "own", None]),
        ("---\nlicense: [mit, apache-2.0]\n---\n", [None, None, None]),
        ("---\nlicense: {a: b}\nlicense_name: 3\n---\n", [None, None, None]),
        ("---\nlicense: mit\n", [None, None, None]),
        ("---\n{: ]\n---\n", [None, None, None]),
        ("# A base\n\nlicense: mit\n", [None, None, None]),
        ("", [None, None, None]),
        (None, [None, None, None]),
    ],
)
def test_the_licence_of_a_base_is_what_its_card_says(tmp_path: Path, text: str | None, wanted: list[Any]) -> None:
    if text is not None:
        (tmp_path / "README.md").write_bytes(text.encode("utf-8"))
    said = read_base_card(tmp_path)
    assert [said[key] for key in ("license", "license_name", "license_link")] == wanted


def test_a_run_keeps_what_its_bases_card_says(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    run = write_run(tmp_path / "run")
    assert collect(run)["base_card"] is None
    keep_base_card(run, tmp_path / "base")
    assert collect(run)["base_card"] == dict.fromkeys(("license", "license_name", "license_link"))
    (tmp_path / "base/README.md").write_text("---\nlicense: mit\n---\n")
    keep_base_card(run, tmp_path / "base")
    stamp = (run / BASE_CARD).stat().st_mtime_ns
    keep_base_card(run, tmp_path / "base")
    assert (run / BASE_CARD).stat().st_mtime_ns == stamp
    assert front_matter(carded(collect(run)))["license"] == "mit"
    assert read_record(run / BASE_CARD, digest(read_base_card(tmp_path / "base"))) is not None


@pytest.mark.parametrize(
    ("code", "wanted"), [("bul", "bg"), ("deu", "de"), ("arb", "ar"), ("ekk", "et"), ("eus", "eu"), ("arz", "arz")]
)
def test_language_codes_are_the_hubs(code: str, wanted: str) -> None:
    assert hub_code(code) == wanted


def test_files_are_no_datasets_of_the_hub(report: dict[str, Any]) -> None:
    assert "datasets" not in front_matter(carded(report))


def test_every_relative_link_of_a_written_card_exists(tmp_path: Path, report: dict[str, Any]) -> None:
    write_card(tmp_path, report, report["recipe"])
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)]+)\)", card) if not link.startswith("https://")]
    assert len(links) == 1
    assert (tmp_path / links[0]).stat().st_size > 1000
    assert links[0].startswith("figures/plane.")
    for part in (
        "## Results",
        "## Use",
        "vllm serve",
        "convert_hf_to_gguf.py",
        "## Recipe",
        "## Limits",
        "## Citation",
    ):
        assert part in card


def test_a_run_without_scores_has_a_card_without_them(tmp_path: Path) -> None:
    run = write_run(tmp_path / "bam")
    for path in run.rglob("eval.json"):
        path.unlink()
    report = collect(run)
    write_card(tmp_path, report, report["recipe"])
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "model-index" not in card
    assert "![" not in card


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "rank 256: exact, the factors of all branches stacked."),
        ({"rank_asked": 16, "rank": 16, "error": 0.25}, "the delta is 25 % off (Frobenius norm). The scores below"),
        ({"scale": 0.5}, "scaled by λ = 0.5; the scores below are those of λ = 1."),
    ],
)
def test_adapter_card(report: dict[str, Any], changes: dict[str, Any], words: str) -> None:
    text = adapter_card(report, report["recipe"], {**FACTS, **changes})
    assert words in text
    data = ModelCard(text, ignore_metadata_errors=False).data.to_dict()
    assert data["library_name"] == "peft"
    assert (data["base_model"], data["base_model_relation"]) == ("example/en-docs-8m", "adapter")
    assert "base_model:adapter:example/en-docs-8m" in data["tags"]
    assert 'from_pretrained("example/en-docs-8m"' in text
    assert "vllm" not in text
    # What was cut or scaled was not scored.
    assert ("model-index" in data) == (not changes)


def test_a_probe_at_a_share_is_not_called_no_comparison(tmp_path: Path) -> None:
    run = write_run(tmp_path / "bam")
    assert "Not compared with another way" in carded(collect(run))
    probe = {"share": 0.05, "tokens": 1, "note": "", "envelope": {"verdict": "on"}}
    record(run / "baseline.json", json.loads(json.dumps(probe)))
    assert "Not compared with another way" not in carded(collect(run))
