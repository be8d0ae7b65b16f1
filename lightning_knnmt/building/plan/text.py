"""Plans for reading."""

from datetime import timedelta

from lightning_knnmt.building.plan.prediction import Plan


def to_text(plan: Plan) -> str:
    """A plan as lines, each with a name in front; bytes in powers of 1000, times as hours:minutes:seconds."""
    size, disk, memory = plan.size, plan.disk, plan.memory
    error = f" (± {200 * plan.entries_error:.1f} %)" if plan.entries_error else ""
    lists = "no lists" if size.nlist is None else f"{size.nlist:,} lists"
    parts = f", {len(size.parts)} parts" if len(size.parts) > 1 else ""
    rows = [
        ("entries", f"{size.entries:,}{error} of {size.pairs:,} pairs, {size.key_size} dimensions"),
        ("shards", f"{len(size.shards):,}"),
        ("index", f"{size.index.factory}: {lists}, {size.train_points:,} training points{parts}"),
        ("disk", f"{_gb(disk.total)}: keys {_gb(disk.keys)}, values {_gb(disk.values)}, "
                 f"texts {_gb(disk.texts)}, index {_gb(disk.index)}"),
    ]  # fmt: skip
    if disk.temporary:
        rows.append(("", f"and {_gb(disk.temporary)} until the parts of the index are merged"))
    rows += [
        ("peak memory", f"{_gb(memory.peak)}: process and model {_gb(memory.baseline)}, beside it"),
        ("", f"encoding {_gb(memory.encode)}, training {_gb(memory.train)}, index {_gb(memory.index)}"),
    ]
    for stage in (*plan.stages, plan.whole):
        together = f" ({_time(stage.machine_seconds)} of all machines)" if size.machines > 1 else ""
        rows.append((stage.name, f"{_time(stage.seconds)}{together}"))
    if size.machines > 1:
        rows.append(("machines", f"{size.machines}; the first samples, trains, merges and reports alone"))
        rows.append(("", f"each writes about {_gb((disk.total - disk.index) / size.machines)} of shards"))
    rows.append(("uncertain", "the time in all by about 20 %, single stages by more, extrapolated indexes by most"))
    return "\n".join(f"{name:<12}{text}" for name, text in rows)


def _gb(number: float) -> str:
    return f"{number / 1e9:,.2f} GB"


def _time(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
