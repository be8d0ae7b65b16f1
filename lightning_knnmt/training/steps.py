"""Steps with their neighbors, searched once, on which combiners and gates are trained for many epochs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from lightning_knnmt.backbone.keyed_model import KeyedModel
from lightning_knnmt.data.pairs import Pair
from lightning_knnmt.datastore import Datastore
from lightning_knnmt.knn.memory import Memory
from lightning_knnmt.knn.neighbors import Neighbors
from lightning_knnmt.knn.reference import reference_steps
from lightning_knnmt.knn.retrievers.retriever import Retriever
from lightning_knnmt.knn.step import Step

TOP = 8  # the model's largest logits, which are kept of each row


@dataclass(frozen=True)
class SearchedSteps:
    """R rows with what was found for them, in a vocabulary of their own.

    Of the V logits of a row only those are kept that matter: the largest, those of the neighbors' values, and that of
    the reference's token. Values and tokens are numbers of these columns; the normaliser is that of all V.

    Attributes:
        step: Queries (R, D) and the kept logits (R, columns).
        neighbors: Values are columns.
        tokens: The references' tokens, as columns, shape (R,).
    """

    step: Step
    neighbors: Neighbors
    tokens: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: Sequence[int] | Tensor) -> "SearchedSteps":
        """Some of the rows."""
        chosen = torch.as_tensor(rows)
        found = self.neighbors.rows(chosen)
        queries, logits, sentence, normalizer = (part[chosen] for part in step_parts(self.step))
        return SearchedSteps(Step(queries, logits, sentence, normalizer=normalizer), found, self.tokens[chosen])

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "SearchedSteps":
        """The same on another device."""
        queries, logits, sentence, normalizer = (part.to(device) for part in step_parts(self.step))
        step = Step(queries, logits, sentence, normalizer=normalizer)
        return SearchedSteps(step, self.neighbors.to(device), self.tokens.to(device))

    @property
    def plain_log_probs(self) -> Tensor:
        """The model's own log-probability of each token, shape (R,)."""
        return (self.step.logits.gather(1, self.tokens[:, None]) - self.step.log_normalizer).squeeze(1)


def step_parts(step: Step) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, logits, sentences and normaliser."""
    return step.queries, step.logits, step.sentence, step.log_normalizer


def kept_columns(step: Step, neighbors: Neighbors, tokens: Tensor) -> SearchedSteps:
    """The same rows with the few logits that matter."""
    largest = step.logits.topk(min(TOP, step.logits.shape[1]), 1).indices
    columns = torch.cat([largest, neighbors.values, tokens[:, None]], 1)  # [row, column -> token]
    first = (columns[:, :, None] == columns[:, None, :]).int().argmax(2)  # [column -> first with the same token]
    again = first != torch.arange(columns.shape[1], device=columns.device)
    logits = step.logits.gather(1, columns).masked_fill(again, -torch.inf)
    start = largest.shape[1]
    found = replace(neighbors, values=first[:, start:-1])
    kept = Step(step.queries, logits, step.sentence, normalizer=step.log_normalizer)
    return SearchedSteps(kept, found, first[:, -1])


def searched_steps(
    model: KeyedModel,
    memory: Memory,
    retriever: Retriever,
    pairs: Sequence[Pair],
    max_tokens: int,
    first_entries: Sequence[int] | None = None,
) -> SearchedSteps:
    """Teacher-force references and search for each of their tokens, on the CPU.

    Args:
        model: The model.
        memory: What the retriever searches.
        retriever: One that finds neighbors; it is bound here.
        pairs: Sources and references.
        max_tokens: Most tokens of a batch on either side.
        first_entries: For pairs of the memory: the first entry of each, so that no entry finds itself. [pair -> entry]

    Raises:
        ValueError: There are no pairs.
    """
    if not pairs:
        raise ValueError("there are no pairs to learn from, expected one or more")
    own = None if first_entries is None else torch.tensor(first_entries)
    if own is not None and "k" in retriever.option_names:
        retriever = retriever.with_options(k=retriever.options["k"] + 1)
    retriever.bind(model, memory)
    parts = []
    for reference in reference_steps(model, pairs, max_tokens, cut=own is None):
        retriever.begin(reference.batch)
        neighbors = retriever(reference.step)
        if own is not None:
            entries = own.to(reference.pair.device)[reference.pair] + reference.position
            neighbors = without(neighbors, entries)
        parts.append(kept_columns(reference.step, neighbors, reference.tokens).to("cpu"))
    queries, logits, sentence, normalizer = map(torch.cat, zip(*(step_parts(part.step) for part in parts), strict=True))
    step = Step(queries, logits, sentence, normalizer=normalizer)
    found = Neighbors(*map(torch.cat, zip(*(part.neighbors.parts for part in parts), strict=True)))
    weights = [part.neighbors.weights for part in parts if part.neighbors.weights is not None]
    if weights:
        found = replace(found, weights=torch.cat(weights))
    return SearchedSteps(step, found, torch.cat([part.tokens for part in parts]))


def without(neighbors: Neighbors, entries: Tensor) -> Neighbors:
    """The neighbors but for one entry of each row, or for the farthest where that was not found.

    Args:
        neighbors: K of R rows.
        entries: Entry numbers, shape (R,).

    Returns:
        K − 1 neighbors of each row.

    >>> ids = torch.tensor([[4, 9, 2], [4, 9, 2]])
    >>> without(Neighbors(ids.float(), ids, ids), torch.tensor([9, 5])).ids
    tensor([[4, 2],
            [4, 9]])
    """
    dropped = neighbors.ids == entries[:, None]
    order = dropped.int().argsort(dim=1, stable=True)[:, :-1]
    return neighbors.gather(order)


def stored_pairs(datastore: Datastore, size: int, seed: int) -> tuple[list[Pair], list[int]]:
    """A random sample of the stored pairs, and the first entry of each.

    Args:
        datastore: Whose pairs; those that were removed are left out.
        size: How many; all if there are no more.
        seed: Of the sample.
    """
    firsts = np.concatenate(
        [np.empty(0, np.int64), *((shard.first + shard.starts[:-1])[shard.kept] for shard in datastore.shards)]
    )
    drawn = np.random.default_rng(seed).choice(firsts, min(size, len(firsts)), replace=False)
    chosen = sorted(drawn.tolist())
    return [datastore.context(first).pair for first in chosen], chosen
