"""Online learning: each sentence is translated, then its reference is learned, and the next one comes."""

from collections.abc import Sequence

from lightning_knnmt.data.pairs import Pair
from lightning_knnmt.decoding import Translations, Translator
from lightning_knnmt.knn.pair_memory import PairMemory
from lightning_knnmt.timing import Spans


class OnlineTranslator:
    """A translator whose memory learns the reference of every sentence once it is translated (arXiv 2302.12188).

    As with a person who corrects each translation before the next one: sentences come one by one in their order, and
    the memory knows the references of those before. After the last one it forgets them all.

    Args:
        translator: Translates.
        memory: What its mixture searches.
        pairs: Sentences with their references, in order.
    """

    def __init__(self, translator: Translator, memory: PairMemory, pairs: Sequence[Pair]) -> None:
        self.translator, self.memory, self.pairs = translator, memory, pairs
        self.decoding = translator.decoding

    def translate(self, sources: Sequence[str]) -> Translations:
        """Translate the sentences that it was made with.

        Raises:
            ValueError: They are others.
        """
        if list(sources) != [pair.src for pair in self.pairs]:
            raise ValueError("sources are not those of the pairs, expected the same in the same order")
        known, done = len(self.memory), []
        try:
            for pair in self.pairs:
                done.append(self.translator.translate([pair.src]))
                self.memory.add([pair])
        finally:
            self.memory.keep(known)
        spans = Spans()
        for each in done:
            for name, seconds in each.spans.seconds.items():
                spans.seconds[name] += seconds
                spans.counts[name] += each.spans.counts[name]
        texts = [each.texts[0] for each in done]
        tokens, seconds, cut = (sum(getattr(each, name) for each in done) for name in ("tokens", "seconds", "cut"))
        return Translations(texts, tokens, seconds, spans, cut)
