"""The page's plots as SVG elements, and its heat map as a table.

Colours come from the page's style sheet, so they follow light and dark.

Drawn by hand rather than by matplotlib: the text stays text in the reader's font, any name can be drawn without font
metrics or glyph warnings, colours are CSS classes, and equal numbers give equal bytes.
A drawing is 440 units wide, so that its text is still legible on a phone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from pipeline.report.leaderboard import (
    MANY_TASKS,
    Difference,
    Estimate,
    Leaderboard,
    Row,
    p_text,
    percent,
    plain,
    points,
)
from pipeline.report.markup import Markup, cut, element, short_name, table
from pipeline.report.records import OUTSIDE_LABELS
from pipeline.report.tables import strategy_text
from pipeline.report.trainings import HELD_OUT_RECALL, LOSS, TRAIN_RECALL, Curve, chance_loss, curves

WIDTH = 440
FOREST_RIGHT = 116  # of it for values and verdicts
NUM_COLOURS = 8
LABEL_CHARS = 20  # of a name beside a mark
HEAT_STEPS = 8  # classes m8 to m1, p0 to p8 of the style sheet
CHAR_UNITS = 8.2  # a generous width of one bold character; the text is 11.5 units high, 13 on a phone


# the CSS class of a standing
STANDING_CLASSES = {
    "best": "good",
    "could be best": "good",
    "not best": "neutral",
    "oracle": "oracle",
    "reference": "oracle",
}

Scale = tuple[list[float], Callable[[float], float]]  # ticks, and the position of a value


def colour_classes(board: Leaderboard) -> dict[str, str]:
    """The CSS class of each strategy: `base` for the baseline, `c0` to `c7` for the others, in the config's order."""
    others = [s.name for s in board.run.compared if s.name != board.run.baseline]
    classes = {name: f"c{i % NUM_COLOURS}" + (" dashed" if i >= NUM_COLOURS else "") for i, name in enumerate(others)}
    return classes | {board.run.baseline: "base"}


def difference_plots(board: Leaderboard) -> tuple[Markup | None, Markup | None]:
    """Each strategy's difference to the baseline, and to its random control, with 95 % intervals.

    Both have the same lines and the same scale, so that they can be read across. The first is None when no strategy has
    a difference, the second when none has a control.
    """
    rows = [row for row in board.rows if row.difference or row.control_difference]
    controls = {row.control for row in rows}
    known = [found for row in rows for found in (row.difference, row.control_difference) if found]
    if not known:
        return None, None
    scale = _scale(known, 18, WIDTH - FOREST_RIGHT - 16)
    first = _forest(rows, scale, [(row.difference, "no average") for row in rows], board.run.baseline)
    if not any(row.control_difference for row in rows):
        return first, None
    reasons = ["random itself" if row.strategy.name in controls else "no control" for row in rows]
    second = list(zip((row.control_difference for row in rows), reasons, strict=True))
    return first, _forest(rows, scale, second, "as many at random")


def _forest(rows: Sequence[Row], scale: Scale, found: Sequence[tuple[Difference | None, str]], other: str) -> Markup:
    """A line a row: name and standing above the interval, value and verdict beside it; a reason where there is none."""
    top, step, x = 22, 46, WIDTH - FOREST_RIGHT
    bottom, zero = top + step * len(rows), scale[1](0)
    parts = [_zero_axis(scale, top, bottom, f"points, minus {other}")]
    if zero > 7 * CHAR_UNITS:
        parts.append(_text(zero - 6, 13, "\N{LEFTWARDS ARROW} worse", "end", "small"))
    parts.append(_text(zero + 6, 13, "better \N{RIGHTWARDS ARROW}", "start", "small"))
    for i, (row, (difference, reason)) in enumerate(zip(rows, found, strict=True)):
        y = top + step * i
        parts.append(_line(0, y, WIDTH, y, "grid"))
        standing = row.standing or row.strategy.label
        name = element("tspan", cut(row.strategy.name, 24), class_="name")
        more = element("tspan", standing, dx=8, class_=f"small {STANDING_CLASSES.get(standing, '')}".rstrip())
        parts.append(element("rect", x=0, y=_n(y + 3), width=x - 8, height=19, class_="paper"))  # no line through names
        parts.append(element("text", name, more if standing else None, x=0, y=_n(y + 17)))
        if difference is None:
            parts.append(_text(x, y + 17, reason, class_="small"))
            continue
        class_ = _verdict_class(difference)
        parts.append(_interval(scale, y + 32, difference, class_, f"{strategy_text(row)} minus {other}", 5.5))
        value = f"{points(difference.value)} ± {percent(difference.half_width)}"
        parts.append(_text(x, y + 17, value, class_="number"))
        says = f"verdict {class_}" if difference.p is not None else "small"  # with one seed it is a remark
        parts.append(_text(x, y + 36, difference.verdict, class_=says))
    return _svg(bottom + 40, parts, f"Differences: each strategy minus {other}, with 95 % intervals")


