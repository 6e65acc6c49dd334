"""What the other examples share: the quickstart's tiny English model and its short stories, so that a CPU will do.

For a run of your own, put a Hub id or a folder in the place of `BASE`, and `datasets.load_dataset(...)` in that of
`read`.
"""

from importlib import resources

from datasets import Dataset

from bam_lora.quickstart.stories import stories

BASE = str(resources.files("bam_lora.quickstart") / "base")
"""Folder of a Llama of 1.7 M parameters that has read English stories only."""


def read(language: str, documents: int, seed: int) -> Dataset:
    """Short stories in "english", "german" or "bulgarian", in the column `text`; another seed tells other stories."""
    return Dataset.from_dict({"text": stories(language, documents, seed)})


def show(when: str, metrics: dict[str, float]) -> None:
    """Prints the losses (nats a token) and the scores (bits per byte) among the metrics."""
    shown = [f"{name} {value:.3f}" for name, value in metrics.items() if name.endswith(("_loss", "_per_byte"))]
    print(f"{when}: {', '.join(shown)}")
