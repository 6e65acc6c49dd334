"""Files: lines in errors, extends, --set, paths, variables, writing back."""

from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from bam_lora.errors import UserError
from bam_lora.recipe import dump_recipe, load_recipe, recipe_from_dict
from bam_lora.recipe_yaml import dump_yaml, read_yaml

MINIMAL = """\
base: org/model
output: out
data:
  target: [{path: org/data}]
"""


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def failure(path: Path, overrides: list[str] | None = None) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe(path, overrides or [])
    return str(caught.value)


def test_several_problems_with_their_lines(tmp_path):
    path = write(tmp_path / "recipe.yaml", MINIMAL + "  replay_shar: 0.2\nbam:\n  slices: two\nmode: chatt\n")
    assert failure(path).splitlines() == [
        f"{path}: 3 problems",
        "  line 5, data.replay_shar: unknown key; did you mean replay_share?",
        "  line 7, bam.slices: expected an integer >= 1, found 'two'",
        "  line 8, mode: expected text or chat, found 'chatt'",
    ]


def test_one_problem_is_one_line(tmp_path):
    path = write(tmp_path / "recipe.yaml", MINIMAL + "bam: {slices: two}\n")
    assert failure(path) == f"{path} line 5, bam.slices: expected an integer >= 1, found 'two'"


def test_what_is_missing_is_at_its_section(tmp_path):
    path = write(tmp_path / "recipe.yaml", "base: a/b\noutput: x\ndata:\n  target:\n  - name: bul_Cyrl\n")
    assert failure(path) == f"{path} line 5, data.target.0.path: expected text, found nothing; the key is required"
    path = write(tmp_path / "recipe.yaml", "output: x\ndata: {target: [{path: a/b}]}\n")
    assert failure(path) == f"{path}: base: expected text, found nothing; the key is required"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "seed: 1\nbam: {slices: 2}\nseed: 2\n",
            " line 3: expected every key once, found 'seed' again (first in line 1)",
        ),
        ("bam: {slices: 2,\n  slices: 3}\n", " line 2: expected every key once, found 'slices' again"),
        ("a: [1\n", "expected YAML, found a mistake in its syntax"),
        ("\tseed: 1\n", " line 1: expected YAML, found a mistake in its syntax"),
        ("a: *b\n", " line 1: expected YAML, found a mistake in its syntax (found undefined alias 'b')"),
        ("a: !!python/object/apply:os.system [ls]\n", "where only plain data may stand"),
        ("a: !!python/name:os.system x\n", "where only plain data may stand"),
        ("a: !!int x\n", "found 'x' tagged int"),
        ("? [1]\n: 2\n", "found a list or mapping as a key"),
        ("a: \x01\n", "expected YAML, found unacceptable character"),
        ("a: 1\n---\nb: 2\n", "but found another document"),
        ("a: &a [*a]\n", "nesting without end"),
        ("a: " + "[" * 3000, "expected YAML"),
        ("", "expected a mapping of keys, found nothing"),
        ("- a\n", "expected a mapping of keys, found a list"),
        ("just words\n", "expected a mapping of keys, found a str"),
    ],
)
def test_files_that_are_no_recipe(tmp_path, text, expected):
    found = failure(write(tmp_path / "recipe.yaml", text))
    assert found.startswith(str(tmp_path / "recipe.yaml"))
    assert expected in found
    assert "\n" not in found


