"""Trained combiners against loops in numpy, against the combiners that they must equal, and from their folders."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_knn import ROWS, VOCABULARY, knn_by_hand, make_neighbors, softmax, step_of
from tiny_models import ENGLISH, GERMAN
from torch import Tensor

from lightning_knnmt.backbone.config import load_model
from lightning_knnmt.backbone.keyed_model import KeyedModel
from lightning_knnmt.building.memory import build_memory
from lightning_knnmt.data.pairs import Pair
from lightning_knnmt.knn.combiners.adaptive import AdaptiveCombiner
from lightning_knnmt.knn.combiners.combiner import Combiner
from lightning_knnmt.knn.combiners.fixed import FixedCombiner
from lightning_knnmt.knn.combiners.kernel import KernelCombiner
from lightning_knnmt.knn.combiners.robust import LEAST, RobustCombiner
from lightning_knnmt.knn.features import distinct_counts
from lightning_knnmt.knn.memory import RamMemory
from lightning_knnmt.knn.mixture import Mixture
from lightning_knnmt.knn.neighbors import Neighbors, no_neighbors
from lightning_knnmt.knn.retrievers.whole_store import WholeStore
from lightning_knnmt.knn.step import Step
from lightning_knnmt.knn.trained import TrainedPart

K, D, T = 8, 6, 10.0


def logits_of(seed: int) -> Tensor:
    return 4 * torch.randn(ROWS, VOCABULARY, generator=torch.Generator().manual_seed(seed))


class Projection:
    """What a combiner asks of a model: logits of keys."""

    name, vocabulary_size, dtype, device = "by hand", VOCABULARY, "float32", torch.device("cpu")

    def __init__(self, key_type: str = "decoder_output") -> None:
        self.config = type("Config", (), {"key_type": key_type})()
        self.weight = torch.randn(VOCABULARY, D, generator=torch.Generator().manual_seed(1))

    def project(self, states: Tensor) -> Tensor:
        return states @ self.weight.T


def memory_of(seed: int = 0, entries: int = 1000) -> RamMemory:
    rng = np.random.default_rng(seed)
    keys = torch.from_numpy(rng.normal(size=(entries, D)).astype(np.float32))
    values = torch.from_numpy(rng.integers(0, VOCABULARY, entries))
    return RamMemory(keys, values, [Pair("a", "b")], [entries])


def bound(combiner: Combiner, memory: RamMemory | None = None) -> Any:
    combiner.bind(Projection(), memory or memory_of())  # type: ignore[arg-type]
    return combiner


def randomised(combiner: Combiner, seed: int = 0) -> Any:
    """Parameters as after a training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in combiner.parameters():
            parameter.copy_(0.7 * torch.randn(parameter.shape, generator=generator))
    return combiner


def query_step(logits: Tensor, seed: int = 3) -> Step:
    queries = torch.randn(len(logits), D, generator=torch.Generator().manual_seed(seed))
    return Step(queries, logits, torch.arange(len(logits)))


