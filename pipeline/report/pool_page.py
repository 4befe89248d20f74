"""What is in a pool, without training anything: pool.html, pool.json, and what the terminal shows of them.

A pure function of the pool's profile. Names, captions and values are hostile here as everywhere in the report.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.core import storage
from pipeline.report.deciles import kept_lines, score_sections, value_text
from pipeline.report.leaderboard import number, percent, plain
from pipeline.report.markup import Markup, document, element, nothing, section, text_table
from pipeline.report.pool_profile import GOOD, Duplicates, Histogram, Numbers, Profile, Sample, Values
from pipeline.report.records import Run
from pipeline.report.samples import figure

PAGE, DATA = "pool.html", "pool.json"
TERMINAL_VALUES = 5  # of a column, in the terminal
DIGEST = "_sha256"  # the end of the names of columns whose values say nothing to a reader
SHOWN_VALUE_CHARS = 80
FREQUENT = 0.01  # of the rows
HISTOGRAM_PX = (300, 86)
TITLE = "What is in the pool?"
SIZES = ("_px", "_bytes", "aspect_ratio")  # how the names of columns of sizes end
CAPTION = "caption"
TEXTS_FIRST = ("language", "source", "url_host", "image_format", CAPTION)


def write_pool_page(run: Run, folder: str) -> str:
    """The path of the page, which is written into the run's folder with its data; the run has a profile."""
    path = storage.join(folder, PAGE)
    storage.write_bytes(path, pool_page(run).encode("utf-8", "replace"))
    storage.write_bytes(storage.join(folder, DATA), pool_json(run).encode("utf-8", "replace"))
    return path


def pool_page(run: Run) -> str:
    """The whole page."""
    profile = _profile(run)
    title = plain(run.header["config_name"] or run.name)
    return document(
        f"{title} · pool",
        _header(profile, run, title),
        _failures(profile),
        *_truth(profile),
        *_columns("Sizes", "Of images and files.", profile, [name for name in profile.numbers if _is_size(name)]),
        *_texts(profile),
        *_columns(
            "Numbers",
            "Every other column of numbers. Marks below a histogram are its nine deciles.",
            profile,
            [name for name in profile.numbers if not _is_size(name)],
        ),
        *(_duplicates(name, found) for name, found in profile.duplicates.items()),
        *score_sections(profile),
        _provenance(run, profile),
        element("footer", "Made by winnow from the pool and its columns; nothing was trained for this page."),
    )


def pool_text(run: Run) -> str:
    """What the terminal shows: counts, failures, languages, sources, duplicates, and the scores' deciles."""
    profile = _profile(run)
    lines = [TITLE, _headline(profile), ""]
    for name in ordered_texts(profile):
        found = profile.values[name]
        if name != CAPTION and not name.endswith(DIGEST) and _has_frequent(found):
            shown = [f"{_short(value)} {_share(count, found.rows)}" for value, count in found.values[:TERMINAL_VALUES]]
            others = found.num_other + len(found.values) - len(shown)
            lines.append(f"{plain(name)}: {', '.join(shown)}" + (f", {number(others)} more" if others else ""))
    for name, groups in profile.duplicates.items():
        lines.append(f"duplicates by {plain(name)}: {_groups_text(groups)}")
    for name, found in profile.numbers.items():
        if found.lowest is not None and (name in profile.scores or _is_size(name) or name.startswith(CAPTION)):
            middle = found.deciles[4] if len(found.deciles) > 4 else None
            span = f"{value_text(found.lowest)} to {value_text(found.highest)}, median {value_text(middle)}"
            missing = found.nulls + found.nans
            lines.append(f"{plain(name)}: {span}" + (f"; {number(missing)} rows without" if missing else ""))
    for name, deciles in profile.scores.items():
        low = name in profile.keeps_low
        line = kept_lines(deciles[::-1] if low else deciles, low)[3]
        if line.precision is not None and line.recall is not None:
            side = "lowest" if low else "highest"
            good = f"precision {percent(line.precision)} %, recall {percent(line.recall)} % of the planted good rows"
            lines.append(f"{plain(name)}, {side} 30 %: {good}")
    return "\n".join([*lines, *(plain(note) for note in run.notes)]).rstrip() + "\n"


