"""Translation by several processes, each with a share of the sentences and a part of the index."""

from collections.abc import Sequence

from lightning_knnmt.backbone.keyed_model import KeyedModel
from lightning_knnmt.checks import check_texts
from lightning_knnmt.decoding.translator import Decoding, Translations, Translator
from lightning_knnmt.index.distributed import DistributedIndex
from lightning_knnmt.knn.mixture import Mixture, PlainModel
from lightning_knnmt.memory import DatastoreMemory
from lightning_knnmt.storage.ranks import Ranks
from lightning_knnmt.timing import Spans


class SharedTranslator(Translator):
    """A translator whose sentences are shared out; every process gets all translations. Alone, it is a `Translator`.

    Args:
        model: The model.
        mixture: What is mixed into its prediction.
        decoding: Beam size, batch size and length.
        ranks: This process's place among those that call `translate` with the same sentences.
        memory: What the mixture searches, together with the other processes; None: the plain model.
    """

    def __init__(
        self,
        model: KeyedModel,
        mixture: Mixture | PlainModel,
        decoding: Decoding,
        ranks: Ranks,
        memory: DatastoreMemory | None = None,
    ) -> None:
        super().__init__(model, mixture, decoding)
        self.ranks, self.memory = ranks, memory

    def translate(self, sources: Sequence[str]) -> Translations:
        """Translate texts, batched by length within each process's share."""
        check_texts(sources=sources)
        if self.ranks.size == 1:
            return super().translate(sources)
        own = super().translate(list(sources)[self.ranks.rank :: self.ranks.size])
        if self.memory is not None and isinstance(self.memory.index, DistributedIndex):
            self.memory.index.finish()  # the others may still have queries
        shares = self.ranks.each(lambda: own)
        texts = [""] * len(sources)
        for rank, share in enumerate(shares):
            texts[rank :: self.ranks.size] = share.texts
        seconds = max(share.seconds for share in shares)
        spans = Spans()
        for name in {name for share in shares for name in share.spans.seconds}:
            spans.seconds[name] = max(share.spans.seconds[name] for share in shares)
            spans.counts[name] = sum(share.spans.counts[name] for share in shares)
        return Translations(
            texts, sum(share.tokens for share in shares), seconds, spans, sum(share.cut for share in shares)
        )
