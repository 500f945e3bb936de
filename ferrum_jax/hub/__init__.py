"""Finds the file of a model by name, and downloads it if necessary.

The idea: a name is a path, an alias or `owner/repo[:file or quantization]`; the last two are lists of sources. First the caches
of all sources are searched, then the sources are tried in order; an error says why each one failed.
"""

import difflib
import os
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..errors import ModelNotFoundError
from . import huggingface, wheel
from .aliases import ALIASES, Alias, HubSource, PackagedSource, Source, WheelSource
from .cache import Report, SourceError, cache_root, is_whole, shared_hub_cache
from .web import HubUnreachable, is_offline

__all__ = [
    "ALIASES",
    "Alias",
    "CachedModel",
    "HubSource",
    "PackagedSource",
    "Source",
    "WheelSource",
    "cache_root",
    "fetch_heads",
    "list_cached",
    "pull",
    "resolve",
]

_FILE_SUFFIXES = (".gguf", ".safetensors", ".bin", ".json", ".pt", ".pth")
_HUB_NAME = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)((:|/(blob|resolve)/main/)(?P<select>[^:?]+)(\?.*)?)?", re.ASCII)
_HUB_PREFIX = re.compile(r"(https?://)?(hf\.co|huggingface\.co)/|hf://")


def resolve(source: str | os.PathLike[str], *, progress: Report | None = None, offline: bool | None = None) -> Path:
    """The .gguf file (or its first part) or directory that a model name means, downloaded if necessary. A repository without
    .gguf files becomes a directory.

    source: the path of a .gguf file (any part of a split one) or of a directory, an alias, or owner/repo[:file or
    quantization]. progress(done_bytes, total_bytes or None, text): called several times a second during a download, and for
    remarks. offline: do not use the network; None: as $HF_HUB_OFFLINE says. Raises ModelNotFoundError with all sources that
    were tried and why each failed, one on each line.
    """
    return _resolve(source, progress, is_offline() if offline is None else offline, thorough=False)


def _resolve(source: str | os.PathLike[str], progress: Report | None, offline: bool, thorough: bool) -> Path:
    if isinstance(source, str):
        name = _alias_key(source)
        if alias := ALIASES.get(name):
            if not alias.checked:
                _remark(f"the alias {name} ({alias.sources[0]}) was never checked by ferrum_jax", progress)
            return _first(name, alias.sources, progress, offline, thorough)
    path = Path(source).expanduser()
    try:
        if os.fspath(source) and path.exists():
            return _local(path)
    except (OSError, ValueError) as error:  # a name is too long or contains NUL, or a directory cannot be read
        raise ModelNotFoundError(f"{os.fspath(source)!r}: {error}") from None
    text = os.fspath(source)
    if isinstance(source, str) and (found := _on_hub(text)):
        return _first(text, (found,), progress, offline, thorough)
    if _looks_like_path(text):
        raise ModelNotFoundError(f"{text}: there is no such file or directory (a file on the hub is owner/repo:file)")
    raise ModelNotFoundError(_unknown(text))


def fetch_heads(source: str, directory: Path, whole: Callable[[Path], object]) -> Path | None:
    """Downloads only the beginnings of a model's files on the hub into `directory`. Returns the path of the first part, or None
    for a name that does not mean a hub repository. `whole(path)` raises ModelFileError while it needs more of the file.

    Raises ModelNotFoundError with all sources that were tried and why each failed.
    """
    alias, named = ALIASES.get(_alias_key(source)), _on_hub(source)
    sources = [s for s in (alias.sources if alias else (named,)) if isinstance(s, HubSource)]
    tried = []
    for wanted in sources:
        if is_offline():
            tried.append(f"{wanted}: not asked, offline (HF_HUB_OFFLINE=1)")
            continue
        try:
            return huggingface.fetch_heads(wanted, directory, whole)
        except SourceError as error:
            tried.append(f"{wanted}: {error}")
    if not tried:
        return None
    raise ModelNotFoundError(
        "\n  ".join([f"{source} is not on this machine, and its header cannot be downloaded. Tried:", *tried])
    )


def pull(source: str | os.PathLike[str], progress: Report | None = None) -> Path:
    """Downloads a model and returns its path, as `resolve` does. Existing files are also read and compared with the record of
    their download, or with the hub's values, and downloaded again if they differ."""
    return _resolve(source, progress, is_offline(), thorough=True)


def _alias_key(text: str) -> str:
    return text.strip().lower().removesuffix(":latest")


def _on_hub(text: str) -> HubSource | None:
    """The source that a text means as owner/repo[:file or quantization]."""
    name = _HUB_PREFIX.sub("", text, count=1)
    match = _HUB_NAME.fullmatch(name)
    if match is None or (match["select"] is None and _looks_like_path(name)):
        return None
    return HubSource(match["repo"], match["select"])


def _looks_like_path(text: str) -> bool:
    if text.startswith((".", "~", "/")) or "\\" in text or text.lower().endswith(_FILE_SUFFIXES):
        return True
    return "/" in text and not _HUB_NAME.fullmatch(text)


def _local(path: Path) -> Path:
    if path.is_dir():
        there = [entry.name for entry in path.iterdir() if entry.is_file()]
        models = huggingface.model_files(there)
        return path / models[0] if len(models) == 1 and models[0] in there else path
    first = path.with_name(huggingface.parts_of(path.name)[0])
    if not first.exists():
        raise ModelNotFoundError(f"{path} is part of a split file whose first part, {first.name}, is not next to it")
    return first


