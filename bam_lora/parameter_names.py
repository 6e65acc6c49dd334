"""Where the parameters of a model in memory lie in its checkpoint.

Adapters name the modules of the model in memory. A checkpoint's files may name the same weights otherwise (a prefix
more or less, a renamed module) and cut them otherwise (one tensor per expert instead of one for all of them).
transformers converts the one into the other while it loads. That is followed here on names and shapes alone: the model
is built without weights, and each tensor of the checkpoint goes where loading would put it (weight_conversion.py).
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from bam_lora.errors import UserError, first_line
from bam_lora.safetensors_stream import TensorRecord
from bam_lora.tensor_layouts import Inexpressible, Layout, Piece, Unfit, pieces, whole
from bam_lora.weight_conversion import converted_layouts

__all__ = ["Piece", "has_inputs_first", "stored_parameters"]

_MATRIX_KEY = re.compile(r"(?P<parameter>.+)\[(?P<index>0|[1-9]\d*)\]")
_AUTOMATIC_CLASSES = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModel")


def stored_parameters(config: Mapping[str, Any], tensors: Mapping[str, TensorRecord]) -> Mapping[str, list[Piece]]:
    """Maps the parameters of the model in memory to their pieces in the checkpoint.

    Nothing is done before the first look-up; then a model without weights is built from the config. A checkpoint's
    fused experts may have the name of the parameter in memory and be its transpose, so a name that is found in the
    checkpoint can stand for itself only if it is no 3-D tensor.

    Args:
        config: The content of config.json.
        tensors: The checkpoint's tensors by name.

    Returns:
        By the parameter's name in the model that its `architectures`, or else one of transformers' automatic classes,
        builds: the pieces in the order of their rows, which together are the whole matrix. Of a 3-D parameter (E, rows,
        columns), such as fused experts, each matrix has a key: "model.layers.0.mlp.experts.gate_up_proj[3]". What is
        not stored, such as a tied parameter, has no key. An architecture unknown to transformers keeps its names.

    Raises:
        UserError: On the look-up of a parameter that does not lie in whole rows of stored matrices, or if transformers
            cannot build the model.
    """
    return _StoredParameters(config, tensors)


def has_inputs_first(config: Mapping[str, Any], parameter: str) -> bool:
    """Whether PEFT takes a fused experts' parameter as (experts, inputs, outputs); their module says so.

    Args:
        config: The content of config.json.
        parameter: Its name in the model.

    Raises:
        UserError: If transformers cannot build the model.
    """
    failure = "no class for it"
    for _, build in _model_builders(config):
        try:
            model = build()
            module = None if model is None else model.get_submodule(parameter.rpartition(".")[0])
        except Exception as error:  # whatever a modelling file raises, or a module of another class of model
            failure = first_line(error)
            continue
        if module is not None:
            return bool(getattr(module, "is_transposed", False))
    raise UserError.of(
        f"parameter {parameter!r}",
        expected="a model that tells which way round its experts are",
        found=failure,
        remedy="Check config.json and the installed version of transformers",
    )


def with_floats(config: Any) -> Any:
    """What a config.json holds, infinities as numbers: transformers writes them as `{"__float__": "Infinity"}`."""
    if isinstance(config, dict):
        if config.keys() == {"__float__"}:
            return float(config["__float__"])
        return {key: with_floats(value) for key, value in config.items()}
    return [with_floats(one) for one in config] if isinstance(config, list) else config


class _StoredParameters(Mapping[str, list[Piece]]):
    """Asks one class that may load the checkpoint after the other; most look-ups need only the first."""

    def __init__(self, config: Mapping[str, Any], tensors: Mapping[str, TensorRecord]) -> None:
        self._tensors = tensors
        self._views: list[_View] = []
        self._failures: dict[str, str] = {}
        self._builders = _model_builders(config)

    def __getitem__(self, name: str) -> list[Piece]:
        for view in self._each_view():
            found = view.get(name)
            if found is not None:
                return found
        for builder, failure in self._failures.items():
            raise UserError.of(
                f"parameter {name!r}",
                expected=f"to learn from {builder} where the checkpoint stores it",
                found=f"that transformers cannot build it ({failure})",
                remedy="Check config.json and the installed version of transformers",
            )
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return iter(list(dict.fromkeys(name for view in self._each_view() for name in view.names())))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _each_view(self) -> Iterator[_View]:
        for position in itertools.count():
            while position == len(self._views):
                if not self._add_view():
                    return
            yield self._views[position]

    def _add_view(self) -> bool:
        """Builds the next view, or notes why it cannot be built; False if there is none left."""
        for name, build in self._builders:
            try:
                model = build()
            except Exception as error:  # whatever a modelling file raises for a config that it does not understand
                self._failures[name] = first_line(error)
            else:
                self._views.append(_View(self._layouts(model)))
            return True
        return False

    def _layouts(self, model: Any) -> Mapping[str, Layout | Inexpressible]:
        if model is None:
            return {name: whole(record) for name, record in self._tensors.items()}
        return converted_layouts(self._tensors, model)


def _model_builders(config: Mapping[str, Any]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What builds the model that an adapter may have been trained on, likeliest first; None for an unknown one."""
    import transformers  # heavy, and not needed before the first look-up

    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in transformers.CONFIG_MAPPING:
        yield "the checkpoint", lambda: None
        return
    # Custom code is never run, and quantisation would not change names.
    plain = {key: value for key, value in config.items() if key not in ("auto_map", "quantization_config")}
    for name in (config.get("architectures") or [])[:1]:
        model_class = getattr(transformers, str(name), None)
        if isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel):
            yield name, functools.partial(_build, model_type, plain, model_class)
    for name in _AUTOMATIC_CLASSES:
        automatic = getattr(transformers, name)
        if transformers.CONFIG_MAPPING[model_type] in automatic._model_mapping:
            yield name, functools.partial(_build, model_type, plain, automatic)


