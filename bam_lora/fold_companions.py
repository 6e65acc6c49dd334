"""What goes along with folded weights: the base's files, or the tokenizer that belongs to a resized vocabulary."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bam_lora.adapter_entries import EMBEDDINGS, HEADS
from bam_lora.adapters import Adapter
from bam_lora.checkpoint import GENERATION, TOKENIZER, Checkpoint, check_link, files_like

# Without one of them the folder holds no tokenizer: a chat template alone is none.
_WHOLE = ("tokenizer.json", "tokenizer_config.json", "tekken.json", "*.model", "vocab*")


@dataclass(frozen=True)
class Companions:
    """The files that go along.

    Attributes:
        files: {name in the new folder: the file it is copied from}.
        tokenizer: "base", or the folder of the adapter or model whose tokenizer it is.
    """

    files: dict[str, Path]
    tokenizer: str

    @property
    def size_bytes(self) -> int:
        """Of all of them."""
        return sum(path.stat().st_size for path in self.files.values())


_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def find_companions(
    checkpoint: Checkpoint, tokenizers: Sequence[Path] = (), model: Checkpoint | None = None
) -> Companions:
    """The base's files, with the tokenizer of the first of some folders that has one in place of the base's.

    The two are never mixed: a file that only the base has would describe the smaller vocabulary.

    Args:
        checkpoint: The base.
        tokenizers: Folders of adapters that may hold the tokenizer.
        model: Another model whose tokenizer, chat template and generation settings are wanted instead.

    Raises:
        UserError: If one of that tokenizer's files is a link that leads out of its folder.
    """
    files = {name: checkpoint.folder / name for name in checkpoint.companions()}
    if model is not None:
        wanted = (*TOKENIZER, GENERATION)
        for name in files_like(checkpoint.folder, wanted):
            files.pop(name, None)
        own = set(files_like(model.folder, wanted))
        return Companions(
            files | {name: model.folder / name for name in model.companions() if name in own}, str(model.folder)
        )
    folder = next((folder for folder in tokenizers if files_like(folder, _WHOLE)), None)
    if folder is None:
        return Companions(files, "base")
    for name in files_like(checkpoint.folder, TOKENIZER):
        del files[name]
    for name in files_like(folder, TOKENIZER):
        check_link(folder, name)
        files[name] = folder / name
    return Companions(files, str(folder))


def token_ids(model: Checkpoint | None) -> dict[str, Any]:
    """The special tokens' numbers in a model's config.json, which go with its tokenizer."""
    config = {} if model is None else model.config
    texts = config.get("text_config") or {}
    return {name: value for name in _TOKEN_IDS if (value := config.get(name, texts.get(name))) is not None}


def tokenizer_folders(adapters: Iterable[Adapter]) -> list[Path]:
    """Folders of the adapters that hold an embedding or output head whole, as those of a resized vocabulary do."""
    ends = tuple(f"{module}.weight" for module in (*EMBEDDINGS, *HEADS))
    found = []
    for adapter in adapters:
        entries = [adapter.entry(name) for name in adapter.names if name.endswith(ends)]
        if any(entry is not None and entry.value is not None for entry in entries):
            found.append(adapter.path)
    return found
