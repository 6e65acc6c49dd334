"""Attention document by document, against `sdpa` with the dense mask that it stands in for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from small_models import SMALL

from bam_lora import packed_attention
from bam_lora.attention import PACKED, PACKED_MODELS
from bam_lora.packed_attention import Documents

LENGTHS = (5, 9, 9, 1, 1, 17, 30, 2)
WINDOW = 6
WINDOWED = ("gemma3_text", "ministral", "mistral", "mixtral", "olmo3", "phi3", "qwen2", "qwen3", "starcoder2")
MIXED = {"gemma3_text", "ministral", "olmo3", "qwen2", "qwen3"}  # those that may have layers of both kinds
Step = tuple[float, torch.Tensor, dict[str, torch.Tensor]]


@pytest.fixture(autouse=True)
def _registered() -> None:
    packed_attention.register()


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[Documents]:
    """The documents that layers attended to one by one."""
    seen: list[Documents] = []
    own = packed_attention._one_by_one

    def one_by_one(query: Any, key: Any, value: Any, documents: Documents, *rest: Any) -> torch.Tensor:
        seen.append(documents)
        return own(query, key, value, documents, *rest)

    monkeypatch.setattr(packed_attention, "_one_by_one", one_by_one)
    return seen


def model_of(kind: str, **changes: Any) -> Any:
    values = {**SMALL, **changes}
    if kind in WINDOWED:
        values |= {"sliding_window": WINDOW}
        values |= {"layer_types": ["sliding_attention", "full_attention"]} if kind in MIXED else {}
        values |= {"use_sliding_window": True} if kind.startswith("qwen") else {}
    values |= {"eos_token_id": 1, "bos_token_id": 2}
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **values))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    return model


def adapted(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    view = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in view.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    return view.train()


def places(lengths: tuple[int, ...] = LENGTHS) -> torch.Tensor:
    return torch.cat([torch.arange(length) for length in lengths])[None]


def tokens(rows: int = 1, length: int = sum(LENGTHS)) -> torch.Tensor:
    return torch.randint(3, 96, (rows, length), generator=torch.Generator().manual_seed(1))


def step(model: Any, kind: str, ids: torch.Tensor, at: torch.Tensor) -> Step:
    """Loss, logits and the gradients of all that is trained."""
    model.set_attn_implementation(kind)
    model.zero_grad()
    found = model(input_ids=ids, position_ids=at, labels=ids, use_cache=False)
    found.loss.backward()
    trained = {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}
    return found.loss.item(), found.logits.detach(), trained


def assert_equal_steps(found: Step, expected: Step, tolerance: float) -> None:
    assert found[0] == pytest.approx(expected[0], rel=tolerance)
    assert (found[1] - expected[1]).norm() <= tolerance * expected[1].norm()
    assert found[2].keys() == expected[2].keys()
    for name, gradient in expected[2].items():
        assert (found[2][name] - gradient).norm() <= 2 * tolerance * gradient.norm(), name


@pytest.mark.parametrize("kind", sorted(PACKED_MODELS))
@pytest.mark.filterwarnings("ignore:fan_in_fan_out", "ignore:The following (rank|alpha)_pattern")
def test_every_known_kind_is_as_with_a_dense_mask(kind: str, used: list[Documents]) -> None:
    model = adapted(model_of(kind))
    expected = step(model, "sdpa", tokens(), places())
    assert not used
    found = step(model, PACKED, tokens(), places())
    assert [one.lengths for one in used] == [LENGTHS] * 2  # both layers
    assert (WINDOW in {one.window for one in used}) == (kind in WINDOWED)
    assert_equal_steps(found, expected, 1e-5)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3", "gemma3_text"])
def test_in_bfloat16_it_is_close(kind: str) -> None:
    model = adapted(model_of(kind))
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = (step(model, name, tokens(), places()) for name in ("sdpa", PACKED))
    assert found[0] == pytest.approx(expected[0], rel=0.01)
    for name, gradient in expected[2].items():
        assert (found[2][name] - gradient).norm() <= 0.1 * gradient.norm(), name


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3", "gemma3_text"])
def test_documents_know_nothing_of_each_other(kind: str) -> None:
    model = model_of(kind).eval()
    model.set_attn_implementation(PACKED)
    ids, changed = tokens(), tokens()
    changed[0, 7] = 3 + (ids[0, 7] + 1) % 90  # of the second document, which is at 5 to 13
    with torch.no_grad():
        before, after = (model(input_ids=one, position_ids=places(), use_cache=False).logits for one in (ids, changed))
    differs = (before != after).any(dim=-1)[0]
    assert differs[7:14].all()
    assert not differs[:7].any()
    assert not differs[14:].any()


def test_a_leak_between_documents_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(model_of("llama"))
    expected = step(model, "sdpa", tokens(), places())
    own = packed_attention._documents

    def leaking(*given: Any) -> Documents:
        found = own(*given)
        assert found is not None
        first, second, *rest = found.lengths
        return Documents((first + second, *rest), found.offsets, found.window)

    monkeypatch.setattr(packed_attention, "_documents", leaking)
    with pytest.raises(AssertionError):
        assert_equal_steps(step(model, PACKED, tokens(), places()), expected, 1e-5)


def test_several_rows_with_documents_of_their_own(used: list[Documents]) -> None:
    model = adapted(model_of("gemma3_text"))
    at = torch.cat([places(), places(LENGTHS[::-1])])
    expected, found = (step(model, name, tokens(2), at) for name in ("sdpa", PACKED))
    assert used[0].lengths == LENGTHS + LENGTHS[::-1]
    assert_equal_steps(found, expected, 1e-5)


def test_one_document_longer_than_the_window_needs_no_mask_either(used: list[Documents]) -> None:
    model = adapted(model_of("mistral"))
    expected, found = (step(model, name, tokens(), places((sum(LENGTHS),))) for name in ("sdpa", PACKED))
    assert {one.lengths for one in used} == {(sum(LENGTHS),)}
    assert_equal_steps(found, expected, 1e-5)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing")
def test_with_checkpointing(used: list[Documents]) -> None:
    model = adapted(model_of("mistral"))
    expected = step(model, PACKED, tokens(), places())
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    found = step(model, PACKED, tokens(), places())
    assert len(used) == 2 + 4
    assert_equal_steps(found, expected, 1e-6)


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma3_text"])
def test_padded_rows_and_generation_go_through_sdpa(kind: str, used: list[Documents]) -> None:
    model = model_of(kind).eval()
    ids = tokens(2, 20)
    padding = torch.ones_like(ids)
    padding[0, 12:] = 0
    prompt = padding.flip(1)
    found = {}
    for name in ("sdpa", PACKED):
        model.set_attn_implementation(name)
        with torch.no_grad():
            padded, whole = (model(input_ids=ids, attention_mask=one).logits for one in (padding, padding * 0 + 1))
            longer = model.generate(ids, attention_mask=prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)
        found[name] = padded, whole, longer
    assert not used
    for one, other in zip(*found.values(), strict=True):
        assert torch.equal(one, other)


def test_other_masks_are_left_to_sdpa() -> None:
    from transformers.masking_utils import and_masks, causal_mask_function, sdpa_mask

    def both_ways(batch: Any, head: Any, query: Any, key: Any) -> torch.Tensor:
        return (query // 4) >= (key // 4)

    def every_second(batch: Any, head: Any, query: Any, key: Any) -> torch.Tensor:
        return (query - key) % 2 == 0

    for function in (both_ways, and_masks(causal_mask_function, every_second)):
        given = {"mask_function": function, "allow_is_causal_skip": False, "device": "cpu"}
        found = packed_attention.packed_mask(1, 12, 12, **given)
        if isinstance(found, Documents):  # what it was taken for must then be what it is
            found = dense(found)
        assert torch.equal(found, sdpa_mask(1, 12, 12, **given))  # type: ignore[arg-type]


def test_a_cpu_takes_a_mask_for_few_tokens_that_are_mostly_one_document(used: list[Documents]) -> None:
    model = model_of("llama")
    for lengths, without in (((60, 14), False), ((37, 37), True), ((400, 120), True)):
        used.clear()
        ids = tokens(length=sum(lengths))
        step(model, PACKED, ids, places(lengths))
        assert bool(used) == without, lengths


def dense(documents: Documents) -> torch.Tensor:
    """The mask that documents stand for, of one row."""
    at = torch.arange(sum(documents.lengths))
    document = torch.repeat_interleave(torch.tensor(documents.lengths))
    distance = at[:, None] - at[None]
    mask = (distance >= 0) & (document[:, None] == document[None])
    if documents.window is not None:
        mask &= distance < documents.window
    return mask[None, None]


def offsets(lengths: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


@pytest.mark.parametrize("window", [None, 1, 2, 7, 8, 16, 64])
@pytest.mark.parametrize("lengths", [(64,), (16, 16, 16, 16), (7, 8, 9, 15, 16, 9)])
def test_windows_of_any_size(window: int | None, lengths: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    documents = Documents(lengths, offsets(lengths), window)
    query, key, value = (torch.randn(1, heads, 64, 8) for heads in (4, 2, 2))
    found, _ = packed_attention.packed_attention(None, query, key, value, documents, scaling=0.7)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=dense(documents), scale=0.7, enable_gqa=True
    )
    torch.testing.assert_close(found, expected.transpose(1, 2), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("asked", ["softcap", "s_aux", "position_bias"])
def test_what_it_cannot_do_is_refused(asked: str) -> None:
    query = torch.zeros(1, 1, 4, 8)
    with pytest.raises(ValueError, match=rf"attention 'packed': Linear needs {asked}, which it has not; take sdpa"):
        packed_attention.packed_attention(
            torch.nn.Linear(1, 1), query, query, query, Documents((4,), offsets((4,)), None), **{asked: 1.0}
        )


def reference_kernel(calls: list[dict[str, Any]], *, shares: bool) -> Callable[..., torch.Tensor]:
    """torch's `varlen_attn` as its documentation has it, in plain operations."""

    def kernel(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, begins: torch.Tensor, begins_k: torch.Tensor,
        longest: int, longest_k: int, *, scale: float | None, window_size: tuple[int, int], enable_gqa: bool = False,
    ) -> torch.Tensor:  # fmt: skip
        calls.append({"query": query, "key": key, "value": value, "begins": begins, "longest": longest,
                      "window_size": window_size, "scale": scale})  # fmt: skip
        assert torch.equal(begins, begins_k)
        assert longest == longest_k
        assert enable_gqa == shares
        assert shares or key.shape[1] == query.shape[1]
        times = query.shape[1] // key.shape[1]
        results = []
        for begin, end in zip(begins.tolist(), begins.tolist()[1:], strict=False):
            q, k, v = (one[begin:end].transpose(0, 1) for one in (query, key, value))
            at = torch.arange(end - begin)
            left = window_size[0] if window_size[0] >= 0 else end
            seen = (at[None] <= at[:, None] + window_size[1]) & (at[None] >= at[:, None] - left)
            scores = (q @ k.repeat_interleave(times, 0).transpose(1, 2)) * (scale or q.shape[-1] ** -0.5)
            weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
            results.append((weights @ v.repeat_interleave(times, 0)).transpose(0, 1))
        return torch.cat(results)

    return kernel