def _build(model_type: str, config: Mapping[str, Any], model_class: Any) -> Any:
    """The model on the meta device: names and shapes, no weights."""
    import torch
    import transformers

    parsed = transformers.CONFIG_MAPPING[model_type].from_dict(with_floats(dict(config)))
    if not issubclass(model_class, transformers.PreTrainedModel):
        model_class = model_class.from_config
    elif not isinstance(parsed, model_class.config_class):  # the text part of a model that has others
        parsed = parsed.get_text_config()
    with torch.device("meta"):
        return model_class(parsed)


class _View:
    """The parameters of one model."""

    def __init__(self, layouts: Mapping[str, Layout | Inexpressible]) -> None:
        self._layouts = layouts
        self._matrices: dict[str, list[list[Piece]]] = {}

    def names(self) -> Iterator[str]:
        """The keys that `get` knows."""
        for name, layout in self._layouts.items():
            if isinstance(layout, Layout) and len(layout.shape) == 3:
                yield from (f"{name}[{index}]" for index in range(layout.shape[0]))
            else:
                yield name

    def get(self, key: str) -> list[Piece] | None:
        """The pieces of a parameter or of a 3-D one's matrix, or None if the model has no such stored parameter.

        Raises:
            UserError: If it does not lie in whole rows.
        """
        match = _MATRIX_KEY.fullmatch(key)
        name, index = (match["parameter"], int(match["index"])) if match else (key, 0)
        layout = self._layouts.get(name)
        if layout is None:
            return None
        try:
            if isinstance(layout, Inexpressible):
                raise layout
            if (len(layout.shape) == 3) != (match is not None) or (match and index >= layout.shape[0]):
                return None
            if name not in self._matrices:
                self._matrices[name] = pieces(layout)
        except Unfit as error:
            raise UserError.of(
                f"parameter {key!r}",
                expected="tensors in the checkpoint that make it up",
                found=str(error),
                remedy="Check that config.json and all files belong to this model",
            ) from None
        except Inexpressible as error:
            raise UserError.of(
                f"parameter {key!r}",
                expected="whole rows of tensors in the checkpoint",
                found=str(error),
                remedy="Load the model with transformers and save it with save_original_format=False, then use that",
            ) from None
        return self._matrices[name][index]
