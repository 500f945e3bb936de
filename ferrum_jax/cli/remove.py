"""`ferrum-jax rm`: delete a model from the cache. It deletes only files that ferrum_jax has downloaded."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import click

from ferrum_jax.cli import common
from ferrum_jax.cli.output import plain, plain_path


@click.command("rm", short_help="Delete a model from the cache.")
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option("--yes", "-y", is_flag=True, help="Delete without asking.")
def rm_command(models: tuple[str, ...], yes: bool) -> None:
    """Delete each MODEL from the cache of ferrum_jax, by its name in `list`. It asks first, unless --yes is given.

    Your own files and the cache of huggingface_hub stay as they are.
    """
    from ferrum_jax import hub

    cached, chosen = hub.list_cached(), []
    root = hub.cache_root()
    for name in models:
        alias = hub.ALIASES.get(name.strip().lower().removesuffix(":latest"))
        found = [model for model in cached if model.name in (name, alias and alias.name) or str(model.path) == name]
        if not found:
            if alias and any(isinstance(source, hub.PackagedSource) for source in alias.sources):
                raise click.UsageError(f"{name} is part of the ferrum_jax package and cannot be deleted")
            known = ", ".join(plain(model.name) for model in cached) or "no models"
            raise click.UsageError(f"{name or 'an empty name'} is not in the cache, which has {known} (`ferrum-jax list`)")
        if not (ours := [model for model in found if model.path.is_relative_to(root)]):
            raise click.UsageError(
                f"{found[0].path} was not downloaded by ferrum_jax; delete it with the program that downloaded it"
            )
        chosen += [model for model in ours if model not in chosen]
    for model in chosen:
        click.echo(f"{plain(model.name)}  {common.readable_bytes(model.bytes)}  {plain_path(model.path)}", err=not yes)
    if not yes:
        click.confirm("Delete?", abort=True, err=True)
    for model in chosen:
        _delete(model.path, root)


def _delete(path: Path, root: Path) -> None:
    """Deletes a directory, or a file with its other parts, and then the folders that have become empty."""
    from ferrum_jax.hub.huggingface import parts_of

    if path.is_dir():
        shutil.rmtree(path)
    else:
        for part in parts_of(path.name):
            path.with_name(part).unlink(missing_ok=True)
    for folder in path.parents:
        if folder == root:
            break
        with contextlib.suppress(OSError):  # it is not empty
            folder.rmdir()
