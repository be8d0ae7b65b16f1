"""Teacher-forced passes over references: the steps that tuning compares settings by, and combiners are trained on."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_knnmt.backbone.batch import Batch, collate
from lightning_knnmt.data.batching import token_budget_batches
from lightning_knnmt.data.pairs import Pair
from lightning_knnmt.knn.step import Step

if TYPE_CHECKING:
    from lightning_knnmt.backbone.keyed_model import KeyedModel


@dataclass(frozen=True)
class ReferenceStep:
    """A teacher-forced batch of references.

    Attributes:
        batch: Its sentences.
        step: Its R reference tokens' states and logits; a first token that decoding forces is left out.
        tokens: The references' tokens, shape (R,).
        pair: The pair of each row, shape (R,).  # [row -> number of the pair]
        position: Which of the target's tokens a row predicts, from 0, shape (R,).
    """

    batch: Batch
    step: Step
    tokens: Tensor
    pair: Tensor
    position: Tensor


@torch.inference_mode()
def reference_steps(
    model: "KeyedModel", pairs: Sequence[Pair], max_tokens: int, cut: bool = True
) -> Iterator[ReferenceStep]:
    """Teacher-forced passes over the references of some pairs, one batch at a time.

    Args:
        model: The model.
        pairs: Sources and references.
        max_tokens: Most tokens of a batch on either side, padding counted.
        cut: Whether pairs are cut into sentences where the model asks for it; those of a datastore are already.
    """
    pairs = list(model.split_pairs(pairs)) if cut else pairs
    ids = model.tokenize([pair.src for pair in pairs], [pair.tgt for pair in pairs])
    lengths = [max(len(src), len(tgt)) for src, tgt in zip(ids.src, ids.tgt, strict=True)]
    for numbers in token_budget_batches(lengths, max_tokens):
        texts = [pairs[n].src for n in numbers]
        batch = collate([ids.src[n] for n in numbers], [ids.tgt[n] for n in numbers], model.pad_id, texts=texts)
        batch = batch.to(model.device)
        keys, logits = model.keys_and_logits(batch)
        mask = batch.target_mask
        if model.forced_id is not None:
            mask[:, 0] = False
        sentence, position = mask.nonzero().T  # [row -> sentence], [row -> position]
        previous = batch.target_labels.roll(1, 1)[mask]
        step = Step(keys[mask].float(), logits[mask].float(), sentence, previous=previous, position=position)
        pair = torch.tensor(numbers, device=sentence.device)[sentence]
        yield ReferenceStep(batch, step, batch.target_labels[mask], pair, position)
