"""Results as JSON and as a table."""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from lightning_knnmt.datastore.manifest import library_versions
from lightning_knnmt.evaluation.comparison import SystemResult
from lightning_knnmt.evaluation.scores import PairedBootstrap
from lightning_knnmt.index.report import IndexReport

BUILD_FILE = "build.json"  # in a datastore's folder, with the time and memory that building took


def system_json(result: SystemResult) -> dict[str, Any]:
    """One system's figures, with the signatures of its scores; `comet` is null where there is none."""
    scores = {"bleu": result.scores.bleu, "chrf": result.scores.chrf, "comet": result.comet}
    return {
        **{name: None if score is None else round(score.value, 4) for name, score in scores.items()},
        "tokens_per_second": round(result.speed.tokens_per_second, 1),
        "tokens_per_second_repeats": [round(rate, 1) for rate in result.speed.repeats],
        "search_share": round(result.speed.search_share, 4),
        "searches_per_token": round(result.speed.searches, 4),
        "batch_size": result.speed.batch_size,
        "repeatable": result.repeatable,
        "signatures": {name: score.signature for name, score in scores.items() if score is not None},
    }


def environment(device: torch.device = torch.device("cpu")) -> dict[str, Any]:
    """Machine, threads and versions, which figures of speed mean nothing without."""
    return {
        "device": str(device) if device.type != "cuda" else f"{device} ({torch.cuda.get_device_name(device)})",
        "threads": {"torch": torch.get_num_threads(), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS")},
        "cores": os.cpu_count(),
        "processor": processor(),
        "platform": platform.platform(),
        "libraries": {
            "python": platform.python_version(),
            **library_versions(),
            **{package: version(package) for package in ("sacrebleu", "lightning")},
        },
    }


def processor() -> str:
    """The processor's name, where Linux tells it; otherwise what it understands."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def markdown_table(
    systems: Mapping[str, SystemResult],
    significance: Mapping[str, PairedBootstrap],
    indexes: Mapping[str, IndexReport | None] | None = None,
) -> str:
    """A table of all systems, the first of which is what the others are compared with.

    Args:
        systems: Results by name.
        significance: Comparisons with the first system, by name.
        indexes: Of the systems with neighbors, by name.
    """
    rows = [
        [
            "system",
            "BLEU",
            "chrF",
            "COMET",
            "tokens/s",
            "relative speed",
            "time in search",
            "imbalance",
            "ΔBLEU (95 %)",
            "p",
        ]
    ]
    imbalances = {name: index.imbalance_factor for name, index in (indexes or {}).items() if index is not None}
    first = next(iter(systems.values())).speed.tokens_per_second
    for name, result in systems.items():
        bleu = significance[name].bleu if name in significance else None
        rows.append(
            [
                name,
                f"{result.scores.bleu.value:.1f}",
                f"{result.scores.chrf.value:.1f}",
                f"{result.comet.value:.4f}" if result.comet else "–",
                f"{result.speed.tokens_per_second:.0f}",
                f"{result.speed.tokens_per_second / first:.2f}" if first else "–",
                f"{result.speed.search_share:.0%}",
                "" if (imbalance := imbalances.get(name)) is None else f"{imbalance:.2f}",
                f"{bleu.delta:+.1f} ({bleu.low:+.1f} to {bleu.high:+.1f})" if bleu else "",
                f"{bleu.p_value:.3f}" if bleu else "",
            ]
        )
    return table(rows)


def table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns; the first row is its head.

    >>> print(table([["system", "BLEU"], ["kNN", "31.6"]]))  # doctest: +NORMALIZE_WHITESPACE
    | system | BLEU |
    |--------|------|
    | kNN    | 31.6 |
    """
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in padded]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def settings_line(results: Mapping[str, Any]) -> str:
    """The settings behind a table, in one line.

    Args:
        results: What results.json holds.
    """
    settings, index, tuning = results["settings"], results["index"], results["tuning"]
    knn, decoding, test = settings["knn"], settings["decoding"], settings["test"]
    chosen = "given" if tuning is None else f"best of {tuning['tried']} on {settings['validation']['sentences']} pairs"
    parts = [
        f"{test['sentences']} sentences of {test['path']}",
        f"{_knn_line(knn) if knn else _mixture_line(settings['mixture'])} ({chosen})",
        f"beam {decoding['beams']}, {decoding['batch_size']} sentences a batch",
        f"median of {settings['repeats']} repeats on {settings['device']}, threads: {settings['threads']['torch']}",
        _searched_line(index) if index else f"{settings['translation_memory']['sentences']} stored pairs",
    ]
    if index and index["imbalance_factor"] is not None:
        parts.append(f"imbalance factor {index['imbalance_factor']:.2f}, homogeneity {index['homogeneity']:.3f}")
    parts.append(f"model {settings['model']['model']} {settings['model']['model_sha256'][:12]}")
    parts += next(iter(results["systems"].values()))["signatures"].values()
    return "; ".join(parts)


def systems_lines(results: Mapping[str, Any]) -> str:
    """The mixture and the index of every system with neighbors, a line each.

    Args:
        results: What results.json holds.
    """
    lines = []
    for name, system in results["systems"].items():
        if "mixture" in system:
            chosen = _knn_line(system["knn"]) if system["knn"] else _mixture_line(system["mixture"])
            lines.append(f"- {name}: {chosen}" + (f"; {_searched_line(system['index'])}" if system["index"] else ""))
    return "\n".join(lines)


def _searched_line(index: Mapping[str, Any]) -> str:
    return f"{index['factory']} over {index['entries']} entries"


def _knn_line(knn: Mapping[str, Any]) -> str:
    line = f"k {knn['k']}, λ {knn['lambda_']:g}, T {knn['temperature']:g}, nprobe {knn['nprobe']}"
    more = {"rescored": knn["rescore"], "ef_search": knn["ef_search"]}
    return ", ".join([line, *(f"{name} {value}" for name, value in more.items() if value)])


def _mixture_line(mixture: Mapping[str, Any]) -> str:
    parts = []
    for part in mixture.values():
        options = ", ".join(f"{name} {value}" for name, value in part["init_args"].items())
        parts.append(f"{part['class_path'].rpartition('.')[2]}({options})")
    return " + ".join(parts)


def read_build(datastore: Path | str) -> dict[str, Any]:
    """Time and memory of building a datastore (`encode`) and its `indexes`, as far as build_index.py has left them."""
    try:
        record = json.loads((Path(datastore) / BUILD_FILE).read_text(encoding="utf-8"))
        return {"encode": record["encode"], "indexes": dict(record["indexes"])}
    except (FileNotFoundError, KeyError, TypeError, ValueError):  # only figures: not worth an error
        return {"encode": None, "indexes": {}}


def significance_json(significance: Mapping[str, PairedBootstrap]) -> dict[str, Any]:
    """Comparisons as plain values."""
    return {name: asdict(compared) for name, compared in significance.items()}
