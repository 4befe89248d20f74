"""Sources: where a pool's pairs come from. What the config may say, what lies there, and its identity.

    source: /data/shards                      a folder, a file or a pattern; or the word demo
    source: {path: "s3://b/pool/*.parquet", image_column: jpg, caption_column: text, carry: {similarity: float32}}
    source: {web: /data/web/*.tar, shop: {path: /data/shop, captions: captions.csv}}      several, by name

Layouts: `webdataset` (tars, with img2dataset's parquet beside where there is one), `parquet` (image bytes in a
column), `folder` (image files), `clip_benchmark` (a task's folder, or one of its splits), `demo` (the embedded world),
`urls` (tables of URLs and captions: parquet, csv, tsv, json, jsonl; their images are downloaded). `auto` goes by what
is there. In a CLIP_benchmark classification folder the caption of an image is its class's name in the first of the
task's templates.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import stat
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from pipeline.core import config, pool, storage
from pipeline.core.artifact import canonical_json
from pipeline.core.errors import ConfigError, suggestion
from stages.ingest import demo_world, image_folder, parquet_rows, tar_samples, url_table
from stages.ingest.image_folder import FileEntry
from stages.ingest.samples import (
    CARRIED_TYPES,
    EXPECTED_SHA256,
    FACE_BOXES,
    IMAGE_EXTENSIONS,
    Settings,
    Unit,
    UnreadableError,
    extension,
)
from stages.ingest.tar_samples import TarExtra

Layout = Literal["auto", "webdataset", "parquet", "folder", "clip_benchmark", "demo", "urls"]
DEMO = "demo"
URLS = "urls"
SINGLE = "source"  # the name of a source that the config gives none
HASHED_BYTES = 1 << 30  # a source up to this size is identified by its bytes, a larger one by sizes and stamps
TRUTH_COLUMNS = {
    "truth_fault": "string",
    "truth_object": "string",
    "truth_colour": "string",
    "truth_count": "int32",
}
FOOTER_THREADS = 16  # footers of many files on an object store are read side by side
WILDCARDS = "*?["
CLASSES_FILE = "classnames.txt"
TEMPLATES_FILE = "zeroshot_classification_templates.txt"
TYPE_FILE = "dataset_type.txt"
# The options that mean something in each layout, beside path, layout and carry.
OPTIONS: dict[str, set[str]] = {
    "webdataset": {"caption_column", "uid_column"},
    "parquet": {"image_column", "caption_column", "uid_column"},
    "folder": {"image_column", "caption_column", "uid_column", "captions"},
    "clip_benchmark": set(),
    "demo": {"pairs", "seed", "clean"},
    "urls": {"url_column", "caption_column", "uid_column", "sha256_column", "face_boxes_column"},
}
URL_OPTIONS = OPTIONS["urls"] - {"caption_column", "uid_column"}


class Source(config.Model):
    """One source of pairs, as the config says it."""

    path: str | None = None
    layout: Layout = "auto"
    image_column: str | None = None  # parquet: the image's bytes; folder with captions: the file's name
    caption_column: str | None = None
    uid_column: str | None = None
    url_column: str | None = None
    sha256_column: str | None = None  # of the original bytes; checked after the download
    face_boxes_column: str | None = None  # boxes of faces to blur
    captions: str | None = None  # folder: a csv, tsv or jsonl, relative to the folder or absolute
    carry: dict[str, str] = Field({})  # further columns of the source that become columns of the pool, with types
    pairs: int | None = Field(None, ge=1)
    seed: int | None = Field(None, ge=0)
    clean: bool | None = None


@dataclass(frozen=True)
class Found:
    """What lies at a source's path: its layout (never auto), its root, and its files by name relative to the root."""

    layout: str
    root: str
    files: Mapping[str, FileEntry]


