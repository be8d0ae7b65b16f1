"""Tables, growth and picture of what `benchmarks/search.py` measures."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter

from lightning_knnmt.evaluation.report import table

FLOOR = 1e-4  # of errors on a logarithmic axis


def tables(result: Mapping[str, Any]) -> str:
    """Everything as Markdown."""
    options = result["options"]
    parts = []
    for label, store in result["stores"].items():
        knn, mixing = store["settings"], ""
        if "plain_log_likelihood" in store:
            mixing = f", λ {knn['lambda_']:g}; the plain model's log-likelihood {store['plain_log_likelihood']:.3f}"
        parts += [
            f"## {label}: {store['entries']:,} entries, D = {store['key_size']}",
            f"{store['queries']} queries, k {knn['k']}, T {knn['temperature']:.3g}{mixing}; median of "
            f"{options['repeats']} interleaved repeats, {options['threads']} thread(s), "
            f"{result['processor']}; ×: times as fast as the baseline (**bold**).",
            build_table(store),
            *([memory_table(store)] if any(index["memory"] for index in store["indexes"].values()) else []),
            search_table(store, options["batch"]),
            equal_table(store, options["batch"]),
        ]
    if result["exponents"]:
        parts.append(growth_table(result))
    return "\n\n".join(parts)


def build_table(store: Mapping[str, Any]) -> str:
    """Building, size and balance."""
    stages = list(dict.fromkeys(stage for index in store["indexes"].values() for stage in index["report"]["seconds"]))
    rows = [["index", *(f"{stage}, s" for stage in stages), "build, s", "bytes per entry", "imbalance", "homogeneity"]]
    for index in store["indexes"].values():
        report = index["report"]
        row = [report["factory"], *(f"{report['seconds'].get(stage, 0):.1f}" for stage in stages)]
        row += [f"{sum(report['seconds'].values()):.1f}", f"{index['bytes_per_entry']:.0f}"]
        row += [_number(report[name], ".3g") for name in ("imbalance_factor", "homogeneity")]
        rows.append(row)
    return table(rows)


def memory_table(store: Mapping[str, Any]) -> str:
    """Resident memory of building and searching, and what of it is beyond the index's codes."""
    beyond = "beyond the codes"
    rows = [["MB", "codes", "building, peak", beyond, "searching, peak", beyond, "mapped, peak", beyond, "anonymous"]]
    for index in store["indexes"].values():
        row, codes = [index["report"]["factory"], f"{index['codes_mb']:,.0f}"], index["codes_mb"]
        for work in ("build", "search", "mapped"):
            peak = index["memory"].get(work, {}).get("peak")
            row += [_number(peak, ",.0f"), _number(None if peak is None else peak - codes, ",.0f")]
        rows.append([*row, f"{index['memory']['mapped']['anonymous']:,.0f}"])
    idle = max(index["memory"]["mapped"]["idle"] for index in store["indexes"].values())
    return (
        f"{table(rows)}\n\nPeak: most that was resident, with pages of mapped files, which the system takes back when "
        "it needs them. Mapped: the index is left on the disk, its candidates are rescored by mapped keys; anonymous: "
        f"of that, what is in no file. Each process has {idle:,.0f} MB before the work."
    )


def search_table(store: Mapping[str, Any], batches: Sequence[int]) -> str:
    """Every setting's time and error, and its translations where there are any."""
    k, baseline = store["settings"]["k"], store["rows"][store["baseline"]]
    scored, decoded = "plain_log_likelihood" in store, "plain" in store
    head = [
        "index",
        "nprobe / efSearch",
        *(f"µs, batch {batch}" for batch in batches),
        f"recall@{k}",
        "total variation",
    ]
    head += ["codes scanned"] + scored * ["log-likelihood"] + decoded * ["BLEU", "chrF", "tokens/s", "time in search"]
    rows = [head]
    if decoded:
        rows.append(["(no neighbors)", *[""] * (len(head) - 5), *_scores(store["plain"])])
    for row in store["rows"]:
        cells = [row["factory"], _number(row["value"], "d")]
        for batch in map(str, batches):
            ratio = baseline["microseconds"][batch] / row["microseconds"][batch]
            cells.append(f"{_short(row['microseconds'][batch])} (×{_short(ratio)})")
        cells += [f"{row['recall']:.3f}", f"{row['total_variation']:.4f}", _number(row["codes_scanned"], ",.0f")]
        cells += scored * [f"{row.get('log_likelihood', math.nan):.3f}"]
        if decoded:
            cells += _scores(row["decoding"])
        rows.append([f"**{cell}**" if row is baseline else cell for cell in cells])
    return table(rows)


