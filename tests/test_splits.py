"""Splits: no source in two of them, documents kept together, nothing lost, and files that are whole."""

import hashlib
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from lightning_knnmt.data.pairs import Pair
from lightning_knnmt.data.splits import SPLITS, SplitConfig, read_split, source_key, split, texts_of, write_splits


def corpus(documents: int = 30, seed: int = 7) -> list[Pair]:
    """Pairs with sources that recur in other documents, in other case and spacing, and with other translations."""
    rng = random.Random(seed)
    pairs = []
    for document in range(documents):
        for line in range(rng.randint(1, 12)):
            number = rng.randint(0, 60) if rng.random() < 0.3 else 100 * document + line + 100
            src = " ".join(["Datei", f"nr{number}", *["öffnen"] * (number % 7)])
            src = rng.choice([src, src.upper(), src.replace(" ", "  ")])
            pairs.append(Pair(src, f"open file {number} {rng.choice('ab')}", f"seite{document}"))
    rng.shuffle(pairs)
    return pairs


def keys(pairs: list[Pair]) -> set[str]:
    return {"".join(pair.src.lower().split()) for pair in pairs}  # not source_key, which is under test


@pytest.mark.parametrize("by", ["document", "source"])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_no_source_is_in_two_splits_up_to_case_and_white_space(by: Any, seed: int) -> None:
    splits, dropped = split(corpus(), SplitConfig(validation=5, test=6, by=by, seed=seed))
    found = [keys(splits[name]) for name in SPLITS]
    assert all(found)
    assert not (found[0] & found[1] | found[0] & found[2] | found[1] & found[2])
    if by == "document":
        assert dropped["test: source in another split"] + dropped["validation: source in another split"]
    else:
        assert not dropped["test: source in another split"]


@pytest.mark.parametrize("by", ["document", "source"])
def test_every_pair_is_in_one_split_or_counted(by: Any) -> None:
    pairs = corpus()
    excluded = frozenset(source_key(pair.src) for pair in pairs[:5])
    splits, dropped = split(pairs, SplitConfig(validation=5, test=6, by=by, min_words=3), excluded)
    kept = [pair for name in SPLITS for pair in splits[name]]
    assert len(kept) + dropped.total() == len(pairs)
    assert len(set(kept)) == len(kept)
    assert set(kept) <= set(pairs)
    held_out = {reason for reason in dropped if reason.startswith("test: ")}
    assert {"repeated", "excluded"} <= dropped.keys()
    assert "test: under min_words" in held_out or by == "source"


def test_documents_stay_together() -> None:
    splits, _ = split(corpus(), SplitConfig(validation=5, test=6))
    documents = {name: {pair.document for pair in splits[name]} for name in SPLITS}
    assert len(documents["validation"]) <= 5
    assert len(documents["test"]) <= 6
    assert documents["train"].isdisjoint(documents["validation"] | documents["test"])
    assert documents["validation"].isdisjoint(documents["test"])


def test_sources_keep_all_their_translations_together() -> None:
    pairs = [Pair(f"Wort {number}", f"word {number} {form}") for number in range(20) for form in "abc"]
    splits, dropped = split(pairs, SplitConfig(validation=4, test=5, by="source"))
    assert sorted(Counter(pair.src for pair in splits["train"]).values()) == [3] * 11
    assert (len(splits["validation"]), len(splits["test"])) == (4, 5)
    assert dropped == {"validation: source occurs again": 8, "test: source occurs again": 10}
    assert all(pair.tgt.endswith("a") for name in ("validation", "test") for pair in splits[name])


def test_pairs_without_a_document_are_units_of_their_own() -> None:
    pairs = [Pair(f"Wort {number}", f"word {number}") for number in range(10)]
    pairs += [Pair("Inhalt", "content", "wort 1"), Pair("Umfang", "extent", "wort 1")]  # a document named as a source
    splits, _ = split(pairs, SplitConfig(validation=0, test=10))
    assert len(splits["test"]) in (10, 11)
    splits, _ = split(pairs, SplitConfig(validation=0, test=11))
    assert (len(splits["test"]), splits["train"]) == (12, [])


@pytest.mark.parametrize("by", ["document", "source"])
def test_the_seed_decides_the_draw(by: Any) -> None:
    first, again, other = (split(corpus(), SplitConfig(4, 5, by=by, seed=seed)) for seed in (1, 1, 2))
    assert first == again
    assert keys(first[0]["test"]) != keys(other[0]["test"])


def test_the_order_of_the_pairs_does_not_matter_to_the_draw() -> None:
    pairs = corpus()
    shuffled = random.Random(1).sample(pairs, len(pairs))
    config = SplitConfig(validation=10, test=10, by="source", min_words=3)
    (first, _), (second, _) = split(pairs, config), split(shuffled, config)
    assert [keys(first[name]) for name in SPLITS] == [keys(second[name]) for name in SPLITS]
    unrelated = [Pair(f"Wort {number}", "word", f"d{number % 9}") for number in range(90)]
    by_document, _ = split(unrelated, SplitConfig(2, 3))
    assert {name: set(members) for name, members in by_document.items()} == {
        name: set(members) for name, members in split(unrelated[::-1], SplitConfig(2, 3))[0].items()
    }


def test_training_pairs_keep_the_order_of_the_corpus_within_a_unit() -> None:
    pairs = [Pair(f"Satz {number}", "sentence", f"d{number % 3}") for number in range(12)]
    splits, _ = split(pairs, SplitConfig(0, 0))
    assert splits["train"] == sorted(pairs, key=lambda pair: pair.document)


