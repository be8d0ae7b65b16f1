"""Tiny randomly initialised translation models of every family, saved as Hugging Face folders without a network."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from tiny_firefox import ship
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    FSMTConfig,
    FSMTForConditionalGeneration,
    FSMTTokenizer,
    M2M100Config,
    M2M100ForConditionalGeneration,
    M2M100Tokenizer,
    MarianConfig,
    MarianMTModel,
    MarianTokenizer,
    MBart50Tokenizer,
    MBartConfig,
    MBartForConditionalGeneration,
    MBartTokenizer,
    MT5Config,
    MT5ForConditionalGeneration,
    NllbTokenizer,
    PegasusConfig,
    PegasusForConditionalGeneration,
    PegasusTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    RobertaTokenizer,
    T5Config,
    T5ForConditionalGeneration,
    T5Tokenizer,
    UMT5Config,
    UMT5ForConditionalGeneration,
)
from transformers.models.mbart.tokenization_mbart import FAIRSEQ_LANGUAGE_CODES as MBART_CODES
from transformers.models.mbart50.tokenization_mbart50 import FAIRSEQ_LANGUAGE_CODES as MBART50_CODES

from lightning_knnmt.backbone.firefox.importing import write_folder
from lightning_knnmt.backbone.firefox.model_card import Provenance
from lightning_knnmt.backbone.firefox.shipped_files import ShippedFiles

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
from scratch_model import ModelShape, init_model

GERMAN = [
    "Der Drucker ist nicht bereit.",
    "Wählen Sie eine Datei aus.",
    "Klicken Sie auf die Schaltfläche Abbrechen, um zurück zu gehen.",
    "Die Tabelle enthält keine Daten.",
    "Öffnen",
    "Speichern Sie das Dokument, bevor Sie das Fenster schließen.",
    "Das Passwort ist falsch.",
    "Fügen Sie ein Bild in den Text ein.",
]
ENGLISH = [
    "The printer is not ready.",
    "Choose a file.",
    "Click on the button Cancel to go back.",
    "The table contains no data.",
    "Open",
    "Save the document before you close the window.",
    "The password is wrong.",
    "Insert an image into the text.",
]

SIZES: dict[str, Any] = {
    "d_model": 24,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 40,
    "tie_word_embeddings": False,
}
POSITIONS = SIZES["max_position_embeddings"]


@dataclass(frozen=True)
class TinyFamily:
    """One kind of tiny model.

    Attributes:
        make: Writes model and tokenizer to a folder.
        src_lang: Code of German, for multilingual models.
        tgt_lang: Code of English, for multilingual models.
        by_hand: Options of Hugging Face's `generate`, name -> token, that a user of the plain model has to give.
    """

    make: Callable[[Path], None]
    src_lang: str | None = None
    tgt_lang: str | None = None
    by_hand: dict[str, str] = field(default_factory=dict)

    @property
    def languages(self) -> dict[str, str]:
        """What KeyedModel has to be told about the languages."""
        return {"src_lang": self.src_lang, "tgt_lang": self.tgt_lang} if self.src_lang and self.tgt_lang else {}


def save(model: PreTrainedModel, tokenizer: Any, out: Path, seed: int = 8) -> None:
    """Write a folder with random weights whose translations are lively: they vary over steps and sentences.

    The input token and the feed-forward layers have to outweigh the attention, which averages everything; tied
    embeddings must be small, or the state resembles its input token and repeats it for ever.
    """
    generator = torch.Generator().manual_seed(seed)
    tied = model.config.tie_word_embeddings
    scaled = getattr(model.config, "scale_embedding", False)
    embedding_std = (0.3 if tied else 4.0) * (model.config.d_model**-0.5 if scaled else 1.0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if "norm" in name and name.endswith("weight"):
                weight.copy_(1 + 0.2 * noise)
            elif weight.ndim == 1:
                weight.copy_(0.1 * noise)
            elif "embed" in name or "shared" in name:
                weight.copy_(embedding_std * noise)
            else:
                attention = "attn" in name or "Attention" in name
                gain = 0.7 if "encoder_attn" in name or "EncDec" in name else 1.0 if attention else 1.5
                weight.copy_(gain * noise / weight.shape[1] ** 0.5)
        if hasattr(model, "final_logits_bias"):
            model.final_logits_bias.copy_(0.1 * torch.randn(model.final_logits_bias.shape, generator=generator))
    model.generation_config.max_length = None
    model.generation_config.max_new_tokens = 12
    model.generation_config.num_beams = 1
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def train_spm(texts: list[str], prefix: Path, vocabulary: int = 70) -> list[tuple[str, float]]:
    """Train `prefix`.model and return its pieces with their scores, the control symbols left out."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_prefix=str(prefix),
        vocab_size=vocabulary,
        hard_vocab_limit=False,
        minloglevel=2,
        num_threads=1,
    )
    lines = prefix.with_suffix(".vocab").read_text().splitlines()
    pieces = [line.split("\t") for line in lines]
    return [(piece, float(score)) for piece, score in pieces if piece not in ("<unk>", "<s>", "</s>")]


