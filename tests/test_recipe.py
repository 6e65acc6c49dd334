"""The models: defaults, values, checks, the recipe's effective N and K, schema and comparison."""

import json
import subprocess
import sys

import pydantic
import pytest

from bam_lora.errors import UserError
from bam_lora.recipe import Recipe, changed_keys, recipe_from_dict, recipe_schema

MINIMAL = {"base": "org/model", "output": "out", "data": {"target": [{"path": "org/data"}]}}


def recipe(**sections) -> Recipe:
    return recipe_from_dict({**MINIMAL, **sections})


def data(**values):
    return {"data": {**MINIMAL["data"], **values}}


def message(**sections) -> str:
    with pytest.raises(UserError) as caught:
        recipe(**sections)
    return str(caught.value)


def test_defaults():
    made = recipe()
    assert (made.slices, made.branches, made.strategy, made.mode, made.seed) == (8, 2, "bam", "text", 0)
    assert (made.lora.r, made.lora.alpha, made.lora.target_modules) == (64, 128, "all-linear")
    assert (made.quantization.bits, made.quantization.type, made.evaluation.precision) == (4, "nf4", "4bit")
    merge = made.bam.merge
    assert (merge.method, merge.weights, merge.scale) == ("linear", "uniform", 1.0)
    assert (merge.density, merge.gamma) == (0.5, 0.01)
    assert merge.weights_by_module == {}
    assert made.bam.outer.model_dump() == {"learning_rate": 1.0, "momentum": 0.0}
    assert made.data.replay == []
    assert made.data.replay_share == 0
    assert made.keep.bases == "last"


@pytest.mark.parametrize(("strategy", "effective"), [("bam", (6, 3)), ("sequential", (6, 1)), ("single", (1, 1))])
def test_effective_slices_and_branches(strategy, effective):
    made = recipe(strategy=strategy, bam={"slices": 6, "branches": 3})
    assert (made.slices, made.branches) == effective


def test_baselines_do_not_mind_bam_values_they_do_not_use():
    bam = {"slices": 1, "branches": 2, "merge": {"weights": [1, 2, 3]}}
    assert recipe(strategy="single", bam=bam).slices == 1
    assert recipe(strategy="sequential", bam=bam).branches == 1


@pytest.mark.parametrize(
    ("written", "tokens"),
    [("500k", 500_000), ("200M", 200_000_000), ("1.5B", 1_500_000_000), ("1_000", 1000), (7, 7), ("2T", 2 * 10**12),
     ("0.1k", 100), ("12", 12), (None, None)],
)  # fmt: skip
def test_tokens(written, tokens):
    made = recipe(**data(target=[{"path": "a/b", "tokens": written}]))
    assert made.data.target[0].tokens == tokens


@pytest.mark.parametrize("written", ["", "k", "1.5", "0", 0, -1, "-5k", "1.0001k", 1.5, True, "1e6", [1]])
def test_wrong_tokens(written):
    text = message(**data(target=[{"path": "a/b", "tokens": written}]))
    assert "data.target.0.tokens: expected a number of tokens >= 1, such as 500k" in text


def test_alpha_is_twice_the_rank_unless_given():
    assert recipe(lora={"r": 8}).lora.alpha == 16
    assert recipe(lora={"r": 8, "alpha": None}).lora.alpha == 16
    assert recipe(lora={"alpha": 5}).lora.alpha == 5


def test_evaluation_sets_are_named_after_their_files():
    sets = [{"path": "/x/valid.bg.jsonl"}, {"path": "/x/bg/*.jsonl"}, {"path": "org/dataset"}, {"path": "/x/folder"}]
    made = recipe(evaluation={"target": [*sets, {"path": "a/b", "set": "mine"}]})
    assert [source.set for source in made.evaluation.target] == ["valid.bg", "bg", "dataset", "folder", "mine"]


