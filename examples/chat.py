"""Conversations: the tiny English model learns to answer in German, from `messages` with a chat template of our own.

    python examples/chat.py

Under a minute on two cores. The loss is on the answers only, as TRL does it with `assistant_only_loss` and a template
that marks them; conversations in the form of prompt and completion need neither. The template goes with the result,
and at the end the saved folder answers as any model of transformers does.
"""

from datasets import Dataset
from peft import LoraConfig
from tiny import BASE, read, show
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig

from bam_lora import BamConfig, BamTrainer

TEMPLATE = """\
{%- for message in messages %}
{%- if message.role == "user" %}{{ "Frage: " + message.content + "\\n" }}
{%- else %}{{ "Antwort:" }}{% generation %}{{ " " + message.content + eos_token }}{% endgeneration %}{{ "\\n" }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ "Antwort:" }}{% endif %}"""


def conversations(documents: int, seed: int) -> Dataset:
    """One question about each story, answered with how it goes on."""
    talks = []
    for words in map(str.split, read("german", documents, seed)["text"]):
        question, answer = f"Wie geht es weiter: {' '.join(words[:6])}?", " ".join(words[6:36])
        talks.append([{"role": "user", "content": question}, {"role": "assistant", "content": answer}])
    return Dataset.from_dict({"messages": talks})


tokenizer = AutoTokenizer.from_pretrained(BASE)
tokenizer.chat_template = TEMPLATE
held_out = conversations(16, seed=2)
trainer = BamTrainer(
    model=BASE,
    bam=BamConfig(slices=4, branches=2),
    args=SFTConfig(
        output_dir="runs/chat",
        learning_rate=4e-3,
        per_device_train_batch_size=4,
        num_train_epochs=1,
        max_length=256,
        assistant_only_loss=True,
        logging_steps=10,
        use_cpu=True,
    ),
    train_dataset=conversations(240, seed=1),
    eval_dataset=held_out,
    processing_class=tokenizer,
    peft_config=LoraConfig(r=32, lora_alpha=64, target_modules="all-linear", task_type="CAUSAL_LM"),
)
show("before", trainer.evaluate())
trainer.train()
show("after", trainer.evaluate())

folder = trainer.directory.model
tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
question = held_out[0]["messages"][:1]
inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
answer = model.generate(**inputs, max_new_tokens=40, do_sample=False)[0, inputs["input_ids"].shape[1] :]
print(question[0]["content"], "->", tokenizer.decode(answer, skip_special_tokens=True))
