"""Domain lists against the rule in plain text, and files that are none."""

from __future__ import annotations

import hashlib
import json

import pytest

from pipeline.core.errors import ConfigError
from stages import build_stage
from stages.columns.domain_list import DomainList
from tests.duplicates_fixture import run_stage
from tests.golden_fixture import check_golden
from tests.pool_fixture import drawing, write_pool

LIST = "# those we trust\nexample.org\n\n Shop.Example.COM # a comment\nmünchen.example\n127.0.0.1\nuk\n"
CASES = [
    ("http://example.org/a.jpg", True),
    ("https://img.cdn.example.org:8080/a.jpg?u=b.test", True),
    ("HTTP://EXAMPLE.ORG./a", True),
    ("http://user:word@example.org/a", True),
    ("http://notexample.org/a", False),
    ("http://example.org.evil.test/a", False),
    ("http://evil.test/example.org", False),
    ("http://evil.test/?http://example.org", False),
    ("http://example.com/a", False),
    ("http://shop.example.com/a", True),
    ("http://a.shop.example.com/a", True),
    ("http://MÜNCHEN.example/a", True),
    ("http://xn--mnchen-3ya.example/a", True),
    ("http://127.0.0.1:99/a", True),
    ("http://bbc.co.uk/a", True),
    (" http://example.org/blanks ", True),
    ("no url at all", False),
    ("http://[::1/broken", False),
    ("", None),
    (" ", None),
    (None, None),
]


def run(folder, urls, path):
    rows = [{"image": drawing(1), "caption": "a", "url": url} for url in urls]
    rows.append({"image": None, "caption": "a", "url": "http://example.org/failed"})
    pool_path = write_pool(folder, [rows])
    _, found, _ = run_stage(pool_path, folder / "out", build_stage("domain_list", {"path": str(path)}, ""))
    return [row["domain_listed"] for row in found]


def test_a_domain_covers_itself_and_what_lies_below_it(tmp_path):
    (tmp_path / "domains.txt").write_text(LIST)
    found = run(tmp_path, [url for url, _ in CASES], tmp_path / "domains.txt")
    assert found == [*(listed for _, listed in CASES), None]
    digest = hashlib.sha256(json.dumps(found).encode()).hexdigest()
    check_golden("domain_list", {"version": DomainList.version, "sha256": digest})


def test_an_empty_list_lists_nothing(tmp_path):
    (tmp_path / "domains.txt").write_text("# nothing\n")
    assert run(tmp_path, ["http://example.org/a", None], tmp_path / "domains.txt") == [False, None, None]


def test_files_that_are_no_lists_are_one_line(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere.txt", ""):
        with pytest.raises(ConfigError, match=f"stages.domain_list.path = {path}, expected a text file of one domain"):
            build_stage("domain_list", {"path": str(path)}, "").external_files()
    for text, message in (("a.test\nhttp://b.test/\n", "'http://b.test/', expected a host's name"), (b"\xff", "utf-8")):
        path = tmp_path / "domains.txt"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(ConfigError, match=message) as caught:
            build_stage("domain_list", {"path": str(path)}, "").load(None)
        assert "stages.domain_list" in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="path is missing"):
        build_stage("domain_list", {}, "stages.1")
