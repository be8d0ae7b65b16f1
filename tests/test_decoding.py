"""kNN-MT through `generate`, against Hugging Face alone and against mixtures recomputed by hand."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import ENGLISH, GERMAN, TinyFamily
from tiny_stores import build_store, corpus_pairs
from transformers import AutoModelForSeq2SeqLM

from lightning_knnmt.backbone.batch import IGNORED, Batch
from lightning_knnmt.backbone.config import load_model
from lightning_knnmt.backbone.keyed_model import KeyedModel
from lightning_knnmt.building.index import build_index
from lightning_knnmt.datastore import Datastore
from lightning_knnmt.decoding import Decoding, Translator
from lightning_knnmt.decoding import mixing as mixing_in
from lightning_knnmt.index.config import IndexConfig
from lightning_knnmt.index.opening import open_index
from lightning_knnmt.knn.combiners.fixed import FixedCombiner
from lightning_knnmt.knn.memory import Memory, RamMemory
from lightning_knnmt.knn.mixture import Mixture
from lightning_knnmt.knn.neighbors import Neighbors
from lightning_knnmt.knn.retrievers.retriever import Retriever
from lightning_knnmt.knn.retrievers.whole_store import WholeStore
from lightning_knnmt.knn.settings import KnnSettings
from lightning_knnmt.knn.step import Step
from lightning_knnmt.memory import DatastoreMemory

STRATEGIES = {
    "greedy": {"num_beams": 1},
    "beam 4": {"num_beams": 4},
    "sampling": {"do_sample": True, "top_k": 0, "num_beams": 1, "temperature": 1.3},
}
SOURCES = [GERMAN[0], GERMAN[4], GERMAN[6], GERMAN[1] + " " + GERMAN[4]]
FolderOf = Callable[[str], Path]
NOTHING = RamMemory(torch.empty(0, 24), torch.empty(0, dtype=torch.long), [], [])


class Proposals(Retriever):
    """Proposes the same tokens, each at its own distance, to chosen sentences at every step."""

    def __init__(self, tokens: list[int], sentences: set[int] | None = None) -> None:
        self.tokens, self.sentences = torch.tensor(tokens), sentences
        self.size = 0

    def begin(self, batch: Batch) -> None:
        self.size = len(batch)

    def __call__(self, step: Step) -> Neighbors:
        queries = step.queries
        shape = len(queries), len(self.tokens)
        distances = torch.arange(1.0, shape[1] + 1).expand(shape).clone()
        values, ids = self.tokens.expand(shape).clone(), torch.arange(shape[1]).expand(shape).clone()
        if self.sentences is not None:
            beams = len(queries) // self.size
            assert step.sentence.tolist() == [row // beams for row in range(len(queries))]
            left_out = [row for row in range(len(queries)) if row // beams not in self.sentences]
            distances[left_out], values[left_out], ids[left_out] = torch.inf, 0, -1
        return Neighbors(distances, values, ids)


class Broken(Proposals):
    """Fails at the third step."""

    steps = 0

    def __call__(self, step: Step) -> Neighbors:
        self.steps += 1
        if self.steps == 3:
            raise RuntimeError("the disk is on fire")
        return super().__call__(step)


@pytest.fixture(scope="module")
def store(tiny_backbone: KeyedModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Datastore]:
    """A flat-indexed datastore of every tiny model in turn."""
    with build_store(tiny_backbone, tmp_path_factory.mktemp("stores") / "store", corpus_pairs(20), 15) as store:
        build_index(store, IndexConfig("Flat"))
        yield store


@pytest.fixture(scope="module")
def marian(marian_folder: Path) -> KeyedModel:
    return load_model(str(marian_folder), device="cpu")


@pytest.fixture(scope="module")
def marian_store(marian: KeyedModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Datastore]:
    with build_store(marian, tmp_path_factory.mktemp("stores") / "marian", corpus_pairs(20), 15) as store:
        build_index(store, IndexConfig("Flat"))
        yield store


def memory_of(store: Datastore) -> DatastoreMemory:
    return DatastoreMemory(store, open_index(store))


def mixing(
    backbone: KeyedModel, retriever: Retriever, lambda_: float, batch: Batch, memory: Memory = NOTHING
) -> AbstractContextManager[None]:
    """Decoding with T = 50."""
    return mixing_in(backbone, Mixture(backbone, memory, retriever, FixedCombiner(lambda_, 50.0)), batch)


def mixture_by_hand(
    backbone: KeyedModel, store: Datastore, batch: Batch, sentence: int, tokens: list[int], k: int, lambda_: float
) -> np.ndarray:
    """The mixture before each token of a translation, shape (T, V), by brute force over the stored keys, T = 50."""
    one = slice(sentence, sentence + 1)
    teacher = Batch(batch.input_ids[one], batch.attention_mask[one], torch.tensor([tokens]))
    with torch.no_grad():
        queries, logits = backbone.keys_and_logits(teacher)
    keys = np.concatenate(list(store.key_chunks())).astype(np.float64)
    model = logits[0].double().softmax(-1).numpy()
    mixed = []
    for query, plain in zip(queries[0].double().numpy(), model, strict=True):
        distances = ((keys - query) ** 2).sum(1)
        nearest = np.argsort(distances)[:k]
        weights = np.exp(-(distances[nearest] - distances.min()) / 50.0)
        knn = np.zeros_like(plain)
        for entry, weight in zip(nearest, weights / weights.sum(), strict=True):
            knn[store.values[entry]] += weight
        mixed.append(lambda_ * knn + (1 - lambda_) * plain)
    return np.array(mixed)


def trimmed(sequence: list[int], eos: int) -> list[int]:
    """Tokens after the decoder's start, to the end of the sentence."""
    tokens = sequence[1:]
    return tokens[: tokens.index(eos) + 1] if eos in tokens else tokens


