"""The command line: parse, call, print. Errors become text and exit codes here. Torch-free."""

from __future__ import annotations

import json
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

import alignctl
from alignctl.cli.completion import complete_override
from alignctl.config.compose import compose, list_recipes, read_request, value_sources
from alignctl.config.secrets import mask_text, masked_output
from alignctl.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_REQUEST, AlignctlError, RequestError
from alignctl.run.disk import FULL

_overrides = click.argument("overrides", nargs=-1, shell_complete=lambda *arguments: _complete(*arguments))
_recipe_dir = click.option(
    "--recipe-dir",
    "recipe_dirs",
    multiple=True,
    envvar="ALIGNCTL_RECIPES",
    type=click.Path(path_type=Path),
    help="Folder with recipes of yours, and groups like model/ or data/ beside them. Repeatable.",
)
_json = click.option("--json", "as_json", is_flag=True, help="Machine-readable output on standard output.")


_trust = click.option(
    "--trust-run-dir", "trusted", is_flag=True, help="Go on in a run directory that others may have written."
)


def _what_to_run(command: Callable[..., None]) -> Callable[..., None]:
    """The arguments of `train` and `submit`."""
    for option in (
        _json,
        click.option("--new", is_flag=True, help="Start a new run even if the same command was run before."),
        click.option("-m", "--multirun", is_flag=True, help="All combinations of overrides like `dpo.beta=0.05,0.1`."),
        click.option("--dry-run", is_flag=True, help="Check, plan, print what would run, and stop."),
        _trust,
        _recipe_dir,
        _overrides,
    ):
        command = option(command)
    return command


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(alignctl.__version__, prog_name="alignctl")
@click.option("--debug", is_flag=True, help="Show the traceback of every error; may stand anywhere.")
def cli(debug: bool) -> None:
    """Align language models from a recipe: `alignctl train recipe=quickstart`."""


@cli.command()
@_what_to_run
def train(**asked: Any) -> None:
    """Run a recipe: `alignctl train recipe=NAME [key=value ...]`.

    The same command again continues a run that was stopped, and says so when there is nothing left to do.
    """
    from alignctl.cli.train import train_command

    train_command(**asked)


@cli.command()
@_what_to_run
def submit(**asked: Any) -> None:
    """Submit a recipe to SLURM: `train` with `launcher=slurm`, where no launcher of SLURM's is named."""
    from alignctl.cli.train import train_command

    train_command(**asked, on_slurm=True)


@cli.command()
@_overrides
@_recipe_dir
@click.option("--as", "place", required=True, metavar="RANK/N", help="Which process of how many.")
@click.option("--stage", help="This stage; else the first one.")
@click.option("--tokens", type=click.IntRange(min=2), help="Of each sequence; else `max_length` of the stage.")
@_json
def rehearse(
    overrides: tuple[str, ...],
    recipe_dirs: tuple[Path, ...],
    place: str,
    stage: str | None,
    tokens: int | None,
    as_json: bool,
) -> None:
    """Say what one process of many would hold and send: `rehearse recipe=NAME --as 5/64`.

    Two optimizer steps of a stage are taken by that process alone, on this machine and without its GPUs: weights are
    made up, and so are rows. Nothing is downloaded or kept.
    """
    from alignctl.cli.rehearse import rehearse_command

    rehearse_command(overrides, recipe_dirs, place, stage, tokens, as_json)


_run = click.argument("run", type=click.Path(path_type=Path))


@cli.command()
@click.argument("runs", nargs=-1, type=click.Path(path_type=Path))
@click.option("--all", "every", is_flag=True, help="All runs below runs/.")
@_json
def status(runs: tuple[Path, ...], every: bool, as_json: bool) -> None:
    """Say what runs are doing: stage, step, loss, time left, why a job waits; of finished stages what they measured.

    Of the folder of a sweep, all its points.
    """
    from alignctl.cli.status import status_command

    status_command(runs, every, as_json)


@cli.command()
@_run
@click.option("--stage", help="Of this stage; else of the one that runs or ran last.")
@click.option("--rank", type=int, help="Of this process of its last attempt.")
@click.option("-f", "--follow", is_flag=True, help="Go on until the stage ends.")
def logs(run: Path, stage: str | None, rank: int | None, follow: bool) -> None:
    """Print what a run printed."""
    from alignctl.cli.runs import logs_command

    logs_command(run, stage, rank, follow)