def write_json(path: Path, content: Any) -> str:
    """Write a JSON file and return its name."""
    path.write_text(json.dumps(content, ensure_ascii=False))
    return str(path)


def _raw(out: Path) -> Path:
    """A folder beside `out` for what the tokenizer is made of."""
    raw = out.with_name(f"{out.name}-raw")
    raw.mkdir(parents=True)
    return raw


def make_marian_scratch(out: Path) -> None:
    """The Marian model of `benchmarks/scratch_model.py`."""
    shape = ModelShape(vocabulary=120, d_model=24, encoder_layers=2, decoder_layers=2, ffn=32, positions=POSITIONS)
    init_model(GERMAN + ENGLISH, out, shape)
    model = MarianMTModel.from_pretrained(out, tie_word_embeddings=False)  # lively even so small
    save(model, AutoTokenizer.from_pretrained(out), out, seed=5)


def make_marian(out: Path) -> None:
    """A Marian model with the SentencePiece tokenizer of OPUS-MT, two models and one vocabulary."""
    raw = _raw(out)
    pieces = train_spm(GERMAN, raw / "source") + train_spm(ENGLISH, raw / "target")
    tokens = list(dict.fromkeys(["</s>", "<unk>", *(piece for piece, _ in pieces), "<pad>"]))
    vocab = write_json(raw / "vocab.json", {token: index for index, token in enumerate(tokens)})
    tokenizer = MarianTokenizer(
        str(raw / "source.model"), str(raw / "target.model"), vocab, source_lang="de", target_lang="en"
    )
    pad = len(tokens) - 1
    config = MarianConfig(
        vocab_size=len(tokens),
        pad_token_id=pad,
        eos_token_id=0,
        bos_token_id=0,
        decoder_start_token_id=pad,
        forced_eos_token_id=0,
        scale_embedding=True,
        **SIZES,
    )
    model = MarianMTModel(config)
    model.generation_config.bad_words_ids = [[pad]]
    save(model, tokenizer, out)


def make_m2m100(out: Path) -> None:
    """An M2M100 model."""
    raw = _raw(out)
    pieces = train_spm(GERMAN + ENGLISH, raw / "spm", 110)
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *(piece for piece, _ in pieces)]
    vocab = write_json(raw / "vocab.json", {token: index for index, token in enumerate(tokens)})
    tokenizer = M2M100Tokenizer(vocab, str(raw / "spm.model"))
    size = len(tokens) + len(tokenizer.lang_code_to_id) + tokenizer.num_madeup_words
    save(M2M100ForConditionalGeneration(M2M100Config(vocab_size=size, **SIZES)), tokenizer, out)


