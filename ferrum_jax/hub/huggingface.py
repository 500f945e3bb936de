"""GGUF files of a repository on the Hugging Face hub.

The idea: one HEAD request per file gives its commit, size and hash, so everything about a download is known before it begins.
Files are stored by commit, so parts of two versions never mix; the fetched part of a file is kept under its ETag and continued
by a Range request, also by a later process.
"""

import hashlib
import json
import re
import time
import urllib.parse
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from http.client import HTTPResponse
from pathlib import Path, PurePosixPath

from ..errors import ModelFileError
from . import web
from .aliases import HubSource
from .cache import (
    Report,
    SourceError,
    cache_root,
    damage,
    is_known,
    is_whole,
    move_into_place,
    record,
    recorded,
    recorded_files,
    require_space,
    shared_hub_cache,
    work_directory,
)

DEFAULT_QUANTS = ("Q4_K_M", "Q4_K_S", "Q5_K_M", "Q8_0", "Q6_K", "Q4_0", "BF16", "F16")
"""If the name has no file or quantization, the first of these that the repository has is taken."""

PATIENCE_SECONDS = 20.0  # a started download is given up after this long without a byte

_SMALL = {
    *("config.json", "generation_config.json", "quantize_config.json", "quant_config.json", "tokenizer.json"),
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "vocab.txt"),
}
_OF_EMBEDDINGS = ("modules.json", "sentence_bert_config.json", "1_Pooling/config.json")
_EXTRA_TEMPLATE = re.compile(r"additional_chat_templates/[^/]+\.jinja")
_SPLIT = re.compile(r"(?P<base>.+)-(?P<part>\d{5})-of-(?P<total>\d{5})\.gguf", re.IGNORECASE | re.DOTALL)
_OF_TOKENS = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    "vocab.txt",
)
_REPORT_SECONDS = 0.1


# ---- which files


def parts_of(name: str) -> list[str]:
    """All parts of the split file that `name` is a part of, in order; `[name]` if it is not split."""
    match = _SPLIT.fullmatch(name)
    if not match or int(match["total"]) == 0:
        return [name]
    return [f"{match['base']}-{part:05}-of-{match['total']}.gguf" for part in range(1, int(match["total"]) + 1)]


def model_files(names: Iterable[str]) -> list[str]:
    """The model files among `names`: .gguf files, the first part of split ones, but no image projectors or importance
    matrices."""
    ggufs = [name for name in names if name.lower().endswith(".gguf")]
    models = [name for name in ggufs if not re.search(r"mmproj|imatrix", PurePosixPath(name).name, re.IGNORECASE)]
    return sorted({parts_of(name)[0] for name in models})


def directory_files(names: Iterable[str]) -> list[str]:
    """The files of a checkpoint directory among `names`, config.json first, weights last; [] if there is none.

    The weights are the numbered parts if there is an index, else model.safetensors, else all .safetensors files; never
    adapters, or the copies in another form that some repositories also have."""
    names = sorted(names)
    top = [name for name in names if "/" not in name]
    weights = [name for name in top if name.endswith(".safetensors") and not name.startswith(("adapter_", "consolidated"))]
    if "config.json" not in top or not weights:
        return []
    if "model.safetensors.index.json" in top:
        weights = [name for name in weights if re.fullmatch(r"model-\d+-of-\d+\.safetensors", name)] or weights
    elif "model.safetensors" in weights:
        weights = ["model.safetensors"]
    small = [name for name in names if name in _OF_EMBEDDINGS or _EXTRA_TEMPLATE.fullmatch(name)]
    small += [name for name in top if name in _SMALL or name.endswith(".safetensors.index.json")]
    return sorted(small, key=lambda name: name != "config.json") + weights


def choose(names: Iterable[str], select: str | None) -> str:
    """The one model file that `select` means: its path or name, or a quantization, case ignored; None: DEFAULT_QUANTS.

    If a file is there both whole and split, the whole one is taken. Raises SourceError with the candidates.
    """
    files = model_files(names)
    if not files:
        raise SourceError("it has no .gguf file")
    if select is None:
        for quant in DEFAULT_QUANTS:
            if found := _of_quant(files, quant):
                return _only(found, quant)
        return _only(files, "no file or quantization")
    wanted = parts_of(select)[0].lower()
    found = [name for name in files if name.lower() in (wanted, wanted + ".gguf")]
    found = found or [name for name in files if PurePosixPath(name.lower()).name in (wanted, wanted + ".gguf")]
    found = found or _of_quant(files, select)
    if not found:
        raise SourceError(f"it has no {select}; it has {_listed(files)}")
    return _only(found, select)


