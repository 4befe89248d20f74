"""Tasks on the Hugging Face hub: a local copy of the files that an evaluation reads, of one commit.

    path: hf://datasets/djghosh/wds_cifar10_test@5bd12a17d0c5e2e3d1d6b7b6e8a3b1c5f3f6f7aa

Without a commit (a branch, a tag, nothing) the hub is asked for the newest, which is said at WARNING: name it, and the
same numbers can be had again. Files go into the hub package's own cache (HF_HOME), or below `eval.root` where that is
a folder, which then must be one that all machines see; on an object store they are copied there. What is there
already is never asked for again, and a commit whose files are all there needs no network.

HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE mean what they mean to huggingface_hub. It is imported inside functions.
"""

from __future__ import annotations

import functools
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipeline.core import storage
from pipeline.core.errors import ConfigError, one_line
from pipeline.core.log import logger, short_count

PREFIX = "hf://"
FOLDER = "hub"  # below eval.root
DATACOMP_OWNER = "djghosh"  # of the repositories of DataComp's tasks
COMMIT = re.compile(r"[0-9a-f]{40}")
_ADDRESS = re.compile(r"hf://datasets/(?P<owner>[\w.-]+)/(?P<name>[\w.-]+?)(?:@(?P<revision>[^@\s]+))?/?")
_OWNER = re.compile(r"hf://datasets/(?P<owner>[\w.-]+)/?")
MAIN = "main"  # the branch of a repository whose address says none
TIMEOUT_S = 10


@dataclass(frozen=True)
class Repository:
    """A data set on the hub, at a commit, tag or branch; None: its main branch."""

    owner: str
    name: str
    revision: str | None = None

    @property
    def id(self) -> str:
        """`owner/name`, as the hub calls it."""
        return f"{self.owner}/{self.name}"

    def __str__(self) -> str:
        return f"hf://datasets/{self.id}" + (f"@{self.revision}" if self.revision else "")


@dataclass(frozen=True)
class Copy:
    """Where the files of a repository are, and at which commit it was."""

    path: str
    repository: Repository


def is_address(path: str | None) -> bool:
    """True for `hf://...`."""
    return path is not None and path.startswith(PREFIX)


def parse(address: str, place: str) -> Repository:
    """The repository of an address. Raises ConfigError for anything but hf://datasets/OWNER/NAME[@REVISION]."""
    match = _ADDRESS.fullmatch(address)
    if not match:
        raise ConfigError(f"{place} = {address}, expected hf://datasets/OWNER/NAME@REVISION")
    return Repository(**match.groupdict())


def owner_of(root: str, place: str) -> str:
    """The owner in `hf://datasets/OWNER`. Raises ConfigError for anything else."""
    match = _OWNER.fullmatch(root)
    if not match:
        raise ConfigError(f"{place} = {root}, expected hf://datasets/OWNER")
    return match["owner"]


def repository_of(task: str, split: str, owner: str = DATACOMP_OWNER) -> Repository:
    """The repository of a task of DataComp by the owner's naming: `vtab/dtd` is wds_vtab-dtd_test."""
    return Repository(owner, f"wds_{task.removeprefix('fairness/').replace('/', '-')}_{split}")


