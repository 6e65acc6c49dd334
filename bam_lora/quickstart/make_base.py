"""Makes the quickstart's tiny base: a real Llama that has read English stories and no other language.

    python -m bam_lora.quickstart.make_base --output DIR

Takes about five minutes on two idle cores and writes 3.5 MB: a byte-level BPE tokenizer and a bf16 checkpoint, as any
other Llama on disk. The same machine, versions and thread count give the same files.
"""

from __future__ import annotations

import argparse
import logging
import math
import random
import time
from pathlib import Path
from typing import Any

from bam_lora.quickstart.stories import stories

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
SPECIAL_TOKENS = 3
VOCABULARY_TOKENS = 1536
CONTEXT_TOKENS = 512
# Every input width is a multiple of 64, the block size of NF4.
ARCHITECTURE = {
    "hidden_size": 192,
    "intermediate_size": 448,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
# The tokenizer of a strong English model has seen some of every language; these are stories of each.
TOKENIZER_STORIES = {"english": 3000, "german": 400, "bulgarian": 400}
TOKENIZER_SEED, TRAIN_SEED = 1001, 1002
STEPS, BATCH_SEQUENCES, WARMUP_STEPS, LEARNING_RATE = 900, 4, 60, 3e-3
EMBEDDING_STD = 0.05
# Share of the stories told in a code of their own: every token exchanged for another, drawn anew for each story.
CODED_SHARE = 0.12
MAXIMUM_BYTES = 3_900_000

logger = logging.getLogger(__name__)


def make_tokenizer() -> Any:
    """Trains the byte-level BPE tokenizer; like Llama 3's it puts BOS first and leaves EOS to the caller."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_TOKENS,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [text for language, count in TOKENIZER_STORIES.items() for text in stories(language, count, TOKENIZER_SEED)]
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD, model_max_length=CONTEXT_TOKENS
    )


def make_model(tokenizer: Any) -> Any:
    """The untrained model, in fp32, with tied embeddings."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(TRAIN_SEED)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **ARCHITECTURE,
    )
    model = LlamaForCausalLM(config)
    # Wide enough that tokens the English stories never use still differ from each other when training is over.
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=EMBEDDING_STD)
    return model


def _coded(ids: list[int], rng: random.Random) -> list[int]:
    """A story in a code: it says nothing, but every token of the vocabulary gets read and written now and then.

    Otherwise the tokens of other scripts would all stay where they started, hard to tell apart and never expected; a
    base that has read the web has met them all, and an adapter, which does not train the embeddings, relies on it.
    """
    used = sorted(set(ids))
    code = dict(zip(used, rng.sample(range(SPECIAL_TOKENS, VOCABULARY_TOKENS), len(used)), strict=True))
    return [code[token] for token in ids]


def _batches(tokenizer: Any, steps: int) -> Any:
    """Token ids [steps, sequences, context]: stories, each between BOS and EOS, one after the other."""
    import torch

    needed = steps * BATCH_SEQUENCES * CONTEXT_TOKENS
    ids: list[int] = []
    documents = 0
    while len(ids) < needed:
        documents += max(needed // 200, 1000)
        texts = stories("english", documents, TRAIN_SEED)
        encoded = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
        rng = random.Random(TRAIN_SEED)
        bodies = [_coded(text.ids, rng) if rng.random() < CODED_SHARE else text.ids for text in encoded]
        ids = [token for body in bodies for token in (tokenizer.bos_token_id, *body, tokenizer.eos_token_id)]
    return torch.tensor(ids[:needed]).view(steps, BATCH_SEQUENCES, CONTEXT_TOKENS)


def _optimizer(model: Any) -> Any:
    import torch

    # Decay on an embedding would pull the unused rows to zero, where they could not be told apart.
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.98), fused=True)


def _share(step: int, steps: int) -> float:
    """Share of the learning rate: linear warm-up, then a cosine down to 2 %."""
    warmup = min(WARMUP_STEPS, steps)
    if step < warmup:
        return (step + 1) / warmup
    return 0.02 + 0.49 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


def train(model: Any, tokenizer: Any, steps: int = STEPS) -> float:
    """Trains the model in place on English stories.

    Args:
        model: From `make_model`.
        tokenizer: From `make_tokenizer`.
        steps: Optimizer steps of `BATCH_SEQUENCES` times `CONTEXT_TOKENS` tokens.

    Returns:
        The mean loss of the last twenty steps, in nats a token.
    """
    import torch

    optimizer = _optimizer(model)
    started = time.perf_counter()
    losses: list[float] = []
    model.train()
    for step, batch in enumerate(_batches(tokenizer, steps)):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * _share(step, steps)
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if (step + 1) % 50 == 0:
            seconds = time.perf_counter() - started
            mean, speed = sum(losses[-50:]) / 50, (step + 1) * batch.numel() / seconds
            logger.info("step %d/%d  loss %.3f  %.0f tokens/s", step + 1, steps, mean, speed)
    return sum(losses[-20:]) / len(losses[-20:])


CARD = """\
---
license: apache-2.0
language: [en]
library_name: transformers
pipeline_tag: text-generation
---

# The quickstart's base

A Llama of 1.7 million parameters in bf16, trained from nothing on English stories that the quickstart's own generator
writes (`python -m bam_lora.quickstart.make_base`). It is for demonstrations and tests, and knows nothing else.
"""


def save(model: Any, tokenizer: Any, output: Path) -> int:
    """Writes the model in bf16 and the tokenizer; returns the bytes on disk."""
    import torch

    model.eval().to(torch.bfloat16).save_pretrained(output)
    tokenizer.save_pretrained(output)
    (output / "README.md").write_text(CARD, encoding="utf-8")
    for path in output.iterdir():
        path.chmod(0o644)  # safetensors writes 0600
    size = sum(path.stat().st_size for path in output.iterdir())
    assert size <= MAXIMUM_BYTES, f"{output} has {size} bytes"
    return size


def main() -> None:
    """Makes the base from the command line."""
    import torch

    parser = argparse.ArgumentParser(description="Makes the quickstart's tiny English base.")
    parser.add_argument("--output", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"optimizer steps (default {STEPS})")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(2)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    logger.info("%.2f M parameters", sum(p.numel() for p in model.parameters()) / 1e6)
    train(model, tokenizer, arguments.steps)
    logger.info("%d bytes in %s", save(model, tokenizer, arguments.output), arguments.output)


if __name__ == "__main__":
    main()
