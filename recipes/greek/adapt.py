"""Greek for an open base: what pretrain.yaml does, from Python, and without the instruction sets in the replay.

    python recipes/greek/adapt.py
    python recipes/greek/adapt.py --base swiss-ai/Apertus-v1.1-0.5B --documents 2000 --max-steps 40    # a first try

One GPU with 12 GB, about 22 hours on an RTX 4090 (estimate; not measured). `runs/greek-script` is a run directory for
`bam-lora status` and `report`, and has the model in its folder `model`. Data sets: see pretrain.yaml.
"""

import argparse

from datasets import Dataset, load_dataset
from peft import LoraConfig
from transformers import BitsAndBytesConfig
from trl import SFTConfig

from bam_lora import BamConfig, BamTrainer

parser = argparse.ArgumentParser()
parser.add_argument("--base", default="swiss-ai/Apertus-v1.1-4B")
parser.add_argument("--documents", type=int, default=180_000, help="Greek pages to learn from")
parser.add_argument("--max-length", type=int, default=2048, help="tokens in a training sequence")
parser.add_argument("--max-steps", type=int, default=-1, help="of the whole run; -1: all the data")
parser.add_argument("--output", default="runs/greek-script")
parser.add_argument("--cpu", action="store_true", help="for a tiny base")
options = parser.parse_args()


def texts(path: str, name: str | None, split: str, count: int) -> Dataset:
    """The first texts of a data set, which is read only so far."""
    rows = load_dataset(path, name=name, split=split, streaming=True).select_columns("text")
    return Dataset.from_list(list(rows.take(count)))


trainer = BamTrainer(
    model=options.base,
    args=SFTConfig(
        output_dir=options.output, learning_rate=2e-4, per_device_train_batch_size=1, gradient_accumulation_steps=16,
        warmup_steps=0.05, max_steps=options.max_steps, max_length=options.max_length, packing=True,
        packing_strategy="bfd_split", use_cpu=options.cpu,
    ),
    bam=BamConfig(slices=8, branches=2, replay_share=0.2, samples=["Η πρωτεύουσα της Ελλάδας είναι"]),
    train_dataset=texts("HuggingFaceFW/fineweb-2", "ell_Grek", "train", options.documents),
    replay_dataset={  # more than the share wants
        "web": texts("HuggingFaceFW/fineweb-edu", "sample-10BT", "train", options.documents // 4),
        "wikipedia": texts("wikimedia/wikipedia", "20231101.en", "train", options.documents // 8),
        "code": texts("common-pile/stackv2_edu_filtered", None, "train", options.documents // 8),
    },
    eval_dataset={
        "target": texts("HuggingFaceFW/fineweb-2", "ell_Grek", "test", 500),
        "source": texts("allenai/c4", "en", "validation", 500),
    },
    peft_config=LoraConfig(r=64, lora_alpha=128, target_modules="all-linear", task_type="CAUSAL_LM"),
    quantization_config=BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="bfloat16"
    ),
)  # fmt: skip
trainer.train()
trainer.save_model()
