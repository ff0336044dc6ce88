# SPDX-License-Identifier: Apache-2.0
"""The command line: the only place that prints and exits."""

from __future__ import annotations

import errno
import json
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgekd import __version__
from edgekd.domain.units import MAX_THREADS
from edgekd.errors import EdgekdError, StorageError, UsageError, printable

if TYPE_CHECKING:
    from collections.abc import Sequence

SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 120}
EXIT_ORDER = (5, 3, 1, 4)  # of several targets, the first that is present
MAX_PROBLEMS = 20  # of one message
MAX_LETTERS = 1000  # of one problem
UNTIL = ("inspect", "teach", "soft_targets", "distill", "export", "quantize", "evaluate")


class _OutputPath(click.Path):
    """A path of a file or folder to write; an empty one would be the working directory."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the path."""
        if value == "":
            self.fail("is empty; expected a path", param, ctx)
        return super().convert(value, param, ctx)


recipe_option = click.option(
    "--recipe", "-r", "recipe", type=click.Path(path_type=Path), default=Path("edgekd.toml"), show_default=True, help="The recipe."
)
targets_option = click.option(
    "--target",
    "-t",
    "targets",
    multiple=True,
    metavar="NAME|FILE",
    help="Name or file of a target profile; may be repeated.  [default: the recipe's [target.*] tables, else host]",
)
devices_option = click.option(
    "--device",
    "devices",
    multiple=True,
    metavar="NAME|ssh:USER@HOST[:PORT]",
    help="A device to measure on, or its name in a devices.toml; may be repeated.  [default: this machine]",
)
cache_option = click.option(
    "--cache",
    "cache",
    type=click.Path(path_type=Path),
    envvar="EDGEKD_CACHE",
    help="The cache folder.  [default: edgekd in the user's cache folder]",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


def run(arguments: Sequence[str]) -> int:
    """Run a command line and return its exit code."""
    try:
        code = main.main(args=list(arguments), prog_name="edgekd", standalone_mode=False)
    except click.exceptions.Abort as error:
        raise KeyboardInterrupt from error
    except click.ClickException as error:
        error.show()
        return error.exit_code if error.exit_code != 1 else 2
    except EdgekdError as error:
        _print_error(error)
        return error.exit_code
    except SystemExit:  # click ends with 1, which means FAIL, if the reader of the output has closed it
        _discard_output()
        return StorageError.exit_code
    except OSError as error:  # most likely the disk that the output goes to is full
        _discard_output()
        problem = f"{error.filename or 'the output'}: cannot be read or written: {error.strerror or type(error).__name__}"
        reported = UsageError(problem) if error.errno == errno.ENAMETOOLONG else StorageError(problem)
        _print_error(reported)
        return reported.exit_code
    return code if isinstance(code, int) else 0


@click.group(context_settings=SETTINGS)
@click.version_option(__version__, prog_name="edgekd")
def main() -> None:
    """Distill a teacher network into a small model that provably runs on the device.

    Every build ends with PASS (0), FAIL (1) or INCONCLUSIVE (4). Other exit codes: 2 usage or recipe error, 3 a device,
    runtime or tool is missing, 5 a stage failed.
    """


@main.command()
@click.argument("folder", type=click.Path(path_type=Path), default=Path())
def init(folder: Path) -> None:
    """Write a commented recipe that can be built."""
    from edgekd import scaffold

    for path in scaffold.write(folder):
        _print(f"wrote {path}")
    _print(f"next: edgekd build --recipe {folder / 'edgekd.toml'}")


@main.command()
@recipe_option
@targets_option
@devices_option
@cache_option
@click.option(
    "--out",
    "-o",
    type=_OutputPath(path_type=Path),
    help="The output folder; each target gets a folder below it.  [default: build beside the recipe]",
)
@click.option("--until", type=click.Choice(UNTIL), help="Stop after this stage and write its output to OUT/until-STAGE.")
@click.option("--depfile", type=_OutputPath(path_type=Path), help="Write the files that the build read, as make rules.")
@click.option("--remeasure", is_flag=True, help="Measure again, even if there is a cached verdict.")
@click.option("--inconclusive-ok", is_flag=True, help="If the verdict is INCONCLUSIVE, ship the model and exit with 0.")
@json_option
def build(recipe: Path, out: Path | None, cache: Path | None, *, as_json: bool, **options: Any) -> int:
    """Build the recipe for its targets, and judge each."""
    from edgekd.build import run as builds
    from edgekd.report import text
    from edgekd.store.cache import cache_folder

    request = builds.Request(recipe=recipe, out=out or recipe.parent / "build", cache=cache_folder(cache), **options)
    with text.reporter() as reporter:
        results = builds.build(request, reporter)
    if not results:  # a rank other than the first
        return 0
    if as_json:
        _print(json.dumps([result.document for result in results], indent=1, sort_keys=True))
    else:
        for result in results:
            _print(text.render_verdict(result.document, cached=result.cached), nl=False)
    codes = {result.exit_code for result in results}
    return next((code for code in EXIT_ORDER if code in codes), 0)


@main.command()
@recipe_option
@targets_option
@cache_option
@click.option("--explain", is_flag=True, help="Show for each step whether it would run, and why.")
@json_option
def plan(recipe: Path, targets: tuple[str, ...], cache: Path | None, *, explain: bool, as_json: bool) -> None:
    """Show what a build would do, without running anything."""
    from edgekd.build import run as builds
    from edgekd.store.cache import cache_folder

    shown = builds.show_plan(recipe, targets, cache_folder(cache), explain=explain)
    if as_json:
        _print(json.dumps(shown, indent=1, sort_keys=True))
        return
    for line in builds.plan_lines(shown):
        _print(line)


@main.command()
@click.argument("name", required=False)
@json_option
def targets(name: str | None, *, as_json: bool) -> None:
    """List the target profiles, or show one."""
    from edgekd import config

    if name is not None:
        path = config.find_target(name)
        config.load_target(name)
        _print(path.read_text(encoding="utf-8"), nl=False)
        return
    profiles = [config.load_target(known) for known in config.target_names()]
    if as_json:
        rows = [
            {"name": target.name, "title": target.title, "runtimes": [r.name for r in target.runtimes], "schemes": list(target.schemes)}
            for target in profiles
        ]
        _print(json.dumps(rows, indent=1, sort_keys=True))
        return
    width = max(len(target.name) for target in profiles)
    for target in profiles:
        _print(f"{target.name:<{width}}  {target.title}")


@main.command()
@click.argument("document", type=click.Choice(["recipe", "target"]), default="recipe")
def schema(document: str) -> None:
    """Print the JSON Schema of recipes or of target profiles, for completion and checks in editors."""
    from edgekd.config import schema as json_schema

    _print(json_schema.render(document), nl=False)


@main.command()
@click.argument("models", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--target", "-t", default="host", show_default=True, metavar="NAME|FILE", help="The profile with the protocol and threads.")
@click.option("--threads", type=click.IntRange(1, MAX_THREADS), multiple=True, help="Thread counts, instead of the profile's.")
@click.option("--device", metavar="NAME|ssh:USER@HOST[:PORT]", help="The device, or its name in a devices.toml.  [default: this machine]")
@json_option
def measure(models: tuple[Path, ...], target: str, threads: tuple[int, ...], device: str | None, *, as_json: bool) -> None:
    """Measure model files (.tflite, .onnx) on this machine or a device, interleaved; the first is the reference."""
    from edgekd.build import run as builds
    from edgekd.report import text

    with text.reporter() as reporter:
        rows = builds.measure_files(models, target, threads, reporter, device)
    if as_json:
        _print(json.dumps(rows, indent=1, sort_keys=True))
    else:
        _print(text.render_measurements(rows), nl=False)


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--format", "output_format", type=click.Choice(["text", "json", "markdown"]), default="text", show_default=True)
def report(folder: Path, output_format: str) -> int:
    """Show the verdict of an earlier build (FOLDER is build/TARGET); the exit code is the verdict's."""
    from edgekd.report import document, markdown, text

    content = document.read(folder)
    if output_format == "json":
        _print(json.dumps(content, indent=1, sort_keys=True))
    elif output_format == "markdown":
        _print(markdown.render(content), nl=False)
    else:
        _print(text.render_verdict(content, cached=True), nl=False)
    return document.exit_code(content)


@main.group()
def cache() -> None:
    """List, verify or prune the cache."""


@cache.command("list")
@cache_option
@json_option
def cache_list(cache: Path | None, *, as_json: bool) -> None:
    """List the cached steps."""
    from edgekd.store.cache import cache_folder

    rows = [
        {
            "key": key,
            "stage": entry.material["stage"] if entry else "damaged",
            "seconds": entry.seconds if entry else None,
            "bytes": size,
            "used": used,
        }
        for key, entry, size, used in _open_cache(cache).entries()
    ]
    if as_json:
        _print(json.dumps(rows, indent=1, sort_keys=True))
        return
    for row in rows:
        _print(f"{row['key'][:12]}  {row['stage']:<10}  {row['bytes'] / 2**20:9.2f} MiB  {row['seconds'] or 0:8.1f} s")
    _print(f"{len(rows)} entries, {sum(row['bytes'] for row in rows) / 2**20:.1f} MiB in {cache_folder(cache)}")


@cache.command("verify")
@cache_option
def cache_verify(cache: Path | None) -> int:
    """Read every byte of the cache; damaged entries are removed, and their steps run again."""
    store = _open_cache(cache)
    keys = [key for key, *_ in store.entries()]
    damaged = {key: names for key in keys if (names := store.damaged_files(key))}
    for key, names in damaged.items():
        store.remove(key)
        _print(f"{key[:12]}: damaged and removed: {', '.join(names)}")
    _print(f"{len(keys)} entries read, {len(damaged)} damaged")
    return 5 if damaged else 0


@cache.command("prune")
@cache_option
@click.option("--max-gib", type=click.FloatRange(min=0), help="Remove the least recently used entries above this size.")
@click.option("--older-than-days", type=click.FloatRange(min=0), help="Remove entries that were not used for this many days.")
def cache_prune(cache: Path | None, max_gib: float | None, older_than_days: float | None) -> None:
    """Remove entries that were not used for some days, or that exceed a size."""
    if max_gib is None and older_than_days is None:
        raise UsageError("cache prune: nothing to prune by; give --max-gib or --older-than-days")
    removed, freed = _open_cache(cache).prune(max_gib, older_than_days)
    _print(f"removed {removed} entries, {freed / 2**20:.1f} MiB")


@main.command()
@click.option("--deep", is_flag=True, help="Import each package, which takes half a minute.")
@devices_option
@click.option("--target", "-t", metavar="NAME|FILE", help="The profile that the devices are compared with.")
@json_option
def doctor(devices: tuple[str, ...], target: str | None, *, deep: bool, as_json: bool) -> int:
    """Show what is missing in the environment and on devices, and the command that fixes it."""
    from edgekd import doctor as diagnosis
    from edgekd.store.cache import cache_folder

    findings = diagnosis.check(cache_folder(None), devices, target, deep=deep)
    _print(diagnosis.as_json(findings) if as_json else diagnosis.as_text(findings), nl=False)
    return diagnosis.exit_code(findings)


def _open_cache(folder: Path | None) -> Any:
    from edgekd.store.cache import Cache, cache_folder

    store = Cache(cache_folder(folder), lambda text: click.echo(text, err=True))
    store.prepare()
    return store


def _print(text: str, *, nl: bool = True) -> None:
    """Print to standard output; a reader that has closed it does not change the exit code."""
    try:
        click.echo(text, nl=nl)
    except BrokenPipeError:
        _discard_output()


def _discard_output() -> None:
    """Send what is still in the buffer of standard output, and all later output, to nowhere."""
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _print_error(error: EdgekdError) -> None:
    rank = os.environ.get("RANK", "0") if "TORCHELASTIC_RUN_ID" in os.environ else "0"
    prefix = f"rank {rank}: " if rank != "0" else ""
    lines = str(error).splitlines() or [type(error).__name__]
    if len(lines) > MAX_PROBLEMS:
        lines[MAX_PROBLEMS:] = [f"and {len(lines) - MAX_PROBLEMS} more problems"]
    with suppress(OSError):  # nobody reads it
        for line in lines:
            click.echo(f"edgekd: {prefix}{printable(line, MAX_LETTERS)}", err=True)
