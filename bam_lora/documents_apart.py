"""Packed rows for hybrids: bases some of whose layers carry a state from token to token beside those that attend.

A mask, or the documents' lengths, keep attention within a document. A state (Mamba, linear attention, a short
convolution) runs on into the next one of the row, unless kernels for it are installed, and transformers 5.23 refuses
such rows without them. So a hybrid's decoder gets its documents as rows of their own, those of like length together,
and gives the row back as it was packed.

D: documents of a group, L: tokens of the longest, T: tokens of the packed row, H: width of the stream.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

# Of the kinds that transformers 5.23 knows; others are found by their convolutions over tokens.
HYBRIDS = frozenset(
    {
        "bailing_hybrid", "bamba", "falcon_h1", "granitemoehybrid", "jamba", "kimi_linear", "lfm2", "lfm2_moe",
        "minimax", "nemotron_h", "olmo_hybrid", "qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_5_text",
        "qwen3_next", "recurrent_gemma", "zamba", "zamba2", "zaya",
    }
)  # fmt: skip
_BOUNDARIES = ("seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
_EXPERTS = ("num_experts", "router_aux_loss_coef")  # of a config
_PADDING = 1.5  # tokens with their padding, for each token


def is_hybrid(model: Any) -> bool:
    """Whether some layers of a causal language model carry a state, or look back, past a document's beginning."""
    from torch import nn

    config = model.config
    kinds = {config.model_type, config.get_text_config().model_type}
    return bool(kinds & HYBRIDS) or any(isinstance(module, nn.Conv1d) for module in model.get_decoder().modules())


def settle_hybrid(model: Any) -> None:
    """Has a hybrid's decoder take packed rows document by document; any other model stays as it is."""
    decoder = model.get_decoder()
    if decoder is model or not is_hybrid(model):
        return
    _name_experts(model.config.get_text_config())
    kind = type(decoder)
    if not issubclass(kind, _Apart):  # of the same name: transformers looks classes up by it
        decoder.__class__ = type(kind.__name__, (_Apart, kind), {"__module__": kind.__module__})


@contextmanager
def unsettled(model: Any) -> Iterator[None]:
    """Puts back, at the end, what `settle_hybrid` does to a model of the caller's meanwhile."""
    decoder, config = model.get_decoder(), vars(model.config.get_text_config())
    kind, named = type(decoder), {name: config[name] for name in _EXPERTS if name in config}
    try:
        yield
    finally:
        if type(decoder) is not kind:
            decoder.__class__ = kind
            for name in _EXPERTS:
                config.pop(name, None)
            config.update(named)


def _name_experts(config: Any) -> None:
    """Gives the config what TRL 1.16 asks it for where it computes the loss that balances experts.

    Granite's hybrids call the number of experts otherwise, and those without any have the loss's weight all the same.
    """
    experts = getattr(config, "num_local_experts", None)
    if experts is None or hasattr(config, "num_experts"):
        return
    if experts:
        config.num_experts = experts
    else:
        config.router_aux_loss_coef = 0.0


class _Apart:
    """A decoder in front of whose `forward` packed rows are taken apart."""

    def forward(
        self, input_ids: Any = None, attention_mask: Any = None, position_ids: Any = None, past_key_values: Any = None,
        inputs_embeds: Any = None, use_cache: bool | None = None, **given: Any,
    ) -> Any:  # fmt: skip
        """As the decoder's own; of a packed row, [1, T] with positions that begin anew, its output alone."""
        _call_out_proj(self)
        whole = super().forward  # type: ignore[misc]
        row = input_ids if input_ids is not None else inputs_embeds
        packed = attention_mask is None and position_ids is not None and past_key_values is None and not use_cache
        if not packed or row.shape[0] != 1:
            return whole(
                input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
                past_key_values=past_key_values, inputs_embeds=inputs_embeds, use_cache=use_cache, **given,
            )  # fmt: skip
        import torch

        given = {name: value for name, value in given.items() if name not in _BOUNDARIES}
        lengths = _lengths(position_ids)
        documents = row[0].split(lengths)
        hidden: list[Any] = [None] * len(lengths)
        routed: list[Any] = [None] * len(lengths)
        output: Any = None
        for group in _groups(lengths):
            rows = torch.nn.utils.rnn.pad_sequence([documents[one] for one in group], batch_first=True)
            held = {"input_ids" if input_ids is not None else "inputs_embeds": rows}
            mask = _mask([lengths[one] for one in group], row.device)
            output = whole(**held, attention_mask=mask, use_cache=False, **given)
            for place, one in enumerate(group):
                hidden[one] = output.last_hidden_state[place, : lengths[one]]
                routed[one] = _routed(output, place, len(group), lengths[one])
        found: dict[str, Any] = {"last_hidden_state": torch.cat(hidden)[None]}
        if routed[0] is not None:  # for the loss that balances experts
            found["router_logits"] = tuple(torch.cat(layer) for layer in zip(*routed, strict=True))
        return type(output)(**found)


def _routed(output: Any, place: int, rows: int, length: int) -> list[Any] | None:
    """What the router of every layer made of one document, [L, experts] each; None if the decoder does not say."""
    layers = getattr(output, "router_logits", None)
    if not layers:
        return None
    return [one.view(rows, -1, one.shape[-1])[place, :length] for one in layers if one is not None]


def _call_out_proj(decoder: Any) -> None:
    """Has Mamba-2 layers call their last linear layer.

    In training mode the kernel of mamba-ssm multiplies by its weight itself: by 4-bit codes, and past its adapter.
    Nothing else of such a layer goes by its own mode, which training sets again and again.
    """
    for module in decoder.modules():
        if hasattr(module, "A_log") and hasattr(module, "out_proj"):
            module.training = False


def _lengths(position_ids: Any) -> list[int]:
    """Tokens of each document of a row, from their positions, [1, T] or, with several axes, [axes, 1, T]."""
    begins = (position_ids.flatten(0, -2)[0] == 0).nonzero().flatten().tolist()
    begins = begins if begins[:1] == [0] else [0, *begins]  # a row of a script's own may begin within a document
    return [end - begin for begin, end in itertools.pairwise([*begins, position_ids.shape[-1]])]


def _groups(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Documents of like length, the longest first, so that there is at most half as much padding as text."""
    group: list[int] = []
    tokens = 0
    for one in sorted(range(len(lengths)), key=lambda one: -lengths[one]):
        if group and (len(group) + 1) * lengths[group[0]] > _PADDING * (tokens + lengths[one]):
            yield group
            group, tokens = [], 0
        group.append(one)
        tokens += lengths[one]
    yield group


def _mask(lengths: Sequence[int], device: Any) -> Any:
    """Which of [D, L] are tokens, not padding; None if all are."""
    import torch

    if len(set(lengths)) == 1:
        return None
    return (torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]).long().to(device)