def test_aliases_of_aliases_do_not_fill_the_memory(tmp_path):
    lines = ["a0: &a0 [1, 2, 3, 4, 5, 6, 7, 8, 9]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
    assert "found more than 20000 values" in failure(write(tmp_path / "recipe.yaml", "\n".join(lines)))


def test_files_that_cannot_be_read(tmp_path):
    assert failure(tmp_path / "none.yaml").endswith(
        "none.yaml: expected a recipe, found no such file. Check the path, or write a recipe with `bam-lora init`."
    )
    assert "expected a recipe, found Is a directory" in failure(tmp_path)
    (tmp_path / "latin.yaml").write_bytes("base: für\n".encode("latin-1"))
    assert "expected UTF-8 text" in failure(tmp_path / "latin.yaml")


def test_plain_words_are_read_as_yaml_1_2(tmp_path):
    text = """\
base: org/model
output: no
revision: 2024-10-01
data:
  target: [{path: org/data, name: no, tokens: 1_000, revision: on}]
training: {learning_rate: 2e-4, weight_decay: 1, adam_epsilon: 1e-8}
seed: 010
"""
    made = load_recipe(write(tmp_path / "recipe.yaml", text))
    assert (made.output, made.revision, made.data.target[0].name) == ("no", "2024-10-01", "no")
    assert (made.data.target[0].tokens, made.data.target[0].revision) == (1000, "on")
    assert (made.training.learning_rate, made.training.weight_decay) == (2e-4, 1.0)
    assert made.training.sft_arguments()["adam_epsilon"] == 1e-8
    assert made.seed == 10


def test_anchors_and_merge_keys_work(tmp_path):
    text = MINIMAL + "evaluation:\n  target: [&v {path: org/v, documents: 5}]\n  source: [{<<: *v, set: other}]\n"
    made = load_recipe(write(tmp_path / "recipe.yaml", text))
    assert made.evaluation.source[0].documents == 5
    assert [made.evaluation.target[0].set, made.evaluation.source[0].set] == ["v", "other"]


def test_extends_merges_mappings_and_replaces_lists(tmp_path):
    write(tmp_path / "shared" / "a.yaml", "lora: {r: 8, dropout: 0.1}\nseed: 1\ndata: {sequence_length: 64}\n")
    write(tmp_path / "shared" / "b.yaml", "extends: a.yaml\nlora: {r: 16}\nevaluation: {samples: [x, y]}\n")
    path = write(
        tmp_path / "own" / "recipe.yaml",
        "extends: [../shared/a.yaml, ../shared/b.yaml]\nevaluation: {samples: [z]}\nlora: {rslora: true}\n" + MINIMAL,
    )
    made = load_recipe(path)
    assert (made.lora.r, made.lora.dropout, made.lora.rslora, made.lora.alpha) == (16, 0.1, True, 32)
    assert (made.seed, made.data.sequence_length, made.evaluation.samples) == (1, 64, ["z"])


def test_problems_in_an_extended_file_name_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "shared" / "a.yaml", "seed: 1\nlora: {r: 0, dropout: 2}\n")
    path = write(tmp_path / "recipe.yaml", MINIMAL + "lora: {dropout: 3}\nextends: shared/a.yaml\n")
    assert failure(path).splitlines()[1:] == [
        "  line 5, lora.dropout: expected a number >= 0, < 1, found 3",
        "  shared/a.yaml line 2, lora.r: expected an integer >= 1, found 0",
    ]


def test_extends_in_a_circle_is_an_error(tmp_path):
    path = write(tmp_path / "a.yaml", "extends: b.yaml\n")
    write(tmp_path / "b.yaml", "extends: [a.yaml]\n")
    found = failure(path)
    assert "expected files that end somewhere, found a circle: " in found
    assert f"{path} -> {tmp_path / 'b.yaml'} -> {path}" in found
    assert "a circle" in failure(write(tmp_path / "self.yaml", "extends: self.yaml"))


def test_extends_that_is_wrong(tmp_path):
    path = write(tmp_path / "a.yaml", "seed: 1\nextends: {x: 1}\n")
    assert f"{path} line 2, extends: expected a file or a list of files" in failure(path)
    path = write(tmp_path / "a.yaml", "extends: gone.yaml\n")
    assert f"{tmp_path / 'gone.yaml'}, which {path} extends: expected a recipe, found no such file" in failure(path)


def test_set_overrides(tmp_path):
    path = write(tmp_path / "recipe.yaml", MINIMAL)
    overrides = ["bam.slices=4", "data.target.0.tokens=5k", "bam.merge.weights=[1, 3]", "revision=", "output=a=b"]
    made = load_recipe(path, [*overrides, "lora={r: 2}", "lora.dropout=0.5", "seed=1", "seed=2"])
    assert (made.bam.slices, made.data.target[0].tokens, made.bam.merge.weights) == (4, 5000, [1.0, 3.0])
    assert (made.lora.r, made.lora.dropout, made.seed, made.revision, made.output) == (2, 0.5, 2, None, "a=b")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("bam.slices", "--set bam.slices: expected key=value, such as bam.slices=4, found no such pair"),
        ("=3", "--set =3: expected key=value"),
        ("a..b=3", "expected key=value"),
        ("data.target.3.path=x", "expected an item of data.target (0 to 0), found '3'"),
        ("data.target.path=x", "expected an item of data.target (0 to 0), found 'path'"),
        ("base.x=1", "expected base to hold keys, found 'org/model'"),
        ("seed=[1", "--set: expected YAML"),
        ("bam.slices=two", "recipe.yaml, --set, bam.slices: expected an integer >= 1, found 'two'"),
        ("bam.slcies=2", "recipe.yaml, --set, bam.slcies: unknown key; did you mean slices?"),
        ("extends=x.yaml", "recipe.yaml, --set, extends: unknown key"),
        ("data.replay_share=0.5", "recipe.yaml line 3, data.replay: expected replay data for a share of 0.5"),
    ],
)
def test_wrong_overrides(tmp_path, override, expected):
    assert expected in failure(write(tmp_path / "recipe.yaml", MINIMAL), [override])