def equal_table(store: Mapping[str, Any], batches: Sequence[int]) -> str:
    """The fastest setting of each index whose error is the baseline's or less."""
    baseline = store["rows"][store["baseline"]]
    rows = [["at the baseline's error or less", *(f"batch {batch}" for batch in batches)]]
    for factory in store["indexes"]:
        good = [
            row
            for row in store["rows"]
            if row["factory"] == factory and row["total_variation"] <= baseline["total_variation"]
        ]
        cells = [factory]
        for batch in map(str, batches):
            best = min(good, key=lambda row: row["microseconds"][batch], default=None)
            if best is None:
                cells.append("–")
                continue
            ratio = baseline["microseconds"][batch] / best["microseconds"][batch]
            at = "" if best["parameter"] is None else f" at {best['parameter']} {best['value']}"
            cells.append(f"×{_short(ratio)}{at}")
        rows.append(cells)
    return table(rows)


def headline(store: Mapping[str, Any], batch: str = "32") -> float | None:
    """Time of the default over that of the baseline, at the baseline's error or less; None where it never gets there.

    The default is the last factory string that was asked for.
    """
    baseline, default = store["rows"][store["baseline"]], list(store["indexes"])[-1]
    times = [
        row["microseconds"][batch]
        for row in store["rows"]
        if row["factory"] == default
        and row["total_variation"] <= baseline["total_variation"]
        and batch in row["microseconds"]
    ]
    return (
        round(min(times) / baseline["microseconds"][batch], 4) if times and batch in baseline["microseconds"] else None
    )


def growth_table(result: Mapping[str, Any]) -> str:
    """How time grows with N."""
    batches = result["options"]["batch"]
    rows = [["time ∝ N^…", *(f"batch {batch}" for batch in batches)]]
    for name, of_batch in result["exponents"].items():
        rows.append([name, *(_number(of_batch[str(batch)], ".2f") for batch in batches)])
    return "## Growth with N\n\n" + table(rows)