def task_differences(board: Leaderboard) -> Markup | None:
    """Per task, each strategy's difference to the baseline with its 95 % interval; None when there is none."""
    rows = [row for row in board.rows if row.task_differences]
    tasks = [task for task in board.run.tasks if any(task.name in row.task_differences for row in rows)]
    if not tasks:
        return None
    classes = colour_classes(board)
    left, step, gap = _label_width([task.title for task in tasks]), 11, 16
    found = [(task, [row for row in rows if task.name in row.task_differences]) for task in tasks]
    bottom = 8 + sum(step * len(inside) + gap for _, inside in found)
    scale = _scale([row.task_differences[task.name] for task, inside in found for row in inside], left, WIDTH - 20)
    parts = [_zero_axis(scale, 8, bottom, f"points over {board.run.baseline}")]
    y = 8 + gap / 2
    for i, (task, inside) in enumerate(found):
        if i:
            parts.append(_line(0, y - gap / 2, WIDTH, y - gap / 2, "grid"))
        middle = y + step * len(inside) / 2
        parts.append(
            _text(
                left - 12, middle + 4, cut(task.title + "*" * task.in_domain, LABEL_CHARS), anchor="end", class_="name"
            )
        )
        for row in inside:
            difference = row.task_differences[task.name]
            label = f"{task.title}, {strategy_text(row)}"
            parts.append(_interval(scale, y + step / 2, difference, classes[row.strategy.name], label, 3.5))
            y += step
        y += gap
    return _svg(bottom + 40, parts, f"Differences to {board.run.baseline} per task with 95 % intervals")


def heat_map(board: Leaderboard) -> Markup | None:
    """A table of tasks by strategies: differences to the baseline in points, tinted; None when there is none.

    A tint's strength is the difference as a fraction of the largest of those that compete, in HEAT_STEPS steps.
    """
    rows = [row for row in board.rows if row.task_differences]
    tasks = [task for task in board.run.tasks if any(task.name in row.task_differences for row in rows)]
    if not tasks:
        return None
    baseline = next(row for row in board.rows if row.strategy.name == board.run.baseline)
    competing = [row for row in rows if row.strategy.label not in OUTSIDE_LABELS] or rows
    largest = max(abs(found.value) for row in competing for found in row.task_differences.values()) or 1.0
    heads = [
        element("th", "task", class_="text"),
        element("th", element("span", short_name(board.run.baseline)), element("small", "%")),
        *(element("th", element("span", short_name(row.strategy.name))) for row in rows),
    ]

    def line(name: Markup, score: Estimate, found: Sequence[Difference | None], class_: str | None = None) -> Markup:
        value = "N/A" if score.value is None else percent(score.value)
        cells = [_heat_cell(difference, largest) for difference in found]
        return element("tr", element("td", name, class_="strategy"), element("td", value), *cells, class_=class_)

    body = []
    if any(row.difference for row in rows):
        name = element("span", f"average of {len(board.run.averaged)}")
        body.append(line(name, baseline.average, [row.difference for row in rows], "average"))
    groups = list(dict.fromkeys(task.group for task in tasks))
    for group in groups:
        if len(groups) > 1:
            head = element("th", plain(group or "others"), class_="text", colspan=str(len(rows) + 2), scope="colgroup")
            body.append(element("tr", head, class_="group"))
        for task in tasks:
            if task.group == group:
                name = element("span", short_name(task.title), "*" * task.in_domain)
                found = [row.task_differences.get(task.name) for row in rows]
                body.append(line(name, baseline.task_scores[task.name], found))
    marks = [f"{points(sign * largest * share)}" for sign, share in ((-1, 1), (-1, 0.5), (1, 0), (1, 0.5), (1, 1))]
    steps = [f"m{i}" for i in range(HEAT_STEPS, 0, -1)] + ["p0"] + [f"p{i}" for i in range(1, HEAT_STEPS + 1)]
    key = element(
        "div",
        element("span", "worse"),
        element("div", *(element("i", "", class_=step) for step in steps), class_="ramp"),
        element("span", "better"),
        element("div", *(element("span", mark) for mark in marks), class_="marks"),
        class_="heat key",
    )
    return element("div", key, table(heads, body, class_="heat turned" if len(rows) > MANY_TASKS else "heat"))


