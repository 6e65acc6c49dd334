"""Layouts follow what torch does to the tensors themselves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bam_lora.safetensors_stream import TensorRecord
from bam_lora.tensor_layouts import (
    Inexpressible,
    Layout,
    Piece,
    Unfit,
    concatenate,
    pieces,
    split,
    stack,
    transpose,
    whole,
)


def record(name: str, *shape: int) -> TensorRecord:
    return TensorRecord(name, "F32", shape, 0, 0)


def filled(layout: Layout, stored: dict[str, torch.Tensor]) -> torch.Tensor:
    """The array, from its boxes; -1 where none of them is."""
    array = torch.full(layout.shape, -1)
    for box in layout.boxes:
        source = stored[box.tensor]
        own = [axis.dimension for axis in box.axes if axis.dimension is not None]
        part = source.permute(own)
        for position, axis in enumerate(axis for axis in box.axes if axis.dimension is not None):
            part = part.narrow(position, axis.stored_first, axis.size)
        place = tuple(slice(axis.first, axis.first + axis.size) for axis in box.axes)
        array[place] = part.reshape(array[place].shape)
    return array


@given(st.data())
def test_operations_do_to_layouts_what_torch_does_to_tensors(data: st.DataObject) -> None:
    rows, columns = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    stored = {f"t{i}": torch.arange(rows * columns).reshape(rows, columns) + 100 * i for i in range(3)}
    layouts = [whole(record(name, rows, columns)) for name in stored]
    tensors = list(stored.values())
    for _ in range(data.draw(st.integers(1, 5))):
        dim = data.draw(st.integers(0, tensors[0].dim() - 1))
        match data.draw(st.sampled_from(["stack", "concatenate", "split", "transpose"])):
            case "stack" if tensors[0].dim() < 4:
                layouts, tensors = [stack(layouts, dim)], [torch.stack(tensors, dim)]
            case "concatenate":
                layouts, tensors = [concatenate(layouts, dim)], [torch.cat(tensors, dim)]
            case "split":
                cut = data.draw(st.integers(0, tensors[0].shape[dim]))
                sizes = [cut, tensors[0].shape[dim] - cut]
                keep = data.draw(st.sampled_from([i for i in (0, 1) if sizes[i]]))
                layouts = [split(layout, sizes, dim)[keep] for layout in layouts]
                tensors = [tensor.split(sizes, dim)[keep] for tensor in tensors]
            case "transpose":
                other = data.draw(st.integers(0, tensors[0].dim() - 1))
                layouts = [transpose(layout, dim, other) for layout in layouts]
                tensors = [tensor.transpose(dim, other) for tensor in tensors]
    for layout, tensor in zip(layouts, tensors, strict=True):
        assert layout.shape == tuple(tensor.shape)
        assert torch.equal(filled(layout, stored), tensor)


def test_pieces_of_transposed_experts_joined_by_rows() -> None:
    gates = transpose(whole(record("gates", 2, 8, 3)), 1, 2)
    ups = transpose(whole(record("ups", 2, 8, 5)), 1, 2)
    assert pieces(concatenate([gates, ups], 1)) == [
        [Piece("gates", expert, (0, 3), True), Piece("ups", expert, (3, 8), True)] for expert in range(2)
    ]


def test_tensors_of_other_axes_are_matrices_by_their_first() -> None:
    assert pieces(whole(record("scalar"))) == [[Piece("scalar", None, (0, 1), False)]]
    assert pieces(whole(record("bias", 6))) == [[Piece("bias", None, (0, 6), False)]]
    assert pieces(whole(record("patches", 6, 3, 2, 2, 2))) == [[Piece("patches", None, (0, 6), False)]]


@pytest.mark.parametrize(
    "layout",
    [
        concatenate([whole(record("left", 4, 2)), whole(record("right", 4, 2))], 1),
        split(whole(record("left", 4, 4)), [2, 2], 1)[0],
        transpose(whole(record("left", 4, 3, 2)), 0, 1),
        transpose(whole(record("left", 4, 3, 2, 5)), 0, 1),
        stack([whole(record("left", 4)), whole(record("right", 4))], 0),
    ],
)
def test_what_is_not_whole_rows_is_refused(layout: Layout) -> None:
    with pytest.raises(Inexpressible, match="tensor 'left'"):
        pieces(layout)


def test_tensors_that_do_not_fit_are_named() -> None:
    with pytest.raises(Unfit, match=r"\[4, 2\] and \[4, 3\].*'odd'"):
        concatenate([whole(record("even", 4, 2)), whole(record("odd", 4, 3))], 0)
    with pytest.raises(Unfit, match=r"'long' of shape \[4, 2\] to be cut into \[1, 2\]"):
        split(whole(record("long", 4, 2)), [1, 2], 0)