def parse(value: Any, place: str) -> dict[str, Source]:
    """{name: source} as the config gives them, checked against what is there; layouts are resolved, paths absolute.

    Args:
        value: a path, `demo`, a source's mapping, or a mapping of names to these.
        place: where it stands in the config, for messages.

    Raises:
        ConfigError: one line; nothing was read but listings, schemas and captions tables.
    """
    if isinstance(value, Mapping) and value and not set(value) & set(Source.model_fields):
        named = {str(name): _parse_one(inner, f"{place}.{name}") for name, inner in value.items()}
    else:
        _check_names(value, place)
        named = {SINGLE: _parse_one(value, place)}
    carried_columns(named, place)
    kinds = {name: source.layout for name, source in named.items()}
    others = [name for name, layout in kinds.items() if layout != URLS]
    if others and len(others) < len(kinds):
        downloaded = next(name for name, layout in kinds.items() if layout == URLS)
        raise ConfigError(
            f"{place}: a pool is either downloaded or read: {downloaded} is a table of URLs, {others[0]} has layout "
            f"{kinds[others[0]]}; expected sources of one sort"
        )
    return named


def carried_columns(sources: Mapping[str, Source], place: str = "pool.source") -> dict[str, str]:
    """{column: type} that the pool has beyond pool.SCHEMA. Raises ConfigError where two sources disagree."""
    columns: dict[str, str] = {}
    for name, source in sources.items():
        for column, kind in ((TRUTH_COLUMNS if source.layout == DEMO else source.carry) | _url_columns(source)).items():
            known = columns.setdefault(column, kind)
            if known != kind:
                raise ConfigError(f"{place}.{name}.carry.{column} = {kind}, expected {known} as in another source")
    return dict(sorted(columns.items()))


def plan_units(sources: Mapping[str, Source], shard_size: int) -> list[Unit]:
    """What tasks read, in the pool's order: sources and files by name, rows as they stand."""
    units: list[Unit] = []
    for name, source in sorted(sources.items()):
        units += _units(name, source, shard_size)
    return units


def source_digest(source: Source) -> str:
    """32 hex digits that identify what a source holds, wherever it lies.

    Up to HASHED_BYTES in total the files are read and hashed; above that their sizes and stamps (etag, or time of
    modification) stand for their bytes. Cost: at most 1 GiB read, one listing.
    """
    idle = set() if source.layout == URLS else URL_OPTIONS
    options = source.model_dump(exclude={"path", "captions"} | idle)
    if source.layout == DEMO:
        return _digest({"options": options, "version": demo_world.VERSION})
    found = find(source)
    files: dict[str, Any] = {}
    paths = {name: storage.join(found.root, name) for name in found.files}
    entries = dict(found.files)
    if source.captions:
        table = _captions_path(source, found.root)
        name = f"captions:{storage.name_of(table)}"
        paths[name], entries[name] = table, FileEntry(storage.size_bytes(table), storage.stamp(table))
    hashed = sum(entry.size_bytes for entry in entries.values()) <= HASHED_BYTES
    for name, entry in entries.items():
        identity = entry.unsafe or (storage.sha256_file(paths[name]) if hashed else entry.stamp)
        files[name.encode("utf-8", "replace").decode()] = [entry.size_bytes, identity]
    return _digest({"options": options, "files": files})


def find(source: Source, place: str = "source") -> Found:
    """What lies at the source's path. Raises ConfigError when nothing does, or when the layout can't be recognised."""
    path = source.path or ""
    if storage.is_folder(path):
        root, files = path, _listing(path)
        if not files:
            raise ConfigError(f"{place}.path = {path}, expected files in the folder; it is empty")
    elif storage.exists(path):
        root, _, name = path.rpartition("/")
        files = {name: FileEntry(storage.size_bytes(path), storage.stamp(path))}
    elif any(character in path for character in WILDCARDS):
        root, files = _matches(path)
        if not files:
            raise ConfigError(f"{place}.path = {path}, expected a pattern that matches files; it matches none")
    else:
        raise ConfigError(f"{place}.path = {path}, expected a file, a folder or a pattern; nothing is there")
    layout = source.layout if source.layout != "auto" else _recognised(source, root, files, place)
    if layout == "webdataset":
        files = _with_tables(root, files)
    elif layout == "clip_benchmark":
        root, files = _split(root, files, place)
    elif layout == "parquet":
        files = {name: entry for name, entry in files.items() if extension(name) == "parquet"}
    elif layout == URLS:
        files = _url_tables(source, root, files, place)
    if layout == "parquet" and not files:
        raise ConfigError(f"{place}.path = {path}, expected files that end in .parquet")
    if layout in ("webdataset", "clip_benchmark") and not any(extension(name) == "tar" for name in files):
        raise ConfigError(f"{place}.path = {path}, expected files that end in .tar")
    if layout == "folder" and not any(extension(name) in IMAGE_EXTENSIONS for name in files):
        raise ConfigError(f"{place}.path = {path}, expected image files; found {_kinds(files)}")
    return Found(layout, root, files)