def _heat_cell(difference: Difference | None, largest: float) -> Markup:
    if difference is None:
        return element("td", "-")
    step = min(HEAT_STEPS, round(HEAT_STEPS * abs(difference.value) / largest))
    class_ = f"{'m' if difference.value < 0 else 'p'}{step}"
    about = f"± {percent(difference.half_width)}, {difference.verdict}"
    if difference.p_holm is not None:
        about += f", {p_text(difference.p_holm)}"
    value = points(difference.value)
    sure = difference.verdict in ("better", "worse")
    return element("td", element("b", f"{value}•") if sure else value, class_=class_, title=about)


def score_against_kept(board: Leaderboard) -> Markup | None:
    """Average against the kept fraction of the pool, with 95 % intervals; None without an average."""
    found = {row.strategy.name: 100 * row.strategy.kept_fraction for row in board.rows if row.strategy.kept_fraction}
    if not found:
        return None
    ends = (0.0, 100.0) if min(found.values()) >= 2 else (10.0 ** math.floor(math.log10(min(found.values()))), 100.0)
    return _score_against(board, found, ends, "kept", "% of the pool")


def score_against_repeats(board: Leaderboard) -> Markup | None:
    """Average against how often a training sees each kept sample, with 95 % intervals; None without an average.

    The smallest selections are seen most often: where the score falls at the right, more repeats may be why.
    """
    found = {row.strategy.name: row.repeats for row in board.rows if row.repeats}
    if not found:
        return None
    low, high = min(found.values()), max(found.values())
    ends = (2.0 ** math.floor(math.log2(low)), 2.0 ** math.ceil(math.log2(high * 1.001)))
    return _score_against(board, found, ends, "repeats", "times each kept sample is seen")


