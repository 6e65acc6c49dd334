"""The conversion of a checkpoint's tensors into a model's parameters, followed on names and shapes alone.

Only this file knows transformers' conversion interface (`conversion_mapping`, `core_model_loading`), which is not
public; tests/test_parameter_names.py compares with what transformers loads, and so tells when it has moved.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bam_lora.errors import UserError, first_line
from bam_lora.safetensors_stream import TensorRecord
from bam_lora.tensor_layouts import Inexpressible, Layout, Unfit, concatenate, split, stack, transpose, whole

# By the pattern of the names that the tensors came from: a list of tensors, or the one that an operation made of them.
_Collected = dict[str, Layout | list[Layout]]


def converted_layouts(tensors: Mapping[str, TensorRecord], model: Any) -> dict[str, Layout | Inexpressible]:
    """Lays out the parameters of a model from a checkpoint's tensors as loading would.

    It follows `convert_and_load_state_dict_in_model` of transformers, tensor by tensor in its order.

    Args:
        tensors: The checkpoint's tensors by name.
        model: A transformers model, on the meta device or any other.

    Returns:
        By name of those parameters that are stored: the layout, or why there is none on shapes alone.

    Raises:
        UserError: If this version of transformers has another interface.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
    except ImportError as error:
        raise UserError.of(
            "transformers",
            expected="a version whose conversion of checkpoints is known (5.17 to 5.23)",
            found=first_line(error),
            remedy="Install such a version, or save the base with save_original_format=False",
        ) from error
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    parameters = model.state_dict()
    prefix = model.base_model_prefix
    layouts: dict[str, Layout | Inexpressible] = {}
    collected: dict[str, tuple[Any, dict[str, list[Layout]]]] = {}
    for stored in sorted(tensors, key=dot_natural_key):
        name, pattern = rename_source_key(stored, renamings, converters, prefix, parameters)
        if name not in parameters and stored in parameters:  # already named as in memory
            name, pattern = rename_source_key(stored, [], [], prefix, parameters)
        if name not in parameters or name in layouts or (pattern is None and name in collected):
            continue  # not of this model; or stored again under another name: loading takes the first
        if pattern is None:
            layouts[name] = whole(tensors[stored])
        else:
            _, parts = collected.setdefault(name, (by_pattern[pattern], {}))
            parts.setdefault(pattern, []).append(whole(tensors[stored]))
    for name, (converter, parts) in collected.items():
        layouts.update(_converted(name, converter, parts, model))
    return {name: _checked(layout, parameters[name].shape) for name, layout in layouts.items() if name in parameters}


def _checked(layout: Layout | Inexpressible, shape: Sequence[int]) -> Layout | Inexpressible:
    """What has another shape than the parameter has been misunderstood, or is not of this model."""
    if isinstance(layout, Inexpressible) or layout.shape == tuple(shape):
        return layout
    more = " and others that make" if len(layout.boxes) > 1 else " of"
    return Unfit(f"tensor {layout.boxes[0].tensor!r}{more} shape {list(layout.shape)}, not {list(shape)}")


def _converted(
    name: str, converter: Any, parts: Mapping[str, list[Layout]], model: Any
) -> dict[str, Layout | Inexpressible]:
    """What a converter makes of the tensors collected for it, by parameter; follows `WeightConverter.convert`."""
    targets = {name.replace(converter.target_patterns[0], target, 1) for target in converter.target_patterns}
    first = next(iter(parts.values()))[0].boxes[0].tensor
    made: _Collected = dict(parts)
    try:
        for operation in converter.operations:
            apply = _OPERATIONS.get(type(operation).__name__)
            if apply is None:
                raise Inexpressible(f"tensor {first!r} rearranged by {type(operation).__name__}")
            made = apply(operation, made, converter, name, model)
    except (Inexpressible, ValueError) as error:  # ValueError: how operations refuse what they do not understand
        problem = error if isinstance(error, Inexpressible) else Inexpressible(f"tensor {first!r}: {error}")
        return dict.fromkeys(targets, problem)
    prefix, target, suffix = next((name.partition(target) for target in made if target in name), ("", "", ""))
    if not target:
        return {name: Inexpressible(f"tensor {first!r} that takes part in an unknown renaming")}
    return {prefix + target + suffix: _single(layout) for target, layout in made.items()}


def _single(layouts: Layout | list[Layout]) -> Layout:
    """Of a list that should hold one tensor transformers takes the first."""
    return layouts if isinstance(layouts, Layout) else layouts[0]


def _only(made: _Collected) -> Layout:
    return _single(next(iter(made.values())))


def _merge_list(operation: Any, made: _Collected, converter: Any, name: str, model: Any) -> _Collected:
    result: _Collected = {}
    for pattern, layouts in made.items():
        target = operation.get_target_pattern(len(made), pattern, converter.target_patterns)
        result[target] = layouts if isinstance(layouts, Layout) else stack(layouts, operation.dim)
    return result


def _concatenate(operation: Any, made: _Collected, converter: Any, name: str, model: Any) -> _Collected:
    layouts: list[Layout] = []
    for pattern in converter.source_patterns:
        there = made.get(pattern, [])
        layouts.extend([there] if isinstance(there, Layout) else there)
    return {operation.get_target_pattern(converter.target_patterns): concatenate(layouts, operation.dim)}


def _chunk(operation: Any, made: _Collected, converter: Any, name: str, model: Any) -> _Collected:
    layout = _only(made)
    targets = operation.get_target_patterns(converter.target_patterns, config=model.config)
    whole_size = layout.shape[operation.dim]
    size = -(-whole_size // len(targets))  # as torch.chunk does
    sizes = [min(size, whole_size - first) for first in range(0, whole_size, size)]
    return dict(zip(targets, split(layout, sizes, operation.dim), strict=False))


def _split(operation: Any, made: _Collected, converter: Any, name: str, model: Any) -> _Collected:
    targets = converter.target_patterns
    names = [name.replace(targets[0], target) for target in targets]
    sizes = [model.get_parameter(target).shape[operation.dim] for target in names]
    return dict(zip(targets, split(_only(made), sizes, operation.dim), strict=True))


def _transpose(operation: Any, made: _Collected, converter: Any, name: str, model: Any) -> _Collected:
    layout = _only(made)
    target = operation.get_target_pattern(made, converter.source_patterns, converter.target_patterns)
    keep = operation.check_dims and layout.shape == tuple(model.get_parameter(name).shape)
    return {target: layout if keep else transpose(layout, operation.dim0, operation.dim1)}


# What can be followed on shapes; the class names are transformers'.
_OPERATIONS: dict[str, Callable[[Any, _Collected, Any, str, Any], _Collected]] = {
    "MergeModulelist": _merge_list,
    "Concatenate": _concatenate,
    "Chunk": _chunk,
    "Split": _split,
    "Transpose": _transpose,
}