def _check_names(value: Any, place: str) -> None:
    """None. Raises ConfigError where options look like sources by name, or stand beside some."""
    if not isinstance(value, Mapping):
        return
    options = [key for key in Source.model_fields if key in value]
    meant = [key for key in options if key != "carry" and isinstance(value[key], Mapping)]
    meant += [key for key in ("pairs", "seed", "clean") if _is_path(value.get(key))]
    others = [key for key in value if key not in options and not difflib.get_close_matches(str(key), options)]
    if any(isinstance(value[key], Mapping) or _is_path(value[key]) for key in others):
        meant += options
    if meant:
        raise ConfigError(
            f"{place}.{meant[0]}: {meant[0]} is an option of a source, expected another name for a source"
        )


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and ("/" in value or value == DEMO)


def _parse_one(value: Any, place: str) -> Source:
    if isinstance(value, str):
        value = {"layout": DEMO} if value == DEMO else {"path": value}
    if not isinstance(value, Mapping) or not value:
        raise ConfigError(f"{place} = {value!r}, expected a path, {DEMO}, a mapping with a path, or named sources")
    source: Source = config.validate(Source, dict(value), place)
    for column, kind in source.carry.items():
        if kind not in CARRIED_TYPES:
            raise ConfigError(f"{place}.carry.{column} = {kind}, expected a type.{suggestion(kind, CARRIED_TYPES)}")
        if column in pool.SCHEMA.names:
            raise ConfigError(f"{place}.carry.{column}: every pool has a column of this name")
    if source.layout == DEMO:
        if source.path is not None or source.carry:
            raise ConfigError(f"{place}: expected no path and no carry with layout: {DEMO}")
        defaults = {"pairs": 10_000, "seed": 0, "clean": False}
        unset = {key: value for key, value in defaults.items() if getattr(source, key) is None}
        source = source.model_copy(update=unset)
    elif source.path is None:
        raise ConfigError(f"{place}.path is missing, expected a file, a folder, a pattern or a URL")
    else:
        source = source.model_copy(update={"path": storage.absolute(source.path)})
        found = find(source, place)
        source = source.model_copy(update={"layout": found.layout})
        _check_options(source, place)
        return _checked(source, found, place)
    _check_options(source, place)
    return source


def _check_options(source: Source, place: str) -> None:
    for option in sorted(set().union(*OPTIONS.values()) - OPTIONS[source.layout]):
        if getattr(source, option) is not None:
            raise ConfigError(f"{place}.{option} has no effect with layout {source.layout}; expected it to be left out")


def _checked(source: Source, found: Found, place: str) -> Source:
    """The source with the columns of a parquet found. Raises ConfigError for a table without what is needed."""
    if source.layout == "parquet":
        for name in sorted(found.files):
            try:
                schema = parquet_rows.schema_of(storage.join(found.root, name))
            except UnreadableError:
                continue  # a row of its own says so
            settings = parquet_rows.resolved(_settings(source), schema, f"{place} ({name})")
            return source.model_copy(
                update={"image_column": settings.image_column, "caption_column": settings.caption_column}
            )
        raise ConfigError(f"{place}.path = {source.path}, expected parquet files; none of them can be read as one")
    if source.layout == URLS:
        return _checked_urls(source, found, place)
    if source.layout == "folder":
        if source.captions:
            image_folder.read_table(_captions_path(source, found.root, place), _settings(source))
        elif source.image_column:
            raise ConfigError(f"{place}.image_column has no effect without captions; expected it to be left out")
        elif not any(extension(name) in ("txt", "json") for name in found.files):
            tables = [name for name in found.files if extension(name) in image_folder.TABLE_EXTENSIONS]
            hint = f"; found {', '.join(tables[:5])}: name it with captions" if tables else ""
            raise ConfigError(f"{place}.path = {source.path}, expected captions in .txt files beside the images{hint}")
    return source


