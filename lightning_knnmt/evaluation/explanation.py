"""Which stored contexts stand behind each produced token."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from lightning_knnmt.backbone.batch import Batch
from lightning_knnmt.backbone.keyed_model import KeyedModel
from lightning_knnmt.data.pairs import StoredContext
from lightning_knnmt.data.sentences import join
from lightning_knnmt.decoding import Decoding, Translator
from lightning_knnmt.decoding.ensemble import EnsembleTranslator
from lightning_knnmt.knn.memory import Memory
from lightning_knnmt.knn.mixture import Mixture
from lightning_knnmt.knn.step import Step
from lightning_knnmt.memory import DatastoreMemory
from lightning_knnmt.timing import Spans

CONTEXT_WIDTH = 60  # characters of a stored target that are shown on either side of the token


@dataclass(frozen=True)
class ExplainedNeighbor:
    """A stored context behind a token.

    Attributes:
        context: The sentence pair and the position in its target.
        marked: The target with the token in brackets, cut to what surrounds it.
        token: The token that followed in that context.
        distance: Distance of its key, squared L2 or a negative similarity as `Neighbors` has it.
        share: Its share of the kNN distribution; the shares of all k neighbors sum to 1.
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

    def times(self, weight: float) -> "ExplainedToken":
        """Probabilities and shares times a model's weight in an ensemble."""
        neighbors = tuple(replace(each, share=weight * each.share) for each in self.neighbors)
        return ExplainedToken(self.token, weight * self.model_probability, weight * self.probability, neighbors)

    def plus(self, other: "ExplainedToken") -> "ExplainedToken":
        """The sum of what two models predict, and the neighbors of both."""
        return ExplainedToken(
            self.token,
            self.model_probability + other.model_probability,
            self.probability + other.probability,
            self.neighbors + other.neighbors,
        )


@dataclass(frozen=True)
class Explanation:
    """A translation, token by token.

    Attributes:
        text: The translation.
        tokens: What it was put together from, the end of the sentence included.
    """

    text: str
    tokens: tuple[ExplainedToken, ...]


def explain(mixture: Mixture, source: str, decoding: Decoding = Decoding(), shown: int = 3) -> Explanation:
    """Translate one text and say what each token rests on.

    Args:
        mixture: A model, its memory, and how neighbors are mixed in.
        source: The source text.
        decoding: Beam size and length.
        shown: Neighbors listed for each token.

    Returns:
        The translation and one entry for each of its tokens.
    """
    return explain_translator(Translator(mixture.model, mixture, decoding), source, shown)


@torch.inference_mode()
def explain_translator(translator: Translator, source: str, shown: int = 3) -> Explanation:
    """Translate one text and say what each token rests on, in an ensemble by the neighbors of every model.

    The produced tokens are teacher-forced once more: the states of that pass are those that decoding saw, so its
    neighbors are too. The text alone would not do, since a tokenizer may cut it otherwise than decoding produced it.

    Args:
        translator: A model, or several, with mixtures.
        source: The source text.
        shown: Neighbors of each model that are listed for each token.

    Returns:
        The translation and one entry for each of its tokens; of several models, probabilities are their means, and
        shares are those of each model's neighbors times its weight.
    """
    sentences = translator.model.split(source)
    explained = [_explain_sentence(translator, sentence.text, shown) for sentence in sentences]
    text = join((each.text for each in explained), sentences)
    return Explanation(text, tuple(token for each in explained for token in each.tokens))


def _explain_sentence(translator: Translator, source: str, shown: int) -> Explanation:
    model = translator.model
    batch = model.batch([source])
    labels = translator.generate(batch, Spans())[:, 1:]  # [1, 1 + T] -> [1, T]
    text = model.tokenizer.decode(labels[0], skip_special_tokens=True)
    if not isinstance(translator, EnsembleTranslator):
        return Explanation(text, _explain_tokens(translator, batch, labels, shown))
    total = sum(translator.weights)
    weighted = [
        [token.times(weight / total) for token in _explain_tokens(member, batch, labels, shown, named=True)]
        for member, weight in zip(translator.members, translator.weights, strict=True)
    ]
    return Explanation(
        text, tuple(reduce(ExplainedToken.plus, of_members) for of_members in zip(*weighted, strict=True))
    )