@pytest.mark.parametrize("by", ["document", "source"])
def test_held_out_sources_have_min_words(by: Any) -> None:
    splits, _ = split(corpus(), SplitConfig(5, 5, min_words=4, by=by))
    lengths = {name: [len(pair.src.split()) for pair in splits[name]] for name in SPLITS}
    assert min(lengths["validation"] + lengths["test"]) >= 4 > min(lengths["train"])


def test_excluded_texts_are_on_neither_side() -> None:
    pairs = corpus()
    excluded = frozenset({source_key(pairs[0].src.swapcase()), source_key(f"  {pairs[1].tgt} ")})
    splits, dropped = split(pairs, SplitConfig(2, 2), excluded)
    texts = {source_key(text) for name in SPLITS for pair in splits[name] for text in (pair.src, pair.tgt)}
    assert not texts & excluded
    assert dropped["excluded"] >= 2


def test_a_request_beyond_the_corpus_names_what_there_is() -> None:
    pairs = [Pair("zu kurz", "too short", "a"), Pair("lang genug ist das", "long enough", "b")]
    message = "validation [+] test is 2 units, but only 1 document units have a source of min_words=3 words or more"
    with pytest.raises(ValueError, match=message):
        split(pairs, SplitConfig(1, 1, min_words=3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"by": "page"}, "by is 'page', expected one of document, source"),
        ({"validation": -1}, "validation is -1, expected 0 or more"),
        ({"min_words": -2}, "min_words is -2, expected 0 or more"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SplitConfig(**{"validation": 1, "test": 1, **options})


# ---- files


def test_counts_and_hashes_are_those_of_the_files(tmp_path: Path) -> None:
    splits, dropped = split(corpus(), SplitConfig(5, 5))
    written = write_splits(tmp_path / "new" / "folder", splits, {"dropped": dict(dropped)})
    folder = tmp_path / "new" / "folder"
    assert sorted(file.name for file in folder.iterdir()) == sorted(
        [*(f"{name}.jsonl" for name in SPLITS), "splits.json"]
    )
    assert json.loads((folder / "splits.json").read_text(encoding="utf-8")) == written
    assert written["dropped"] == dict(dropped)
    for name in SPLITS:
        content = (folder / f"{name}.jsonl").read_bytes()
        records = [json.loads(line) for line in content.decode().split("\n")[:-1]]
        assert written[name] == {
            "pairs": len(records),
            "src_words": sum(len(record["src"].split()) for record in records),
            "tgt_words": sum(len(record["tgt"].split()) for record in records),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
        assert read_split(folder / f"{name}.jsonl") == splits[name]


def test_unusual_characters_survive_the_file(tmp_path: Path) -> None:
    pairs = [Pair("Straße\u2028zwei \x85 🪟", 'say "no" \\n', "Seite/öffnen"), Pair("Ja", "Yes")]
    write_splits(tmp_path, {"train": pairs, "validation": [], "test": []}, {})
    assert read_split(tmp_path / "train.jsonl") == pairs
    assert read_split(tmp_path / "test.jsonl") == []


@pytest.mark.parametrize("interrupted", range(4))
def test_an_interrupted_write_leaves_the_old_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupted: int
) -> None:
    splits, _ = split(corpus(seed=1), SplitConfig(5, 5))
    write_splits(tmp_path, splits, {})
    old = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    writes: list[Path] = []
    write_bytes = Path.write_bytes

    def interrupt(path: Path, content: bytes) -> int:
        writes.append(path)
        if len(writes) > interrupted:
            write_bytes(path, content[: len(content) // 2])
            raise KeyboardInterrupt
        return write_bytes(path, content)

    monkeypatch.setattr(Path, "write_bytes", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_splits(tmp_path, split(corpus(seed=2), SplitConfig(3, 3))[0], {"other": True})
    assert len(writes) == interrupted + 1
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == old


def test_texts_of_gives_both_sides_of_every_pair(tmp_path: Path) -> None:
    pairs = [Pair("Ein  Haus", "A House"), Pair("STRASSE", "street")]
    write_splits(tmp_path, {"train": pairs[:1], "validation": [], "test": pairs[1:]}, {})
    files = [tmp_path / "train.jsonl", tmp_path / "test.jsonl"]
    assert list(texts_of(files)) == ["ein haus", "a house", "strasse", "street"]
    assert source_key("Straße") == source_key("STRASSE")


@pytest.mark.parametrize(
    "line", ["{", "[1]", "7", '{"src": "a"}', '{"src": null, "tgt": "b"}', '{"src": "a", "tgt": "b", "score": 1}', ""]
)
def test_a_line_that_is_no_pair_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text('{"src": "a", "tgt": "b", "document": ""}\n' + line + "\n")
    with pytest.raises(
        ValueError, match=r"train\.jsonl:2: expected a JSON object with the texts src, tgt and document"
    ):
        read_split(file)


def test_a_missing_split_says_what_writes_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"train\.jsonl does not exist; write it with prepare_data\.py"):
        read_split(tmp_path / "train.jsonl")


def test_no_held_out_source_is_a_sentence_of_the_training_split() -> None:
    pairs = [Pair(f"Word number {number} here. Another one follows.", f"x {number}. y.") for number in range(20)]
    pairs += [Pair(f"Word number {number} here.", f"x {number}.") for number in range(20)]
    whole, _ = split(pairs, SplitConfig(5, 5, by="source"))
    apart, dropped = split(pairs, SplitConfig(5, 5, by="source", sentences="en-pt"))
    stored = {pair.src.split(". ")[0].rstrip(".") for pair in apart["train"]}
    assert any(pair.src.rstrip(".") in stored for part in ("test", "validation") for pair in whole[part])
    assert not any(pair.src.rstrip(".") in stored for part in ("test", "validation") for pair in apart[part])
    assert dropped.total() > 0
