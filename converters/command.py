"""The command ``convert_hf_to_lowbit``, which is ``lowbit convert`` too."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..errors import BudgetError, CalibrationError, FrequencyError, LowbitError, OutputError, RecipeError, SchemeError
from ..quantize import Target
from .budgeted import Budget, Choice
from .calibration_data import Calibration
from .convert import convert_hf_to_lowbit, fit_budget, peak_memory
from .driver import work_directory
from .plan import Plan
from .planning import plan_conversion
from .recipe import Recipe, load_recipe, make_target, write_recipe
from .summary import block_table, budget_tables, module_lines, plan_tables, remarks_on_quality, result_tables
from .words import Words

if TYPE_CHECKING:
    from ..calibration.ladder import BlockResult

# Options that make a target, and those of a recipe beside them. What is not given is left to the recipe's file.
_OF_TARGET = ("codec", "bits", "group_size", "nested", "offset", "solver", "table", "scale_dtype")
_OF_RECIPE = ("embeddings", "lm_head", "words")
_OF_CALIBRATION = ("effort", "samples", "length", "seed", "device")
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}

app = typer.Typer(add_completion=False, rich_markup_mode="markdown", pretty_exceptions_enable=False)


@app.command()
def convert(
    context: typer.Context,
    source: Annotated[str, typer.Argument(help="Model directory, or repository on the Hub such as `user/model`.")],
    out: Annotated[
        Path | None,
        typer.Argument(help="Directory to make. It appears only when it is complete. A dry run needs none."),
    ] = None,
    codec: Annotated[
        str, typer.Option(help="`bcq` (best at low bits), `uniform` (integers, for PEQA) or `codebook`.")
    ] = "bcq",
    bits: Annotated[
        int, typer.Option(min=1, max=8, help="bcq and uniform: planes of each matrix. A codebook's table decides.")
    ] = 4,
    group_size: Annotated[int, typer.Option(min=0, help="Columns that share a scale; 0 is the whole row.")] = 128,
    nested: Annotated[
        str,
        typer.Option(help="bcq, uniform: store scales for fewer planes too, such as `2,3`: one file, many precisions."),
    ] = "",
    offset: Annotated[bool, typer.Option(help="bcq: fit an offset for each group.")] = True,
    solver: Annotated[str, typer.Option(help="uniform: `mse`, `minmax` (round to nearest) or `symmetric`.")] = "mse",
    table: Annotated[
        str, typer.Option(help="codebook: `nf4`, `fp4-e2m1`, `fp4-e3m0`, `fp4-e1m2` or `ternary`.")
    ] = "nf4",
    scale_dtype: Annotated[
        str, typer.Option(help="`F16`, `BF16` or `F32`; F32 is taken where it does not fit.")
    ] = "F16",
    embeddings: Annotated[
        bool | None,
        typer.Option(
            "--embeddings/--no-embeddings",
            help="Quantize embeddings like the rest, or keep them in full precision; if neither is given they are "
            "rounded to 8 bits (with --nested: kept).",
        ),
    ] = None,
    lm_head: Annotated[
        bool | None,
        typer.Option(
            "--lm-head/--no-lm-head",
            help="The same for the output head, the most sensitive matrix. One that is tied to an embedding is "
            "decided by either.",
        ),
    ] = None,
    word_frequencies: Annotated[
        str | None,
        typer.Option(
            help="Give words of the vocabulary's embedding bits by their frequency: `rank` (the tokenizer's own "
            "order), a text, or a JSON list of a frequency for each id."
        ),
    ] = None,
    word_bits: Annotated[
        str, typer.Option(help="With --word-frequencies: bits of the clusters, the most frequent words first.")
    ] = "6,5,4,3",
    word_ratio: Annotated[
        float, typer.Option(help="With --word-frequencies: size of a cluster relative to the one before.")
    ] = 2.0,
    keep: Annotated[
        list[str] | None,
        typer.Option(
            help="Leave modules in full precision whose path matches this pattern, such as `*.q_proj`; repeatable."
        ),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            help="JSON file with a default and rules by pattern, see docs/recipes.md. Options given beside it override "
            "its default, not its rules."
        ),
    ] = None,
    bits_budget: Annotated[
        float | None,
        typer.Option(
            help="Choose the bits of every module, 1 to 8, so that the whole file has so many bits a weight, such as "
            "3.25; parameters and what is kept count too. Rules of the recipe may set limits."
        ),
    ] = None,
    size: Annotated[
        str | None, typer.Option(help="The same, for a size of all tensors together, such as `70MB`.")
    ] = None,
    fused_equal: Annotated[
        bool,
        typer.Option(
            "--fused-equal",
            help="With a budget: the same bits for layers that others fuse (query, key and value; gate and up).",
        ),
    ] = False,
    rows: Annotated[
        bool,
        typer.Option(
            "--rows",
            help="With a budget and without data: single rows of a matrix may have more or fewer bits than others, by "
            "how much they count for the model's predictions.",
        ),
    ] = False,
    recipe_to: Annotated[
        Path | None,
        typer.Option("--write-recipe", help="With a budget: write the recipe that makes the same model to this file."),
    ] = None,
    strip_prefix: Annotated[
        list[str] | None,
        typer.Option(help="Take this off the names of the checkpoint's tensors, such as `_orig_mod.`; repeatable."),
    ] = None,
    leave_out: Annotated[
        list[str] | None,
        typer.Option(
            help="Convert without the files beside the weights whose path matches this pattern, such as "
            "`sparse_linear.pt`; repeatable."
        ),
    ] = None,
    calibrate: Annotated[
        str | None,
        typer.Option(
            help="Quantize for what layers give on this data: a text file, JSON lines with `text` or `messages`, "
            "safetensors with the inputs, a data set of the Hub (`user/name` or `user/name:config`), or `self`: text "
            "that the float model writes."
        ),
    ] = None,
    effort: Annotated[
        str, typer.Option(help="With --calibrate: `fast`, `default` or `high`; each is better and slower.")
    ] = "default",
    samples: Annotated[
        int | None, typer.Option(min=1, help="With --calibrate: how many to take; the effort decides if not given.")
    ] = None,
    length: Annotated[int, typer.Option(min=2, help="With --calibrate: tokens of a sample.")] = 512,
    seed: Annotated[int, typer.Option(help="With --calibrate: of what is drawn at random.")] = 0,
    device: Annotated[str, typer.Option(help="With --calibrate: to compute on, such as `cuda`.")] = "cpu",
    measured: Annotated[
        bool,
        typer.Option(
            "--eval/--no-eval",
            help="In the end, compare the model with its checkpoint: on a part of the data that is held out for this, "
            "or (without data, a causal model) on a short text of our own.",
        ),
    ] = True,
    requantize: Annotated[
        bool,
        typer.Option(
            "--requantize",
            help="SOURCE is quantized already: quantize its weights anew, from what they decode to, with the options "
            "given here. Without this its own grid is kept.",
        ),
    ] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
    min_coverage: Annotated[
        float, typer.Option(min=0, max=1, help="Fail if less of the matrices' weights would be quantized.")
    ] = 0.9,
    max_shard_size: Annotated[str, typer.Option(help="Begin a new file at this size, such as `2GB`.")] = "5GiB",
    stream: Annotated[
        bool | None,
        typer.Option(
            "--stream/--no-stream",
            help="Fetch weights from the Hub tensor by tensor and keep none of their files; by default only where they "
            "do not fit the disk of the Hub's cache.",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.")] = False,
    modules: Annotated[bool, typer.Option("--modules", help="List every module, not only their kinds.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Complete an interrupted conversion.")] = False,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1, help="Quantize in this many processes; the result is the same bytes. Default: in this one."
        ),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            help="A Ray cluster that has the workers: `auto`, `ray://host:10001`, or `local` for one begun here."
        ),
    ] = None,
) -> None:
    """Convert a Hugging Face checkpoint to low-bit planes.

    By default every Linear and Conv1D matrix of the base model is quantized. Embeddings and the output head are rounded
    to 8 bits, which changes no prediction worth mentioning; `--embeddings` and `--lm-head` quantize them like the
    rest, `--no-embeddings` and `--no-lm-head` leave them in full precision.

    Examples:

        convert_hf_to_lowbit ./llama ./llama-4bit

        convert_hf_to_lowbit user/model out --bits 3 --calibrate text.txt

        convert_hf_to_lowbit user/model out --bits-budget 3.25 --calibrate text.txt

        convert_hf_to_lowbit user/model out --bits 3 --nested 2 --lm-head

        convert_hf_to_lowbit ./model --codec uniform --bits 4 --group-size 0 --dry-run
    """
    if dry_run and resume:
        raise typer.BadParameter("--resume has no meaning in a dry run, which writes nothing; leave one of them out")
    if out is None and not dry_run:
        raise typer.BadParameter("OUT is missing: the directory to make (only --dry-run needs none)")
    console = Console(stderr=False)
    blocks: list[tuple[str, BlockResult]] = []
    try:
        values = {
            "codec": codec, "bits": bits, "group_size": group_size, "offset": offset,
            "nested": _numbers(nested, "--nested"), "solver": solver, "table": table,
            "scale_dtype": scale_dtype.upper(), "embeddings": embeddings, "lm_head": lm_head,
        }  # fmt: skip
        given = {name: value for name, value in values.items() if _is_given(context, name)}
        if word_frequencies is not None:
            given["words"] = Words(word_frequencies, _numbers(word_bits, "--word-bits"), word_ratio)
        elif unused := [name for name in ("word_bits", "word_ratio") if _is_given(context, name)]:
            raise FrequencyError(f"--{unused[0].replace('_', '-')} needs --word-frequencies; leave it out, or add that")
        plan_recipe = _recipe(recipe, given).keeping(keep or [])
        shard_bytes = _size(max_shard_size, "--max-shard-size")
        budget = _budget(bits_budget, size, fused_equal, rows, recipe_to, "bits" in given)
        if calibrate is None and (unused := [name for name in _OF_CALIBRATION if _is_given(context, name)]):
            raise CalibrationError(f"--{unused[0]} needs --calibrate, which says the data; leave it out, or add that")
        data = None if calibrate is None else Calibration(calibrate, effort, samples, length, seed, device)
        if data is not None:
            _ = data.work  # raises for an unknown effort before anything is read
        options: dict[str, Any] = {
            "revision": revision, "min_coverage": min_coverage, "strip_prefix": strip_prefix or [],
            "leave_out": leave_out or [], "stream": stream, "requantize": requantize,
        }  # fmt: skip
        choice: Choice | None = None
        if budget is not None:
            with _progress(console) as progress:
                task = progress.add_task("candidates", total=None)
                choice = fit_budget(
                    source, budget, plan_recipe, calibration=data, **options,
                    report=lambda step, total: progress.update(
                        task, advance=1, total=total, description=step.destination.path[-40:]
                    ),
                )  # fmt: skip
            if recipe_to is not None:
                write_recipe(recipe_to, choice.recipe)
        if out is None or dry_run:
            opened, plan, _ = plan_conversion(source, plan_recipe if choice is None else choice.recipe, **options)
            _print_modules(plan, console, modules)
            _say_kept(plan, console, context)
            memory = peak_memory(opened, plan, data, measured=measured, workers=workers)
            for one in [*plan_tables(plan, memory), *([] if choice is None else budget_tables(choice))]:
                console.print(one)
            if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
                console.print(f"Note: {escape(str(out))} exists already; the conversion will need another name.")
            return
        with _progress(console) as progress:
            task = progress.add_task("reading", total=None)
            done = convert_hf_to_lowbit(
                source, out, plan_recipe, **options, budget=choice, max_shard_bytes=shard_bytes, resume=resume,
                workers=workers, ray=ray, measured=measured,
                report=lambda step, total: progress.update(
                    task, advance=1, total=total, description=step.destination.path[-40:]
                ),
                calibration=data, report_block=lambda path, result: blocks.append((path, result)),
            )  # fmt: skip
        _print_modules(done.plan, console, modules)
        _say_kept(done.plan, console, context)
        if blocks:
            console.print(block_table(blocks))
        for one in result_tables(done):
            console.print(one)
        for one in [] if done.choice is None else budget_tables(done.choice):
            console.print(one)
        for line in remarks_on_quality(done):
            console.print(line, highlight=False)
        console.print(
            f"Wrote {escape(str(done.directory))}. Load it with transformers' from_pretrained, as any model "
            "(`import lowbit_format` first where TORCH_DEVICE_BACKEND_AUTOLOAD=0)."
        )
    except KeyboardInterrupt:
        kept = out is not None and work_directory(out).exists()
        how = "run the same command with --resume to go on" if kept else "nothing was done yet"
        Console(stderr=True).print(f"Interrupted: {how}.", highlight=False)
        raise typer.Exit(130) from None
    except LowbitError as e:
        fail(e)


def run() -> None:
    """Entry point."""
    app()


def fail(error: LowbitError) -> None:
    """Print a named error to standard error and exit with 2."""
    Console(stderr=True).print(
        f"[red]{type(error).__name__}[/red]:", escape(str(error)), highlight=False, markup=True, soft_wrap=True
    )
    raise typer.Exit(2)


def _is_given(context: typer.Context, name: str) -> bool:
    """Whether the option stands on the command line."""
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def _recipe(file: Path | None, given: dict[str, Any]) -> Recipe:
    """The recipe that the file and the options given beside it make."""
    if file is not None:
        return load_recipe(file, options=given)
    target = make_target({name: given[name] for name in _OF_TARGET if name in given}, Target())
    return Recipe(target, (), **{name: given[name] for name in _OF_RECIPE if name in given})


def _print_modules(plan: Plan, console: Console, wanted: bool) -> None:
    """One line for each module, never broken by us: a path can be copied."""
    for line in module_lines(plan) if wanted else ():
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def _say_kept(plan: Plan, console: Console, context: typer.Context) -> None:
    """Say which options had no effect on weights that are quantized already."""
    given = [f"--{name.replace('_', '-')}" for name in _OF_TARGET if _is_given(context, name)]
    if plan.release and given and not plan.requantized:
        console.print(
            f"Note: SOURCE is quantized already ({escape(plan.release)}): its own grid is kept, and {', '.join(given)} "
            "applies to other weights only; --requantize quantizes it anew.",
            highlight=False,
        )


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:40}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )


def _numbers(text: str, option: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError as e:
        raise SchemeError(f"{option} is {text!r}, expected numbers such as 3,2") from e


def _budget(
    bits: float | None, size: str | None, fused_equal: bool, rows: bool, recipe_to: Path | None, bits_given: bool
) -> Budget | None:
    """The budget that the options make. Raises BudgetError for options that contradict each other."""
    if bits is None and size is None:
        if fused_equal or rows or recipe_to is not None:
            option = "--fused-equal" if fused_equal else "--rows" if rows else "--write-recipe"
            raise BudgetError(f"{option} needs a budget: add --bits-budget or --size, or leave it out")
        return None
    if bits_given:
        raise BudgetError("--bits says the bits of all modules, and a budget chooses them: give one of them")
    if recipe_to is not None and recipe_to.exists():
        raise OutputError(f"{recipe_to}: exists already; name another file for the recipe, or remove it")
    return Budget(bits, None if size is None else _size(size, "--size"), fused_equal, rows)


def _size(text: str, option: str) -> int:
    upper = text.strip().upper()
    unit = next((u for u in sorted(_UNITS, key=len, reverse=True) if upper.endswith(u)), None)
    number = upper.removesuffix(unit or "").strip()
    try:
        found = int(float(number) * (_UNITS[unit] if unit else 1))
    except (ValueError, OverflowError):
        found = 0
    if found <= 0:
        raise RecipeError(f"{option} is {text!r}, expected a size such as 2GB")
    return found
