"""The unit of a parallel corpus."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Pair:
    """One source segment and its translation.

    Attributes:
        src: Source text, one segment, no line breaks.
        tgt: Target text, one segment, no line breaks.
        document: Name of the page or file that the pair comes from; splits keep a document together.
            Empty where the corpus has no documents.
    """

    src: str
    tgt: str
    document: str = ""


@dataclass(frozen=True)
class StoredContext:
    """Where an entry comes from.

    Attributes:
        pair: The sentence pair.
        number: The pair's number in the corpus; the numbers of a corpus that was appended follow.
        position: Which of the target's tokens the entry predicts, from 0.
        store: Name of the datastore, where several are searched as one; empty otherwise.
    """

    pair: Pair
    number: int
    position: int
    store: str = ""
