"""The command line: every command parses, calls one function, prints what came back."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from bam_lora.cli_adapters import Run_, export, fold, merge
from bam_lora.cli_check import check
from bam_lora.cli_complete import BeginnersFirst, story_languages
from bam_lora.cli_errors import VERBOSE, command
from bam_lora.cli_next import after_run
from bam_lora.cli_start import doctor, init
from bam_lora.cli_tasks import Limit, NumFewshot, Tasks, specs_of, tasks_text
from bam_lora.errors import UserError

app = typer.Typer(
    name="bam-lora",
    cls=BeginnersFirst,
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Branch-and-Merge with LoRA: teach a language model a new language on one GPU, and keep what it knew.\n\n"
    "Start with `bam-lora quickstart`: the whole loop on an embedded tiny model, on a CPU, in minutes. `doctor` says "
    "whether this machine can do more. Then `init` writes a recipe, `check` says what it will do, `run` does it, "
    "`status` tells how far it is, `report` what was learned and forgotten, `export` gives or publishes the result. "
    "`merge` and `fold` work on any PEFT LoRA adapters. Tab completes: --install-completion.\n\n"
    "Exit status: 0 done, 1 something for you to put right, 2 wrong usage, 130 interrupted. --verbose, anywhere, adds "
    "the traceback of an error and the libraries' own messages.",
)


def main() -> None:
    """Entry point of the `bam-lora` script."""
    if "--verbose" in sys.argv:
        sys.argv.remove("--verbose")
        os.environ[VERBOSE] = "1"
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what its encoding lacks is written as an escape, not an error
            stream.reconfigure(errors="backslashreplace")
    app(prog_name="bam-lora")


Recipe_ = Annotated[Path, typer.Argument(help="Recipe in YAML (docs/recipe.md).", metavar="RECIPE")]
Set_ = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key: --set bam.slices=4. May be repeated."),
]

Plots_ = Annotated[
    Path | None, typer.Option(help="Also write every plot into this folder: SVG, and PNG where resvg-py is installed.")
]


@app.command()
@command
def quickstart(
    output: Annotated[Path, typer.Option(help="Folder for the runs and the report.")] = Path("quickstart"),
    language: Annotated[
        str, typer.Option(help="Language to teach: german or bulgarian.", autocompletion=story_languages)
    ] = "german",
) -> None:
    """The whole loop on a tiny model: CPU, offline, minutes.

    Teaches an embedded English model German (or Bulgarian) stories, twice over the same tokens, as one QLoRA run
    (`single`) and as Branch-and-Merge (`bam`), and shows what each learned and forgot.

    Examples:
        bam-lora quickstart
        bam-lora quickstart --language bulgarian --output quickstart-bg
    """
    from bam_lora.quickstart.driver import quickstart as start

    typer.echo(start(output, language))


app.command()(command(check))


@app.command()
@command
def run(
    recipe: Recipe_,
    output: Annotated[Path | None, typer.Option(help="Run directory, if not the recipe's.")] = None,
    overrides: Set_ = None,
    extend: Annotated[bool, typer.Option("--extend", help="Train a finished run on more slices and new data.")] = False,
    baseline: Annotated[
        float | None,
        typer.Option(
            help="Afterwards, probe on this share of the tokens whether a single run does as well: 0.05. Default: no."
        ),
    ] = None,
) -> None:
    """Runs a recipe, or goes on where it was stopped.

    Ctrl-C (or SIGTERM) stops at the next step and leaves a checkpoint; the same command goes on. A finished run is
    left alone. --extend takes the recipe with a higher bam.slices and more data.target.

    Examples:
        bam-lora run german.yaml
        bam-lora run german.yaml --set strategy=single --output runs/single
    """
    from bam_lora.loop import run as start
    from bam_lora.report import render_text, write_report

    wanted = _load(recipe, overrides, output)
    report = start(wanted, extend=extend)
    if baseline is not None:
        from bam_lora.baseline import probe_baseline

        probe_baseline(Path(wanted.output).expanduser().resolve(), wanted, baseline)
        report = write_report(Path(wanted.output).expanduser())
    typer.echo(render_text([report], None))
    typer.echo(f"\n{after_run(Path(wanted.output).expanduser())}")


@app.command()
@command
def status(run_directory: Run_) -> None:
    """Where a run is and what is left; also while it runs.

    Examples:
        bam-lora status runs/german
    """
    from bam_lora.status import describe_run

    typer.echo(describe_run(run_directory))


app.command()(command(init))
for adapters_command in (merge, fold, export, doctor):
    app.command()(command(adapters_command))


@app.command(name="eval")
@command
def evaluate(
    model: Annotated[str, typer.Argument(help="Model folder, Hub id or finished run.", metavar="MODEL")],
    target: Annotated[list[str] | None, typer.Option(help="Text in the language learned. May be repeated.")] = None,
    source: Annotated[list[str] | None, typer.Option(help="Text of what the base knew. May be repeated.")] = None,
    text: Annotated[str, typer.Option(help="Column that holds the text.")] = "text",
    chat: Annotated[bool, typer.Option("--chat", help="Rows are conversations: score their answers.")] = False,
    precision: Annotated[str, typer.Option(help="4bit or 16bit; compare only scores of the same.")] = "4bit",
    window_bytes: Annotated[
        int | None, typer.Option(help="Bytes in a window. Default: as the model's context.")
    ] = None,
    tasks: Tasks = None,
    num_fewshot: NumFewshot = None,
    limit: Limit = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Scores a model on text, in bits per byte, and on benchmarks.

    Fewer bits are better, and compare across tokenisers. Compare only scores of the same --precision.

    Examples:
        bam-lora eval runs/german --target valid.de.jsonl
        bam-lora eval runs/german --tasks belebele_deu_Latn,arc_de --limit 200
    """
    from bam_lora.score_files import score_files

    result = score_files(
        model, target, source, text=text, chat=chat, precision=precision, window_bytes=window_bytes,
        tasks=specs_of(tasks, num_fewshot, limit), say=lambda line: typer.echo(line, err=True),
    )  # fmt: skip
    if as_json:
        typer.echo(json.dumps(result, indent=2, ensure_ascii=False))
        return
    for one in result["scores"]:
        error = "" if one["stderr"] is None else f" ± {one['stderr']:.4f}"
        typer.echo(
            f"{one['role']:7} {one['set']}: {one['bits_per_byte']:.4f}{error} bits per byte, {one['bytes']:,} bytes"
        )
    if result["tasks"]:
        typer.echo(tasks_text(result["tasks"]))