def make_nllb(out: Path) -> None:
    """An M2M100 model with NLLB's tokenizer."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    specials = ["<s>", "<pad>", "</s>", "<unk>"]
    trained.train_from_iterator(
        GERMAN + ENGLISH, trainers.BpeTrainer(vocab_size=150, special_tokens=specials, show_progress=False)
    )
    model = json.loads(trained.to_str())["model"]
    tokenizer = NllbTokenizer(vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]])
    save(M2M100ForConditionalGeneration(M2M100Config(vocab_size=len(tokenizer), **SIZES)), tokenizer, out)


def make_mbart25(out: Path) -> None:
    """An mBART-25 model, whose sentences end with the language."""
    pieces = train_spm(GERMAN + ENGLISH, _raw(out) / "spm", 110)
    codes = [(code, 0.0) for code in MBART_CODES]
    specials = [(token, 0.0) for token in ("<s>", "<pad>", "</s>", "<unk>")]
    tokenizer = MBartTokenizer(vocab=[*specials, *pieces, *codes, ("<mask>", 0.0)])
    save(MBartForConditionalGeneration(MBartConfig(vocab_size=len(tokenizer), **SIZES)), tokenizer, out)


def make_mbart50(out: Path) -> None:
    """An mBART-50 model, whose sentences begin with the language."""
    pieces = train_spm(GERMAN + ENGLISH, _raw(out) / "spm", 110)
    codes = [(code, 0.0) for code in MBART50_CODES]
    specials = [(token, 0.0) for token in ("<s>", "<pad>", "</s>", "<unk>")]
    tokenizer = MBart50Tokenizer(vocab=[*specials, *pieces, *codes, ("<mask>", 0.0)])
    config = MBartConfig(vocab_size=len(tokenizer), decoder_start_token_id=2, **SIZES)
    save(MBartForConditionalGeneration(config), tokenizer, out)


def make_t5(out: Path) -> None:
    """A T5 model with tied embeddings, which scales its decoder outputs."""
    pieces = train_spm(GERMAN + ENGLISH, _raw(out) / "spm", 110)
    specials = [(token, 0.0) for token in ("<pad>", "</s>", "<unk>")]
    extra = [(f"<extra_id_{index}>", 0.0) for index in reversed(range(4))]
    tokenizer = T5Tokenizer(vocab=[*specials, *pieces, *extra], extra_ids=4)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=24,
        d_kv=6,
        d_ff=32,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        tie_word_embeddings=True,
    )
    save(T5ForConditionalGeneration(config), tokenizer, out)


def make_bart(out: Path) -> None:
    """A BART model, which begins every translation with a token of its own."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trained.train_from_iterator(
        GERMAN + ENGLISH, trainers.BpeTrainer(vocab_size=150, special_tokens=specials, show_progress=False)
    )
    model = json.loads(trained.to_str())["model"]
    tokenizer = RobertaTokenizer(vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]])
    bart = BartForConditionalGeneration(BartConfig(vocab_size=len(tokenizer), forced_bos_token_id=0, **SIZES))
    bart.generation_config.forced_bos_token_id = 0
    save(bart, tokenizer, out, seed=2)


def make_pegasus(out: Path) -> None:
    """A Pegasus model: norms before every layer, positions by sines."""
    pieces = train_spm(GERMAN + ENGLISH, _raw(out) / "spm", 110)
    specials = [(token, 0.0) for token in ("<pad>", "</s>", "<unk>", "<mask_2>")]
    tokenizer = PegasusTokenizer(vocab=[*specials, *pieces], offset=3)
    config = PegasusConfig(vocab_size=len(tokenizer), scale_embedding=True, **SIZES)
    save(PegasusForConditionalGeneration(config), tokenizer, out, seed=13)