def fetch(
    repository: Repository,
    root: str | None,
    texts: Sequence[str],
    splits: Sequence[str],
    place: str,
    *,
    optional: Sequence[str] = (),
    download: bool = True,
) -> Copy:
    """The copy of these texts and of the tars of these splits, fetched where it is not here yet.

    Args:
        root: a folder or URL for the copies; None: the hub package's cache.
        texts: files at the top of the repository; what it does not have is no error here.
        optional: further ones, which a message does not miss.
        place: where the address stands, for messages.
        download: False: what a download would fetch is an error that says so.

    Raises:
        ConfigError: in one line: the files are not here and the hub does not give them, which ones, and where to put
            them by hand.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, RevisionResolutionError

    cache = storage.join(storage.absolute(root), FOLDER) if root and not storage.is_url(root) else None
    counts = [f"{split}/nshards.txt" for split in splits]
    options: dict[str, Any] = {"repo_type": "dataset", "cache_dir": cache}
    options["allow_patterns"] = [*texts, *optional, *counts, *(f"{split}/[0-9]*.tar" for split in splits)]
    pinned = repository
    try:
        if not COMMIT.fullmatch(repository.revision or ""):
            pinned = replace(repository, revision=_newest(repository, cache))
        target = storage.join(root, FOLDER, f"{pinned.owner}--{pinned.name}@{pinned.revision}") if root else ""
        if storage.is_url(target) and not set(counts) - set(storage.list_files(target, recursive=True)):
            return Copy(target, pinned)
        found, whole = _here(pinned, **options)
        if not whole:
            HfApi().dataset_info(pinned.id, revision=pinned.revision, timeout=TIMEOUT_S)  # what follows tries for long
            if not download:
                wanted = snapshot_download(pinned.id, revision=pinned.revision, dry_run=True, **options)
                sizes = [file.file_size or 0 for file in wanted if file.will_download]
                said = f"{len(sizes)} files ({short_count(sum(sizes))}B) of {pinned}"
                raise ConfigError(f"{place}: a run would first download {said}; a plan downloads nothing")
            logger.info(f"{place}: downloading {pinned}")
            found = snapshot_download(pinned.id, revision=pinned.revision, **options)
    except (*HfHubHTTPError.__bases__, RevisionResolutionError, ValueError) as error:  # also its HTTP library's own
        missing = ", ".join(_missing(_here(pinned, **options)[0], texts, counts))
        folder = f"the folder {storage.join(root, repository.name)}" if root else "a folder"
        raise ConfigError(
            f"{place} = {repository}: {_reason(error)}; missing here: {missing}; "
            f"put them into {folder} and give it as path, or run once where the hub can be reached"
        ) from error
    lacks = set(counts) - set(storage.list_files(found or "", recursive=True))
    if lacks:
        raise ConfigError(f"{place}: {pinned} lacks {', '.join(sorted(lacks))}, expected CLIP_benchmark's layout")
    if storage.is_url(target):
        if not download:
            raise ConfigError(f"{place}: a run would first copy {pinned} to {target}; a plan copies nothing")
        _copy(found, target, counts)
        return Copy(target, pinned)
    return Copy(found, pinned)


def _here(repository: Repository, **options: Any) -> tuple[str | None, bool]:
    """Where files of the repository's revision are in the cache, or None, and whether they are all that are wanted."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    revision = repository.revision or MAIN
    try:
        return snapshot_download(repository.id, revision=revision, local_files_only=True, **options), True
    except LocalEntryNotFoundError as error:
        return getattr(error, "snapshot_path", None), False


@functools.cache  # one commit for a whole process, and one line about it
def _newest(repository: Repository, cache: str | None) -> str:
    """The commit of a branch or tag, as the hub says it or, where it can't be asked, as the cache remembers it."""
    from huggingface_hub import HfApi

    found = HfApi().resolve_revision(
        repository.id, repo_type="dataset", revision=repository.revision or MAIN, cache_dir=cache
    )
    pinned = replace(repository, revision=found.resolved)
    logger.warning(f"{repository} names no commit: the newest known is used; to pin it: {pinned}")
    return found.resolved


def _copy(folder: str, target: str, last: Sequence[str]) -> None:
    """None; the files are in the target, those that tell that a copy is whole after all others."""
    files = storage.list_files(folder, recursive=True)
    for file in sorted(files, key=lambda file: (file in last, file)):
        with storage.write_file(storage.join(target, file)) as temporary:
            shutil.copyfile(storage.join(folder, file), temporary)


def _missing(folder: str | None, texts: Sequence[str], counts: Sequence[str]) -> list[str]:
    """The files that are needed and not in the folder, as far as it can be known without the hub."""
    there = set(storage.list_files(folder, recursive=True)) if folder else set()
    missing = [file for file in [*texts, *counts] if file not in there]
    for count in counts:
        split = count.partition("/")[0]
        text = (
            storage.read_bytes(storage.join(folder, count)).decode("ascii", "replace").strip() if count in there else ""
        )
        if text.isdigit() and len(text) <= 6:
            missing += [tar for tar in (f"{split}/{number}.tar" for number in range(int(text))) if tar not in there]
        else:
            missing.append(f"{split}/0.tar and as many more as {count} says")
    return missing


def _reason(error: BaseException) -> str:
    """Why the hub does not give what is asked for, in one line."""
    from huggingface_hub.errors import OfflineModeIsEnabled, RepositoryNotFoundError, RevisionNotFoundError

    cause = error.__cause__ or error  # of a revision that can't be resolved
    if isinstance(cause, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    if isinstance(error, RevisionNotFoundError):
        return "the hub has no such revision"
    if isinstance(error, RepositoryNotFoundError):
        return "the hub has no such data set, or not for you"
    return f"the hub can't be used ({one_line(cause, 160)})"