def exponents(result: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """Least-squares slopes of log time over log N of the synthetic datastores, at fixed settings and at fixed error."""
    measured = [store for store in result["stores"].values() if store["synthetic"]]
    if len({store["entries"] for store in measured}) < 2:
        return {}
    error, batches = result["options"]["error"], [str(batch) for batch in result["options"]["batch"]]
    found: dict[str, dict[str, float | None]] = {}
    for factory in result["options"]["factories"]:
        series = [[row for row in store["rows"] if row["factory"] == factory] for store in measured]
        settings = [(row["parameter"], row["value"]) for row in series[0]]
        for setting in settings:
            same = [[row for row in rows if (row["parameter"], row["value"]) == setting] for rows in series]
            if all(same):
                name = f"{factory}, {setting[0]} {setting[1]}" if setting[0] else factory
                found[name] = {b: _slope(measured, [row[0]["microseconds"][b] for row in same]) for b in batches}
        if len(settings) > 1:
            name = f"{factory}, total variation {error:g}"
            found[name] = {b: _slope(measured, [time_at(rows, error, b) for rows in series]) for b in batches}
    return found


def time_at(rows: Sequence[Mapping[str, Any]], error: float, batch: str) -> float | None:
    """Microseconds at an error between those of two settings, by a straight line in logarithms; None beyond them."""
    points = sorted((max(row["total_variation"], FLOOR), row["microseconds"][batch]) for row in rows)
    errors, times = np.log(np.array(points)).T
    if not errors[0] <= math.log(error) <= errors[-1]:
        return None
    return float(np.exp(np.interp(math.log(error), errors, times)))


def _slope(measured: Sequence[Mapping[str, Any]], times: Sequence[float | None]) -> float | None:
    points = [(store["entries"], value) for store, value in zip(measured, times, strict=True) if value is not None]
    if len({entries for entries, _ in points}) < 2:
        return None
    entries, values = np.log(np.array(points)).T
    return float(np.polyfit(entries, values, 1)[0])


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Error against time at the middle batch size, a panel for each datastore and a line for each index."""
    batches = sorted(result["options"]["batch"])
    batch = batches[len(batches) // 2]
    measured = result["stores"]
    lines = -(-len(measured) // 3)
    columns = -(-len(measured) // lines)
    figure = Figure(figsize=(1.5 + 5 * columns, 1.2 + 4.2 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False, sharey=True)
    for panel in panels.flat[len(measured) :]:
        panel.set_axis_off()
    factories = result["options"]["factories"]
    style = {factory: (f"C{number % 10}", "os^Dv<>P*X"[number % 10]) for number, factory in enumerate(factories)}
    for panel, (label, store) in zip(panels.flat, measured.items(), strict=False):
        for factory in factories:
            rows = [row for row in store["rows"] if row["factory"] == factory]
            times = [row["microseconds"][str(batch)] for row in rows]
            errors = [max(row["total_variation"], FLOOR) for row in rows]
            color, marker = style[factory]
            panel.plot(times, errors, color=color, marker=marker, markersize=5, linewidth=1.3)
            for row, x, y in zip(rows, times, errors, strict=True):
                if row["value"] is not None and row in (rows[0], rows[-1]):
                    panel.annotate(
                        str(row["value"]), (x, y), (4, 4), textcoords="offset points", fontsize=8, color=color
                    )
        baseline = store["rows"][store["baseline"]]
        where = (baseline["microseconds"][str(batch)], max(baseline["total_variation"], FLOOR))
        panel.plot(*where, "o", markersize=13, markerfacecolor="none", markeredgecolor="black")
        panel.axhline(where[1], color="black", linestyle=":", linewidth=0.8)
        panel.set(xscale="log", yscale="log", title=f"{label} (N = {store['entries']:,}, D = {store['key_size']})")
        panel.set_xlabel(f"µs per query (batches of {batch})")
        panel.set_ylabel("error of the kNN distribution (total variation)")
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter("{x:,g}")
            axis.set_minor_formatter(NullFormatter())
        panel.grid(True, which="major", linewidth=0.4)
    handles = [Line2D([], [], color=color, marker=marker, label=factory) for factory, (color, marker) in style.items()]
    handles.append(
        Line2D(
            [], [], color="black", linestyle=":", marker="o", markersize=10, markerfacecolor="none", label="baseline"
        )
    )
    figure.legend(handles=handles, loc="outside lower center", ncols=min(1 + columns, len(handles)), frameon=False)
    note = "Numbers: nprobe or efSearch; left and below is better"
    if any(row["total_variation"] < FLOOR for store in measured.values() for row in store["rows"]):
        note += f"; errors below {FLOOR:g} are drawn there"
    figure.suptitle(note, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _scores(decoded: Mapping[str, Any]) -> list[str]:
    rates = [f"{decoded[name]:.1f}" for name in ("bleu", "chrf")]
    return [*rates, f"{decoded['tokens_per_second']:.0f}", f"{decoded['search_share']:.0%}"]


def _number(value: float | None, spec: str) -> str:
    return "–" if value is None else format(value, spec)


def _short(value: float) -> str:
    return f"{value:.2g}" if value < 10 else f"{value:,.0f}"