def pool_json(run: Run) -> str:
    """The profile's numbers, without captions and pictures."""
    profile = _profile(run)
    value = {
        "run": run.name,
        **{key: run.header[key] for key in ("config_name", "date", "winnow_version", "pool")},
        "profile": _plain_value(profile),
        "notes": list(run.notes),
    }
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def _plain_value(value: Any) -> Any:
    """Dataclasses as mappings; a sample is its uid."""
    if isinstance(value, Sample):
        return value.uid
    if dataclasses.is_dataclass(value):
        return {field.name: _plain_value(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain_value(inner) for key, inner in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain_value(inner) for inner in value]
    return sorted(value) if isinstance(value, frozenset) else value


def _profile(run: Run) -> Profile:
    assert run.profile is not None  # asked for only then
    return run.profile


def _is_size(name: str) -> bool:
    return name.endswith(SIZES)


def ordered_texts(profile: Profile) -> list[str]:
    """The columns of texts and bools in the order of the page; what planted truth says has a section of its own."""
    names = [name for name in profile.values if name.startswith("truth_") is False or profile.truth is None]
    first = [name for name in TEXTS_FIRST if name in names]
    return [*first, *(name for name in names if name not in first)]


def _headline(profile: Profile) -> str:
    failed = profile.rows - profile.ok_rows
    text = f"{number(profile.rows)} rows, {number(profile.ok_rows)} usable"
    if failed:
        worst = sorted(profile.failed.items(), key=lambda entry: (-entry[1], entry[0]))[:3]
        text += f", {number(failed)} failed ({', '.join(f'{plain(name)} {number(count)}' for name, count in worst)})"
    if profile.excluded_rows:
        text += f", {number(profile.excluded_rows)} of the usable ones excluded"
    return text + "."


def _header(profile: Profile, run: Run, title: str) -> Markup:
    facts = [("rows", number(profile.rows)), ("usable", number(profile.ok_rows))]
    facts += [("failed", number(profile.rows - profile.ok_rows))]
    facts += [("excluded", number(profile.excluded_rows))] if profile.excluded_rows else []
    facts += [("flagged", number(profile.flagged_rows))] if profile.flagged else []
    facts += [("columns", str(len(profile.numbers) + len(profile.values))), ("date", str(run.header["date"] or "-"))]
    about = "Counts are exact and of the usable rows, unless they say otherwise. Nothing was trained for this page."
    if profile.flagged:
        about += f" Pictures of rows with {' or '.join(map(plain, profile.flagged))} are blurred: a click shows one."
    return element(
        "header",
        element("h1", element("b", "winnow"), f" · {title} · pool"),
        element("p", f"{TITLE} {_headline(profile)}", class_="headline"),
        element("p", about, class_="scope"),
        element("dl", *(element("div", element("dt", k), element("dd", plain(v))) for k, v in facts), class_="facts"),
    )


def _failures(profile: Profile) -> Markup:
    if not profile.failed:
        return section("Failures", "Rows that can't be used, by what they failed at.", nothing("None."))
    entries = sorted(profile.failed.items(), key=lambda entry: (-entry[1], entry[0]))
    about = f"Rows that can't be used, by what they failed at, of all {number(profile.rows)} rows."
    return section("Failures", about, _bars(entries, profile.rows))


def _truth(profile: Profile) -> list[Markup]:
    if profile.truth is None:
        return []
    total = sum(profile.truth.values())
    faults = sorted(profile.truth.items(), key=lambda entry: (entry[0] != GOOD, -entry[1], entry[0]))
    entries = [(fault or "(good)", count) for fault, count in faults]
    about = "What this pool's own record says was done to its usable rows; no filter but an oracle may read it."
    return [section("Planted truth", about, _bars(entries, total))]


def _texts(profile: Profile) -> list[Markup]:
    names = ordered_texts(profile)
    parts = [_text_column(name, profile.values[name]) for name in names if profile.values[name].values]
    empty = [plain(name) for name in names if not profile.values[name].values]
    about = "The most frequent values of every column of texts."
    about += f" Without any value: {', '.join(empty)}." if empty else ""
    return [section("Values", about, element("div", *parts, class_="columns-of"))] if parts else []


def _text_column(name: str, found: Values) -> Markup:
    lines = []
    if found.nulls:
        lines.append(f"{number(found.nulls)} rows without a value.")
    if found.unsure_below > (found.values[-1][1] if found.values else 0):
        lines.append(f"Other values may be as frequent as {number(found.unsure_below)} rows.")
    if not _has_frequent(found) and (name not in TEXTS_FIRST or found.values[0][1] == 1):
        about = f"About {number(found.num_other + len(found.values))} values"
        content = nothing(f"{about}, the most frequent in {number(found.values[0][1])} rows.")
    else:
        entries = list(found.values)
        if found.num_other:
            entries.append((f"(about {number(found.num_other)} others)", found.other_rows))
        content = _bars(entries, found.rows)
    return element("div", element("h3", plain(name)), content, *(element("p", line) for line in lines))


def _has_frequent(found: Values) -> bool:
    """False where values are names or hashes, which tell nobody anything: many, and none of them frequent."""
    return bool(found.values) and (not found.num_other or found.values[0][1] >= FREQUENT * found.rows)


def _columns(title: str, about: str, profile: Profile, names: Sequence[str]) -> list[Markup]:
    there = [name for name in names if profile.numbers[name].lowest is not None]
    parts = [_number_column(name, profile.numbers[name]) for name in there]
    empty = [plain(name) for name in names if name not in there]
    about += f" Without any number: {', '.join(empty)}." if empty else ""
    return [section(title, about, element("div", *parts, class_="columns-of"))] if parts else []


def _number_column(name: str, found: Numbers) -> Markup:
    middle = found.deciles[4] if len(found.deciles) > 4 else None
    facts = [f"{value_text(found.lowest)} to {value_text(found.highest)}"]
    facts += [f"mean {value_text(found.mean)}", f"median {value_text(middle)}"]
    facts += [f"{number(found.nulls)} nulls"] if found.nulls else []
    facts += [f"{number(found.nans)} NaN"] if found.nans else []
    facts += [f"{number(found.infinite)} infinite"] if found.infinite else []
    plot = histogram_plot(name, found) if found.histogram else None
    return element("div", element("h3", plain(name)), plot, element("p", ", ".join(facts)))


def histogram_plot(name: str, found: Numbers) -> Markup:
    """The counts as bars, its range below them, and a mark at each decile."""
    bins = found.histogram
    assert bins is not None  # asked for only then
    width_px, height_px = HISTOGRAM_PX
    base = height_px - 20
    most = max(*bins.counts, 1)
    step = width_px / len(bins.counts)
    bars = [
        element(
            "rect",
            element("title", f"{_bin_text(bins, at)}: {number(count)} rows"),
            x=f"{at * step:.2f}",
            y=f"{base - (base - 4) * count / most:.2f}",
            width=f"{max(0.5, step - 1):.2f}",
            height=f"{(base - 4) * count / most:.2f}",
            class_="bin",
        )
        for at, count in enumerate(bins.counts)
        if count
    ]
    end = bins.start + bins.width * len(bins.counts)
    span = end - bins.start
    marks = [
        element("line", x1=f"{x:.2f}", x2=f"{x:.2f}", y1=base, y2=base + 5, class_="tick")
        for value in found.deciles
        if value is not None and span and 0 <= (x := width_px * (value - bins.start) / span) <= width_px
    ]
    left = f"{value_text(bins.start)}" + (f" ({number(bins.below)} below)" if bins.below else "")
    last = end - 1 if found.kind.startswith("int") else end
    right = f"{value_text(last)}" + (f" ({number(bins.above)} above)" if bins.above else "")
    middle = found.deciles[4] if len(found.deciles) > 4 else None
    label = f"{plain(name)}: {left} to {right}, median {value_text(middle)}"
    return element(
        "svg",
        *bars,
        element("line", x1=0, x2=width_px, y1=base, y2=base, class_="axis"),
        *marks,
        element("text", left, x=0, y=height_px - 2, class_="small"),
        element("text", right, x=width_px, y=height_px - 2, class_="small", text_anchor="end"),
        viewBox=f"0 0 {width_px} {height_px}",
        role="img",
        aria_label=label,
        class_="histogram",
    )


def _bin_text(bins: Histogram, at: int) -> str:
    start = bins.start + at * bins.width
    if bins.width == 1 and bins.start == int(bins.start):
        return value_text(start)
    return f"{value_text(start)} to {value_text(start + bins.width)}"


def _duplicates(name: str, found: Duplicates) -> Markup:
    title = f"Duplicates: {plain(name)}"
    if not found.groups:
        return section(title, "Groups of rows that repeat each other.", nothing("None."))
    about = f"Groups of rows that repeat each other: {_groups_text(found)}."
    sizes = [[number(size), number(num)] for size, num in found.sizes.items()]
    largest = ", ".join(map(number, found.largest))
    examples = [
        element(
            "div",
            element("h3", f"{number(example.size)} rows, {len(example.samples)} of them shown"),
            element("div", *map(figure, example.samples), class_="samples"),
        )
        for example in found.examples
    ]
    return section(
        title,
        about,
        element("p", f"The largest have {largest} rows.", class_="about"),
        element("details", element("summary", "Groups by size"), text_table(["rows in a group", "groups"], sizes)),
        element("details", element("summary", "Examples: the largest, and some at random"), *examples, open=""),
    )


def _groups_text(found: Duplicates) -> str:
    extra = found.rows - found.groups
    return f"{number(found.groups)} groups of {number(found.rows)} rows, {number(extra)} more than one of each"


def _bars(entries: Sequence[tuple[str, int]], total: int) -> Markup:
    """A line for each value: its rows, their share, and a bar of it."""
    lines = []
    for value, count in entries:
        share = count / total if total else 0.0
        lines.append(
            element(
                "li",
                element("span", _short(value), title=plain(value) if len(value) > SHOWN_VALUE_CHARS else None),
                element("span", number(count), " ", element("small", f"{percent(share)} %")),
                element("div", element("i", "", style=f"width:{100 * min(1.0, share):.2f}%"), class_="track c0"),
            )
        )
    return element("ul", *lines, class_="bars")


def _short(value: str) -> str:
    text = plain(value)
    return (text if len(text) <= SHOWN_VALUE_CHARS else f"{text[: SHOWN_VALUE_CHARS - 1]}…") or "(empty)"


def _share(count: int, total: int) -> str:
    return f"{percent(count / total)} %" if total else "-"


def _provenance(run: Run, profile: Profile) -> Markup:
    pool = run.header["pool"]
    lines = [f"run            {run.name}", f"pool           {pool['path']}", f"profile        {profile.path}"]
    lines += [f"winnow         {run.header['winnow_version']}"]
    parts = [("Fingerprints", lines)] + ([("Config", run.config_text.splitlines())] if run.config_text else [])
    blocks = [
        element("details", element("summary", name), element("pre", "\n".join(plain(line) for line in block)))
        for name, block in parts
    ]
    notes = [element("li", plain(note)) for note in run.notes]
    listed = element("ul", *notes, class_="notes") if notes else None
    return section("Where it comes from", "The artifacts behind this page, by fingerprint.", *blocks, listed)
