"""The usual way with PEFT, as a program: python peft_merge.py BASE ADAPTER ADAPTER WEIGHT WEIGHT OUTPUT."""

from __future__ import annotations

import sys

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    base, first, second, first_weight, second_weight, output = sys.argv[1:]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    model = PeftModel.from_pretrained(model, first, adapter_name="first")
    model.load_adapter(second, "second")
    weights = [float(first_weight), float(second_weight)]
    # The only combination that is exact; "linear", the default, mixes the factors.
    model.add_weighted_adapter(["first", "second"], weights, "both", combination_type="cat")
    model.set_adapter("both")
    model.merge_and_unload().save_pretrained(output)
    AutoTokenizer.from_pretrained(base).save_pretrained(output)


if __name__ == "__main__":
    main()