def network(layers: Any, features: np.ndarray, activation: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Two layers by hand."""
    first, first_bias, last, last_bias = (parameter.detach().double().numpy() for parameter in layers.parameters())
    return activation(features @ first.T + first_bias) @ last.T + last_bias


def mixed_by_hand(logits: Tensor, neighbors: Neighbors, shares: np.ndarray, lambdas: np.ndarray) -> np.ndarray:
    knn = np.zeros((ROWS, VOCABULARY))
    for row in range(ROWS):
        for place, share in enumerate(shares[row]):
            knn[row, int(neighbors.values[row, place])] += share
    model = softmax(logits.double().numpy())
    found = knn.sum(1, keepdims=True) > 0
    return np.where(found, lambdas[:, None] * knn + (1 - lambdas[:, None]) * model, model)


def test_distinct_counts_are_those_of_sets() -> None:
    neighbors = make_neighbors(2)
    for row in range(ROWS):
        for place in range(neighbors.ids.shape[1]):
            near = [p for p in range(place + 1) if neighbors.ids[row, p] >= 0]
            found = {int(neighbors.values[row, p]) for p in near}
            assert distinct_counts(neighbors)[row, place] == len(found)


# ---- adaptive


@pytest.mark.parametrize("searched", [5, K, 12])
def test_adaptive_is_the_mean_of_every_k_by_the_networks_weights(searched: int) -> None:
    neighbors, logits = make_neighbors(1, k=searched), logits_of(1)
    combiner = randomised(AdaptiveCombiner(K, T))
    combiner.set_scale(torch.empty(0, 1), neighbors.distances)
    distances = np.full((ROWS, K), np.inf)
    counts = np.zeros((ROWS, K))
    for row in range(ROWS):
        for place in range(K):
            near = [p for p in range(min(place + 1, searched)) if neighbors.ids[row, p] >= 0]
            counts[row, place] = len({int(neighbors.values[row, p]) for p in near})
        distances[row, : min(searched, K)] = neighbors.distances[row, :K].double()
    scaled = np.minimum(distances / float(combiner.scale), 10.0)
    weights = softmax(network(combiner.network, np.concatenate([scaled, counts / K], 1), np.tanh))
    model = softmax(logits.double().numpy())
    expected = weights[:, :1] * model
    for number, k in enumerate((1, 2, 4, 8), start=1):
        expected = expected + weights[:, number : number + 1] * knn_by_hand(neighbors.first(k), T)
    nothing = (neighbors.ids < 0).all(1).numpy()
    expected[nothing] = model[nothing]
    found = combiner(step_of(logits), neighbors).double().softmax(1).detach().numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("choice", "k"), list(enumerate((0, 1, 2, 4, 6))))
def test_adaptive_that_always_picks_one_k_is_the_fixed_combiner_of_that_k(choice: int, k: int) -> None:
    neighbors, logits = make_neighbors(4), logits_of(4)
    combiner = AdaptiveCombiner(6, T)
    assert combiner.choices == (0, 1, 2, 4, 6)
    with torch.no_grad():
        combiner.network[2].bias[choice] += 200.0
        mixed = combiner(step_of(logits), neighbors).double().softmax(1)
        fixed = FixedCombiner(1.0, T)(step_of(logits), neighbors.first(k)) if k else logits
    torch.testing.assert_close(mixed, fixed.double().softmax(1), rtol=1e-4, atol=1e-7)


# ---- kernel-smoothed


@pytest.mark.parametrize(("temperature", "lambda_"), [(3.0, 0.5), (25.0, 0.8)])
def test_kernel_of_constant_bandwidth_and_share_is_the_fixed_combiner(temperature: float, lambda_: float) -> None:
    neighbors, logits = make_neighbors(5), logits_of(5)
    combiner = bound(KernelCombiner(temperature=temperature, k=12))
    with torch.no_grad():
        combiner.share[2].bias.fill_(math.log(lambda_ / (1 - lambda_)))
        mixed = combiner(query_step(logits), neighbors)
    fixed = FixedCombiner(lambda_, temperature)(step_of(logits), neighbors)
    torch.testing.assert_close(mixed.softmax(1), fixed.softmax(1), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kernel", ["gauss", "laplace"])
@pytest.mark.parametrize("k", [5, 12])
def test_kernel_is_a_loop_over_queries_and_keys(kernel: Any, k: int) -> None:
    neighbors, logits, memory = make_neighbors(6), logits_of(6), memory_of(6)
    combiner = randomised(bound(KernelCombiner(kernel=kernel, k=k), memory))
    combiner.scale.fill_(4.0 * D)
    step = query_step(logits)
    shares, lambdas = np.zeros((ROWS, k)), np.zeros(ROWS)
    for row in range(ROWS):
        query = step.queries[row].double().numpy() / 2.0
        near = [place for place in range(k) if neighbors.ids[row, place] >= 0]
        keys = {place: memory.keys[neighbors.ids[row, place]].double().numpy() for place in near}
        if not near:
            continue
        mean = sum(keys.values()) / len(near) / 2.0
        weight, bias = (p.detach().double().numpy() for p in (combiner.bandwidth.weight[0], combiner.bandwidth.bias))
        bandwidth = math.exp(float(weight @ np.concatenate([query, mean]) + bias[0]))
        distances = np.array([float(neighbors.distances[row, place]) for place in near])
        scores = np.exp(-(distances if kernel == "gauss" else np.sqrt(distances)) / bandwidth)
        shares[row, near] = scores / scores.sum()
        weighted = sum(shares[row, place] * keys[place] for place in near) / 2.0
        hidden = network(combiner.share, np.concatenate([query, weighted])[None], lambda x: np.maximum(x, 0))
        lambdas[row] = 1 / (1 + math.exp(-float(hidden[0, 0])))
    expected = mixed_by_hand(logits, neighbors, shares, lambdas)
    found = combiner(step, neighbors).double().softmax(1).detach().numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-6)


# ---- robust


def test_untrained_robust_is_the_fixed_combiner() -> None:
    neighbors, logits = make_neighbors(7), logits_of(7)
    mixed = bound(RobustCombiner(12, T))(query_step(logits), neighbors)
    torch.testing.assert_close(mixed.softmax(1), FixedCombiner(0.5, T)(step_of(logits), neighbors).softmax(1))


def test_robust_is_a_loop_over_neighbors() -> None:
    neighbors, logits, memory = make_neighbors(8), logits_of(8), memory_of(8)
    combiner = randomised(bound(RobustCombiner(K, T), memory), 4)
    combiner.scale.fill_(20.0)
    model = Projection()
    shares, lambdas = np.zeros((ROWS, K)), np.zeros(ROWS)
    plain = logits.double().log_softmax(1)
    for row in range(ROWS):
        near = [place for place in range(K) if neighbors.ids[row, place] >= 0]
        counts = [len({int(neighbors.values[row, p]) for p in near if p <= place}) / K for place in range(K)]
        distances = neighbors.distances[row, :K].double().numpy()
        seen = np.concatenate([np.minimum(distances / 20.0, 10.0), counts])
        warmth = T * math.exp(float(network(combiner.warmth, seen[None], np.tanh)[0, 0]))
        top = np.maximum(plain[row].topk(8).values.numpy(), LEAST)
        score = float(network(combiner.share, np.concatenate([seen, top])[None], np.tanh)[0, 0])
        lambdas[row] = 1 / (1 + math.exp(-score))
        scores = []
        for place in near:
            entry, value = int(neighbors.ids[row, place]), int(neighbors.values[row, place])
            then = float(model.project(memory.keys[entry]).log_softmax(0)[int(memory.values[entry])])
            pair = np.maximum([float(plain[row, value]), then], LEAST)
            scores.append(float(network(combiner.confidence, pair[None], np.tanh)[0, 0]) - distances[place] / warmth)
        if near:
            shares[row, near] = softmax(np.array([scores]))[0]
    expected = mixed_by_hand(logits, neighbors, shares, lambdas)
    found = combiner(query_step(logits), neighbors).double().softmax(1).detach().numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-6)


def test_robust_refuses_keys_that_are_no_decoder_outputs() -> None:
    with pytest.raises(ValueError, match="key_type is 'ffn_input', expected 'decoder_output' for a RobustCombiner"):
        RobustCombiner().bind(Projection("ffn_input"), memory_of())  # type: ignore[arg-type]


def test_disturbances_fade_out_and_keep_distances_in_order() -> None:
    torch.manual_seed(0)
    logits = torch.cat([logits_of(seed) for seed in range(20)])
    parts = zip(*(make_neighbors(seed).parts for seed in range(20)), strict=True)
    neighbors = Neighbors(*(torch.cat(part) for part in parts)).first(K)
    tokens = torch.full((len(logits),), 17)  # which no neighbor has
    combiner = bound(RobustCombiner(K, disturbed=1.0))
    step = query_step(logits)
    last = combiner.training_neighbors(step, neighbors, tokens, 1.0)
    assert last.ids.equal(neighbors.ids) and last.distances.equal(neighbors.distances)
    shares = []
    for progress in (0.0, 0.5):
        found = combiner.training_neighbors(step, neighbors, tokens, progress)
        assert (found.distances[:, 1:] >= found.distances[:, :-1]).all()
        helped = (found.values == 17).any(1)
        assert (found.ids[helped, 0] == -1).all() and found.distances[helped, 0].isfinite().all()
        shares.append(float(helped.float().mean()))
    assert 0.35 < shares[0] < 0.65 and 0.1 < shares[1] < 0.4


# ---- all of them

COMBINERS: list[Callable[[], TrainedPart]] = [
    lambda: AdaptiveCombiner(K, T),
    lambda: KernelCombiner(k=K),
    lambda: KernelCombiner(kernel="laplace", k=K),
    lambda: RobustCombiner(K, T),
]


@pytest.mark.parametrize("make", COMBINERS)
def test_log_probs_of_tokens_are_those_of_the_mixed_logits_and_gradients_flow(make: Callable[[], Combiner]) -> None:
    neighbors, logits = make_neighbors(9), logits_of(9)
    combiner = randomised(bound(make()), 2)
    step = query_step(logits)
    expected = combiner(step, neighbors).double().log_softmax(1)
    tokens = torch.tensor([5, 0, 11, 30, 3, VOCABULARY - 1, 5, 1, 5])
    found = combiner.token_log_probs(step, neighbors, tokens)
    torch.testing.assert_close(found.double(), expected.gather(1, tokens[:, None])[:, 0], rtol=1e-3, atol=1e-4)
    found.sum().backward()
    for name, parameter in combiner.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name
    nothing = combiner(step, no_neighbors(ROWS, 3))
    torch.testing.assert_close(nothing, logits)


@pytest.mark.parametrize("make", COMBINERS)
def test_a_neighbor_of_weight_2_counts_as_two(make: Callable[[], Combiner]) -> None:
    """But for what networks see of it: they are the same for all rows here."""
    combiner = bound(make())
    if isinstance(combiner, AdaptiveCombiner):
        with torch.no_grad():
            combiner.network[2].weight.zero_()
            combiner.network[2].bias[-1] += 200.0  # all K of them
    neighbors, logits = make_neighbors(11, k=4), logits_of(11)
    weights = torch.tensor([2, 1, 1, 2]).expand(ROWS, 4)
    twice = neighbors.gather(torch.tensor([[0, 0, 1, 2, 3, 3]]).expand(ROWS, 6))
    weighted = Neighbors(*neighbors.parts, weights=weights)
    step = query_step(logits)
    torch.testing.assert_close(combiner(step, weighted).softmax(1), combiner(step, twice).softmax(1))
    assert not combiner(step, weighted).allclose(combiner(step, neighbors))


@pytest.fixture(scope="module")
def marian(marian_folder: Path) -> KeyedModel:
    return load_model(str(marian_folder), device="cpu")


@pytest.fixture(scope="module")
def memory(marian: KeyedModel) -> RamMemory:
    return build_memory(marian, GERMAN, ENGLISH)


@pytest.mark.parametrize("make", COMBINERS)
def test_a_saved_combiner_gives_the_same_logits_and_fits_nothing_else(
    make: Callable[[], TrainedPart], marian: KeyedModel, memory: RamMemory, backbone: KeyedModel, tmp_path: Path
) -> None:
    combiner = make()
    combiner.bind(marian, memory)
    randomised(combiner, 6)  # type: ignore[arg-type]
    combiner.scale.fill_(3.0)
    folder = tmp_path / "combiner"
    combiner.save(folder, marian, memory)
    loaded: Any = type(combiner)(folder=folder)
    assert set(loaded.options) == {"folder", "any_store"}
    assert loaded.configuration["init_args"]["folder"] == str(folder)
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(7, marian.key_size, generator=generator)
    step = Step(queries, torch.randn(7, marian.vocabulary_size, generator=generator), torch.arange(7))
    logits = [
        Mixture(marian, memory, WholeStore(k=10), each)(step)  # type: ignore[arg-type]
        for each in (combiner, loaded, loaded.with_options())
    ]
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-3, atol=1e-3)  # log-probabilities are kept in 2 bytes
    assert logits[2].equal(logits[1])
    assert not logits[0].allclose(step.logits)
    fresh = type(combiner)(folder=folder)
    with pytest.raises(ValueError, match=r"does not fit the model .*: model .* against .*trained for, against given"):
        fresh.bind(backbone, memory)
    other = build_memory(marian, GERMAN[:2], ENGLISH[:2])
    with pytest.raises(ValueError, match=r"was trained for another datastore .* any_store: true"):
        type(combiner)(folder=folder).bind(marian, other)
    type(combiner)(folder=folder, any_store=True).bind(marian, other)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match=r"hidden is 5, but the .* was trained with 32; leave it out"):
        type(combiner)(hidden=5, folder=folder)  # type: ignore[call-arg]


def test_a_damaged_or_missing_folder_is_named(marian: KeyedModel, memory: RamMemory, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"folder is .*nowhere, which holds no trained.json"):
        AdaptiveCombiner(folder=tmp_path / "nowhere")
    combiner = AdaptiveCombiner(K, T)
    combiner.save(tmp_path, marian, memory)
    with pytest.raises(ValueError, match=r"which holds a .*AdaptiveCombiner, expected a .*RobustCombiner"):
        RobustCombiner(folder=tmp_path)
    weights, description = tmp_path / "trained.safetensors", tmp_path / "trained.json"
    content = weights.read_bytes()
    weights.write_bytes(content[:-4] + b"0000")
    with pytest.raises(ValueError, match=r"trained.safetensors is missing or damaged"):
        AdaptiveCombiner(folder=tmp_path)
    weights.write_bytes(content)
    AdaptiveCombiner(folder=tmp_path)
    description.write_text(description.read_text().replace('"hidden": 32', '"hidden": 33'))
    with pytest.raises(ValueError, match=r"trained.json is damaged \(its checksum does not fit its content\)"):
        AdaptiveCombiner(folder=tmp_path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AdaptiveCombiner(k=0), "k is 0, expected 1 or more"),
        (lambda: AdaptiveCombiner(temperature=0.0), "temperature is 0.0, expected more than 0"),
        (lambda: KernelCombiner(kernel="box"), "kernel is 'box', expected one of gauss, laplace"),  # type: ignore[arg-type]
        (lambda: KernelCombiner(hidden=0), "hidden is 0, expected 1 or more"),
        (lambda: RobustCombiner(disturbed=1.5), "disturbed is 1.5, expected 0 to 1"),
        (lambda: RobustCombiner(noise=-1.0), "noise is -1.0, expected 0 or more"),
    ],
)
def test_options_out_of_range_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