def _explain_tokens(
    translator: Translator, batch: Batch, labels: Tensor, shown: int, named: bool = False
) -> tuple[ExplainedToken, ...]:
    """Each token of labels of shape (1, T) as one model predicts it; `named`: contexts say of which datastore."""
    model, mixture = translator.model, translator.mixture
    keys, logits = model.keys_and_logits(replace(batch, labels=labels))
    tokens = labels[0]
    pieces = model.tokenizer.convert_ids_to_tokens(tokens.tolist())
    step = Step(
        keys[0],
        logits[0],
        tokens.new_zeros(len(tokens)),
        previous=tokens.roll(1),
        position=torch.arange(len(tokens), device=tokens.device),
    )
    plain = _probabilities(step.logits, tokens)
    if not isinstance(mixture, Mixture):
        return tuple(ExplainedToken(piece, p, p, ()) for piece, p in zip(pieces, plain, strict=True))
    mixture.begin(batch)
    neighbors = mixture.neighbors(step)
    shares = mixture.combiner.weigh(step, neighbors).log_shares.exp()
    mixed = _probabilities(mixture.combiner(step, neighbors), tokens)
    memory = mixture.memory
    store = str(memory.datastore.folder) if isinstance(memory, DatastoreMemory) else model.name
    return tuple(
        ExplainedToken(
            token=piece,
            model_probability=plain[row],
            probability=mixed[row],
            neighbors=tuple(
                _explained(model, memory, int(entry), float(distance), float(share), store if named else "")
                for entry, distance, share in zip(
                    neighbors.ids[row, :shown],
                    neighbors.distances[row, :shown],
                    shares[row, :shown],
                    strict=True,
                )
                if entry >= 0
            ),
        )
        for row, piece in enumerate(pieces)
    )


def _probabilities(logits: Tensor, tokens: Tensor) -> list[float]:
    return logits.float().softmax(-1).gather(1, tokens[:, None]).squeeze(1).tolist()


def _explained(
    model: KeyedModel, memory: Memory, entry: int, distance: float, share: float, store: str
) -> ExplainedNeighbor:
    context = memory.context(entry)
    ids = model.tokenize([context.pair.src], [context.pair.tgt]).tgt[0]
    marked = mark_token(model.tokenizer, ids, context.position, CONTEXT_WIDTH)
    piece = model.tokenizer.convert_ids_to_tokens(ids[context.position])
    return ExplainedNeighbor(replace(context, store=context.store or store), marked, piece, distance, share)


def mark_token(tokenizer: Any, ids: list[int], position: int, width: int | None = None) -> str:
    """A text with one of its tokens in brackets; a token without letters of its own, such as the end, by its name.

    Args:
        tokenizer: The tokenizer.
        ids: The text's tokens.
        position: Which of them to mark, from 0.
        width: Most characters kept on either side of the token, cut between words; None: all.
    """
    before, through, whole = (
        tokenizer.decode(ids[:end], skip_special_tokens=True) for end in (position, position + 1, len(ids))
    )
    name = tokenizer.convert_ids_to_tokens(ids[position])
    if not (through.startswith(before) and whole.startswith(through)):  # a detokenizer at work, or half a character
        after = tokenizer.decode(ids[position + 1 :], skip_special_tokens=True)
        return f"{_end(before.strip(), width)} [{name}] {_beginning(after.strip(), width)}".strip()
    token, after = through[len(before) :], whole[len(through) :]
    before, after = _end(before, width), _beginning(after, width)
    if not token.strip():
        return f"{before} [{name}] {after.lstrip()}".strip()
    gap = token[: len(token) - len(token.lstrip())]
    return f"{before}{gap}[{token.strip()}]{after}"


def _beginning(text: str, width: int | None) -> str:
    return text if width is None or len(text) <= width else f"{text[:width].rpartition(' ')[0]} …"


def _end(text: str, width: int | None) -> str:
    return text if width is None or len(text) <= width else f"… {text[-width:].partition(' ')[2]}"


def explanation_lines(explanation: Explanation) -> Iterator[str]:
    """An explanation as indented text; long sources are cut."""
    for token in explanation.tokens:
        yield f"  {token.token}  p={token.probability:.2f} (model alone {token.model_probability:.2f})"
        for neighbor in token.neighbors:
            source = _beginning(neighbor.context.pair.src, 2 * CONTEXT_WIDTH)
            store = f"  ({neighbor.context.store})" if neighbor.context.store else ""
            yield f"      {neighbor.share:.2f}  d={neighbor.distance:.1f}  {neighbor.marked}  ⇐  {source}{store}"
