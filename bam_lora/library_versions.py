"""Where the oldest libraries that are allowed behave otherwise than the newest, and what makes them alike."""

from __future__ import annotations


def seed_the_adapter(seed: int) -> None:
    """Seeds every generator before a trainer is made, which draws the adapter's first values.

    TRL 1.16 does this itself with the trainer's seed; 1.10 draws them from whatever came before, so that a branch would
    begin otherwise in a run that was interrupted than in one that was not.

    Args:
        seed: The trainer's seed, so that nothing changes where TRL seeds, too.
    """
    import transformers

    transformers.set_seed(seed)