@cli.command()
@_run
@_trust
def cancel(run: Path, trusted: bool) -> None:
    """Stop a run; what is saved stays."""
    from alignctl.cli.runs import cancel_command

    cancel_command(run, trusted)


@cli.command()
@_run
@_trust
def resume(run: Path, trusted: bool) -> None:
    """Go on with a run that was stopped, cancelled or failed, with what is not done of it."""
    from alignctl.cli.runs import resume_command

    resume_command(run, trusted)


@cli.command(hidden=True)
@_run
@click.argument("stage")
@click.option("--meet", required=True, help="HOST:PORT where the machines of the job find each other.")
@click.option("--machine", default="", help="Which of the machines of the job this is, counted from 0.")
def node(run: Path, stage: str, meet: str, machine: str) -> None:
    """Run this machine's part of a stage: what a SLURM job starts on each of its machines."""
    from alignctl.cli.node import node_command

    node_command(run, stage, meet, machine)


@cli.command()
@_recipe_dir
@_json
def recipes(recipe_dirs: tuple[Path, ...], as_json: bool) -> None:
    """List the recipes, one line each."""
    found = list_recipes(recipe_dirs)
    if as_json:
        click.echo(json.dumps([{"name": r.name, "summary": r.summary, "path": str(r.path)} for r in found], indent=2))
        return
    from alignctl.cli.terminal import two_columns

    width = max(len(recipe.name) for recipe in found)
    for recipe in found:
        click.echo(two_columns(recipe.name, recipe.summary, width))


@cli.command()
@_json
def methods(as_json: bool) -> None:
    """List the methods: the data and models each needs, and when to choose it."""
    from alignctl.cli.methods import describe_methods, render_methods

    if as_json:
        click.echo(json.dumps(describe_methods(), indent=2))
    else:
        click.echo(render_methods(), nl=False)


@cli.command()
@click.argument("name", required=False)
@_json
def templates(name: str | None, as_json: bool) -> None:
    """List the chat templates that come with alignctl, or print one: `alignctl templates [NAME]`."""
    from alignctl.cli.templates import describe_templates, render_templates

    if as_json:
        click.echo(json.dumps(describe_templates(name), indent=2, ensure_ascii=False))
    else:
        click.echo(render_templates(name), nl=False)


@cli.group()
def data() -> None:
    """Look at rows: `alignctl data preview`."""


@data.command()
@click.argument("source")
@_overrides
@_recipe_dir
@click.option("--for", "method", metavar="METHOD", help="What the rows are for: a method of `alignctl methods`.")
@click.option("--model", metavar="MODEL", help="Folder or Hub id of the model, for its tokenizer.")
@click.option("--stage", help="Of a run: this stage; else the first.")
@click.option("--row", type=click.IntRange(min=1), help="This row of the data, counted from 1.")
@click.option("--worst", type=click.Choice(["length", "margin"]), help="The longest, or those with the least margin.")
@click.option("--rows", "count", type=click.IntRange(min=1), default=3, help="At most so many; 3 if not said.")
@_json
def preview(source: str, **asked: Any) -> None:
    """Show rows as the trainer sees them: `data preview FILE --for dpo --model MODEL [key=value ...]`, or `data preview
    RUN`.

    Text and token ids, with what is trained on, what is context, and what is cut. No weights are loaded.
    """
    from alignctl.cli.preview import preview_command

    preview_command(source, **asked)


@cli.group()
def cache() -> None:
    """Say what runs share lies on this machine, or remove it: `alignctl cache list`, `alignctl cache clear`."""


@cache.command("list")
@_json
def cache_list(as_json: bool) -> None:
    """List what is kept: how much of each kind, of which rows, and when it was taken last."""
    from alignctl.cli.cache import describe_cache, print_cache

    if as_json:
        click.echo(json.dumps(describe_cache(), indent=2, ensure_ascii=False))
    else:
        print_cache()