VALUES = [
    ({"bam": {"slices": "two"}}, "recipe: bam.slices: expected an integer >= 1, found 'two'"),
    ({"bam": {"slices": 0}}, "recipe: bam.slices: expected an integer >= 1, found 0"),
    ({"bam": {"slices": True}}, "recipe: bam.slices: expected an integer >= 1, found true"),
    ({"bam": {"branches": 2.5}}, "recipe: bam.branches: expected an integer >= 1, found 2.5"),
    ({"bam": None}, "recipe: bam: expected a mapping of keys, found nothing"),
    ({"bam": {"merge": {"scale": float("nan")}}}, "recipe: bam.merge.scale: expected a number > 0, found nan"),
    (
        {"bam": {"merge": {"method": "best"}}},
        "recipe: bam.merge.method: expected linear or slerp or karcher or model_stock or ties or "
        "dare_linear or dare_ties or breadcrumbs, found 'best'",
    ),
    ({"lora": {"dropout": 1}}, "recipe: lora.dropout: expected a number >= 0, < 1, found 1"),
    ({"lora": {"rslora": "yes"}}, "recipe: lora.rslora: expected true or false, found 'yes'"),
    ({"lora": {"alpha": 1.5}}, "recipe: lora.alpha: expected an integer >= 1, found 1.5"),
    ({"quantization": {"bits": 5}}, "recipe: quantization.bits: expected 4 or 8 or 16, found 5"),
    ({"strategy": "bma"}, "recipe: strategy: expected bam or single or sequential, found 'bma'"),
    ({"seed": -1}, "recipe: seed: expected an integer >= 0, < 4294967296, found -1"),
    ({"keep": {"bases": "none "}}, "recipe: keep.bases: expected last or all or none, found 'none '"),
    ({"base": 7}, "recipe: base: expected text, found 7; put it in quotes"),
    ({"base": ""}, "recipe: base: expected text, found ''"),
    ({"data": {"target": []}}, "recipe: data.target: expected a list with at least one item, found an empty list"),
    ({"data": {"target": ["x"]}}, "recipe: data.target.0: expected a mapping of keys, found 'x'"),
    ({"data": {}}, "recipe: data.target: expected a list with at least one item, found nothing; the key is required"),
    (data(replay_share=1.0), "recipe: data.replay_share: expected a number >= 0, < 1, found 1.0"),
    (data(sequence_length=7), "recipe: data.sequence_length: expected an integer >= 8, found 7"),
    ({"evaluation": {"samples": [3]}}, "recipe: evaluation.samples.0: expected text, found 3; put it in quotes"),
    ({"evaluation": {"precision": "8bit"}}, "recipe: evaluation.precision: expected 4bit or 16bit, found '8bit'"),
]


@pytest.mark.parametrize(("sections", "expected"), VALUES)
def test_wrong_values_are_one_line_each(sections, expected):
    assert message(**sections) == expected


WEIGHTS = "expected uniform, tokens, learned, search or a list with one finite number per branch"


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ("even", f"{WEIGHTS}, found 'even'"),
        ([], f"{WEIGHTS}, found an empty list"),
        ([1, float("inf")], f"{WEIGHTS}, found a list of 2"),
        ([1, "2"], f"{WEIGHTS}, found a list of 2"),
        ([1, True], f"{WEIGHTS}, found a list of 2"),
        ([1, -1], "expected weights whose sum is not zero, found a list of 2"),
        ([0, 0], "expected weights whose sum is not zero, found a list of 2"),
        ([1], "expected one weight per branch (2), found 1"),
    ],
)
def test_wrong_weights(weights, expected):
    assert message(bam={"merge": {"weights": weights}}) == f"recipe: bam.merge.weights: {expected}"


def test_weights_that_are_right():
    assert recipe(bam={"merge": {"weights": [1, 0.25]}}).bam.merge.weights == [1.0, 0.25]
    assert recipe(bam={"merge": {"weights": "tokens"}}).bam.merge.weights == "tokens"