def selects(select: str | None, name: str) -> bool:
    """Whether `select` means the model file `name`, if that is the only one."""
    try:
        return choose([name], select) == name
    except SourceError:
        return False


def _of_quant(files: list[str], quant: str) -> list[str]:
    pattern = re.compile(rf"(?<![a-z0-9_]){re.escape(quant)}(?![a-z0-9_])", re.IGNORECASE)
    return [name for name in files if pattern.search(name.removesuffix(".gguf"))]


def _only(found: list[str], what: str) -> str:
    whole = [name for name in found if not _SPLIT.fullmatch(name)]
    bases = {match["base"].lower() if (match := _SPLIT.fullmatch(n)) else n[: -len(".gguf")].lower() for n in found}
    if len(found) == 1 or (len(bases) == 1 and len(whole) == 1):
        return (whole or found)[0]
    raise SourceError(f"{what} is ambiguous; name one of {_listed(found)}")


def _listed(names: list[str], limit: int = 30) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


# ---- what is cached already


def snapshots(repo: str) -> list[Path]:
    """The directories that hold a commit of `repo`, newest first, those of our own cache before huggingface_hub's."""
    own = cache_root() / "hub" / repo.replace("/", "--")
    shared = shared_hub_cache() / ("models--" + repo.replace("/", "--")) / "snapshots"
    found: list[Path] = []
    for parent in (own, shared):
        if parent.is_dir():
            found += sorted(parent.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
    return found


def whole_models(snapshot: Path) -> list[str]:
    """The model files under a directory that have all their parts, as relative paths."""
    there = [path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file()]
    return [name for name in model_files(there) if set(parts_of(name)) <= set(there)]


def whole_directory(snapshot: Path) -> bool:
    """Whether a directory is a checkpoint with all its files of weights."""
    there = {path.name for path in snapshot.iterdir() if path.is_file()} if snapshot.is_dir() else set()
    if not directory_files(there):
        return False
    indices = [name for name in there if name.endswith(".safetensors.index.json")]
    try:
        maps = [json.loads((snapshot / name).read_text("utf-8"))["weight_map"].values() for name in indices]
        return all(set(named) <= there for named in maps)
    except (ValueError, KeyError, TypeError, AttributeError):
        return False


def cached(
    source: HubSource,
    *,
    any_quant: bool = False,
    thorough: bool = False,
    unknown: bool = True,
    damaged: list[str] | None = None,
) -> Path | None:
    """The file, if a cache has all of it, as pinned and as downloaded; or the directory of a checkpoint without .gguf files.

    A source without a selection means the first of DEFAULT_QUANTS here, or with `any_quant` the best one in the cache, as the
    cache does not show what else the repository has. thorough: large files are read and compared too. unknown: accept files
    that there is nothing to compare with. `damaged` collects, in words, the differences found.
    """
    select = source.select or (None if any_quant else DEFAULT_QUANTS[0])
    for snapshot in snapshots(source.repo):
        files = files_of(snapshot)
        try:
            path = snapshot / choose(whole_models(snapshot), select)
            files = [snapshot / part for part in parts_of(path.relative_to(snapshot).as_posix())]
        except SourceError:
            if source.select is not None or whole_models(snapshot) or not whole_directory(snapshot):
                continue
            path = snapshot
        if not (unknown or source.sha256 or all(map(is_known, files))):
            continue
        found = [words for file in files if (words := damage(file, thorough))]
        if damaged is not None:
            damaged += found
        if not found and (path == snapshot or is_whole(path, source.size, source.sha256)):
            return path
    return None


def files_of(snapshot: Path) -> list[Path]:
    """The files of a checkpoint directory in a cache, including downloaded ones that no longer exist."""
    there = [path for path in snapshot.rglob("*") if path.is_file()]
    return sorted({*there, *recorded_files(snapshot)})


# ---- fetching

_HEADS = (4 << 20, 24 << 20, 64 << 20)  # bytes: enough for most headers, enough for the largest vocabularies, the limit


@dataclass(frozen=True)
class _Remote:
    """A file of the repository as its HEAD describes it."""

    name: str
    url: str
    commit: str
    etag: str
    size: int
    digest: str | None  # sha256, or sha1 of git's blob; None: the hub does not say

    @property
    def sha256(self) -> str | None:
        return self.digest if self.digest and len(self.digest) == 64 else None


def fetch(source: HubSource, report: Report) -> Path:
    """Downloads the file that `source` selects and returns the path of its first part, or of the directory if the repository
    has a checkpoint in safetensors and no .gguf file.

    Raises SourceError (HubUnreachable if there was no answer), OSError if the cache cannot be written.
    """
    report(0, None, f"asking {web.endpoint()} for {source.repo}")
    try:
        remotes = _describe(source)
    except web.HubRefusal as error:
        raise _explained(error, source) from None
    first = remotes[0]
    if source.sha256 and (first.size != source.size or first.sha256 not in (None, source.sha256)):
        raise SourceError(f"{first.name} is not the file whose sha256 begins {source.sha256[:12]}; refused")
    relative = Path(first.commit) if first.name == "config.json" else Path(first.commit, first.name)
    for snapshot in snapshots(source.repo):
        if snapshot.name == first.commit and all(_is_here(remote, snapshot / remote.name, source) for remote in remotes):
            return snapshot.parent / relative
    repo_key = source.repo.replace("/", "--")
    directory = cache_root() / "hub" / repo_key
    total, before = sum(remote.size for remote in remotes), 0
    with work_directory(f"hub-{repo_key}-{_short(first.name)}", report) as work:
        _drop_other_versions(work, remotes)
        for remote in remotes:
            target = directory / remote.commit / remote.name
            if not _is_here(remote, target, source):
                text = f"downloading {source.repo}/{remote.name}"
                try:
                    _download(remote, source.sha256 or remote.sha256, work, target, report, (before, total, text))
                except web.HubRefusal as error:
                    raise _explained(error, source) from None
            before += remote.size
    report(total, total, f"{source.repo}{'' if relative.name == first.commit else f'/{first.name}'} is in the cache")
    return directory / relative


def fetch_heads(source: HubSource, directory: Path, whole: Callable[[Path], object]) -> Path:
    """Downloads only the beginning of each file that `source` selects into `directory`, and returns the path of the first part
    (or `directory` itself for a checkpoint directory).

    `whole(path)` raises ModelFileError while that is too little; then more is read, up to the limit of a header's size. Raises
    SourceError as `fetch` does, or the last error of `whole`.
    """
    try:
        remotes = [remote for remote in _describe(source) if remote.name not in (*_OF_TOKENS, *_OF_EMBEDDINGS)]
        remotes = [remote for remote in remotes if not _EXTRA_TEMPLATE.fullmatch(remote.name)]
        path = directory if remotes[0].name == "config.json" else directory / PurePosixPath(remotes[0].name).name
        paths = [directory / PurePosixPath(remote.name).name for remote in remotes]
        with ExitStack() as stack:
            bodies = [stack.enter_context(web.open_url(remote.url)) for remote in remotes]
            files = [stack.enter_context(path.open("wb", buffering=0)) for path in paths]
            for size in _HEADS:
                for body, file in zip(bodies, files, strict=True):
                    while file.tell() < size and (chunk := web.read(body, size - file.tell())):
                        file.write(chunk)
                try:
                    whole(path)
                    break
                except ModelFileError:
                    if size == _HEADS[-1]:
                        raise
    except web.HubRefusal as error:
        raise _explained(error, source) from None
    return path


def _is_here(remote: _Remote, path: Path, source: HubSource) -> bool:
    """Whether `path` is the file that the hub describes. If it is, and it lies in our own cache without a record, one is
    made."""
    digest = source.sha256 or remote.digest
    if not is_whole(path, remote.size, digest) or (digest is None and damage(path, thorough=True)):
        return False
    if path.is_relative_to(cache_root()):
        with path.open("rb") as file:
            facts = remote.size, remote.sha256 or hashlib.file_digest(file, "sha256").hexdigest()
        if recorded(path) != facts:
            record(path, *facts)
    return True


def _describe(source: HubSource) -> list[_Remote]:
    """The parts of the selected file, all of one commit; for a repository without .gguf files those of its checkpoint
    directory, config.json first. A file name needs no listing unless it does not exist as written."""
    name = source.select if source.select and source.select.lower().endswith(".gguf") else None
    if name is not None:
        try:
            first = _head(source.repo, parts_of(name)[0])
        except web.HubRefusal as error:
            if error.status != 404 or error.code == "RepoNotFound":
                raise
            name = None
    if name is None:
        names = _names(source.repo)
        parts = [] if source.select or model_files(names) else directory_files(names)
        parts = parts or parts_of(choose(names, source.select))
        first = _head(source.repo, parts[0])
    else:
        parts = parts_of(name)
    remotes = [first, *(_head(source.repo, part) for part in parts[1:])]
    if len({remote.commit for remote in remotes}) > 1:
        raise SourceError("the repository changed while it was read; try again")
    return remotes


def _names(repo: str) -> list[str]:
    answer = web.get_json(f"{web.endpoint()}/api/models/{repo}/revision/main")
    try:
        return [str(entry["rfilename"]) for entry in answer["siblings"]]
    except (KeyError, TypeError):
        raise web.HubUnreachable(f"{web.endpoint()} does not answer as the hub does: no list of files") from None


def _head(repo: str, name: str) -> _Remote:
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\\" in name or ":" in name:
        raise SourceError(f"{name!r} is not a path inside a repository")
    url = f"{web.endpoint()}/{repo}/resolve/main/{urllib.parse.quote(name)}"
    headers = web.head(url)
    commit = headers.get("x-repo-commit") or ""
    etag = (headers.get("x-linked-etag") or headers.get("etag") or "").removeprefix("W/").strip('"')
    size = headers.get("x-linked-size") or headers.get("content-length") or ""
    if not re.fullmatch(r"\w[\w.-]*", commit) or not etag or not size.isdecimal():
        raise web.HubUnreachable(f"{web.endpoint()} does not answer as the hub does: no commit, ETag or size of {name}")
    # The sha256 for files in large-file storage, git's sha1 for others.
    digest = etag.lower() if re.fullmatch(r"[0-9a-fA-F]{40}([0-9a-fA-F]{24})?", etag) else None
    return _Remote(name, url, commit, etag, int(size), digest)


def _explained(error: web.HubRefusal, source: HubSource) -> SourceError:
    page = f"{web.endpoint()}/{source.repo}"
    if error.status in (401, 403):
        reason = "gated" if error.code == "GatedRepo" else "private, gated or not there"
        have = "the token in use has no access" if web.token() else "no token is set"
        return SourceError(f"{error}: {reason}; accept its licence at {page} and set HF_TOKEN ({have})")
    if error.status == 404:
        missing = {"RepoNotFound": f"no repository {source.repo}", "EntryNotFound": f"{source.repo} has no such file"}
        return SourceError(f"{error}: {missing.get(error.code, 'no such repository or file')} ({source})")
    if error.status == 429:
        return SourceError(f"{error}: too many requests; wait, or set HF_TOKEN")
    return error


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _part(work: Path, remote: _Remote) -> Path:
    return work / f"{_short(json.dumps([remote.name, remote.etag, remote.size]))}.part"


def _drop_other_versions(work: Path, remotes: list[_Remote]) -> None:
    current = {_part(work, remote) for remote in remotes}
    for path in work.iterdir():
        if path not in current:
            path.unlink()


def _download(
    remote: _Remote, sha256: str | None, work: Path, target: Path, report: Report, progress: tuple[int, int, str]
) -> None:
    """Downloads `remote` to `target`, continuing where an earlier download stopped and after a lost connection."""
    before, total, text = progress
    part = _part(work, remote)
    digest = hashlib.sha256()
    with part.open("a+b") as file:
        file.seek(0)
        while chunk := file.read(1 << 20):
            digest.update(chunk)
        done = file.tell()
        require_space(work, remote.size - done)
        resumed, digest_known = done > 0, sha256 is not None
        furthest, progressed, reported = None, time.monotonic(), 0.0  # furthest: in this call, None before the first byte
        while True:
            while done < remote.size:
                try:
                    with web.open_url(remote.url, start=done) as response:
                        if done and not _continues(response, done):
                            file.truncate(0)
                            digest, done = hashlib.sha256(), 0
                        while chunk := web.read(response, 1 << 18):
                            file.write(chunk)
                            digest.update(chunk)
                            done += len(chunk)
                            now = time.monotonic()
                            if furthest is None or done > furthest:
                                furthest, progressed = done, now
                            if now - reported >= _REPORT_SECONDS:
                                report(before + done, total, text)
                                reported = now
                    lost = "the connection was closed"
                except web.HubUnreachable as error:
                    lost = str(error)
                if done < remote.size:
                    if furthest is None or time.monotonic() - progressed > PATIENCE_SECONDS:
                        raise web.HubUnreachable(f"{lost}, after {done} of {remote.size} bytes of {remote.name}; kept")
                    report(before + done, total, f"{text} ({lost}; continuing)")
                    time.sleep(0.5)
            file.flush()
            # A sha1 is compared only after a resumed download, where damage is likely: some mirrors send other values of that
            # form.
            if done == remote.size and (
                digest.hexdigest() == sha256 if digest_known else not resumed or is_whole(part, done, remote.digest)
            ):
                break
            file.truncate(0)
            if not resumed:
                raise SourceError(f"{remote.name} did not arrive as the hub describes it (size or sha256); nothing is kept")
            resumed, digest, done = False, hashlib.sha256(), 0
            report(before, total, f"{text} (the kept part is damaged; starting again)")
        record(target, done, digest.hexdigest())
        move_into_place(file, part, target)


def _continues(response: HTTPResponse, start: int) -> bool:
    """Whether the body begins at byte `start` as requested, and not at 0."""
    return response.status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {start}-")
