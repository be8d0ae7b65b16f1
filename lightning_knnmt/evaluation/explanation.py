"""Which stored contexts stand behind each produced token."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from lightning_knnmt.backbone.keyed_model import KeyedModel
from lightning_knnmt.data.pairs import StoredContext
from lightning_knnmt.data.sentences import join
from lightning_knnmt.decoding import Decoding, Translator
from lightning_knnmt.knn.memory import Memory
from lightning_knnmt.knn.mixture import Mixture
from lightning_knnmt.knn.step import Step
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


@dataclass(frozen=True)
class Explanation:
    """A translation, token by token.

    Attributes:
        text: The translation.
        tokens: What it was put together from, the end of the sentence included.
    """

    text: str
    tokens: tuple[ExplainedToken, ...]


@torch.inference_mode()
def explain(mixture: Mixture, source: str, decoding: Decoding = Decoding(), shown: int = 3) -> Explanation:
    """Translate one text and say what each token rests on.

    The produced tokens are teacher-forced once more: the states of that pass are those that decoding saw, so its
    neighbors are too. The text alone would not do, since a tokenizer may cut it otherwise than decoding produced it.

    Args:
        mixture: A model, its memory, and how neighbors are mixed in.
        source: The source text.
        decoding: Beam size and length.
        shown: Neighbors listed for each token.

    Returns:
        The translation and one entry for each of its tokens.
    """
    sentences = mixture.model.split(source)
    explained = [_explain_sentence(mixture, sentence.text, decoding, shown) for sentence in sentences]
    text = join((each.text for each in explained), sentences)
    return Explanation(text, tuple(token for each in explained for token in each.tokens))


def _explain_sentence(mixture: Mixture, source: str, decoding: Decoding, shown: int) -> Explanation:
    model = mixture.model
    batch = model.batch([source])
    labels = Translator(model, mixture, decoding).generate(batch, Spans())[:, 1:]  # [1, 1 + T] -> [1, T]
    keys, logits = model.keys_and_logits(replace(batch, labels=labels))
    tokens = labels[0]
    step = Step(keys[0], logits[0], tokens.new_zeros(len(tokens)))
    mixture.begin(batch)
    neighbors = mixture.neighbors(step)
    shares = mixture.combiner.weigh(step, neighbors).log_shares.exp()
    model_probabilities, probabilities = (
        each.float().softmax(-1).gather(1, tokens[:, None]).squeeze(1)
        for each in (step.logits, mixture.combiner(step, neighbors))
    )
    return Explanation(
        text=model.tokenizer.decode(tokens, skip_special_tokens=True),
        tokens=tuple(
            ExplainedToken(
                token=piece,
                model_probability=float(model_probabilities[row]),
                probability=float(probabilities[row]),
                neighbors=tuple(
                    _explained(model, mixture.memory, int(entry), float(distance), float(share))
                    for entry, distance, share in zip(
                        neighbors.ids[row, :shown],
                        neighbors.distances[row, :shown],
                        shares[row, :shown],
                        strict=True,
                    )
                    if entry >= 0
                ),
            )
            for row, piece in enumerate(model.tokenizer.convert_ids_to_tokens(tokens.tolist()))
        ),
    )


def _explained(model: KeyedModel, memory: Memory, entry: int, distance: float, share: float) -> ExplainedNeighbor:
    context = memory.context(entry)
    ids = model.tokenize([context.pair.src], [context.pair.tgt]).tgt[0]
    marked = mark_token(model.tokenizer, ids, context.position, CONTEXT_WIDTH)
    piece = model.tokenizer.convert_ids_to_tokens(ids[context.position])
    return ExplainedNeighbor(context, marked, piece, distance, share)


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