@app.command()
@command
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run directories, two or more.", metavar="RUN RUN...")],
    output: Annotated[Path | None, typer.Option(help="Also write the comparison as JSON.")] = None,
    html: Annotated[Path | None, typer.Option(help="Also write it as an HTML report.")] = None,
    plots: Plots_ = None,
) -> None:
    """Sets runs side by side: learned, forgotten, |ΔW|, cost.

    Examples:
        bam-lora compare runs/german-single runs/german --html comparison.html
    """
    from bam_lora.report import compare as compare_runs
    from bam_lora.report import render_html, render_text, write_plots
    from bam_lora.store import write_json, write_text

    if len(runs) < 2:
        raise UserError.of("compare", expected="at least two runs", found=str(len(runs)), remedy="Name another")
    comparison = compare_runs(runs)
    if output:
        write_json(output, comparison)
    if html:
        write_text(html, render_html(comparison["runs"], comparison))
    typer.echo(render_text(comparison["runs"], comparison))
    if plots:
        typer.echo(write_plots(plots, comparison["runs"], comparison))


@app.command()
@command
def report(run_directory: Run_, plots: Plots_ = None) -> None:
    """Writes report.json and report.html of a run; prints the table.

    The run need not be finished.

    Examples:
        bam-lora report runs/german
    """
    from bam_lora.report import render_text, write_plots, write_report

    written = write_report(run_directory)
    typer.echo(render_text([written], None))
    typer.echo(f"\n{after_run(run_directory)}")
    if plots:
        typer.echo(write_plots(plots, [written]))


@app.command()
@command
def shrink(
    run_directory: Run_,
    scale: Annotated[
        list[float] | None,
        typer.Option(
            help="A value of λ. May be repeated. Default: 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, if nothing else is."
        ),
    ] = None,
    source_weight: Annotated[
        list[float] | None,
        typer.Option(
            help="A value of μ: learn the last merge's weights for target + μ · source. May be repeated. Default: none."
        ),
    ] = None,
    checkpoints: Annotated[
        bool,
        typer.Option("--checkpoints", help="The checkpoints of a single run (keep.checkpoints), and their EMA."),
    ] = False,
    output: Annotated[
        Path | None, typer.Option(help="New folder for the model of the one λ or μ that is given.")
    ] = None,
) -> None:
    """Scores models near a finished run's result, for a curve.

    λ·ΔW for a curve of λ, or learned merge weights for a curve of μ. Nothing is trained but, for μ, the numbers of the
    last merge, on the recipe's selection sets: more μ forgets less and learns less, so a sweep such as `--source-weight
    0.3 --source-weight 1 --source-weight 3` gives a curve to choose from. With --output the chosen model stays.

    `bam-lora compare` uses the curves as rivals: a method has earned its keep where, at the same target score, its
    source score is below the curves of the others.

    Examples:
        bam-lora shrink runs/german
        bam-lora shrink runs/german --scale 0.8 --output german-0.8
    """
    from bam_lora.report import render_text, write_report
    from bam_lora.shrink import shrink as score_nearby

    score_nearby(run_directory, scale, source_weights=source_weight or (), checkpoints=checkpoints, output=output)
    typer.echo(render_text([write_report(run_directory)], None))


@app.command()
@command
def schema() -> None:
    """Prints the recipe's JSON schema, for editors.

    Examples:
        bam-lora schema
    """
    from bam_lora.recipe import recipe_schema

    typer.echo(json.dumps(recipe_schema(), indent=2, ensure_ascii=False))


def _load(recipe: Path, overrides: list[str] | None, output: Path | None) -> Any:
    from bam_lora.recipe import load_recipe

    return load_recipe(recipe, overrides or [], str(output) if output else None)