def _checked_urls(source: Source, found: Found, place: str) -> Source:
    """The source with the columns of its first readable table."""
    problem = ""
    for name in _tables(found):
        if found.files[name].unsafe:
            problem = problem or f"{name} is {found.files[name].unsafe}"
            continue
        try:
            settings = url_table.resolved(_settings(source), storage.join(found.root, name), f"{place} ({name})")
        except UnreadableError as error:
            problem = problem or f"{name}: {error}"
            continue
        columns = ("url_column", "caption_column", "sha256_column", "face_boxes_column")
        source = source.model_copy(update={column: getattr(settings, column) for column in columns})
        for column in sorted(set(source.carry) & set(_url_columns(source))):
            raise ConfigError(f"{place}.carry.{column}: the pool has a column of this name already")
        return source
    raise ConfigError(f"{place}.path = {source.path}, expected tables of URLs; none can be read as one ({problem})")


def _url_columns(source: Source) -> dict[str, str]:
    """{column: type} that tables of URLs add to the pool beside what is carried."""
    columns = {EXPECTED_SHA256: source.sha256_column, FACE_BOXES: source.face_boxes_column}
    return {name: "string" for name, column in columns.items() if column is not None}


def _settings(source: Source) -> Settings:
    return Settings(
        source.layout,
        source.image_column,
        source.caption_column,
        source.uid_column,
        dict(source.carry),
        source.url_column,
        source.sha256_column,
        source.face_boxes_column,
    )


def _units(name: str, source: Source, shard_size: int) -> list[Unit]:
    settings = _settings(source)
    if source.layout == DEMO:
        pairs = source.pairs or 0
        world = (pairs, source.seed, source.clean)
        starts = range(0, pairs, shard_size)
        return [Unit(name, settings, DEMO, DEMO, start, min(start + shard_size, pairs), world) for start in starts]
    found = find(source)
    if source.layout == "folder":
        table = _captions_path(source, found.root) if source.captions else None
        return image_folder.units(name, settings, found.root, found.files, table, shard_size)
    units: list[Unit] = []
    if source.layout in ("parquet", URLS):

        def of_file(file: str) -> list[Unit]:
            path = storage.join(found.root, file)
            if source.layout == URLS:
                return url_table.units(name, settings, file, path, shard_size, found.files[file].unsafe)
            return parquet_rows.units(name, settings, file, path, shard_size)

        files = _tables(found) if source.layout == URLS else sorted(found.files)
        with ThreadPoolExecutor(FOOTER_THREADS) as threads:
            return [unit for found_units in threads.map(of_file, files) for unit in found_units]
    captions = _class_captions(found.root) if source.layout == "clip_benchmark" else None
    stems = {file.rpartition(".")[0] for file in found.files if extension(file) in ("tar", "parquet")}
    for stem in sorted(stems):
        tar, table = f"{stem}.tar", f"{stem}.parquet"
        path = storage.join(found.root, table) if table in found.files else None
        extra = TarExtra(tar in found.files, path, captions)
        units.append(Unit(name, settings, tar, storage.join(found.root, tar), extra=extra))
    return units


