"""Short stories for the quickstart in three languages, told by a seeded generator and written for this project.

Each language has its own words, grammar and plots (`english.py`, `german.py`, `bulgarian.py` beside their word lists);
they tell the same kind of stories, not translations of each other. A story is one line of 60 to 200 words.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from bam_lora.errors import UserError
from bam_lora.quickstart.stories import bulgarian, english, german

LANGUAGES: dict[str, Callable[[random.Random], str]] = {
    "english": english.tell,
    "german": german.tell,
    "bulgarian": bulgarian.tell,
}
MINIMUM_WORDS, MAXIMUM_WORDS = 60, 200


def stories(language: str, documents: int, seed: int) -> list[str]:
    """Tells short stories, all different from each other.

    The same arguments give the same stories on every machine and Python version, and the first stories of a longer
    list are those of a shorter one. Different seeds give different lists, which may share a few stories.

    Args:
        language: "english", "german" or "bulgarian".
        documents: How many stories, at least 0.
        seed: Seed of the random numbers.

    Returns:
        The stories: plain text without line breaks, 60 to 200 words each.

    Raises:
        UserError: For a language it does not speak or a negative number of documents.
    """
    if language not in LANGUAGES:
        raise UserError.of(
            "language", expected="one of " + ", ".join(LANGUAGES), found=repr(language), remedy="Choose one of these"
        )
    if documents < 0:
        raise UserError.of("documents", expected="a number >= 0", found=str(documents), remedy="Ask for at least 0")
    tell, rng = LANGUAGES[language], random.Random(seed)
    told: dict[str, None] = {}
    while len(told) < documents:
        story = tell(rng)
        if MINIMUM_WORDS <= len(story.split()) <= MAXIMUM_WORDS:
            told[story] = None
    return list(told)
