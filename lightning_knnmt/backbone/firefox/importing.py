"""From the files that Firefox Translations and Bergamot ship to an ordinary Hugging Face folder."""

import json
import logging
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import sentencepiece
from transformers import GenerationConfig

from lightning_knnmt.backbone.firefox.configuration import FirefoxConfig
from lightning_knnmt.backbone.firefox.marian_file import read_marian_file
from lightning_knnmt.backbone.firefox.model_card import Provenance, model_card
from lightning_knnmt.backbone.firefox.modeling import FirefoxForConditionalGeneration
from lightning_knnmt.backbone.firefox.shipped_files import ShippedFiles
from lightning_knnmt.backbone.firefox.shortlist import SHORTLIST_FILE, read_shortlist
from lightning_knnmt.backbone.firefox.tokenization import FirefoxTokenizer
from lightning_knnmt.backbone.firefox.weights import config_of, state_dict_of

log = logging.getLogger(__name__)

RECORD = "import.json"  # what was imported, beside the model

_FORMAT = 1  # of what is written; another one is imported anew
_PAD = "<pad>"


def record_of(files: ShippedFiles, provenance: Provenance, positions: int) -> dict[str, Any]:
    """What distinguishes an import from another one; equal records give equal folders."""
    return {
        "format": _FORMAT,
        "files": files.checksums(),
        "positions": positions,
        "provenance": asdict(provenance),
    }


def write_folder(files: ShippedFiles, provenance: Provenance, out: Path, positions: int = 512) -> None:
    """Write a new Hugging Face folder; it is incomplete until this returns.

    Args:
        files: What is imported.
        provenance: Where it comes from.
        out: The folder.
        positions: Longest sequence, in tokens.

    Raises:
        ValueError: A file is damaged, or the model is of another kind.
    """
    record = record_of(files, provenance, positions)
    with tempfile.TemporaryDirectory() as folder:
        files = files.decompressed(Path(folder))
        _write_model(files, provenance, out, positions)
        _write_tokenizer(files, provenance, out, positions)
        if files.shortlist is not None:
            _check_shortlist(files)
            shutil.copyfile(files.shortlist, out / SHORTLIST_FILE)
    (out / "README.md").write_text(
        model_card(record["files"], provenance, files.shortlist is not None), encoding="utf-8"
    )
    (out / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _write_model(files: ShippedFiles, provenance: Provenance, out: Path, positions: int) -> None:
    marian = read_marian_file(files.model)
    name = files.model.name
    config = config_of(marian, name, max_position_embeddings=positions)
    if provenance.src_lang is not None and provenance.tgt_lang is not None:
        config.sentence_languages = f"{provenance.src_lang}-{provenance.tgt_lang}"
    if config.share_encoder_decoder_embeddings and files.source_vocabulary != files.target_vocabulary:
        raise ValueError(f"{name} shares its embeddings, but there are two vocabularies; expected one, vocab*.spm")
    sides = ("Wemb", "Wemb") if config.share_encoder_decoder_embeddings else ("encoder_Wemb", "decoder_Wemb")
    for file, side in zip((files.source_vocabulary, files.target_vocabulary), sides, strict=True):
        _check_vocabulary(file, len(marian.tensors[side]))
    state = state_dict_of(marian, config, name)  # compares all sizes before a model of that size is made
    model = FirefoxForConditionalGeneration(config)
    model.load_state_dict(state)
    model.generation_config = generation_config_of(config)
    model.save_pretrained(out)
    log.info("%s: %.1f M parameters, %d tokens", name, model.num_parameters() / 1e6, config.vocab_size - 1)


def generation_config_of(config: FirefoxConfig) -> GenerationConfig:
    """How such models decode: greedily as in the browser, never producing `<unk>` or padding."""
    return GenerationConfig(
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        decoder_start_token_id=config.decoder_start_token_id,
        suppress_tokens=[config.unk_token_id, config.pad_token_id],
        max_new_tokens=config.max_position_embeddings // 2,
    )


def _check_vocabulary(file: Path, tokens: int) -> None:
    pieces = _pieces(file)
    if len(pieces) != tokens:
        raise ValueError(f"{file.name} has {len(pieces)} tokens, expected the model's {tokens}")
    if pieces[:2] != ["</s>", "<unk>"]:
        raise ValueError(f"{file.name} begins with {', '.join(pieces[:2])}, expected </s>, <unk>")


def _write_tokenizer(files: ShippedFiles, provenance: Provenance, out: Path, positions: int) -> None:
    """Two vocabularies of different lengths have padding at the same place, behind the longer one."""
    two = files.source_vocabulary != files.target_vocabulary
    vocabularies = [_pieces(files.source_vocabulary), _pieces(files.target_vocabulary)]
    pad = max(map(len, vocabularies))
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, name) for name in ("vocab.json", "target_vocab.json")]
        for path, pieces in zip(paths, vocabularies, strict=True):
            ids = {piece: number for number, piece in enumerate(pieces)} | {_PAD: pad}
            path.write_text(json.dumps(ids, ensure_ascii=False), encoding="utf-8")
        tokenizer = FirefoxTokenizer(
            str(files.source_vocabulary),
            str(files.target_vocabulary),
            str(paths[0]),
            target_vocab_file=str(paths[1]) if two else None,
            source_lang=provenance.src_lang,
            target_lang=provenance.tgt_lang,
            pad_token=_PAD,
            model_max_length=positions,
            separate_vocabs=two,
        )
        tokenizer.save_pretrained(out)


def _pieces(vocabulary: Path) -> list[str]:
    """The tokens of a SentencePiece model, by id.

    Raises:
        ValueError: The file is damaged.
    """
    try:
        model = sentencepiece.SentencePieceProcessor(model_file=str(vocabulary))
    except (RuntimeError, OSError) as error:
        raise ValueError(f"{vocabulary} is damaged or no SentencePiece model: {error}") from error
    return [model.id_to_piece(number) for number in range(len(model))]


def _check_shortlist(files: ShippedFiles) -> None:
    assert files.shortlist is not None
    shortlist = read_shortlist(files.shortlist, len(_pieces(files.target_vocabulary)))
    sources = len(_pieces(files.source_vocabulary))
    if len(shortlist.offsets) != sources + 1:
        raise ValueError(f"{files.shortlist.name} has {len(shortlist.offsets) - 1} source tokens, expected {sources}")
