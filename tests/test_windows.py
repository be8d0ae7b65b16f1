"""Documents in windows: every character and every token once, in the context that it has in the document."""

import json
from itertools import chain
from pathlib import Path

import pytest
from tiny_causal import LLAMA_3, OTHER_PAGE, PAGE, tokenizer_like

import prepare_data
from lightning_knnmt.data.documents import Documents, HelpPages
from lightning_knnmt.data.pairs import Pair
from lightning_knnmt.data.readers import CorpusFile, MalformedCorpusError, ReadReport, read_pairs
from lightning_knnmt.data.splits import SplitConfig, read_split
from lightning_knnmt.data.windows import Window, Windows

SIZES = [(1, 0), (7, 3), (30, 0), (60, 25), (100, 100), (10_000, 50)]


@pytest.mark.parametrize(("characters", "overlap"), SIZES)
def test_windows_put_together_are_the_document_and_contexts_stand_before_them(characters: int, overlap: int):
    place = 0
    for window in Windows(characters, overlap).cut(PAGE, "printing"):
        assert 1 <= len(window.text) <= characters
        assert len(window.context) <= overlap
        assert PAGE[place : place + len(window.text)] == window.text
        assert PAGE[:place].endswith(window.context)
        assert window.document == "printing"
        place += len(window.text)
    assert place == len(PAGE)


@pytest.mark.parametrize("pattern", [None, LLAMA_3], ids=["gpt2", "llama3"])
@pytest.mark.parametrize(("characters", "overlap"), [(30, 0), (60, 25), (100, 100)])
def test_tokens_of_the_windows_are_the_tokens_of_the_document(pattern: str | None, characters: int, overlap: int):
    tokenizer = tokenizer_like(pattern)
    for page in (PAGE, OTHER_PAGE):
        windows = [window.text for window in Windows(characters, overlap).cut(page)]
        assert len(windows) > 1
        pieces = tokenizer(windows, add_special_tokens=False).input_ids
        assert list(chain(*pieces)) == tokenizer(page, add_special_tokens=False).input_ids


def test_windows_end_with_a_line_where_one_ends_in_their_second_half():
    first, second, *_ = Windows(40, 20).cut("A first line that is long\nand a second line.")
    assert (first.text, second.text) == ("A first line that is long\n", "and a second line.")
    assert second.context == " line that is long\n"


def test_a_text_without_spaces_is_cut_where_windows_are_full():
    assert [window.text for window in Windows(4, 2).cut("abcdefghij")] == ["abcd", "efgh", "ij"]


def test_an_empty_document_has_no_windows():
    assert list(Windows()([Pair("", "", "empty")])) == []


@pytest.mark.parametrize(("options", "message"), [({"characters": 0}, "characters is 0"), ({"overlap": -1}, "overlap")])
def test_sizes_that_cannot_be_are_refused(options: dict[str, int], message: str):
    with pytest.raises(ValueError, match=message):
        Windows(**options)


def corpus_of(path: Path, *records: dict[str, str]) -> CorpusFile:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return CorpusFile(path, max_characters=100, malformed="skip")


def test_windows_are_read_with_their_white_space_and_with_an_empty_context(tmp_path: Path):
    records = [
        {"context": "", "text": "First\n", "document": "a"},
        {"context": "First\n", "text": "  second ", "document": "a"},
    ]
    report = ReadReport()
    found = list(read_pairs(corpus_of(tmp_path / "windows.jsonl", *records), report))
    assert found == [Pair("", "First\n", "a"), Pair("First\n", "  second ", "a")]
    assert report.read == 2
    assert read_split(tmp_path / "windows.jsonl") == found


def test_windows_that_cannot_be_stored_are_counted_or_refused(tmp_path: Path):
    records = [{"context": "a", "text": text} for text in ("", "a\0b", "x" * 101)] + [{"context": "", "text": "good"}]
    corpus, report = corpus_of(tmp_path / "windows.jsonl", *records), ReadReport()
    assert [pair.tgt for pair in read_pairs(corpus, report)] == ["good"]
    assert report.skipped == {"empty text": 1, "NUL byte": 1, "too long": 1}
    with pytest.raises(MalformedCorpusError, match=r"windows\.jsonl:1: empty text"):
        list(read_pairs(CorpusFile(corpus.path)))