def test_output_argument_wins(tmp_path):
    path = write(tmp_path / "recipe.yaml", MINIMAL)
    assert load_recipe(path, ["output=b"], output="c").output == "c"
    assert load_recipe(write(tmp_path / "r.yaml", MINIMAL.replace("output: out\n", "")), output="c").output == "c"


def test_paths_are_relative_to_the_file_that_names_them(tmp_path, monkeypatch):
    write(tmp_path / "shared" / "replay.yaml", "data: {replay_share: 0.5, replay: [{path: en.jsonl}]}\n")
    write(tmp_path / "own" / "folder" / "x.txt", "x")
    write(tmp_path / "here" / "set.txt", "x")
    text = """\
extends: ../shared/replay.yaml
base: ./model
output: out
data:
  target:
    - {path: de/*.parquet}
    - {path: folder}
    - {path: org/data}
    - {path: ../up}
    - {path: data.jsonl.gz}
evaluation: {target: [{path: v.txt}]}
"""
    monkeypatch.chdir(tmp_path / "here")
    path = write(tmp_path / "own" / "recipe.yaml", text)
    made = load_recipe(Path("../own/recipe.yaml"), ["evaluation.source=[{path: set.txt}]"])
    assert made == load_recipe(path, ["evaluation.source=[{path: set.txt}]"])
    own = tmp_path / "own"
    assert [source.path for source in made.data.target] == [
        str(own / "de/*.parquet"), str(own / "folder"), "org/data", str(tmp_path / "up"), str(own / "data.jsonl.gz")
    ]  # fmt: skip
    assert made.base == str(own / "model")
    assert made.output == "out"
    assert made.data.replay[0].path == str(tmp_path / "shared" / "en.jsonl")
    assert made.evaluation.target[0].path == str(own / "v.txt")
    assert made.evaluation.source[0].path == str(tmp_path / "here" / "set.txt")


def test_home_and_variables(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TEXTS", str(tmp_path / "texts"))
    monkeypatch.delenv("NOT_SET", raising=False)
    text = "base: ~/model\noutput: ${TEXTS}/run\ndata: {target: [{path: '${TEXTS}/a.jsonl'}]}\n"
    made = load_recipe(write(tmp_path / "recipe.yaml", text))
    assert made.base == str(tmp_path / "home" / "model")
    assert made.output == str(tmp_path / "texts" / "run")
    assert made.data.target[0].path == str(tmp_path / "texts" / "a.jsonl")
    path = write(tmp_path / "recipe.yaml", text.replace("TEXTS}/a", "NOT_SET}/a"))
    expected = "line 3, data.target.0.path: expected the environment variable NOT_SET to be set, found it unset"
    assert expected in failure(path)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("data/de/train", "expected a Hub id (owner/name), a folder or files, found 'data/de/train', which is not in"),
        ("my data", "expected a Hub id (owner/name), a folder or files, found 'my data'"),
        ("hf://datasets/a/b", "found the address 'hf://datasets/a/b'; download it and name the files"),
    ],
)
def test_names_that_are_neither_path_nor_hub_id(tmp_path, name, expected):
    path = write(tmp_path / "recipe.yaml", MINIMAL.replace("org/data", name))
    assert expected in failure(path)
    assert "line 4, data.target.0.path" in failure(path)


def test_dump_reads_back_the_same(tmp_path):
    sections = {
        "base": "org/model",
        "output": "läufe/1e5",
        "revision": "1e5",
        "data": {"target": [{"path": str(tmp_path / "a b.jsonl"), "name": "no", "tokens": "1.5B", "weight": 1e-7}]},
        "training": {"adam_beta2": 0.95, "report_to": ["none"], "run_name": "null"},
        "evaluation": {"samples": ["Имало едно време: ", "a\nb", "", "2024-10-01", "- x", "#"]},
    }
    made = recipe_from_dict(sections)
    text = dump_recipe(made)
    assert load_recipe(write(tmp_path / "recipe.yaml", text)) == made
    assert dump_recipe(load_recipe(tmp_path / "recipe.yaml")) == text
    assert "Имало" in text


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@example("\x85")
@given(PLAIN)
def test_any_plain_data_survives_yaml(value):
    assert read_yaml(dump_yaml(value), None).value == value
