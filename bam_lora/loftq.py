"""LoftQ: an adapter that begins as the best low-rank correction of its base's 4-bit error (arXiv 2310.08659).

The correction belongs to the 4-bit copy, not to the weights that are folded into: what a branch has learned is
scaling · (B·A - B₀·A₀), a delta of rank 2r. So the adapter is saved as [B, -B₀] · [A; A₀], plain LoRA of the full base.
Shapes: o output, i input, r rank.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from bam_lora.adapter_entries import PREFIX
from bam_lora.adapters import CONFIG_FILE, WEIGHTS_FILE
from bam_lora.checkpoint import Checkpoint, open_checkpoint
from bam_lora.errors import UserError
from bam_lora.fold_plan import find_pieces, stored_matrix
from bam_lora.parameter_names import stored_parameters
from bam_lora.safetensors_stream import map_tensor, read_header, read_tensor, write_tensors
from bam_lora.store import write_text

Tensors = dict[str, torch.Tensor]


def begin(model: Any, file: Path, *, fresh: bool) -> Tensors:
    """Sets the factors of every adapted layer to the correction, and keeps them for the end.

    Args:
        model: The adapted 4-bit model; its `name_or_path` is the folder of its full-precision weights.
        file: Where the first factors are kept, so that a resumed branch takes off the very ones it began with.
        fresh: Whether the branch begins; else they are read.

    Returns:
        {"<module>.lora_A.weight", "<module>.lora_B.weight": the first factors, fp32 on the CPU}.

    Raises:
        UserError: If an adapted layer is not quantised to 4 bits.
    """
    if fresh:
        write_tensors(file, _corrections(model))
    initial = {name: read_tensor(file, record) for name, record in read_header(file).tensors.items()}
    parameters = dict(model.named_parameters())
    for name, value in initial.items():
        (adapter,) = model.peft_config
        module, _, half = name.rpartition(".lora_")
        parameters[f"{PREFIX}{module}.lora_{half[0]}.{adapter}.weight"].data.copy_(value)
    return initial


def _corrections(model: Any) -> Tensors:
    import bitsandbytes as bnb
    from peft.tuners.lora.layer import LoraLayer

    checkpoint = open_checkpoint(Path(model.get_base_model().name_or_path))
    (adapter,) = model.peft_config
    found = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        module, weight = name.removeprefix(PREFIX), layer.get_base_layer().weight
        if not isinstance(weight, bnb.nn.Params4bit):
            raise UserError.of(
                "lora.init: loftq",
                expected="adapted layers that are quantised to 4 bits",
                found=f"{module}, which is not",
                remedy="Name the others in lora.target_modules, or use another init",
            )
        shown = bnb.functional.dequantize_4bit(weight.data, weight.quant_state).float()
        W_oi = read_weight(checkpoint, f"{module}.weight").to(shown.device)
        B_or, A_ri = low_rank_part((W_oi - shown) / layer.scaling[adapter], layer.r[adapter])
        found[f"{module}.lora_A.weight"], found[f"{module}.lora_B.weight"] = A_ri.cpu(), B_or.cpu()
    return found


def read_weight(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """A parameter of the model, (o, i) in fp32, wherever the checkpoint stores it; KeyError if it does not."""
    tensors = checkpoint.tensors()
    pieces = find_pieces(name, tensors, stored_parameters(checkpoint.config, tensors))
    if pieces is None:
        raise KeyError(name)
    paths = {stored: header.path for header in checkpoint.shards.values() for stored in header.tensors}
    found = [(piece, map_tensor(paths[piece.tensor], stored_matrix(checkpoint, piece)).float()) for piece in pieces]
    return torch.cat([matrix.T if piece.transposed else matrix for piece, matrix in found])


def low_rank_part(E_oi: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(B_or, A_ri) whose product is the best approximation of a matrix of that rank, both halves of the same size."""
    if E_oi.shape[0] > E_oi.shape[1]:
        B_ir, A_ro = low_rank_part(E_oi.T, rank)
        return A_ro.T.contiguous(), B_ir.T.contiguous()
    squares, vectors = torch.linalg.eigh(E_oi @ E_oi.T)
    count = min(rank, len(squares))
    roots_r = squares[-count:].clamp(min=torch.finfo(torch.float32).tiny).sqrt().sqrt()
    B_or, A_ri = vectors[:, -count:] * roots_r, vectors[:, -count:].T @ E_oi / roots_r[:, None]
    pad = rank - count
    return torch.nn.functional.pad(B_or, (0, pad)).contiguous(), torch.nn.functional.pad(A_ri, (0, 0, 0, pad))


def subtract(folder: Path, initial: Tensors) -> None:
    """Rewrites a saved adapter so that it is what training added to its first factors."""
    file = folder / WEIGHTS_FILE
    header = read_header(file)
    tensors = {name: read_tensor(file, record) for name, record in header.tensors.items()}
    for name, first in initial.items():
        trained = tensors[PREFIX + name]
        halves = [trained, first] if name.endswith("lora_A.weight") else [trained, -first]
        tensors[PREFIX + name] = torch.cat(halves, dim=0 if name.endswith("lora_A.weight") else 1).contiguous()
    write_tensors(file, tensors, header.metadata)
    path = folder / CONFIG_FILE
    config = json.loads(path.read_text(encoding="utf-8"))
    growth = math.sqrt(2) if config["use_rslora"] else 2  # of alpha, for the same scaling at twice the rank
    config["r"], config["lora_alpha"] = 2 * config["r"], growth * config["lora_alpha"]
    config["rank_pattern"] = {key: 2 * value for key, value in (config["rank_pattern"] or {}).items()}
    config["alpha_pattern"] = {key: growth * value for key, value in (config["alpha_pattern"] or {}).items()}
    config["init_lora_weights"] = True
    write_text(path, json.dumps(config, indent=2, sort_keys=True) + "\n")