LOCAL = {"path": "/files/a.jsonl"}
SELECTION = {"target": [{"path": "/files/b.jsonl"}], "source": [{"path": "/files/c.jsonl"}]}


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        (
            {"bam": {"slices": 2, "branches": 3}},
            "bam.slices: expected at least as many slices as branches (3), found 2",
        ),
        (
            {"bam": {"branches": 3, "merge": {"method": "slerp"}}},
            "bam.merge.method: expected a method for 3 branches, found slerp, which takes two; use karcher",
        ),
        (
            {"bam": {"merge": {"method": "breadcrumbs", "density": 0.995}}},
            "bam.merge.density: expected at most 0.99, as gamma drops the rest, found 0.995",
        ),
        (
            {"bam": {"merge": {"method": "karcher", "weights": "learned"}}, "selection": SELECTION},
            "bam.merge.method: expected linear, since its weights are learned, found karcher",
        ),
        (data(replay_share=0.2), "data.replay: expected replay data for a share of 0.2, found none"),
        (data(replay=[LOCAL]), "data.replay_share: expected a share above 0, since there is replay data, found 0"),
        (data(slicing="by_column"), "data.slicing_column: expected the column to slice by, found none; name it"),
        (data(slicing_column="lang"), "data.slicing_column: expected none, since slicing is random, found 'lang'; say"),
        (data(target=[{**LOCAL, "weight": 1.0}, LOCAL]), "data.target.1.weight: expected a weight, since others"),
        (data(target=[{**LOCAL, "revision": "v1"}]), "data.target.0.revision: only data on the Hub has revisions"),
        ({"base": "/models/x", "revision": "v1"}, "revision: only a base on the Hub has revisions; leave it out"),
        (
            {"evaluation": {"target": [LOCAL], "source": [{"path": "/other/a.jsonl"}]}},
            "evaluation.source.0.set: expected a name of its own, found 'a' like evaluation.target.0; name it with",
        ),
        (
            {"evaluation": {"window_bytes": 100, "overlap_bytes": 100}},
            "evaluation.overlap_bytes: expected fewer bytes than the window has (100), found 100",
        ),
        ({"training": {"max_steps": 0}}, "training.max_steps: expected a number of steps >= 1, or -1 for all the data"),
    ],
)
def test_values_that_do_not_fit_together(sections, expected):
    assert message(**sections).startswith(f"recipe: {expected}")


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"bam": {"slicse": 2}}, "bam.slicse: unknown key; did you mean slices?"),
        (data(replay_shar=0.2), "data.replay_shar: unknown key; did you mean replay_share?"),
        ({"learning_rate": 1}, "learning_rate: unknown key; did you mean training.learning_rate?"),
        ({"keep": {"zzz": 1}}, "keep.zzz: unknown key; here can stand bases"),
        (data(target=[{"path": "a/b", "tokns": 1}]), "data.target.0.tokns: unknown key; did you mean tokens?"),
        ({"training": {"optm": "sgd"}}, "training.optm: unknown key; did you mean optim?"),
        (
            {"training": {"neftune_noise_alfa": 1}},
            "training.neftune_noise_alfa: unknown key; did you mean neftune_noise",
        ),
        ({"training": {"zzzz": 1}}, "training.zzzz: unknown key; it takes the fields of TRL's SFTConfig"),
        ({"training": {"warmup_ratio": 0.1}}, "training.warmup_ratio: unknown key; say warmup_steps instead"),
        ({"training": {"bf16": True}}, "training.bf16: not set here: say quantization.compute_dtype instead"),
        ({"training": {"max_length": 1}}, "training.max_length: not set here: say data.sequence_length instead"),
        ({"training": {"optim": "adamw_torh"}}, "did you mean adamw_torch?"),
        (
            {"training": {"neftune_noise_alpha": "x"}},
            "neftune_noise_alpha: expected a number or nothing (null), found 'x'",
        ),
        ({"training": {"lr_scheduler_type": "reduce_lr_on_plateau"}}, "needs evaluations inside a branch"),
        ({3: 4}, "3: expected text as a key, found 3"),
    ],
)
def test_unknown_keys_name_what_was_meant(sections, expected):
    with pytest.raises(UserError) as caught:
        recipe_from_dict({**MINIMAL, **sections})
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_all_problems_at_once_also_across_sections():
    text = message(
        bam={"slices": 2, "branches": 3},
        lora={"r": 0, "alpha": "x"},
        training={"save_steps": 0, "bf16": True, "optim": "adamw_torh"},
        sed=1,
        **data(replay_share=0.5),
    )
    lines = text.splitlines()
    assert lines[0] == "recipe: 8 problems"
    for start in ("bam.slices", "lora.r", "lora.alpha", "training.save_steps", "training.bf16", "training.optim", "sed",
                  "data.replay"):  # fmt: skip
        assert sum(line.startswith(f"  {start}: ") for line in lines) == 1, start