def _remark(text: str, progress: Report | None) -> None:
    if progress is None:
        warnings.warn(text, stacklevel=4)
    else:
        progress(0, None, text)


def _first(name: str, sources: tuple[Source, ...], progress: Report | None, offline: bool, thorough: bool) -> Path:
    """The model from the first source that has it: first the caches of all sources, then the sources in order."""
    report = progress or (lambda done, total, text: None)
    damaged: list[str] = []
    if thorough and any(isinstance(source, HubSource) and huggingface.snapshots(source.repo) for source in sources):
        report(0, None, f"comparing the cached files of {name} with their downloads")
    for source in sources:
        if path := _cached(source, thorough, damaged):
            return path
    if isinstance(sources[0], PackagedSource):
        raise ModelNotFoundError(f"{name}: {sources[0].path} is missing from this installation; install ferrum-jax again")
    tried = [f"local cache: {'; '.join(damaged) or f'not in {cache_root()}'}"]
    if damaged:
        report(0, None, tried[0])
    unreachable = False
    for source in sources:
        if offline:
            tried.append(f"{source}: not asked, offline (HF_HUB_OFFLINE=1 or offline=True)")
        elif isinstance(source, HubSource) and unreachable:
            tried.append(f"{source}: not asked, the hub does not answer")
        else:
            try:
                if isinstance(source, HubSource):
                    return huggingface.fetch(source, report)
                assert isinstance(source, WheelSource)
                return wheel.fetch(source, report)
            except SourceError as error:
                tried.append(f"{source}: {error}")
                unreachable |= isinstance(error, HubUnreachable)
            except OSError as error:
                reason = error.strerror or error
                tried.append(
                    f"{source}: cannot write to {error.filename or cache_root()}: {reason}"
                    " (FERRUM_JAX_CACHE sets another cache directory)"
                )
        if source is not sources[-1]:
            report(0, None, f"{tried[-1]}; trying {sources[sources.index(source) + 1]}")
    for source in sources:
        if not isinstance(source, HubSource) or (source.select is not None and not thorough):
            continue
        if path := huggingface.cached(source, any_quant=True, thorough=thorough):
            compared = " unchecked: there is nothing to compare it with" if thorough else ""
            _remark(f"{tried[-1]}; taking {path.name} from the cache{compared}", progress)
            return path
    raise ModelNotFoundError("\n  ".join([f"{name} was not found. Tried:", *tried]))


def _cached(source: Source, thorough: bool, damaged: list[str]) -> Path | None:
    try:
        if isinstance(source, HubSource):
            return huggingface.cached(source, thorough=thorough, unknown=not thorough, damaged=damaged)
        if isinstance(source, PackagedSource):
            return source.path if source.path.is_file() else None
        path = wheel.path_of(source)
        return path if is_whole(path, source.size, source.sha256) else None
    except OSError:  # a cache that cannot be read
        return None


def _unknown(text: str) -> str:
    name = text.strip().lower()
    family = name.split(":")[0]
    near = sorted(alias for alias in ALIASES if alias.startswith(f"{family}:"))
    near = near or difflib.get_close_matches(name, ALIASES, n=5, cutoff=0.5)
    hint = "near: " if near else "aliases begin with "
    near = near or sorted({alias.split(":")[0] for alias in ALIASES})
    return (
        f"{text!r} is not a file, a directory or an alias ({hint}{', '.join(near)});"
        " a model on the hub is owner/repo or owner/repo:file-or-quantization"
    )


# ---- cached models


@dataclass(frozen=True)
class CachedModel:
    """A model on this machine: a name for `resolve`, its first file, the bytes of all parts, and its origin."""

    name: str
    path: Path
    bytes: int
    source: str


def list_cached() -> list[CachedModel]:
    """The models in the cache and in that of huggingface_hub, sorted by name, without unfinished downloads."""
    found: set[CachedModel] = set()
    for alias in ALIASES.values():
        for source in alias.sources:
            if isinstance(source, WheelSource) and (path := wheel.path_of(source)).is_file():
                found.add(CachedModel(alias.name, path, path.stat().st_size, str(source)))
    own, shared = cache_root() / "hub", shared_hub_cache()
    for directory in [*own.glob("*--*"), *shared.glob("models--*--*")]:
        repo = directory.name.removeprefix("models--").replace("--", "/", 1)
        for snapshot in huggingface.snapshots(repo):
            for file in huggingface.whole_models(snapshot):
                parts = [snapshot / part for part in huggingface.parts_of(file)]
                kept = f"hub {repo}" + (" (kept by huggingface_hub)" if snapshot.is_relative_to(shared) else "")
                name = _alias_of(repo, file, parts[0]) or f"{repo}:{file}"
                found.add(CachedModel(name, parts[0], sum(part.stat().st_size for part in parts), kept))
            if not huggingface.whole_models(snapshot) and huggingface.whole_directory(snapshot):
                size = sum(path.stat().st_size for path in snapshot.iterdir() if path.is_file())
                kept = f"hub {repo}" + (" (kept by huggingface_hub)" if snapshot.is_relative_to(shared) else "")
                found.add(CachedModel(repo, snapshot, size, kept))
    return sorted(found, key=lambda model: (model.name, str(model.path)))


def _alias_of(repo: str, file: str, path: Path) -> str | None:
    for alias in ALIASES.values():
        for source in alias.sources:
            if isinstance(source, HubSource) and source.repo == repo and huggingface.selects(source.select, file):
                return alias.name if is_whole(path, source.size, source.sha256) else None
    return None
