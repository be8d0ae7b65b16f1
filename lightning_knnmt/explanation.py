"""Which stored contexts stand behind each produced token."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from lightning_knnmt.combiners import FixedCombiner
from lightning_knnmt.datastore import StoredContext
from lightning_knnmt.functional.knn import knn_log_weights
from lightning_knnmt.search import KnnSearch, KnnSettings


@dataclass(frozen=True)
class ExplainedNeighbor:
    """A stored context behind a token.

    Attributes:
        context: The sentence pair and the position in its target.
        marked: The target with the token in brackets.
        token: The token that followed in that context.
        distance: Squared L2 distance of its key.
        share: Its share of the kNN distribution.
    """

    context: StoredContext
    marked: str
    token: str
    distance: float
    share: float


@dataclass(frozen=True)
class ExplainedToken:
    """A produced token, and the contexts nearest to the state that predicted it.

    Attributes:
        token: The token.
        model_probability: The plain model's probability of it.
        probability: That of the mixture.
        neighbors: Nearest first.
    """

    token: str
    model_probability: float
    probability: float
    neighbors: tuple[ExplainedNeighbor, ...]


@torch.inference_mode()
def explain(
    search: KnnSearch, settings: KnnSettings, source: str, translation: str, shown: int = 3
) -> list[ExplainedToken]:
    """Explain a translation, token by token.

    The states of a teacher-forced pass over the translation are those that decoding saw, so its neighbors are too.

    Args:
        search: Model and datastore.
        settings: k, λ, T and nprobe that the translation was made with.
        source: The source text.
        translation: Its translation.
        shown: Neighbors listed for each token.

    Returns:
        One entry for each token of the translation, the end of the sentence included.
    """
    backbone = search.backbone
    batch = backbone.batch([source], [translation])
    assert batch.labels is not None
    keys, logits = backbone.keys_and_logits(batch)
    tokens = batch.labels[0]
    neighbors = search.retriever(settings.k, settings.nprobe).retrieve(keys[0])
    shares = knn_log_weights(neighbors.distances, settings.temperature).exp()
    mixed = FixedCombiner(settings.lambda_, settings.temperature)(logits[0], neighbors)
    plain_probabilities = logits[0].float().softmax(-1).gather(1, tokens[:, None]).squeeze(1).tolist()
    probabilities = mixed.float().softmax(-1).gather(1, tokens[:, None]).squeeze(1).tolist()
    pieces = backbone.tokenizer.convert_ids_to_tokens(tokens.tolist())
    return [
        ExplainedToken(
            token=piece,
            model_probability=plain_probabilities[step],
            probability=probabilities[step],
            neighbors=tuple(
                _explained(search, int(entry), float(distance), float(share))
                for entry, distance, share in zip(
                    neighbors.ids[step, :shown], neighbors.distances[step, :shown], shares[step, :shown], strict=True
                )
                if entry >= 0
            ),
        )
        for step, piece in enumerate(pieces)
    ]


def _explained(search: KnnSearch, entry: int, distance: float, share: float) -> ExplainedNeighbor:
    context = search.datastore.context(entry)
    tokenizer = search.backbone.tokenizer
    ids = search.backbone.tokenize([context.pair.src], [context.pair.tgt])[1][0]
    before, token, after = ids[: context.position], ids[context.position], ids[context.position + 1 :]
    left, right = (tokenizer.decode(part, skip_special_tokens=True).strip() for part in (before, after))
    piece = tokenizer.convert_ids_to_tokens(token)
    return ExplainedNeighbor(context, f"{left} [{piece}] {right}".strip(), piece, distance, share)


def explanation_lines(tokens: Sequence[ExplainedToken]) -> Iterator[str]:
    """An explanation as indented text."""
    for token in tokens:
        yield f"  {token.token}  p={token.probability:.2f} (model alone {token.model_probability:.2f})"
        for neighbor in token.neighbors:
            yield (
                f"      {neighbor.share:.2f}  d={neighbor.distance:.1f}  {neighbor.marked}"
                f"  ⇐  {neighbor.context.pair.src}"
            )
