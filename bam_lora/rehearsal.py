"""What a run's branches will train, found on a model without weights: what cannot be folded is refused at the start.

Only changes that are not low rank need it: products of two factors can be cut and turned as the base stores its weight.
And hybrids do, of which PEFT refuses some layers.
"""

from __future__ import annotations

import copy
import json
import re
import warnings
from pathlib import Path
from typing import Any

import torch

from bam_lora.adapter_config import is_inside
from bam_lora.adapter_entries import entries_of
from bam_lora.adapters import WEIGHTS_FILE, Adapter
from bam_lora.checkpoint import Checkpoint, open_checkpoint
from bam_lora.dense_methods import DENSE_METHODS
from bam_lora.documents_apart import HYBRIDS
from bam_lora.errors import UserError, first_line
from bam_lora.fold_plan import Changes
from bam_lora.merge import MergedAdapters
from bam_lora.safetensors_stream import Header, TensorRecord
from bam_lora.snapshots import find_parts


class _Untrained(Adapter):
    """An adapter of which only names, shapes and kinds are known: every number is zero, and takes no memory."""

    def read(self, record: TensorRecord) -> torch.Tensor:
        return torch.zeros(1).expand(record.shape)

    def mapped(self, record: TensorRecord) -> torch.Tensor:
        return self.read(record)


def require_mergeable(
    start: Path, original: Path | Checkpoint, before: Changes, config: Any, method: str, bits: int
) -> None:
    """Checks that what the branches will train can be merged and folded, where that is not plain LoRA added up.

    Args:
        start: The model that the first branches are trained on.
        original: The base that is folded into.
        before: What was added to it before.
        config: The adapter, a `LoraConfig`.
        method: The merge method.
        bits: Of the frozen base.

    Raises:
        UserError: Naming the setting, or the weight that the base does not store as such a merge needs it.
    """
    dense = (config.use_dora, config.bias != "none", config.modules_to_save, config.trainable_token_indices)
    listed = (config.rank_pattern, config.alpha_pattern, config.target_parameters, config.exclude_modules)
    plain = not any((*dense, *listed)) and method not in DENSE_METHODS
    if plain and _kind(start) not in HYBRIDS:
        return
    model = _bare_model(start)
    _require_rows(model, config.trainable_token_indices or [])
    adapter = _rehearsed(model, config)
    for parameter in config.target_parameters or ():
        _require_parameter(adapter, parameter)
    for saved in config.modules_to_save or ():
        _require_module(adapter, saved)
    if bits < 16:
        _require_not_quantised(model)
    merged = MergedAdapters([adapter], [1.0], method if method in DENSE_METHODS else "linear")
    names = [name for name in merged.names() if merged.is_dense(name)]
    find_parts(open_checkpoint(original), before, merged, names)


def _kind(folder: Path) -> str:
    return str(json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type"))


def _bare_model(folder: Path) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(str(folder)))


def _rehearsed(model: Any, wanted: Any) -> Adapter:
    """The adapter as PEFT would put it on the model and save it."""
    from peft import get_peft_model, get_peft_model_state_dict

    layers = _layers(model)
    try:
        # PEFT warns again when branches train.
        with torch.device("meta"), warnings.catch_warnings(action="ignore"):
            adapted = get_peft_model(model, copy.deepcopy(wanted))
    except (ValueError, TypeError, NotImplementedError, AttributeError) as error:
        found, remedy = first_line(error).rstrip("."), "Change it"
        if "incompatible with Mamba" in found:
            remedy = f"List layers in lora.target_modules, such as {', '.join(layers)}"
        raise UserError.of(
            "the adapter", expected="one that PEFT can put on the base", found=found, remedy=remedy
        ) from error
    _require_no_idle_pattern(adapted.base_model, wanted)
    tensors = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    records = {name: TensorRecord(name, "F32", tuple(one.shape), 0, 0) for name, one in tensors.items()}
    settings = adapted.peft_config["default"].to_dict()
    config = {key: sorted(value) if isinstance(value, set) else value for key, value in settings.items()}
    folder = Path("lora")  # for errors
    header = Header(folder / WEIGHTS_FILE, b"", records, None, 0)
    return _Untrained(folder, config, entries_of(folder, config, header), header)


def _layers(model: Any) -> list[str]:
    """Names of linear layers but for those that PEFT refuses beside a state, and the output head."""
    head = model.get_output_embeddings()
    found = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }
    return sorted(found - {"out_proj"})


def _require_no_idle_pattern(tuner: Any, wanted: Any) -> None:
    """Where a pattern matches no layer PEFT only warns, and not before 0.21; its rule is that of `rank_of`."""
    names = [*tuner.targeted_module_names, *tuner.targeted_parameter_names]
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(wanted, key):
            if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in names):
                raise UserError.of(
                    key, expected="patterns of adapted layers' names", found=repr(pattern), remedy="Change it"
                )


def _require_rows(model: Any, stated: Any) -> None:
    for rows in stated.values() if isinstance(stated, dict) else [stated]:
        vocabulary = model.get_input_embeddings().weight.shape[0]
        if rows and max(rows) >= vocabulary:
            raise UserError.of(
                "trainable_token_indices",
                expected=f"token numbers below {vocabulary}, the base's vocabulary",
                found=str(max(rows)),
                remedy="Change the list",
            )


def _require_parameter(adapter: Adapter, wanted: str) -> None:
    if not any(name.partition("[")[0].endswith(f".{wanted}") for name in adapter.names):
        raise UserError.of(
            "target_parameters",
            expected="ends of names of the model's parameters, such as mlp.experts.down_proj",
            found=repr(wanted),
            remedy="Change the list",
        )


def _require_module(adapter: Adapter, saved: str) -> None:
    if not any(entry.value and is_inside(saved, name) for name in adapter.names if (entry := adapter.entry(name))):
        raise UserError.of(
            "modules_to_save",
            expected="ends of names of the base's modules, such as embed_tokens, lm_head or norm",
            found=repr(saved),
            remedy="Change the list",
        )


def _require_not_quantised(model: Any) -> None:
    """Of all linear layers only the output head is left as it is in 4 and 8 bits."""
    from peft.utils.other import ModulesToSaveWrapper

    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if not isinstance(module, ModulesToSaveWrapper) or module is head:
            continue
        if any(isinstance(one, torch.nn.Linear) for one in module.original_module.modules()):
            raise UserError.of(
                "modules_to_save",
                expected="modules that are not quantised: embeddings, norms, the output head",
                found=f"{name}, with a linear layer",
                remedy="Leave it to the adapter, or set quantization.bits to 16",
            )