def make_t5_variant(config: type[PreTrainedConfig], model: type[PreTrainedModel], out: Path) -> None:
    """A model of T5's structure with gated feed-forward layers."""
    pieces = train_spm(GERMAN + ENGLISH, _raw(out) / "spm", 110)
    specials = [(token, 0.0) for token in ("<pad>", "</s>", "<unk>")]
    tokenizer = T5Tokenizer(vocab=[*specials, *pieces], extra_ids=0)
    sizes = {"d_model": 24, "d_kv": 6, "d_ff": 32, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
    save(model(config(vocab_size=len(tokenizer), feed_forward_proj="gated-gelu", **sizes)), tokenizer, out, seed=12)


def make_fsmt(out: Path) -> None:
    """An FSMT model, with a vocabulary for each language."""
    raw = _raw(out)
    specials = ["<s>", "<pad>", "</s>", "<unk>"]
    merges = [("e", "n</w>"), ("d", "e"), ("t", "h"), ("i", "s</w>"), ("th", "e</w>")]
    sizes = {}
    for side, texts in (("src", GERMAN), ("tgt", ENGLISH)):
        letters = sorted(set("".join(texts)) - {" "})
        tokens = specials + [letter + end for letter in letters for end in ("", "</w>")] + ["".join(m) for m in merges]
        sizes[side] = len(tokens)
        write_json(raw / f"vocab-{side}.json", {token: index for index, token in enumerate(tokens)})
    (raw / "merges.txt").write_text("".join(f"{first} {second} 9\n" for first, second in merges))
    files = [str(raw / name) for name in ("vocab-src.json", "vocab-tgt.json", "merges.txt")]
    tokenizer = FSMTTokenizer(["de", "en"], *files)
    config = FSMTConfig(
        langs=["de", "en"],
        src_vocab_size=sizes["src"],
        tgt_vocab_size=sizes["tgt"],
        num_beams=1,
        **SIZES,
    )
    save(FSMTForConditionalGeneration(config), tokenizer, out)


def make_firefox(out: Path, target_texts: list[str] | None = None) -> None:
    """A Firefox Translations model, imported from the files that it ships as; two vocabularies with target texts."""
    raw = _raw(out)
    one = target_texts is None
    ship(raw, GERMAN + ENGLISH if one else GERMAN, target_texts, seed=3 if one else 5)
    out.mkdir()
    write_folder(ShippedFiles.of(raw), Provenance("a test"), out, positions=POSITIONS)
    generation = json.loads((out / "generation_config.json").read_text())
    write_json(out / "generation_config.json", generation | {"max_new_tokens": 12})


def make_firefox_two_vocabularies(out: Path) -> None:
    """One with a vocabulary for each language."""
    make_firefox(out, ENGLISH)


TINY_FAMILIES: dict[str, TinyFamily] = {
    "marian": TinyFamily(make_marian),
    "marian_scratch": TinyFamily(make_marian_scratch),
    "m2m100": TinyFamily(make_m2m100, "de", "en", {"forced_bos_token_id": "__en__"}),
    "nllb": TinyFamily(make_nllb, "deu_Latn", "eng_Latn", {"forced_bos_token_id": "eng_Latn"}),
    "mbart25": TinyFamily(make_mbart25, "de_DE", "en_XX", {"decoder_start_token_id": "en_XX"}),
    "mbart50": TinyFamily(make_mbart50, "de_DE", "en_XX", {"forced_bos_token_id": "en_XX"}),
    "t5": TinyFamily(make_t5),
    "mt5": TinyFamily(partial(make_t5_variant, MT5Config, MT5ForConditionalGeneration)),
    "umt5": TinyFamily(partial(make_t5_variant, UMT5Config, UMT5ForConditionalGeneration)),
    "bart": TinyFamily(make_bart),
    "pegasus": TinyFamily(make_pegasus),
    "fsmt": TinyFamily(make_fsmt),
    "firefox": TinyFamily(make_firefox),
    "firefox_two_vocabularies": TinyFamily(make_firefox_two_vocabularies),
}