def _score_against(
    board: Leaderboard, x_of_name: dict[str, float], ends: tuple[float, float], what: str, unit: str
) -> Markup | None:
    """Average with its 95 % interval against x; from 0 on x is linear, else logarithmic. None without an average."""
    rows = [row for row in board.rows if row.average.value is not None and row.strategy.name in x_of_name]
    if not rows:
        return None
    classes = colour_classes(board)
    left, right, top, bottom = 44, WIDTH - 12, 12, 270
    low, high = ends
    if low:
        along = _linear(math.log(low), math.log(high), left, right)
        base = 2 if what == "repeats" else 10
        count = round(math.log(high / low, base))
        every = max(1, -(-count // 8))
        x_ticks = [low * base**e for e in range(0, count + 1, every)]
    else:
        along = _linear(low, high, left, right)
        x_ticks = [high * i / 4 for i in range(5)]

    def x_of(value: float) -> float:
        return along(math.log(value) if low else value)

    lows = [row.average.value - row.average.half_width for row in rows]
    highs = [row.average.value + row.average.half_width for row in rows]
    ticks = _ticks(100 * min(lows), 100 * max(highs))
    y_of = _linear(ticks[0], ticks[-1], bottom, top)
    parts = [_y_axis(ticks, y_of, left, right, "average, %")]
    for tick in x_ticks:
        parts.append(_text(x_of(tick), bottom + 18, f"{tick:g}", anchor="middle", class_="small"))
    parts.append(_text((left + right) / 2, bottom + 36, f"{what}, {unit}", anchor="middle", class_="small"))
    labels, marks = [], []
    for row in rows:
        own = x_of_name[row.strategy.name]
        x = x_of(own)
        value, width = 100 * row.average.value, 100 * row.average.half_width
        y = y_of(value)
        marks.append(
            element(
                "g",
                _line(x, y_of(value - width), x, y_of(value + width), "bar"),
                element("circle", cx=_n(x), cy=_n(y), r=5, class_="dot"),
                _title(f"{strategy_text(row)}: {value:.1f} ± {width:.1f} %, {what} {own:.3g} {unit}"),
                class_=classes[row.strategy.name],
            )
        )
        labels.append((x, y, y - y_of(value + width), cut(row.strategy.name, LABEL_CHARS)))
    parts += [*_labels(labels, left, right, bottom), *marks]  # no label hides a mark
    return _svg(bottom + 44, parts, f"Average against {what} with 95 % intervals")


def score_against_samples(board: Leaderboard) -> Markup | None:
    """Average against the budget, with 95 % intervals; None without an average at two budgets."""
    classes = colour_classes(board)
    parts = board.by_budget[::-1]
    averages = {row.strategy.name: [] for row in board.rows}
    for part in parts:
        for row in part.rows:
            if row.average.value is not None:
                averages[row.strategy.name].append(
                    (part.samples_seen, 100 * row.average.value, 100 * row.average.half_width)
                )
    known = [point for points in averages.values() for point in points]
    budgets = sorted({samples for samples, _, _ in known})
    if len(budgets) < 2:
        return None
    left, right, top, bottom = 44, WIDTH - 24, 12, 270
    position = _linear(math.log(budgets[0]), math.log(budgets[-1]), left + 20, right)
    ticks = _ticks(min(value - width for _, value, width in known), max(value + width for _, value, width in known))
    y_of = _linear(ticks[0], ticks[-1], bottom, top)
    drawn = [_y_axis(ticks, y_of, left, WIDTH - 12, "average, %")]
    last_label = -math.inf
    for samples in budgets:
        if (x := position(math.log(samples))) - last_label > 5 * CHAR_UNITS:
            drawn.append(_text(x, bottom + 18, _short(samples), anchor="middle", class_="small"))
            last_label = x
    drawn.append(_text((left + right) / 2, bottom + 36, "samples seen", anchor="middle", class_="small"))
    for i, (name, points_of) in enumerate(averages.items()):
        shift = 3 * (i - (len(averages) - 1) / 2)  # so that intervals do not hide each other
        marks = [(position(math.log(samples)) + shift, value, width) for samples, value, width in points_of]
        path = "M" + " L".join(f"{_n(x)} {_n(y_of(value))}" for x, value, _ in marks)
        drawn.append(
            element(
                "g",
                element("path", d=path, class_="curve") if len(marks) > 1 else None,
                *(_line(x, y_of(value - width), x, y_of(value + width), "bar") for x, value, width in marks),
                *(element("circle", cx=_n(x), cy=_n(y_of(value)), r=4, class_="dot") for x, value, _ in marks),
                _title(f"{name}: " + ", ".join(f"{n:,}: {value:.1f} ± {width:.1f} %" for n, value, width in points_of)),
                class_=classes[name],
            )
        )
    return _svg(bottom + 44, drawn, "Average against samples seen with 95 % intervals")


def loss_curves(board: Leaderboard) -> Markup | None:
    """Loss against samples seen, beside what guessing gives: ln of the batch; None without metrics."""
    return _curves(board, curves(board, LOSS), "loss", chance_loss(board))


def recall_curves(board: Leaderboard) -> list[tuple[str, Markup]]:
    """(what it is, plot) of each recall against samples seen that some line has."""
    found = [
        ("Recall@1 on pairs that are trained on", _percent_curves(board, TRAIN_RECALL, "train recall@1, %")),
        ("Recall@1 on held-out pairs", _percent_curves(board, HELD_OUT_RECALL, "held-out recall@1, %")),
    ]
    return [(about, plot) for about, plot in found if plot is not None]


def _percent_curves(board: Leaderboard, key: str, label: str) -> Markup | None:
    def scaled(line: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        return line[0], 100 * line[1]

    found = [Curve(c.strategy, scaled(c.mean), tuple(map(scaled, c.seeds))) for c in curves(board, key)]
    return _curves(board, found, label, lowest=0.0)


def _curves(
    board: Leaderboard,
    found: Sequence[Curve],
    label: str,
    guessing: tuple[float, str] | None = None,
    lowest: float = math.inf,
) -> Markup | None:
    """Each strategy's mean over seeds, each seed as a thin line; None when there is no curve.

    Args:
        guessing: the loss that it gives, and what that is called.
        lowest: a value that the axis reaches down to.
    """
    if not found:
        return None
    classes = colour_classes(board)
    left, right, top, bottom = 44, WIDTH - 12, 12, 270
    lines = [line for curve in found for line in (curve.mean, *curve.seeds)]
    values = [float(bound) for _, y in lines for bound in (y.min(), y.max())] + ([guessing[0]] if guessing else [])
    ticks = _ticks(min(lowest, *values), max(values))
    y_of = _linear(ticks[0], ticks[-1], bottom, top)
    last = max(float(x[-1]) for x, _ in lines)
    x_of = _linear(0, last, left, right)
    parts = [_y_axis(ticks, y_of, left, right, label)]
    for tick in _ticks(0, last):
        if tick <= last * 1.001:
            parts.append(_text(x_of(tick), bottom + 18, _short(tick), anchor="middle", class_="small"))
    parts.append(_text((left + right) / 2, bottom + 36, "samples seen", anchor="middle", class_="small"))
    if guessing:
        y = y_of(guessing[0])
        parts.append(_line(left, y, right, y, "reference"))
        parts.append(_text(right, y - 5, f"guessing: {guessing[1]}", anchor="end", class_="small halo"))

    def path(line: tuple[np.ndarray, np.ndarray], class_: str) -> Markup:
        points_of = " L".join(f"{_n(x_of(x))} {_n(y_of(y))}" for x, y in zip(*line, strict=True))
        return element("path", d=f"M{points_of}", class_=class_)

    several = [curve for curve in found if len(curve.seeds) > 1]
    for curve in several:
        parts.append(element("g", *(path(line, "seed") for line in curve.seeds), class_=classes[curve.strategy]))
    for curve in found:
        title = _title(f"{curve.strategy}: {label} {curve.mean[1][-1]:.3f} at the end")
        parts.append(element("g", path(curve.mean, "curve"), title, class_=classes[curve.strategy]))
    return _svg(bottom + 44, parts, f"Training curves: {label} against samples seen")


def _svg(height: float, parts: Sequence[Markup], label: str) -> Markup:
    return element("svg", *parts, viewBox=f"0 0 {WIDTH} {_n(height)}", role="img", aria_label=plain(label))


def _n(value: float) -> str:
    return f"{value:.1f}".replace("-0.0", "0.0").removesuffix(".0")


def _line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    return element("line", x1=_n(x1), y1=_n(y1), x2=_n(x2), y2=_n(y2), class_=class_)


def _text(x: float, y: float, text: str, anchor: str = "start", class_: str = "") -> Markup:
    return element("text", plain(text), x=_n(x), y=_n(y), text_anchor=anchor, class_=class_ or None)


def _title(text: str) -> Markup:
    return element("title", plain(text))


def _label_width(texts: Sequence[str]) -> float:
    return 20 + CHAR_UNITS * max(len(cut(text, LABEL_CHARS)) for text in texts)


def _short(value: float) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def _linear(low: float, high: float, start: float, stop: float) -> Callable[[float], float]:
    return lambda value: start + (value - low) / (high - low) * (stop - start)


def _ticks(low: float, high: float) -> list[float]:
    """Four to eight round numbers that enclose the range."""
    span = max(high - low, 1e-9 * max(abs(high), 1.0), 1e-12)
    rough = span / 5
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * unit for factor in (1, 2, 2.5, 5, 10) if factor * unit >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 10) for i in range(first, max(last, first + 1) + 1)]


def _scale(differences: Sequence[Difference], start: float, stop: float) -> Scale:
    """Ticks in points that enclose zero and all intervals, and the position of a value in points."""
    lows = [100 * (d.value - d.half_width) for d in differences]
    highs = [100 * (d.value + d.half_width) for d in differences]
    ticks = _ticks(min([0.0, *lows]), max([0.0, *highs]))
    return ticks, _linear(ticks[0], ticks[-1], start, stop)


def _zero_axis(scale: Scale, top: float, bottom: float, label: str) -> Markup:
    ticks, x_of = scale
    parts = [_line(x_of(tick), top, x_of(tick), bottom, "zero" if tick == 0 else "grid") for tick in ticks]
    every = 2 if len(ticks) > 6 else 1
    shown = [tick for tick in ticks if round(tick / (ticks[1] - ticks[0])) % every == 0]
    parts += [
        _text(x_of(t), bottom + 15, f"{t:+g}".replace("-", "\N{MINUS SIGN}") if t else "0", "middle", "small")
        for t in shown
    ]
    parts.append(_text(x_of(ticks[0]) / 2 + x_of(ticks[-1]) / 2, bottom + 32, label, "middle", "small"))
    return element("g", *parts)


def _y_axis(ticks: Sequence[float], y_of, left: float, right: float, label: str) -> Markup:
    parts = [_line(left, y_of(tick), right, y_of(tick), "grid") for tick in ticks]
    parts += [_text(left - 8, y_of(tick) + 4, f"{tick:g}", "end", "small") for tick in ticks]
    middle = y_of(ticks[0]) / 2 + y_of(ticks[-1]) / 2
    turn = f"rotate(-90 12 {_n(middle)})"
    turned = element("text", label, x=12, y=_n(middle), text_anchor="middle", class_="small", transform=turn)
    return element("g", *parts, turned)


def _interval(scale: Scale, y: float, difference: Difference, class_: str, label: str, radius: float) -> Markup:
    _, x_of = scale
    value, width = 100 * difference.value, 100 * difference.half_width
    p = "" if difference.p is None else f", p = {difference.p:.2g}, with Holm's correction {difference.p_holm:.2g}"
    return element(
        "g",
        _line(x_of(value - width), y, x_of(value + width), y, "bar"),
        element("circle", cx=_n(x_of(value)), cy=_n(y), r=radius, class_="dot"),
        _title(f"{label}: {points(difference.value)} ± {width:.1f} points, {difference.verdict}{p}"),
        class_=class_,
    )


def _verdict_class(difference: Difference) -> str:
    return {"better": "good", "worse": "bad"}.get(difference.verdict, "neutral")


def _labels(
    labels: Sequence[tuple[float, float, float, str]], left: float, right: float, bottom: float
) -> list[Markup]:
    """Names beside their points, on the side and at the height where nothing else is.

    A name without room is left out, the last ones first: the mark's tooltip has it, and so has the table.

    Args:
        labels: (x, y, half of the interval's height, name).
    """
    taken = [(x - 7, x + 7, y - max(6.0, half), y + max(6.0, half)) for x, y, half, _ in labels]
    placed = []
    for x, y, half, text in labels:
        width = CHAR_UNITS * len(text)
        anchors = {"start": (x + 10, x + 10), "end": (x - 10, x - 10 - width), "middle": (x, x - width / 2)}
        beside = [(anchor, shift) for shift in (0, 12, -12) for anchor in ("start", "end")]
        for anchor, shift in [*beside, ("middle", -half - 10), ("middle", half + 10)]:
            own, start = anchors[anchor]
            box = (start, start + width, y + shift - 6, y + shift + 6)
            inside = left <= box[0] and box[1] <= right and box[2] > 0 and box[3] < bottom
            if inside and all(box[1] <= a or b <= box[0] or box[3] <= c or d <= box[2] for a, b, c, d in taken):
                taken.append(box)
                placed.append(_text(own, y + shift + 4, text, anchor, "name halo"))
                break
    return placed


def legend(board: Leaderboard, rows: Sequence[Row]) -> Markup:
    """The strategies with their colours."""
    classes = colour_classes(board)
    items = [
        element("li", element("span", "", class_=f"chip {classes[row.strategy.name]}"), plain(strategy_text(row)))
        for row in rows
    ]
    return element("ul", *items, class_="legend")
