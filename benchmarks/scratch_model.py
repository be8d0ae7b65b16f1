"""A small translation model for tests and benchmarks: joint subwords and randomly initialised weights."""

import io
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import MarianConfig, MarianMTModel, PreTrainedTokenizerFast

log = logging.getLogger(__name__)

PAD, EOS, UNK = "<pad>", "</s>", "<unk>"


def train_tokenizer(texts: Iterable[str], vocabulary_size: int) -> PreTrainedTokenizerFast:
    """Train a joint unigram vocabulary with SentencePiece; every sequence ends in ``</s>``, digits stand alone."""
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=trained,
        vocab_size=vocabulary_size,
        model_type="unigram",
        character_coverage=0.9999,
        split_digits=True,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        pad_piece=PAD,
        eos_piece=EOS,
        unk_piece=UNK,
        minloglevel=2,
    )
    pieces = sentencepiece.SentencePieceProcessor(model_proto=trained.getvalue())
    scores = [(pieces.id_to_piece(number), pieces.get_score(number)) for number in range(len(pieces))]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=2))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {EOS}", special_tokens=[(EOS, 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, unk_token=UNK)


@dataclass(frozen=True)
class ModelShape:
    """Family and sizes of a new model.

    Attributes:
        vocabulary: Number of joint subwords.
        d_model: Size of the states, and so D of the keys.
        encoder_layers: Encoder blocks.
        decoder_layers: Decoder blocks.
        heads: Attention heads per block.
        ffn: Size of the feed-forward layers.
        dropout: Dropout rate while training.
        positions: Longest sequence, in tokens.
    """

    vocabulary: int = 8000
    d_model: int = 128
    encoder_layers: int = 4
    decoder_layers: int = 2
    heads: int = 4
    ffn: int = 512
    dropout: float = 0.1
    positions: int = 512


def init_model(texts: Iterable[str], out: Path, shape: ModelShape, seed: int = 1) -> None:
    """Write a Hugging Face folder with a new tokenizer and a randomly initialised model.

    Args:
        texts: Sentences of both languages, for the subwords.
        out: The folder.
        shape: Family and sizes of the model.
        seed: Seed of the weights.
    """
    tokenizer = train_tokenizer(texts, shape.vocabulary)
    tokenizer.model_max_length = shape.positions
    torch.manual_seed(seed)
    config = MarianConfig(
        vocab_size=len(tokenizer),
        d_model=shape.d_model,
        encoder_layers=shape.encoder_layers,
        decoder_layers=shape.decoder_layers,
        encoder_attention_heads=shape.heads,
        decoder_attention_heads=shape.heads,
        encoder_ffn_dim=shape.ffn,
        decoder_ffn_dim=shape.ffn,
        dropout=shape.dropout,
        activation_function="relu",
        scale_embedding=True,
        init_std=0.02,  # larger, and a post-norm model takes several times longer to begin to attend to the source
        max_position_embeddings=shape.positions,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        decoder_start_token_id=tokenizer.pad_token_id,
        forced_eos_token_id=tokenizer.eos_token_id,
    )
    model = MarianMTModel(config)
    model.generation_config.bad_words_ids = [[tokenizer.pad_token_id]]
    model.generation_config.max_length = None
    model.generation_config.max_new_tokens = shape.positions // 2
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    log.info("%s: %d tokens, %.2f M parameters", out, len(tokenizer), model.num_parameters() / 1e6)