def hook_count(backbone: KeyedModel) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in backbone.model.modules())


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_lambda_0_is_hugging_face_generate_exactly(
    tiny_backbone: KeyedModel, tiny_folder: Path, tiny_family: TinyFamily, strategy: str
) -> None:
    model = AutoModelForSeq2SeqLM.from_pretrained(tiny_folder).eval()
    by_hand = {
        name: tiny_backbone.tokenizer.convert_tokens_to_ids(token) for name, token in tiny_family.by_hand.items()
    }
    inputs = tiny_backbone.tokenizer(SOURCES, return_tensors="pt", padding=True)
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    batch = tiny_backbone.batch(SOURCES)
    torch.manual_seed(3)
    expected = model.generate(**inputs, **by_hand, **STRATEGIES[strategy])
    torch.manual_seed(3)
    with mixing(tiny_backbone, Broken([5]), 0.0, batch):
        assert hook_count(tiny_backbone) == 0
        found = tiny_backbone.generate(batch, **STRATEGIES[strategy])
    assert found.tolist() == expected.tolist()
    assert strategy != "sampling" or len({tuple(row) for row in found.tolist()}) == len(SOURCES)


@pytest.mark.parametrize("lambda_", [0.4, 1.0])
def test_scores_of_beams_are_the_recomputed_mixture_of_their_own_neighbors(
    tiny_backbone: KeyedModel, store: Datastore, lambda_: float
) -> None:
    batch = tiny_backbone.batch(SOURCES)
    eos = tiny_backbone.model.generation_config.eos_token_id
    options = {"num_beams": 4, "num_return_sequences": 4, "length_penalty": 0.0, "max_new_tokens": 6}
    with mixing(tiny_backbone, WholeStore(k=6), lambda_, batch, memory_of(store)):
        found = tiny_backbone.generate(
            batch, **options, forced_eos_token_id=None, bad_words_ids=[[tiny_backbone.pad_id]],
            return_dict_in_generate=True, output_scores=True,
        )  # fmt: skip
    forced = tiny_backbone.forced_id
    compared = 0
    for row, sequence in enumerate(found.sequences.tolist()):
        tokens = trimmed(sequence, eos)
        mixture = mixture_by_hand(tiny_backbone, store, batch, row // 4, tokens, 6, lambda_)
        with np.errstate(divide="ignore"):
            steps = np.log(mixture[np.arange(len(tokens)), tokens])
        if forced is not None:
            assert tokens[0] == forced
            steps[0] = 0.0  # a forced token is certain
        if np.isfinite(steps.sum()):
            assert float(found.sequences_scores[row]) == pytest.approx(steps.sum(), abs=5e-3)
            compared += 1
        else:  # λ = 1: fewer than four hypotheses were possible
            assert lambda_ == 1
    assert compared >= (16 if lambda_ < 1 else 4)


@pytest.mark.parametrize("k", [1, 7, 10_000])
@pytest.mark.parametrize("lambda_", [0.5, 1.0])
def test_greedy_takes_the_likeliest_token_of_the_mixture_with_one_few_or_all_neighbors(
    marian: KeyedModel, marian_store: Datastore, k: int, lambda_: float
) -> None:
    batch = marian.batch(SOURCES)
    with mixing(marian, WholeStore(k=k), lambda_, batch, memory_of(marian_store)):
        found = marian.generate(batch, num_beams=1, bad_words_ids=None, forced_eos_token_id=None)
    for sentence, sequence in enumerate(found.tolist()):
        tokens = trimmed(sequence, marian.tokenizer.eos_token_id)
        mixture = mixture_by_hand(marian, marian_store, batch, sentence, tokens, k, lambda_)
        assert mixture.argmax(1).tolist() == tokens
    assert found.tolist() != marian.generate(batch, num_beams=1).tolist()


@pytest.mark.parametrize("beams", [1, 4])
def test_lambda_1_follows_neighbors_where_there_are_any_and_the_model_elsewhere(marian: KeyedModel, beams: int) -> None:
    batch = marian.batch(SOURCES)
    options = {"num_beams": beams, "max_new_tokens": 8}
    plain = marian.generate(batch, **options).tolist()
    with mixing(marian, Proposals([40, 41, 42, 40, 43, 44], {1, 3}), 1.0, batch):
        found = marian.generate(batch, **options).tolist()
    special = set(marian.tokenizer.all_special_ids)
    for sentence in (1, 3):
        assert set(found[sentence]) - special <= {40, 41, 42, 43, 44}
        assert 40 in found[sentence]
    eos = marian.tokenizer.eos_token_id
    for sentence in (0, 2):
        assert trimmed(found[sentence], eos) == trimmed(plain[sentence], eos)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_neighbors_do_not_leak_past_a_forced_language(
    tiny_backbone: KeyedModel, tiny_family: TinyFamily, strategy: str
) -> None:
    forced = tiny_backbone.forced_id
    if forced is None:
        pytest.skip("this family does not force its first token")
    source_language = tiny_backbone.tokenizer(GERMAN[0]).input_ids[0]
    pushed = tiny_backbone.tokenizer(text_target=ENGLISH[0]).input_ids[2]
    batch = tiny_backbone.batch(SOURCES)
    options = STRATEGIES[strategy] | {"output_scores": True, "return_dict_in_generate": True}
    with mixing(tiny_backbone, Proposals([pushed, source_language, source_language]), 0.999, batch):
        found = tiny_backbone.generate(batch, **options)
    assert found.sequences[:, 1].tolist() == [forced] * len(SOURCES)
    assert (found.scores[0][:, forced] == 0).all()
    assert (found.scores[0].isfinite().sum(1) == 1).all()
    assert {pushed, source_language} & set(found.sequences[:, 2:].flatten().tolist())  # they do act afterwards


@pytest.mark.parametrize("option", ["suppress_tokens", "bad_words_ids", "begin_suppress_tokens"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_suppressed_tokens_stay_suppressed_when_neighbors_propose_them(
    marian: KeyedModel, option: str, strategy: str
) -> None:
    batch = marian.batch(SOURCES)
    begin = option == "begin_suppress_tokens"
    with mixing(marian, Proposals([50, 51, 50]), 0.999, batch):
        free = marian.generate(batch, **STRATEGIES[strategy])
        bound = marian.generate(
            batch, **STRATEGIES[strategy], **{option: [[50]] if option == "bad_words_ids" else [50]}
        )
    assert (free[:, 1:] == 50).any(1).all()
    assert not (bound[:, 1 : 2 if begin else None] == 50).any()
    assert (bound[:, 1:] == 51).any(1).all()


@pytest.mark.parametrize("beams", [1, 3])
def test_no_hook_stays_after_decoding_or_after_an_error_in_it(marian: KeyedModel, beams: int) -> None:
    batch = marian.batch(SOURCES)
    plain = marian.generate(batch, num_beams=beams)
    with pytest.raises(RuntimeError, match="the disk is on fire"), mixing(marian, Broken([40]), 0.5, batch):
        marian.generate(batch, num_beams=beams)
    assert hook_count(marian) == 0
    with mixing(marian, Proposals([40]), 0.5, batch):
        assert hook_count(marian) == 2
    assert hook_count(marian) == 0
    assert marian.generate(batch, num_beams=beams).equal(plain)


def test_the_last_position_is_mixed_when_decoding_without_a_cache(marian: KeyedModel, marian_store: Datastore) -> None:
    batch = marian.batch(SOURCES)
    with mixing(marian, WholeStore(k=6), 0.5, batch, memory_of(marian_store)):
        cached = marian.generate(batch, num_beams=3)
        uncached = marian.generate(batch, num_beams=3, use_cache=False)
    assert cached.equal(uncached)


def translator(backbone: KeyedModel, store: Datastore, beams: int, batch_size: int) -> Translator:
    mixture = KnnSettings(k=6, lambda_=0.2, temperature=50.0).open(backbone, memory_of(store))
    return Translator(backbone, mixture, Decoding(beams, batch_size, 10))


@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_translations_come_in_the_order_of_the_sources_whatever_the_batches(
    tiny_backbone: KeyedModel, store: Datastore, beams: int, batch_size: int
) -> None:
    sources = [f"{text} {number}" for number, text in enumerate(GERMAN)] + [GERMAN[4], "Datei"]
    found = translator(tiny_backbone, store, beams, batch_size).translate(sources)
    single = translator(tiny_backbone, store, beams, 1)
    assert found.texts == [single.translate([source]).texts[0] for source in sources]
    assert len(set(found.texts)) > 1


def test_translations_count_tokens_queries_and_time(marian: KeyedModel, marian_store: Datastore) -> None:
    found = translator(marian, marian_store, beams=3, batch_size=2).translate(SOURCES)
    special = set(marian.tokenizer.all_special_ids)
    with mixing(marian, WholeStore(k=6), 0.2, marian.batch(SOURCES), memory_of(marian_store)):
        whole = marian.generate(marian.batch(SOURCES), num_beams=3, max_new_tokens=10).flatten().tolist()
    assert found.tokens == sum(token not in special for token in whole)
    assert found.spans.counts["search"] == found.spans.counts["mix"] > 3 * len(SOURCES)
    assert found.spans.counts["search"] % (3 * 2) == 0
    assert found.spans.counts["decode"] == 2
    assert 0 < found.spans.seconds["search"] + found.spans.seconds["mix"] < found.spans.seconds["decode"]
    assert found.seconds == found.spans.seconds["decode"]


def test_no_sources_are_no_translations(marian: KeyedModel, marian_store: Datastore) -> None:
    found = translator(marian, marian_store, beams=2, batch_size=4).translate([])
    assert (found.texts, found.tokens, found.seconds) == ([], 0, 0)


@pytest.mark.parametrize("beams", [1, 4])
def test_an_empty_datastore_is_the_plain_model(marian: KeyedModel, tmp_path: Path, beams: int) -> None:
    plain = Translator(marian, decoding=Decoding(beams, 2, 10)).translate(SOURCES)
    with build_store(marian, tmp_path / "store", []) as empty:
        assert build_index(empty, IndexConfig()).factory == "Flat"
        assert translator(marian, empty, beams, 2).translate(SOURCES).texts == plain.texts


def test_shards_translate_as_one_file_does(marian: KeyedModel, tmp_path: Path) -> None:
    texts = []
    for name, shard_pairs in (("whole", 100), ("parts", 3)):
        with build_store(marian, tmp_path / name, corpus_pairs(20), shard_pairs) as store:
            assert (len(store.manifest.shards) > 4) == (name == "parts")
            build_index(store, IndexConfig("Flat"))
            texts.append(translator(marian, store, 4, 3).translate(SOURCES).texts)
    assert texts[0] == texts[1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_decoding_on_the_gpu_is_decoding_on_the_cpu(
    marian: KeyedModel, marian_folder: Path, marian_store: Datastore
) -> None:
    on_gpu = load_model(str(marian_folder), device="cuda")
    expected = translator(marian, marian_store, 4, 3).translate(SOURCES)
    found = translator(on_gpu, marian_store, 4, 3).translate(SOURCES)
    assert found.texts == expected.texts
    assert found.spans.counts == expected.spans.counts


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beams": 0}, "beams is 0, expected 1 or more"),
        ({"batch_size": 0}, "batch_size is 0, expected 1 or more"),
        ({"max_new_tokens": -1}, "max_new_tokens is -1, expected 1 or more"),
        ({"options": {"num_beams": 2}}, "options has num_beams: 2, expected it in beams"),
        ({"options": {"num_return_sequences": 2}}, "num_return_sequences: 2, expected one translation of each source"),
        ({"options": {"return_dict_in_generate": True}}, "return_dict_in_generate: True, expected options that return"),
        ({"options": {"length_penalty": "x"}}, "options has length_penalty: 'x', expected a number"),
        ({"options": {"prompt_lookup_num_tokens": 3}}, "prompt_lookup_num_tokens: 3, expected one token at a time"),
    ],
)
def test_decoding_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Decoding(**options)


def test_one_string_for_a_list_of_sources_is_refused(marian: KeyedModel) -> None:
    with pytest.raises(
        TypeError, match=r"sources is one string, 'Öffnen', expected a list of strings: write \['Öffnen'\]"
    ):
        Translator(marian, decoding=Decoding(max_new_tokens=5)).translate("Öffnen")


def test_labels_are_ignored_where_they_are_padding(marian: KeyedModel, marian_store: Datastore) -> None:
    batch = marian.batch(SOURCES, ENGLISH[:4])
    assert batch.labels is not None and (batch.labels == IGNORED).any()
    with mixing(marian, WholeStore(k=3), 0.5, batch, memory_of(marian_store)):
        assert marian.generate(batch, num_beams=2).equal(marian.generate(marian.batch(SOURCES), num_beams=2))


def test_more_tokens_than_positions_are_refused(marian: KeyedModel) -> None:
    assert marian.position_limit is not None
    Translator(marian, decoding=Decoding(max_new_tokens=marian.position_limit))
    with pytest.raises(ValueError, match=rf"max_new_tokens is 256, but .* has {marian.position_limit} positions"):
        Translator(marian, decoding=Decoding(max_new_tokens=256))
