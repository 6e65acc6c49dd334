"""The fields read from source against the real SFTConfig."""

import dataclasses
import subprocess
import sys
import typing

import pytest

from bam_lora import sft_arguments
from bam_lora.errors import UserError
from bam_lora.recipe import recipe_from_dict
from bam_lora.sft_fields import SftField, _classes, sft_fields

MINIMAL = {"base": "org/model", "output": "out", "data": {"target": [{"path": "org/data"}]}}


@pytest.fixture(scope="module")
def real():
    from trl import SFTConfig

    return SFTConfig


def test_same_names_as_the_real_class(real):
    assert set(sft_fields()) == {field.name for field in dataclasses.fields(real)}


def test_same_plain_types_as_the_real_class(real):
    hints = typing.get_type_hints(real)
    for name, field in sft_fields().items():
        parts = typing.get_args(hints[name]) if field.optional or "|" in field.annotation else (hints[name],)
        assert field.optional == (type(None) in parts), name
        if field.kinds is not None:
            names = {(typing.get_origin(part) or part).__name__ for part in parts if part is not type(None)}
            assert field.kinds == names, name


def test_choices_are_the_enums(real):
    from transformers.trainer_utils import SchedulerType
    from transformers.training_args import OptimizerNames

    assert set(sft_fields()["optim"].choices) == {name.value for name in OptimizerNames}
    assert set(sft_fields()["lr_scheduler_type"].choices) == {name.value for name in SchedulerType}


def test_every_owned_field_exists_and_every_renamed_one_does_not(real):
    # Between 5.17 and 5.23 transformers renamed the one to the other; the table serves both.
    known = {field.name for field in dataclasses.fields(real)} | {"activation_checkpointing", "gradient_checkpointing"}
    assert not set(sft_arguments.OWNED) - known
    assert not set(sft_arguments.RENAMED) & known


def test_arguments_of_a_recipe_make_an_sft_config(real, tmp_path):
    recipe = recipe_from_dict({**MINIMAL, "training": {"neftune_noise_alpha": 5, "adam_beta2": 0.95}})
    arguments = recipe.training.sft_arguments()
    config = real(output_dir=str(tmp_path), bf16=False, **arguments)
    assert (config.neftune_noise_alpha, config.adam_beta2, config.warmup_steps) == (5, 0.95, 0.03)
    assert config.learning_rate == 2e-4
    assert config.gradient_checkpointing is True
    assert "checkpointing" not in arguments


def test_every_settable_field_takes_its_own_default(real):
    for field in dataclasses.fields(real):
        if field.name in sft_arguments.settable() and field.default is not dataclasses.MISSING:
            default = getattr(field.default, "value", field.default)
            assert sft_fields()[field.name].allows(default), field.name


@pytest.mark.parametrize(
    ("annotation", "value", "allowed"),
    [
        ("float", 1, True),
        ("float", True, False),
        ("int", 1.5, False),
        ("int | None", None, True),
        ("int", None, False),
        ("Optional[Union[str, dict]]", {}, True),
        ("Optional[Union[str, dict]]", [], False),
        ("'bool | None'", None, True),
        ("list[str]", ["a"], True),
        ("Literal[False]", "anything", True),
    ],
)
def test_annotations(tmp_path, annotation, value, allowed):
    import ast

    from bam_lora.sft_fields import _field

    file = tmp_path / "empty.py"
    file.write_text("")
    assert _field("x", ast.parse(annotation, mode="eval").body, file).allows(value) is allowed


def test_expected_in_words():
    field = SftField("x", "int | str | None", frozenset({"int", "str"}), optional=True)
    assert field.expected == "an integer or text or nothing (null)"
    assert sft_fields()["optim"].expected.endswith(", ...")


def test_an_unknown_layout_is_an_error_that_names_the_file(tmp_path):
    cases = {
        "gone.py": (None, "No such file"),
        "empty.py": ("x = 1", "no class SFTConfig"),
        "moved.py": ("from other.place import Base\nclass SFTConfig(Base): pass", r"Base from other\.place"),
        "broken.py": ("class SFTConfig(:", "invalid syntax"),
    }
    for name, (text, found) in cases.items():
        if text is not None:
            (tmp_path / name).write_text(text)
        message = rf"{name}: expected the fields of SFTConfig .* found .*{found}.* Install the versions"
        with pytest.raises(UserError, match=message):
            list(_classes(tmp_path / name, "SFTConfig"))


def test_missing_package_is_an_error(monkeypatch):
    from bam_lora import sft_fields as module

    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"package trl: expected it to be installed, found nothing\. Run pip install trl"
    ):
        module._package("trl")


def test_checking_training_fields_loads_no_torch():
    code = (
        "import sys\n"
        "from bam_lora.recipe import recipe_from_dict, recipe_schema\n"
        f"recipe_from_dict({{**{MINIMAL!r}, 'training': {{'neftune_noise_alpha': 5.0}}}}).training.sft_arguments()\n"
        "recipe_schema()\n"
        "heavy = {'torch', 'transformers', 'trl', 'peft', 'datasets', 'accelerate'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