def _listing(root: str, recursive: bool = True) -> dict[str, FileEntry]:
    """The files in (or below) the folder by relative name, in order; hidden ones left out."""
    files: dict[str, FileEntry] = {}
    if storage.is_url(root):
        for name, entry in storage.list_entries(root, recursive).items():
            if not storage.is_hidden(name):
                files[name] = FileEntry(entry.size_bytes, entry.stamp)
        return files

    def refuse(error: OSError) -> None:
        raise ConfigError(f"{error.filename}: a folder that can't be listed: {error.strerror}") from error

    real_root = os.path.realpath(root)
    for folder, folders, names in os.walk(root, onerror=refuse):
        for name in [*names, *(name for name in folders if os.path.islink(os.path.join(folder, name)))]:
            path = os.path.join(folder, name)
            relative = os.path.relpath(path, root).replace(os.sep, "/")
            if not storage.is_hidden(relative):
                files[relative] = _entry(path, real_root)
        if not recursive:
            break
    return dict(sorted(files.items()))


def _entry(path: str, real_root: str) -> FileEntry:
    """The local file's entry. A link may lead to a tar, parquet or npz anywhere, as in Hugging Face's cache."""
    try:
        status = os.stat(path)
    except OSError:
        return FileEntry(0, "", "a link that leads nowhere")
    if stat.S_ISDIR(status.st_mode):
        return FileEntry(0, "", "a link to a folder, which is not followed", is_folder=True)
    if not stat.S_ISREG(status.st_mode):
        return FileEntry(0, "", "not a regular file")
    leaves = os.path.commonpath([real_root, os.path.realpath(path)]) != real_root
    if leaves and extension(path) not in ("tar", "parquet", "npz"):
        return FileEntry(0, "", "a link that leads out of the source's folder")
    return FileEntry(status.st_size, str(status.st_mtime_ns))


def _matches(pattern: str) -> tuple[str, dict[str, FileEntry]]:
    """The pattern's fixed folder, and the files below it that match; beside tars, images and parquet files theirs."""
    parts = pattern.split("/")
    fixed = next(index for index, part in enumerate(parts) if any(character in part for character in WILDCARDS))
    root = "/".join(parts[:fixed])
    matched = {path[len(root) :].lstrip("/") for path in storage.glob(pattern)}
    files = _listing(root, recursive=fixed < len(parts) - 1 or "**" in pattern)
    stems = {name.rpartition(".")[0] for name in matched if extension(name) in {"tar", *IMAGE_EXTENSIONS}}
    beside = ("parquet", "txt", "json")
    wanted = {name for name in files if name.rpartition(".")[0] in stems and extension(name) in beside} | matched
    wanted |= {url_table.features_path(name) for name in matched if extension(name) == "parquet"}
    return root, {name: entry for name, entry in files.items() if name in wanted}


def _recognised(source: Source, root: str, files: Mapping[str, FileEntry], place: str) -> str:
    if TYPE_FILE in files or CLASSES_FILE in files or _task_folder(root, files):
        return "clip_benchmark"
    kinds = {extension(name) for name in files}
    images = bool(kinds & IMAGE_EXTENSIONS)
    if "tar" in kinds and not images:
        return "webdataset"
    if "parquet" in kinds and not images:
        return URLS if _has_urls(source, root, files) else "parquet"
    if images and not kinds & {"tar", "parquet"}:
        return "folder"
    if not images and any(map(url_table.kind_of, files)):
        return URLS
    raise ConfigError(
        f"{place}.path = {source.path}: the layout can't be recognised from {_kinds(files)}; expected tars, parquet "
        "files, tables of URLs or images: give `layout`, or a pattern such as *.tar"
    )


def _has_urls(source: Source, root: str, files: Mapping[str, FileEntry]) -> bool:
    """True when the parquet files hold URLs and not images, as the config or the first readable one says."""
    if source.url_column or source.image_column:
        return source.image_column is None
    for name in sorted(files):
        if extension(name) == "parquet" and not files[name].unsafe:
            try:
                return url_table.has_urls(parquet_rows.schema_of(storage.join(root, name)))
            except UnreadableError:
                continue
    return False


