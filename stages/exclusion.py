"""What is taken out wherever it would be used: uids and domains of the config's `exclude` (takedowns).

    exclude: {uids: [takedowns.txt, subset.npy], domains: [example.org]}     a domain covers its subdomains

They apply before a download (such a row is never fetched) and again at every selection, so a new entry leaves every
later artifact without anything being downloaded again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa

from pipeline.core import storage
from pipeline.core.errors import ConfigError, StoreError, WinnowError, one_line
from stages.selection import uids as uid_pairs

URL_COLUMNS = ("url", "final_url")  # where a row's image came from


@dataclass(frozen=True)
class Exclusion:
    """The lists, as the config gives them: files of uids (.npy subset files or one uid a line), and domains."""

    uid_paths: tuple[str, ...] = ()
    domains: frozenset[str] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.uid_paths or self.domains)

    def identity(self) -> Mapping[str, Any]:
        """The lists by content. Raises ConfigError when a file can't be read."""
        return {"uids": sorted(map(_digest, self.uid_paths)), "domains": sorted(self.domains)}

    def load(self) -> Excluded:
        """The lists in memory: 16 bytes a uid. Raises WinnowError for a file that holds something else."""
        return Excluded([_read_uids(path) for path in self.uid_paths], self.domains)


NOTHING = Exclusion()


@dataclass(frozen=True)
class Excluded:
    """The lists, ready to judge rows."""

    uids: Sequence[np.ndarray]  # each [n, 2] uint64, sorted
    domains: frozenset[str]

    def rows(self, uids: np.ndarray, urls: Iterable[Sequence[str | None]]) -> np.ndarray:
        """[rows] bool: which are excluded.

        Args:
            uids: [rows, 2] uint64.
            urls: columns of URLs, each with one entry per row; read only where domains are excluded.
        """
        found = np.zeros(len(uids), dtype=bool)
        for subset in self.uids:
            found |= uid_pairs.count_in(uids, subset) > 0
        for column in urls if self.domains else ():
            found |= np.fromiter((self.host(host_of(url)) for url in column), dtype=bool, count=len(uids))
        return found

    def host(self, host: str) -> bool:
        """True when the host or a domain above it is excluded."""
        while host and self.domains:
            if host in self.domains:
                return True
            host = host.partition(".")[2]
        return False


def parse(uids: str | Sequence[str], domains: str | Sequence[str], place: str) -> Exclusion:
    """The checked lists of a config. Raises ConfigError for a list that can't be read.

    Args:
        uids: a path, or several.
        domains: see parse_domains.
    """
    paths = [uids] if isinstance(uids, str) else list(uids)
    exclusion = Exclusion(tuple(storage.absolute(path) for path in paths), parse_domains(domains, f"{place}.domains"))
    for path in exclusion.uid_paths:
        try:
            _read_uids(path)
        except StoreError as error:
            raise ConfigError(f"{place}.uids: {error}") from error
        except WinnowError as error:
            raise ConfigError(f"{place}.{error}") from error
    return exclusion


def parse_domains(domains: str | Sequence[str], place: str) -> frozenset[str]:
    """The domains as name servers know them. Raises ConfigError for a list that can't be read or a wrong name.

    Args:
        domains: names, or the path of a file with one a line (`#` starts a comment).
    """
    if isinstance(domains, str):
        try:
            lines = storage.read_bytes(domains).decode("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{place} = {domains}, expected a text file: {one_line(error)}") from error
        domains = [line for line in (line.partition("#")[0].strip() for line in lines) if line]
    for domain in domains:
        if not domain or any(character in domain for character in "/:@ *?"):
            raise ConfigError(f"{place}: {domain!r}, expected a host's name such as example.org")
    return frozenset(_ascii_host(domain) for domain in domains)


def host_of(url: str | None) -> str:
    """The host of a URL in lower case, as name servers know it (punycode); "" where there is none."""
    try:
        return _ascii_host(urlsplit((url or "").strip()).hostname or "")
    except ValueError:
        return ""


def _ascii_host(host: str) -> str:
    host = host.lower().strip(".")
    if not host.isascii():
        with contextlib.suppress(UnicodeError):
            return host.encode("idna").decode().strip(".")
    return host


def _digest(path: str) -> str:
    try:
        return storage.sha256_file(path)
    except OSError as error:
        raise ConfigError(f"exclude.uids = {path}, expected a file that can be read: {one_line(error)}") from error


def _read_uids(path: str) -> np.ndarray:
    if path.endswith(".npy"):
        return np.asfortranarray(uid_pairs.read_subset(path, "uids"))
    try:
        lines = storage.read_bytes(path).decode("ascii").split()
    except (OSError, UnicodeDecodeError) as error:
        raise WinnowError(f"uids = {path}, expected a .npy or one uid a line: {one_line(error)}") from error
    pairs = uid_pairs.parse(pa.array(lines, type=pa.string()), f"uids = {path}")
    return np.asfortranarray(pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))])