@cache.command("clear")
@click.argument("kind", required=False)
@click.option("--older-than", metavar="AGE", help="Only what was not taken for so long: `30d`, `12h`, `45m`.")
@_json
def cache_clear(kind: str | None, older_than: str | None, as_json: bool) -> None:
    """Remove what is kept, all of it or one KIND; runs make it again when they need it."""
    from alignctl.cli.cache import clear_command

    clear_command(kind, older_than, as_json)


@cli.command()
@_overrides
@_recipe_dir
@click.option("--sources", is_flag=True, help="Write beside each value the file it comes from.")
@_json
def show(overrides: tuple[str, ...], recipe_dirs: tuple[Path, ...], sources: bool, as_json: bool) -> None:
    """Print a recipe with everything filled in: `alignctl show recipe=NAME [key=value ...]`."""
    from alignctl.cli.show import render_config

    request = read_request(overrides, recipe_dirs)
    config, problems = compose(request)
    if problems:
        raise RequestError.from_problems(problems)
    click.echo(render_config(config, value_sources(request) if sources else None, as_json), nl=False)


@cli.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script of a shell: `eval "$(alignctl completion bash)"`."""
    from click.shell_completion import get_completion_class

    script = get_completion_class(shell)
    assert script is not None
    click.echo(script(cli, {}, "alignctl", "_ALIGNCTL_COMPLETE").source())


def _complete(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Completes `recipe=NAME`, options of groups, and fields of the recipe's stages."""
    # bash takes `=` for a word of its own: `recipe=q` arrives as `recipe`, `=`, `q`, and wants `q...` back.
    words = [str(word) for word in context.params.get("overrides") or ()]
    cut_off = ""
    if words and words[-1] == "=":
        cut_off, words = f"{words[-2]}=", words[:-2]
    elif incomplete == "=" and words:
        cut_off, incomplete, words = f"{words[-1]}=", "", words[:-1]
    given = " ".join(words).replace(" = ", "=").split()
    offers = complete_override(given, cut_off + incomplete, context.params.get("recipe_dirs") or ())
    return [offer.removeprefix(cut_off) for offer in offers]


def _say(error: AlignctlError, debug: bool = False) -> None:
    if debug:
        click.echo(traceback.format_exc(), err=True)
        return
    from alignctl.cli.terminal import say_error

    say_error(error)


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the command `alignctl`. What it prints is masked."""
    with masked_output():
        code = _exit_code(arguments)
    sys.exit(code)


def _exit_code(arguments: list[str] | None) -> int:
    """Of a command, which is run."""
    arguments = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        _refuse_unreadable(arguments)
        result: Any = cli.main(args=arguments, prog_name="alignctl", standalone_mode=False)
        code = result if isinstance(result, int) else 0
    except AlignctlError as error:
        _say(error, debug)
        code = error.exit_code
    except click.ClickException as error:
        error.show()
        code = EXIT_REQUEST
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        code = EXIT_INTERRUPTED
    except BrokenPipeError:
        code = EXIT_FAILED
    except Exception as error:
        if debug:
            traceback.print_exc()
        else:
            _say(_unforeseen(error))
        code = EXIT_FAILED
    return code


def _refuse_unreadable(arguments: list[str]) -> None:
    """Whether the arguments are text: those that the system could not read as such cannot be shown either.

    Raises:
        RequestError: One is not.
    """
    for number, argument in enumerate(arguments, start=1):
        if "\0" in argument or any("\ud800" <= letter <= "\udfff" for letter in argument):
            shown = argument.encode("ascii", "backslashreplace").decode()
            raise RequestError(f"argument {number} is no text: `{shown}`", "write it in UTF-8")


def _unforeseen(error: Exception) -> AlignctlError:
    """What to say of an error that nobody thought of: a disk without room, or a bug of ours, whose traceback goes into
    a file."""
    if isinstance(error, OSError) and error.errno in FULL:
        full = f"there is no room left to write to: {error.strerror}"
        return AlignctlError(full, "make room, and run the same command again: it continues")
    said = " ".join(str(error).split())
    with tempfile.NamedTemporaryFile("w", prefix="alignctl-bug-", suffix=".log", delete=False) as log:
        log.write(mask_text(traceback.format_exc()))
    return AlignctlError(
        f"this is a bug of alignctl: {type(error).__name__}: {said[:200]}",
        f"please report it, with {log.name}; `--debug` shows the same",
    )
