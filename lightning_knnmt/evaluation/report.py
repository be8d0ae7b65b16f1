"""Results as JSON and as a table."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning_knnmt.evaluation.comparison import SystemResult
from lightning_knnmt.evaluation.scores import PairedBootstrap


def system_json(result: SystemResult) -> dict[str, Any]:
    """One system's figures, with the signatures of its scores."""
    scores = {"bleu": result.scores.bleu, "chrf": result.scores.chrf}
    if result.comet is not None:
        scores["comet"] = result.comet
    return {
        **{name: round(score.value, 4) for name, score in scores.items()},
        "tokens_per_second": round(result.speed.tokens_per_second, 1),
        "tokens_per_second_repeats": [round(rate, 1) for rate in result.speed.repeats],
        "search_share": round(result.speed.search_share, 4),
        "batch_size": result.speed.batch_size,
        "signatures": {name: score.signature for name, score in scores.items()},
    }


def markdown_table(systems: Mapping[str, SystemResult], significance: Mapping[str, PairedBootstrap]) -> str:
    """A table of all systems, the first of which is what the others are compared with."""
    rows = [["system", "BLEU", "chrF", "COMET", "tokens/s", "relative speed", "time in search", "ΔBLEU (95 %)", "p"]]
    first = next(iter(systems.values()))
    for name, result in systems.items():
        bleu = significance[name].bleu if name in significance else None
        rows.append(
            [
                name,
                f"{result.scores.bleu.value:.1f}",
                f"{result.scores.chrf.value:.1f}",
                f"{result.comet.value:.4f}" if result.comet else "–",
                f"{result.speed.tokens_per_second:.0f}",
                f"{result.speed.tokens_per_second / first.speed.tokens_per_second:.2f}",
                f"{result.speed.search_share:.0%}",
                f"{bleu.delta:+.1f} ({bleu.low:+.1f} to {bleu.high:+.1f})" if bleu else "",
                f"{bleu.p_value:.3f}" if bleu else "",
            ]
        )
    return table(rows)


def table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns; the first row is its head."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in padded]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON beside its final place and rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".partial")
    beside.write_text(json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
    beside.replace(path)


def significance_json(significance: Mapping[str, PairedBootstrap]) -> dict[str, Any]:
    """Comparisons as plain values."""
    return {name: asdict(compared) for name, compared in significance.items()}
