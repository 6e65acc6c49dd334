"""What every model card says in the same words."""

from __future__ import annotations

NOT_COMPARED = (
    "Not compared with another way of training: "
    "this does not say whether one would have learned more or forgotten less."
)

USE = """The model is a plain Hugging Face checkpoint; it needs neither bam_lora nor PEFT. `path/or/repository` is this
folder, or where it was published.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("path/or/repository")
model = AutoModelForCausalLM.from_pretrained("path/or/repository", dtype="auto", device_map="auto")
inputs = tokenizer("Once upon a time", return_tensors="pt").to(model.device)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0], skip_special_tokens=True))
```

With vLLM:

```bash
vllm serve path/or/repository
```

With llama.cpp and what builds on it, after conversion to GGUF, in a checkout of llama.cpp with its Python requirements:

```bash
python convert_hf_to_gguf.py path/to/this/folder --outtype bf16 --outfile model.gguf
llama-cli -m model.gguf -p "Once upon a time"
```"""

ADAPTER_USE = """The adapter goes on the full-precision base that it was made for. `path/or/repository` is this
folder, or where it was published.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained("BASE", dtype="auto", device_map="auto")
model = PeftModel.from_pretrained(base, "path/or/repository")
tokenizer = AutoTokenizer.from_pretrained("BASE")
```

`bam-lora fold --base BASE --adapter path/or/repository --output folded` writes a model that needs no PEFT."""

LIMITS = """- Scores are bits per byte on the sets named above: how well text is predicted. They do not say how well
  instructions are followed, whether answers are true, or how the model does on texts of another kind.
- Forgetting was measured on the source sets above; what they do not cover may have been forgotten more.
- The biases of the base and of the training data are in this model, too; nothing was done about them."""

CITATION = r"""The method is Branch-and-Merge:

```bibtex
@inproceedings{alexandrov2024bam,
  title     = {Mitigating Catastrophic Forgetting in Language Transfer via Model Merging},
  author    = {Alexandrov, Anton and Raychev, Veselin and M{\"u}ller, Mark Niklas and Zhang, Ce and Vechev, Martin and
               Toutanova, Kristina},
  booktitle = {Findings of the Association for Computational Linguistics: EMNLP 2024},
  year      = {2024},
  note      = {arXiv:2407.08699}
}
```"""
