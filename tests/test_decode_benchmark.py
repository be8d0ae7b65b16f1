"""The benchmark of decoding runs on a tiny model, and says all that it is there for."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import decode
import overlap


def test_quick_run_compares_all_ways(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = "--json", str(tmp_path / "out.json"), "--picture", str(tmp_path / "spans.png")
    decode.main(["--quick", "--threads", "1", *files])
    result = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    ways = set(map(str, decode.ways_of(4, bfloat16=False)))
    own = {way for way in ways if "generate" not in way}
    for key in ("seconds", "tokens_per_second", "bleu", "all_seconds"):
        assert result[key].keys() == ways
    assert result["spans"].keys() == own
    assert all(spans.keys() == {*decode.SPANS, "rest"} for spans in result["spans"].values())
    assert result["bleu_over_whole"].keys() == {way for way in own if "shortlist" in way or "int8" in way}
    assert decode.GOALS.keys() <= result.keys()
    assert result["native"] is None
    speeds = result["tokens_per_second"]
    assert result["ratio"] == pytest.approx(speeds["neighbors, beam 4"] / speeds["plain, beam 4"], rel=0.05)
    assert (tmp_path / "spans.png").stat().st_size > 0
    assert f"ratio {result['ratio']} (goal 0.95)" in capsys.readouterr().out


def test_bfloat16_is_a_way_of_its_own() -> None:
    more = set(decode.ways_of(4, bfloat16=True)) - set(decode.ways_of(4, bfloat16=False))
    kinds = ("neighbors, beam 4", "neighbors, greedy", "plain, beam 4", "plain, greedy")
    assert sorted(map(str, more)) == [f"{kind}, bfloat16" for kind in kinds]
    assert all(way.options() == {"dtype": "bfloat16", "quantization": "none"} for way in more)


def test_searching_beside_the_projection_is_compared_with_one_after_the_other(tmp_path: Path) -> None:
    path = tmp_path / "overlap.json"
    overlap.main(["--quick", "--threads", "1", "--json", str(path)])
    result = json.loads(path.read_text())
    medians = result["median_ms"]
    assert {"projection", "search", "one after the other", "together"} <= medians.keys()
    assert result["ratio"] == pytest.approx(medians["together"] / medians["one after the other"], rel=0.05)
    assert ("projection, compiled" in medians) == result["compiling"].endswith(" s")
