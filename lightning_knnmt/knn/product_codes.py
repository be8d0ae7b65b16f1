"""Asymmetric distance computation: queries as they are against product-quantization codes (arXiv 2305.16021)."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_knnmt.metric import Metric


@dataclass(frozen=True)
class ProductCodes:
    """Codes of N entries, W bytes each: of M pieces of S dimensions, each byte one codeword of 256 or two of 16.

    Attributes:
        codes: Shape (N, W), uint8.
        codebooks: Shape (M, L, S).
        norms: Squared norms of the decoded keys, shape (N,).
        lists: The centroid that each code is the residual to, shape (N,); None: keys are coded as they are.
        centroids: Shape (nlist, M · S); None as before.
        matrix: A of the transform A q + b, shape (M · S, D); None: the identity.
        offset: b, shape (M · S,); None: 0.
    """

    codes: Tensor
    codebooks: Tensor
    norms: Tensor
    lists: Tensor | None = None
    centroids: Tensor | None = None
    matrix: Tensor | None = None
    offset: Tensor | None = None

    def take(self, entries: Tensor, device: torch.device | str = "cpu") -> "CodedEntries":
        """Some entries, ready to be compared with queries on a device.

        Args:
            entries: Their numbers, shape (n,).
            device: Where.
        """
        places = self.codes[entries].to(device).int()
        places += 256 * torch.arange(places.shape[1], dtype=torch.int32, device=places.device)
        centroids = None
        if self.lists is not None and self.centroids is not None:
            numbers, of_entries = self.lists[entries].unique(return_inverse=True)
            centroids = self.centroids[numbers].to(device)
            last = 256 * places.shape[1] + of_entries.int().to(device)
            places = torch.cat([places, last[:, None]], 1)
        return CodedEntries(places, self.norms[entries].to(device), centroids)

    def transformed(self, queries: Tensor) -> Tensor:
        """Queries of shape (R, D) as codes see them, shape (R, M · S), float32."""
        queries = queries.detach().float()
        if self.matrix is not None:
            queries = queries @ self.matrix.T
        return queries if self.offset is None else queries + self.offset

    def tables(self, queries: Tensor) -> Tensor:
        """What each byte of a code adds to the product of its key and each query: the tables A of the paper.

        Args:
            queries: Transformed, shape (R, M' · S) with M' = M, or M − 1 where a piece of zeros was added.

        Returns:
            Shape (W · 256, R).
        """
        pieces, codewords, size = self.codebooks.shape
        queries = F.pad(queries, (0, pieces * size - queries.shape[1]))
        asked = queries.view(-1, pieces, size).transpose(0, 1)  # [M, R, S]
        products = torch.bmm(asked, self.codebooks.transpose(1, 2))  # [M, R, L]
        if codewords == 16:
            low, high = products[0::2, :, None], products[1::2, :, :, None]  # [W, R, 1, 16], [W, R, 16, 1]
            products = (low + high).flatten(2)  # [W, R, 256]
        return products.transpose(1, 2).flatten(0, 1)

    def to(self, device: torch.device | str) -> "ProductCodes":
        """The same with all that queries meet on a device; the codes themselves stay where they are."""
        moved = (None if part is None else part.to(device) for part in (self.codebooks, self.matrix, self.offset))
        codebooks, matrix, offset = moved
        assert codebooks is not None
        return ProductCodes(self.codes, codebooks, self.norms, self.lists, self.centroids, matrix, offset)


@dataclass(frozen=True)
class CodedEntries:
    """Entries of one sentence's subset.

    Attributes:
        places: Rows of the tables that each entry adds up, shape (n, W), or (n, W + 1) with its centroid's behind them.
        norms: Squared norms of the decoded keys, shape (n,).
        centroids: Those that the entries are residuals to, shape (U, M · S).
    """

    places: Tensor
    norms: Tensor
    centroids: Tensor | None

    def distances(self, queries: Tensor, tables: Tensor, metric: Metric = "l2") -> Tensor:
        """Squared distances ‖q‖² + ‖k‖² − 2 q · k, where q · k is a sum of W numbers from the tables.

        For other metrics than `l2`, −q · k.

        Args:
            queries: Transformed, shape (R, M · S).
            tables: Theirs, shape (W · 256, R).
            metric: By what entries are near.

        Returns:
            Shape (R, n).
        """
        if self.centroids is not None:
            tables = torch.cat([tables, self.centroids @ queries.T])
        products = F.embedding_bag(self.places, tables, mode="sum")  # [n, R]
        if metric != "l2":
            return -products.T
        distances = self.norms[:, None] - 2 * products
        return (distances.T + queries.square().sum(1, keepdim=True)).clamp(min=0)

    def __len__(self) -> int:
        return len(self.places)