@pytest.mark.parametrize("shares", [True, False])
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3", "gemma3_text"])
def test_the_kernel_gets_what_it_documents(kind: str, shares: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    kernel = reference_kernel(calls, shares=shares)
    monkeypatch.setattr(packed_attention, "_kernel", lambda: (kernel, shares))
    monkeypatch.setattr(packed_attention, "kernel_takes", lambda *given: True)
    model = adapted(model_of(kind))
    expected, found = (step(model, name, tokens(), places()) for name in ("sdpa", PACKED))
    assert_equal_steps(found, expected, 1e-5)
    assert len(calls) == 2
    for call in calls:
        assert call["query"].shape == (sum(LENGTHS), 4, 8)
        assert call["key"].shape == call["value"].shape == (sum(LENGTHS), 2 if shares else 4, 8)
        assert call["begins"].dtype == torch.int32
        assert call["begins"].tolist() == [0, 5, 14, 23, 24, 25, 42, 72, 74]
        assert call["longest"] == 30
        assert all(one.stride(-1) == 1 for one in (call["query"], call["key"], call["value"]))
    windows = {call["window_size"] for call in calls}
    both = {(-1, 0), (WINDOW - 1, 0)}
    assert windows == (both if kind in MIXED else both - {(-1, 0)} if kind in WINDOWED else {(-1, 0)})


def test_the_kernel_computes_in_the_type_of_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(packed_attention, "_kernel", lambda: (reference_kernel(calls, shares=True), True))
    monkeypatch.setattr(packed_attention, "kernel_takes", lambda *given: True)
    model = adapted(model_of("qwen3"))  # in fp32, as are its norms of queries and keys
    with torch.autocast("cpu", torch.bfloat16):
        step(model, PACKED, tokens(), places())
    assert {one.dtype for call in calls for one in (call["query"], call["key"], call["value"])} == {torch.bfloat16}


def test_this_torch_has_the_kernel() -> None:
    found = packed_attention._kernel()
    assert found is not None
    assert found[0] is torch.nn.attention.varlen.varlen_attn


def test_where_the_kernel_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    takes, cuda = packed_attention.kernel_takes, torch.device("cuda")
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    assert takes(cuda, torch.bfloat16, 128, 128)
    assert takes(cuda, torch.float16, 192, 192)
    assert not takes(cuda, torch.bfloat16, 256, 256)  # only on the large chips
    assert not takes(cuda, torch.float32, 128, 128)
    assert not takes(cuda, torch.bfloat16, 100, 100)
    assert not takes(cuda, torch.bfloat16, 128, 64)
    assert not takes(torch.device("cpu"), torch.bfloat16, 128, 128)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert takes(cuda, torch.bfloat16, 256, 256)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not takes(cuda, torch.float16, 128, 128)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    assert not takes(cuda, torch.bfloat16, 128, 128)