def _url_tables(source: Source, root: str, files: Mapping[str, FileEntry], place: str) -> dict[str, FileEntry]:
    """The tables of URLs, all of one kind, and the npz beside each where vectors are carried."""
    tables = {name: entry for name, entry in files.items() if url_table.kind_of(name)}
    kinds = sorted({f".{url_table.kind_of(name)}" for name in tables})
    if len(kinds) != 1:
        there = (
            f"found {' and '.join(kinds)}: give a pattern such as *{kinds[0]}" if kinds else f"found {_kinds(files)}"
        )
        raise ConfigError(f"{place}.path = {source.path}, expected tables of one kind; {there}")
    if kinds == [".parquet"] and url_table.VECTOR in source.carry.values():
        for name in map(url_table.features_path, list(tables)):
            path = storage.join(root, name)
            if name in files:
                tables[name] = files[name]
            elif storage.exists(path):  # the source is one file
                tables[name] = FileEntry(storage.size_bytes(path), storage.stamp(path))
    return dict(sorted(tables.items()))


def _tables(found: Found) -> list[str]:
    return sorted(name for name in found.files if url_table.kind_of(name))


def _task_folder(root: str, files: Mapping[str, FileEntry]) -> str | None:
    """The CLIP_benchmark task that this folder is a split of: its parent, or None."""
    parent = root.rstrip("/").rpartition("/")[0]
    if "nshards.txt" not in files or not parent:
        return None
    there = any(storage.exists(storage.join(parent, name)) for name in (TYPE_FILE, CLASSES_FILE))
    return parent if there else None


def _split(root: str, files: Mapping[str, FileEntry], place: str) -> tuple[str, dict[str, FileEntry]]:
    """The task's folder, with the tars of one split and the files that decide captions.

    Which split, the path says: training on a test split must be a decision.
    """
    task = _task_folder(root, files)
    if task is not None:
        split = storage.name_of(root)
        tars = {f"{split}/{name}": entry for name, entry in files.items() if extension(name) == "tar"}
    else:
        task = root
        tars = {name: entry for name, entry in files.items() if extension(name) == "tar"}
    splits = sorted({name.split("/")[0] for name in tars})
    if len(splits) > 1:
        raise ConfigError(f"{place}.path = {root}, expected one split; give the path of {' or '.join(splits)}")
    for name in (CLASSES_FILE, TEMPLATES_FILE):
        path = storage.join(task, name)
        if storage.exists(path):
            tars[name] = FileEntry(storage.size_bytes(path), storage.stamp(path))
    return task, tars


def _class_captions(task: str) -> tuple[str, ...] | None:
    """The caption of each class: its name in the first template, "{c}" where there is none. None: retrieval."""
    path = storage.join(task, CLASSES_FILE)
    if not storage.exists(path):
        return None
    templates = storage.join(task, TEMPLATES_FILE)
    lines = _lines(templates) if storage.exists(templates) else []
    template = next((line for line in lines if line.strip()), "{c}")
    names = _lines(path)
    return tuple(template.replace("{c}", name) for name in names)


def _lines(path: str) -> list[str]:
    try:
        return storage.read_bytes(path).decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: expected text in UTF-8 ({error})") from error


def _with_tables(root: str, files: Mapping[str, FileEntry]) -> dict[str, FileEntry]:
    """The tars, the parquet files beside them, and those of img2dataset's shards whose tar is missing."""

    def wanted(name: str) -> bool:
        if extension(name) != "parquet":
            return extension(name) == "tar"
        return f"{name.removesuffix('parquet')}tar" in files or tar_samples.is_status_table(storage.join(root, name))

    return {name: entry for name, entry in files.items() if wanted(name)}


def _captions_path(source: Source, root: str, place: str = "source") -> str:
    captions = source.captions or ""
    path = captions if storage.is_url(captions) else os.path.expanduser(captions)
    if not storage.is_url(path) and not os.path.isabs(path):
        path = storage.join(root, path)
    if not storage.exists(path):
        raise ConfigError(f"{place}.captions = {captions}, expected a table in {root} or an absolute path")
    return path


def _kinds(files: Mapping[str, FileEntry]) -> str:
    kinds = sorted({f".{extension(name)}" if extension(name) else "files without a suffix" for name in files})
    return ", ".join(kinds[:8]) or "nothing"


def _digest(value: Any) -> str:
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:32]
