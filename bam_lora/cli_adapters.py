"""The commands that work on adapters: merge, fold, export; the first two without any run."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from bam_lora.cli_complete import methods
from bam_lora.cli_push import Exported, Public_, Push_, Revision_, push_result, require_sense

Run_ = Annotated[Path, typer.Argument(help="Run directory.", metavar="RUN")]
Adapters_ = Annotated[
    list[str], typer.Option("--adapter", metavar="A", help="PEFT LoRA adapter folder. May be repeated.")
]
OptionalAdapters_ = Annotated[
    list[str] | None,
    typer.Option("--adapter", metavar="A", help="PEFT LoRA adapter folder. May be repeated. A difference needs none."),
]
Weights_ = Annotated[
    list[float] | None,
    typer.Option("--weight", metavar="W", help="Weight of each adapter, in order, used as it is. Default: their mean."),
]
Method_ = Annotated[
    str,
    typer.Option(
        help="Merge method: linear, slerp (two adapters), karcher, model_stock; element by element: ties, dare_linear, "
        "dare_ties, breadcrumbs.",
        autocompletion=methods,
    ),
]
Density_ = Annotated[float, typer.Option(help="Share of each delta's elements that ties, dare and breadcrumbs keep.")]
Gamma_ = Annotated[float, typer.Option(help="Share of the largest elements that breadcrumbs drops.")]
Seed_ = Annotated[int, typer.Option(help="Of dare_linear, dare_ties and stochastic rounding.")]
MergeSeed_ = Annotated[int, typer.Option(help="Of dare_linear and dare_ties.")]
AnyBase_ = Annotated[bool, typer.Option("--any-base", help="Allow adapters that name another base.")]


def merge(
    adapter: Adapters_,
    output: Annotated[Path, typer.Option(help="New folder for the merged adapter.")],
    weight: Weights_ = None,
    method: Method_ = "linear",
    rank: Annotated[
        int | None,
        typer.Option(
            help="Keep this rank, and say the error; methods element by element need it. Default: all, exact."
        ),
    ] = None,
    density: Density_ = 0.5,
    gamma: Gamma_ = 0.01,
    seed: MergeSeed_ = 0,
    any_base: AnyBase_ = False,
) -> None:
    """Merges LoRA adapters into one exact adapter.

    ΔW = Σ weight · scaling · B·A, stacked along the rank. With --rank the largest singular directions of each weight's
    ΔW are kept and the error is said.

    Examples:
        bam-lora merge --adapter a --adapter b --output merged
        bam-lora merge --adapter a --adapter b --rank 4 --output small
    """
    from bam_lora.dense_methods import DenseOptions
    from bam_lora.merged_adapter import merge_adapters

    options = DenseOptions(density, gamma, seed)
    statistics = merge_adapters(
        adapter, output, weights=weight, method=method, rank=rank, any_base=any_base, options=options
    )
    norms = ", ".join(f"{norm:.4g}" for norm in statistics["delta_norms"])
    cosine = "" if statistics["cosine"] is None else f", cosine {statistics['cosine']:.4f}"
    typer.echo(f"{output}: |ΔW| {statistics['merged_norm']:.4g} from {norms}{cosine}")
    if rank is not None:
        _echo_error(statistics)


def fold(
    base: Annotated[str, typer.Option(help="Full-precision model: folder or Hub id.")],
    output: Annotated[Path, typer.Option(help="New folder for the folded model.")],
    adapter: OptionalAdapters_ = None,
    weight: Weights_ = None,
    method: Method_ = "linear",
    difference: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Add MODEL minus --difference-base, tensor by tensor.")
    ] = None,
    difference_base: Annotated[
        str | None, typer.Option(metavar="BASE", help="The full-precision model that MODEL was made from.")
    ] = None,
    difference_weight: Annotated[float, typer.Option(metavar="W", help="Factor of that difference.")] = 1.0,
    dtype: Annotated[str | None, typer.Option(help="bfloat16, float16 or float32. Default: as the base.")] = None,
    max_shard_size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Largest file, such as 5GB or 500MB. Default: the base's files.")
    ] = None,
    rounding: Annotated[
        str, typer.Option(help="nearest, or stochastic: unbiased, seeded (16-bit models).")
    ] = "nearest",
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare sampled rows with float64 before it counts.")
    ] = False,
    density: Density_ = 0.5,
    gamma: Gamma_ = 0.01,
    seed: Seed_ = 0,
    any_base: AnyBase_ = False,
    device: Annotated[str, typer.Option(help="Where the products are computed: cpu or cuda.")] = "cpu",
) -> None:
    """Adds the deltas of LoRA adapters to a model's weights.

    They are merged, and added in fp32, rounded once, block by block. Killed in the middle, the same command goes on
    from the files that are finished.

    --difference adds what another model has learned since its base, whole and frozen: a chat vector.

    Examples:
        bam-lora fold --base meta-llama/Llama-3.1-8B --adapter a --output folded
    """
    from bam_lora.dense_methods import DenseOptions
    from bam_lora.fold_layout import parse_size
    from bam_lora.folding import fold as fold_adapters

    with _progress() as progress:
        facts = fold_adapters(
            base,
            adapter or [],
            output,
            weights=weight,
            method=method,
            difference=_difference(difference, difference_base, difference_weight),
            dtype=dtype,
            max_shard_bytes=None if max_shard_size is None else parse_size(max_shard_size),
            rounding=rounding,
            seed=seed,
            verify=verify,
            any_base=any_base,
            options=DenseOptions(density, gamma, seed),
            device=device,
            progress=progress,
        )
    resumed = f", {facts['resumed_shards']} of {facts['shards']} files from before" if facts["resumed_shards"] else ""
    typer.echo(
        f"{output}: {facts['changed']} of {facts['tensors']} tensors changed, "
        f"{facts['bytes'] / 1e9:.2f} GB in {facts['seconds']:.1f} s{resumed}"
    )
    if facts["vocabulary"] is not None and facts["tokenizer"] == "base":
        typer.echo(
            f"warning: the vocabulary has {facts['vocabulary']} rows now and the tokenizer is still the base's; "
            "put the adapter's tokenizer files beside the model",
            err=True,
        )
    if facts["verified"] is not None:
        _echo_verified(facts["verified"])


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[int, int], None] | None]:
    """A bar on a terminal; nothing in a file or a pipe."""
    if not sys.stderr.isatty():
        yield None
        return
    with typer.progressbar(length=1, label="folding", file=sys.stderr, update_min_steps=1 << 24) as bar:

        def progress(count: int, total: int) -> None:
            bar.length = total
            bar.update(count)

        yield progress


def _difference(model: str | None, base: str | None, weight: float) -> tuple[str, str, float] | None:
    from bam_lora.errors import UserError

    if model is not None and base is not None:
        return model, base, weight
    if model is None and base is None:
        return None
    raise UserError.of(
        "--difference" if base is None else "--difference-base",
        expected="both --difference MODEL and --difference-base BASE",
        found="it alone",
        remedy="Name the model and the one it was made from",
    )


def _echo_verified(verified: dict[str, Any]) -> None:
    typer.echo(
        f"verified {verified['rows']} rows of {verified['tensors']} tensors: {verified['identical']:.4%} as float64 "
        f"rounded directly, at most {verified['worst_ulp']:.2g} units in the last place off"
    )


def _echo_error(facts: dict[str, Any]) -> None:
    worst = max(facts["errors"], key=lambda name: facts["errors"][name])
    typer.echo(f"relative error of the delta {facts['error']:.2%}; most in {worst}: {facts['errors'][worst]:.2%}")


def export(
    run_directory: Run_,
    output: Annotated[
        Path | None, typer.Option(help="New folder for the adapter, or with --chat-vector the model.")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Recompress to this rank. Default: exact.")] = None,
    scale: Annotated[float, typer.Option(help="λ on all that the run has added.")] = 1.0,
    chat_vector: Annotated[
        str | None,
        typer.Option(metavar="INSTRUCT", help="Instruct model of the run's base: write a model with what it knows."),
    ] = None,
    against: Annotated[
        str | None, typer.Option(metavar="BASE", help="Base of INSTRUCT. Default: the run's original base.")
    ] = None,
    weight: Annotated[float, typer.Option(metavar="W", help="Factor of the chat vector.")] = 1.0,
    verify: Annotated[bool, typer.Option("--verify", help="Compare sampled rows of the model with float64.")] = False,
    push: Push_ = None,
    public: Public_ = None,
    revision: Revision_ = None,
) -> None:
    """Writes a run as one LoRA adapter, or publishes its result.

    The adapter is on the run's original base, to load with PEFT or to serve beside it. Exact without --rank: all
    branches' factors, stacked. With it the largest singular directions are kept and the error is said.

    --chat-vector writes a model instead: the original base, all that the run has added, and W times INSTRUCT minus its
    base, rounded once, with the tokenizer and chat template of INSTRUCT.

    --push uploads the run's model, or what --output names, with its card and report to the Hub.

    Examples:
        bam-lora export runs/german --output german-lora --rank 128
        bam-lora export runs/german --chat-vector org/base-instruct --output chat
        bam-lora export runs/german --push my-name/german
    """
    writes = Exported(output, rank, scale, chat_vector, against, weight, verify)
    require_sense(writes, push=push, public=public, revision=revision)
    note = None
    if chat_vector is not None:
        assert output is not None
        _export_chat(run_directory, chat_vector, output, against=against, weight=weight, scale=scale, verify=verify)
        note = f"On top of the run: {weight:g} times what {chat_vector} has learned since its base (a chat vector)."
    elif output is not None:
        note = _export_adapter(run_directory, output, rank, scale)
    if push is not None:
        push_result(run_directory, push, folder=output, public=public, revision=revision, note=note)


def _export_adapter(run: Path, output: Path, rank: int | None, scale: float) -> str:
    from bam_lora.export import export_adapter

    facts = export_adapter(run, output, rank=rank, scale=scale)
    typer.echo(f"{output}: rank {facts['rank']} on {facts['base']}, from a stacked rank of {facts['stacked_rank']}")
    if rank is None:
        return f"The run as one LoRA adapter, exact, of rank {facts['rank']}."
    _echo_error(facts)
    return f"The run as one LoRA adapter of rank {facts['rank']}; relative error of its delta {facts['error']:.2%}."


def _export_chat(
    run: Path, instruct: str, output: Path, *, against: str | None, weight: float, scale: float, verify: bool
) -> None:
    from bam_lora.chat_vector import export_with_chat_vector

    with _progress() as progress:
        facts = export_with_chat_vector(
            run, instruct, output, against=against, weight=weight, scale=scale, verify_rows=verify, progress=progress
        )
    typer.echo(f"{output}: |ΔW| {facts['delta_norm']:.4g}, {facts['bytes'] / 1e9:.2f} GB in {facts['seconds']:.1f} s")
    if facts["verified"] is not None:
        _echo_verified(facts["verified"])
