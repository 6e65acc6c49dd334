"""What goes along with folded weights: the base's files, or the tokenizer that belongs to a resized vocabulary."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bam_lora.adapter_entries import EMBEDDINGS, HEADS
from bam_lora.adapters import Adapter
from bam_lora.checkpoint import TOKENIZER, Checkpoint, check_link, files_like

# Without one of them the folder holds no tokenizer: a chat template alone is none.
_WHOLE = ("tokenizer.json", "tokenizer_config.json", "tekken.json", "*.model", "vocab*")


@dataclass(frozen=True)
class Companions:
    """The files that go along.

    Attributes:
        files: {name in the new folder: the file it is copied from}.
        tokenizer: "base", or the folder of the adapter whose tokenizer it is.
    """

    files: dict[str, Path]
    tokenizer: str

    @property
    def size_bytes(self) -> int:
        """Of all of them."""
        return sum(path.stat().st_size for path in self.files.values())


def find_companions(checkpoint: Checkpoint, tokenizers: Sequence[Path] = ()) -> Companions:
    """The base's files, with the tokenizer of the first of some folders that has one in place of the base's.

    The two are never mixed: a file that only the base has would describe the smaller vocabulary.

    Args:
        checkpoint: The base.
        tokenizers: Folders of adapters that may hold the tokenizer.

    Raises:
        UserError: If one of that tokenizer's files is a link that leads out of its folder.
    """
    files = {name: checkpoint.folder / name for name in checkpoint.companions()}
    folder = next((folder for folder in tokenizers if files_like(folder, _WHOLE)), None)
    if folder is None:
        return Companions(files, "base")
    for name in files_like(checkpoint.folder, TOKENIZER):
        del files[name]
    for name in files_like(folder, TOKENIZER):
        check_link(folder, name)
        files[name] = folder / name
    return Companions(files, str(folder))


def tokenizer_folders(adapters: Iterable[Adapter]) -> list[Path]:
    """Folders of the adapters that hold an embedding or output head whole, as those of a resized vocabulary do."""
    ends = tuple(f"{module}.weight" for module in (*EMBEDDINGS, *HEADS))
    found = []
    for adapter in adapters:
        entries = [adapter.entry(name) for name in adapter.names if name.endswith(ends)]
        if any(entry is not None and entry.value is not None for entry in entries):
            found.append(adapter.path)
    return found