def test_a_pair_with_a_text_beside_its_sides_stays_a_pair(tmp_path: Path):
    corpus = corpus_of(tmp_path / "pairs.jsonl", {"src": "a", "tgt": "b", "context": "c", "text": "d"})
    assert list(read_pairs(corpus)) == [Pair("a", "b")]


def test_documents_are_read_from_text_files_and_from_json_lines(tmp_path: Path):
    (tmp_path / "one.txt").write_text("\ufeffOne\n\n", encoding="utf-8")
    (tmp_path / "more.jsonl").write_text('{"text": "Two", "document": "two"}\n{"text": "Three"}\n{"text": " "}\n')
    report = ReadReport()
    found = list(Documents([tmp_path / "one.txt", tmp_path / "more.jsonl"]).pairs(tmp_path, report))
    assert [(pair.src, pair.tgt) for pair in found] == [("One", ""), ("Two", ""), ("Three", "")]
    assert [pair.document for pair in found] == [f"{tmp_path}/one.txt", "two", f"{tmp_path}/more.jsonl:2"]
    assert report.skipped == {"empty document": 1}
    (tmp_path / "bad.jsonl").write_text('{"words": 1}\n')
    with pytest.raises(MalformedCorpusError, match=r"bad\.jsonl:1: found .* expected an object with a document's text"):
        list(Documents([tmp_path / "bad.jsonl"]).pairs(tmp_path, report))
    with pytest.raises(ValueError, match="files is empty"):
        Documents([])


def test_help_pages_are_drawn_and_short_ones_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pages = {f"{name}.html": f'<p id="par_1">{name * 9}</p><p id="par_2">end</p>'.encode() for name in "abcdef"}
    pages["short.html"] = b'<p id="par_1">short</p>'
    monkeypatch.setattr("lightning_knnmt.data.recipes.LibreOfficeHelp._pages", lambda package, cache: pages)
    report = ReadReport()
    found = list(HelpPages(pages=4, min_characters=10, seed=2).pairs(tmp_path, report))
    assert len(found) == 4 == report.read
    assert all(pair.src == f"{pair.document[0] * 9}\nend" and pair.tgt == "" for pair in found)
    assert report.skipped == {"page under min_characters": 1, "page not drawn": 2}
    assert found == list(HelpPages(pages=4, min_characters=10, seed=2).pairs(tmp_path, report))
    assert len(list(HelpPages(min_characters=10).pairs(tmp_path, report))) == 6


def test_prepared_windows_keep_documents_together_and_hold_every_text_once(tmp_path: Path):
    texts = {f"page-{number}": f"{number} {PAGE} {number * 7}" for number in range(8)}
    lines = [json.dumps({"text": text, "document": name}) for name, text in texts.items()]
    (tmp_path / "pages.jsonl").write_text("\n".join([*lines, lines[0]]))
    prepare_data.prepare(
        corpus=Documents([tmp_path / "pages.jsonl"]),
        splits=SplitConfig(validation=2, test=2),
        out=tmp_path / "out",
        windows=Windows(100, 40),
    )
    found: dict[str, str] = {}
    documents: dict[str, set[str]] = {}
    for name in ("train", "validation", "test"):
        pairs = list(read_pairs(CorpusFile(tmp_path / "out" / f"{name}.jsonl")))
        documents[name] = {pair.document for pair in pairs}
        for pair in pairs:
            assert not pair.src or found[pair.document].endswith(pair.src)
            found[pair.document] = found.get(pair.document, "") + pair.tgt
    assert found == texts
    assert [len(names) for names in documents.values()] == [4, 2, 2]
    facts = json.loads((tmp_path / "out" / "splits.json").read_text())
    assert facts["windows"] == {"characters": 100, "overlap": 40}
    assert facts["dropped"] == {"repeated": 1}


def test_a_window_is_a_pair_of_context_and_text():
    window = Window("before", " and after", "page")
    assert (window.src, window.tgt) == ("before", " and after")
    assert window.pair == Pair("before", " and after", "page")
