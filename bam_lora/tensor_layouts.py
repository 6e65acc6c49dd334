"""Which element of a stored tensor goes where when a model is loaded, from shapes alone.

An array that loading would make is a shape filled with boxes; all elements of a box come from one stored tensor. Boxes
are stacked, concatenated, cut and transposed as the tensors would be, at no cost that depends on the tensors' sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from bam_lora.safetensors_stream import TensorRecord


@dataclass(frozen=True)
class Piece:
    """Where a part of a parameter's matrix lies in the checkpoint.

    A tensor of any number of axes counts as a matrix with its first axis as rows.

    Attributes:
        tensor: The name in the checkpoint.
        index: Which matrix of a stored 3-D tensor it is; None: the stored tensor itself is the matrix.
        rows: Rows [first, stop) of the parameter's matrix, as in memory, that are stored there.
        transposed: Whether the stored matrix is the transpose of that part, because transformers transposes on loading.
        stored_rows: Rows [first, stop) of the stored matrix, turned as in memory, that hold the part, where its other
            rows belong to other parameters; None: all of them.
    """

    tensor: str
    index: int | None
    rows: tuple[int, int]
    transposed: bool
    stored_rows: tuple[int, int] | None = None


class Inexpressible(Exception):
    """An array that is not made of whole rows of stored matrices; the text says what it is."""


class Unfit(Inexpressible):
    """Stored tensors that do not make the array: one is missing, or they belong to another model."""


@dataclass(frozen=True)
class Axis:
    """Elements [first, first + size) of an array along one axis, and where they are in the stored tensor.

    Attributes:
        first: The first element in the array.
        size: The number of elements.
        dimension: The stored tensor's dimension, or None: an axis of size one that stacking made.
        stored_first: The first element along that dimension.
        stored_size: The whole length of that dimension.
    """

    first: int
    size: int
    dimension: int | None
    stored_first: int
    stored_size: int

    @property
    def is_whole(self) -> bool:
        """Whether it takes in the stored dimension from end to end."""
        return self.size == self.stored_size


@dataclass(frozen=True)
class Box:
    """A block of an array whose elements all come from one stored tensor."""

    tensor: str
    axes: tuple[Axis, ...]

    def replaced(self, position: int, axis: Axis) -> Box:
        """The box with another axis at a position."""
        return Box(self.tensor, (*self.axes[:position], axis, *self.axes[position + 1 :]))


@dataclass(frozen=True)
class Layout:
    """An array that loading would make: its shape, and the boxes that fill it."""

    shape: tuple[int, ...]
    boxes: tuple[Box, ...]

    def resized(self, dim: int, size: int, boxes: Sequence[Box]) -> Layout:
        """A layout of another size along one axis, filled with other boxes."""
        return Layout((*self.shape[:dim], size, *self.shape[dim + 1 :]), tuple(boxes))


def whole(record: TensorRecord) -> Layout:
    """A stored tensor as it is."""
    axes = tuple(Axis(0, size, dimension, 0, size) for dimension, size in enumerate(record.shape))
    return Layout(record.shape, (Box(record.name, axes),))


def stack(layouts: Sequence[Layout], dim: int) -> Layout:
    """What `torch.stack` makes of them.

    Raises:
        Unfit: If their shapes differ.
    """
    new = Axis(0, 1, None, 0, 1)
    return concatenate(
        [
            Layout(
                (*layout.shape[:dim], 1, *layout.shape[dim:]),
                tuple(Box(box.tensor, (*box.axes[:dim], new, *box.axes[dim:])) for box in layout.boxes),
            )
            for layout in layouts
        ],
        dim,
    )


def concatenate(layouts: Sequence[Layout], dim: int) -> Layout:
    """What `torch.cat` makes of them.

    Raises:
        Unfit: If their shapes do not fit together.
    """
    size = 0
    boxes: list[Box] = []
    for layout in layouts:
        if layouts[0].resized(dim, layout.shape[dim], ()).shape != layout.shape:
            shapes = f"{list(layouts[0].shape)} and {list(layout.shape)}"
            raise Unfit(f"tensors of shapes {shapes} to be joined, one of them {layout.boxes[0].tensor!r}")
        for box in layout.boxes:
            boxes.append(box.replaced(dim, replace(box.axes[dim], first=box.axes[dim].first + size)))
        size += layout.shape[dim]
    return layouts[0].resized(dim, size, boxes)


def split(layout: Layout, sizes: Sequence[int], dim: int) -> list[Layout]:
    """What `torch.split` makes of it.

    Raises:
        Unfit: If the sizes do not add up to its own.
    """
    if sum(sizes) != layout.shape[dim]:
        found = f"tensor {layout.boxes[0].tensor!r} of shape {list(layout.shape)} to be cut into {list(sizes)}"
        raise Unfit(found)
    parts, first = [], 0
    for size in sizes:
        boxes = []
        for box in layout.boxes:
            axis = box.axes[dim]
            low, high = max(axis.first, first), min(axis.first + axis.size, first + size)
            if low < high:
                stored_first = axis.stored_first + low - axis.first
                boxes.append(
                    box.replaced(dim, replace(axis, first=low - first, size=high - low, stored_first=stored_first))
                )
        parts.append(layout.resized(dim, size, boxes))
        first += size
    return parts


def transpose(layout: Layout, dim0: int, dim1: int) -> Layout:
    """What `torch.transpose` makes of it."""
    order = list(range(len(layout.shape)))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    boxes = tuple(Box(box.tensor, tuple(box.axes[dim] for dim in order)) for box in layout.boxes)
    return Layout(tuple(layout.shape[dim] for dim in order), boxes)


def pieces(layout: Layout) -> list[list[Piece]]:
    """The pieces of an array: of each of its matrices if it is 3-D, else of the one that it is.

    Returns:
        For each matrix its pieces, in the order of their rows, which together are the whole matrix.

    Raises:
        Inexpressible: If a matrix is not made of whole rows of stored matrices.
    """
    if len(layout.shape) != 3:
        return [_matrix_pieces(layout.shape, [(None, box) for box in layout.boxes])]
    matrices: list[list[tuple[int | None, Box]]] = [[] for _ in range(layout.shape[0])]
    for box in layout.boxes:
        outer = box.axes[0]
        if outer.dimension not in (None, 0):
            raise Inexpressible(f"tensor {box.tensor!r} with its axes in another order")
        for position in range(outer.size):
            index = None if outer.dimension is None else outer.stored_first + position
            matrices[outer.first + position].append((index, Box(box.tensor, box.axes[1:])))
    return [_matrix_pieces(layout.shape[1:], boxes) for boxes in matrices]


def _matrix_pieces(shape: tuple[int, ...], boxes: Sequence[tuple[int | None, Box]]) -> list[Piece]:
    found = sorted((_piece(shape, index, box) for index, box in boxes), key=lambda piece: piece.rows)
    row = 0
    for piece in found:
        if piece.rows[0] != row:
            break
        row = piece.rows[1]
    assert row == (shape[0] if shape else 1), (shape, found)  # boxes fill their layout
    return found


def _piece(shape: tuple[int, ...], index: int | None, box: Box) -> Piece:
    if not shape:
        return Piece(box.tensor, index, (0, 1), False)
    rows, *columns = box.axes
    order = [-1 if axis.dimension is None else axis.dimension for axis in box.axes]
    transposed = len(order) == 2 and order[0] > order[1] >= 0
    in_order = transposed or (-1 not in order and order == sorted(order))
    across = all(axis.size == size and axis.is_whole for axis, size in zip(columns, shape[1:], strict=True))
    if not in_order or not across:
        raise Inexpressible(f"tensor {box.tensor!r} cut along its columns or with its axes in another order")
    stored_rows = None if rows.is_whole else (rows.stored_first, rows.stored_first + rows.size)
    return Piece(box.tensor, index, (rows.first, rows.first + rows.size), transposed, stored_rows)
