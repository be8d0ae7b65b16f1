"""Where neighbors come from."""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from lightning_knnmt.knn.component import Component
from lightning_knnmt.knn.neighbors import Neighbors
from lightning_knnmt.knn.step import Step

if TYPE_CHECKING:
    from lightning_knnmt.backbone.batch import Batch


class Retriever(Component, ABC):
    """Finds neighbors of rows.

    A retriever with an option `k` finds the K nearest, of which a smaller k is the first ones.

    Attributes:
        follows: Whether a row goes on from the row before it in its text, so that there is one row a text (no beams).
        followed: Rows of the latest call that needed no search.
    """

    follows: ClassVar[bool] = False
    followed: int = 0

    def begin(self, batch: "Batch") -> None:
        """Prepare for B sentences; the rows of each step say to which of them they belong."""

    @abstractmethod
    def __call__(self, step: Step) -> Neighbors:
        """Neighbors of R rows, on the rows' device."""