def test_built_without_a_file_the_same_rules_hold():
    with pytest.raises(pydantic.ValidationError, match="at least as many slices as branches"):
        Recipe.model_validate({**MINIMAL, "bam": {"slices": 1, "branches": 2}})


def test_a_recipe_cannot_be_changed():
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        recipe().seed = 1


def test_values_given_are_left_alone():
    values = json.loads(json.dumps({**MINIMAL, "data": {"target": [{"path": "./here.jsonl"}]}}))
    before = json.dumps(values)
    assert recipe_from_dict(values).data.target[0].path.startswith("/")
    assert json.dumps(values) == before


def test_resolved_is_plain_json_with_every_value():
    resolved = recipe(training={"adam_beta2": 0.95}).resolved()
    assert json.loads(json.dumps(resolved, allow_nan=False)) == resolved
    assert resolved["lora"]["alpha"] == 128
    assert resolved["training"]["adam_beta2"] == 0.95
    assert set(resolved) == set(Recipe.model_fields) - {"script"}  # only a recipe that a script wrote has it
    assert recipe_from_dict(resolved) == recipe(training={"adam_beta2": 0.95})


def test_changed_keys():
    before = recipe(training={"adam_beta2": 0.95}).resolved()
    changed = {"seed": 3, "bam": {"slices": 4}, **data(target=[{"path": "org/other", "tokens": 5}])}
    after = recipe(**changed).resolved()
    expected = ["bam.slices", "data.target.0.path", "data.target.0.tokens", "seed", "training.adam_beta2"]
    assert changed_keys(before, after) == changed_keys(after, before) == expected
    assert changed_keys(before, before) == []
    more = recipe(**data(target=[{"path": "org/data"}] * 2)).resolved()
    assert changed_keys(recipe().resolved(), more) == ["data.target"]
    assert changed_keys({"a": 1}, {"a": 1.0}) == []
    assert changed_keys({"a": 1}, {"a": True}) == ["a"]
    assert changed_keys({"a": None}, {}) == ["a"]


def test_schema():
    schema = recipe_schema()
    assert json.loads(json.dumps(schema, allow_nan=False)) == schema
    assert {"extends", *Recipe.model_fields} == set(schema["properties"])
    assert schema["additionalProperties"] is False
    training = schema["$defs"]["Training"]
    assert training["additionalProperties"] is False
    assert training["properties"]["neftune_noise_alpha"]["type"] == ["null", "number"]
    assert "bf16" not in training["properties"]
    assert schema["$defs"]["Lora"]["properties"]["alpha"]["anyOf"][1] == {"type": "null"}
    assert "500k" in schema["$defs"]["Source"]["properties"]["tokens"]["description"]


def test_import_loads_nothing_heavy():
    code = (
        "import sys, bam_lora.recipe\n"
        "heavy = {'torch', 'transformers', 'trl', 'peft', 'datasets', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_filters_of_data_and_of_one_source():
    made = recipe(**data(filters={"min_words": 5}, target=[{"path": "org/data", "filters": {"max_digits": 0.2}}]))
    assert (made.data.filters.min_words, made.data.target[0].filters.min_words) == (5, None)
    assert (made.data.deduplicate, made.data.contamination) == ("none", "warn")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            {"filters": {"min_words": 9, "max_words": 3}},
            "data.filters.max_words: expected at least min_words (9), found 3",
        ),
        ({"filters": {"pattern": "("}}, "data.filters.pattern: expected a regular expression, such as (?i)cookie"),
        ({"filters": {"max_symbols": 1.5}}, "data.filters.max_symbols: expected"),
        ({"deduplicate": "fuzzy"}, "data.deduplicate: expected none or exact or near"),
        ({"contamination": True}, "data.contamination: expected warn or drop or error"),
        (
            {"target": [{"path": "org/data", "filters": {"min_characters": 9, "max_characters": 3}}]},
            "data.target.0.filters.max_characters: expected at least min_characters (9), found 3",
        ),
    ],
)
def test_screening_that_cannot_be(values, words):
    assert words in message(**data(**values))
