import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from lightning_knnmt import dispersion as modules
from lightning_knnmt.dispersion import functional as F

Loss = Callable[..., Tensor]

SLICED: dict[str, Loss] = {
    "sliced": F.sliced_dispersion,
    "sliced, 5 circles": lambda x, **k: F.sliced_dispersion(x, circles=5, **k),
    "axis-aligned, 5 circles": lambda x, **k: F.axis_aligned_sliced_dispersion(x, circles=5, **k),
}
ENERGIES: dict[str, Loss] = {
    **{f"energy, s={s}": lambda x, s=s, **k: F.minimum_hyperspherical_energy(x, s, **k) for s in (0.0, 1.0, 2.5)},
    **{
        f"{kernel}, {metric}": lambda x, a=kernel, b=metric, **k: F.mmd_dispersion(x, a, b, bandwidth=0.7, s=1.5, **k)
        for kernel in ("gaussian", "laplace", "riesz")
        for metric in ("chordal", "geodesic")
    },
}
NEAREST: dict[str, Loss] = {"koleo": F.koleo, "mma": F.mma, "mmcs": F.mmcs}
PAIRWISE = {**ENERGIES, **NEAREST}
OTHERS: dict[str, Loss] = {
    "lloyd": lambda x, **k: F.lloyd(x, samples=300, **k),
    "mean resultant length": lambda x, generator=None, **k: F.mean_resultant_length(x, **k),
}
ALL = {**SLICED, **PAIRWISE, **OTHERS}


def every(losses: dict[str, Loss]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("loss", [pytest.param(f, id=name) for name, f in losses.items()])


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def vectors(n: int = 20, d: int = 6, seed: int = 1, clump: float = 0.0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random vectors of different norms, shifted together by `clump`."""
    g = seeded(seed)
    x = torch.randn(n, d, generator=g, dtype=dtype) + clump * torch.randn(1, d, generator=g, dtype=dtype)
    return x * (0.5 + 3 * torch.rand(n, 1, generator=g, dtype=dtype))


def gradient(loss: Loss, x: Tensor, **options) -> tuple[Tensor, Tensor]:
    x = x.detach().clone().requires_grad_()
    value = loss(x, **options)
    value.backward()
    assert x.grad is not None
    return value.detach(), x.grad


def unit(x: Tensor) -> np.ndarray:
    x = x.detach().double().numpy()
    return x / np.linalg.norm(x, axis=1, keepdims=True)


# --- sliced dispersion -------------------------------------------------------------------------------------------


def closed_form(x: np.ndarray, p: np.ndarray, q: np.ndarray) -> tuple[float, np.ndarray]:
    """δ and its gradient as the paper prints them, one point at a time."""
    n = len(x)
    theta = [math.atan2(row @ q, row @ p) for row in x]
    rank = stats.rankdata(theta, method="ordinal")
    delta, grads = 0.0, []
    for row, angle, k in zip(x, theta, rank, strict=True):
        target = sum(theta) / n + 2 * math.pi * k / n - math.pi - math.pi / n
        delta += 0.5 * (angle - target) ** 2
        a, b = row @ p, row @ q
        grads.append((angle - target) * (a * q - b * p) / (a**2 + b**2))
    return delta, np.array(grads)


@pytest.mark.parametrize("circles", [1, 4])
def test_sliced_value_and_gradient_are_the_closed_form(circles):
    x = vectors(30, 9, clump=1.0)
    value, grad = gradient(F.sliced_dispersion, x, circles=circles, generator=seeded(), reduction="sum")
    planes = F.random_great_circles(9, circles, seeded(), dtype=torch.float64).numpy()
    expected = [closed_form(x.numpy(), plane[:, 0], plane[:, 1]) for plane in planes]
    assert value.item() == pytest.approx(np.mean([delta for delta, _ in expected]), rel=1e-12)
    np.testing.assert_allclose(grad.numpy(), np.mean([g for _, g in expected], axis=0), rtol=1e-9, atol=1e-12)


@every(ALL)
def test_gradient_is_that_of_finite_differences(loss):
    x = vectors(7, 4, clump=0.5).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(x, generator=seeded(3)), (x,), eps=1e-6, atol=1e-6)


@every(ALL)
def test_gradient_has_no_radial_part(loss):
    x = vectors(clump=1.0)
    _, grad = gradient(loss, x, generator=seeded())
    assert grad.norm() > 1e-3
    torch.testing.assert_close((x * grad).sum(dim=1), torch.zeros(len(x), dtype=x.dtype), atol=1e-12, rtol=0)


@every(ALL)
def test_loss_does_not_depend_on_the_norms_nor_on_the_order(loss):
    x = vectors(clump=1.0)
    value = loss(x, generator=seeded())
    scale = 0.01 + 50 * torch.rand(len(x), 1, generator=seeded(9), dtype=x.dtype)
    torch.testing.assert_close(loss(x * scale, generator=seeded()), value)
    torch.testing.assert_close(loss(x[torch.randperm(len(x), generator=seeded(8))], generator=seeded()), value)


def test_normalising_first_leaves_the_gradient_of_the_raw_vectors_unchanged():
    x = vectors(clump=1.0)
    _, raw = gradient(F.sliced_dispersion, x, generator=seeded())
    _, first = gradient(lambda x: F.sliced_dispersion(nn.functional.normalize(x, dim=1), generator=seeded()), x)
    torch.testing.assert_close(raw, first)


def test_sliced_dispersion_agrees_with_that_of_rotated_points_over_many_circles():
    x = vectors(25, 5, clump=1.0)
    rotation = torch.from_numpy(stats.ortho_group.rvs(5, random_state=4))
    a, b = (F.sliced_dispersion(y, circles=20_000, generator=seeded(s)).item() for s, y in enumerate((x, x @ rotation)))
    assert a == pytest.approx(b, rel=0.02)


@every({**PAIRWISE, "mean resultant length": OTHERS["mean resultant length"]})
def test_losses_without_random_directions_are_invariant_under_rotation(loss):
    x = vectors(clump=1.0)
    rotation = torch.from_numpy(stats.ortho_group.rvs(6, random_state=4))
    torch.testing.assert_close(loss(x @ rotation), loss(x))


@pytest.mark.parametrize("n", [2, 3, 8, 101])
def test_equally_spaced_angles_in_any_order_give_zero(n):
    phi = 2 * math.pi * torch.arange(1, n + 1, dtype=torch.float64) / n - math.pi - math.pi / n
    theta = phi[torch.randperm(n, generator=seeded())] + 0.9 * math.pi / n  # any shift short of the cut at π
    assert F.great_circle_loss(theta).item() == pytest.approx(0, abs=1e-25)
    plane = torch.stack([theta.cos(), theta.sin()], dim=1)
    assert F.axis_aligned_sliced_dispersion(plane, generator=seeded(1)).item() == pytest.approx(0, abs=1e-25)


@pytest.mark.parametrize("n", [2, 3, 10, 2000])
def test_collapsed_points_give_the_variance_of_equal_spacing(n):
    # ½ mean_k φ_k² with φ_k = 2π/N (k − (N+1)/2), and Σ_k (k − (N+1)/2)² = N (N² − 1) / 12
    x = vectors(1, 8).expand(n, 8)
    expected = math.pi**2 / 6 * (1 - 1 / n**2)
    assert F.sliced_dispersion(x, circles=3).item() == pytest.approx(expected, rel=1e-9)
    assert F.sliced_dispersion(x, reduction="sum").item() == pytest.approx(n * expected, rel=1e-9)


def test_great_circle_loss_is_watsons_statistic_of_uniformity():
    theta = torch.rand(5, 40, generator=seeded(), dtype=torch.float64) * 2 * math.pi - math.pi
    u = np.sort(theta.numpy() / (2 * math.pi) + 0.5, axis=1)
    cramer_von_mises = np.array([stats.cramervonmises(row, "uniform").statistic for row in u])
    watson = cramer_von_mises - 40 * (u.mean(axis=1) - 0.5) ** 2
    np.testing.assert_allclose(F.great_circle_loss(theta).numpy(), 2 * np.pi**2 / 40 * (watson - 1 / (12 * 40)))


def test_uniform_points_give_the_expectation_of_watsons_statistic():
    # E[U²] = 1/12, so E[δ/N] = π²/6 · (N − 1)/N²
    g = seeded()
    x = (torch.randn(100, 512, generator=g) for _ in range(40))
    mean = np.mean([F.sliced_dispersion(points, circles=50, generator=g).item() for points in x])
    assert mean == pytest.approx(math.pi**2 / 6 * 99 / 100**2, rel=0.06)


def test_great_circles_are_orthonormal_and_uniform():
    planes = F.random_great_circles(3, 20_000, seeded(), dtype=torch.float64)
    gram = planes.mT @ planes
    torch.testing.assert_close(gram, torch.eye(2, dtype=torch.float64).expand_as(gram))
    # on the 2-sphere every coordinate of a uniform direction is uniform in [-1, 1] (Archimedes)
    for column, axis in itertools.product(range(2), range(3)):
        assert stats.kstest(planes[:, axis, column], "uniform", (-1, 2)).pvalue > 1e-3
    normals = torch.linalg.cross(planes[..., 0], planes[..., 1])
    assert stats.kstest(normals[:, 2], "uniform", (-1, 2)).pvalue > 1e-3


def test_a_point_orthogonal_to_the_circle_gets_no_gradient_from_it():
    x = vectors(12, 2, dtype=torch.float32)
    x = torch.cat([x, torch.zeros(12, 4)], dim=1)
    x[6:] = torch.diag(torch.arange(1.0, 7.0))
    for seed in range(20):
        value, grad = gradient(F.axis_aligned_sliced_dispersion, x, generator=seeded(seed))
        assert value.isfinite()
        assert grad.isfinite().all()


# --- losses over pairs and the others ----------------------------------------------------------------------------


def angle(a: np.ndarray, b: np.ndarray) -> float:
    return math.acos(max(-1.0, min(1.0, float(a @ b))))


def chord(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.sqrt(((a - b) ** 2).sum()))


def mean_over_pairs(points: np.ndarray, value: Callable[[np.ndarray, np.ndarray], float]) -> float:
    n = len(points)
    return sum(value(points[i], points[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))


def mean_over_nearest(
    points: np.ndarray, value: Callable[[np.ndarray, np.ndarray], float], pick: Callable = min
) -> float:
    n = len(points)
    return sum(pick(value(points[i], points[j]) for j in range(n) if i != j) for i in range(n)) / n


KERNELS = {
    "gaussian": lambda d: math.exp(-(d**2) / (2 * 0.7**2)),
    "laplace": lambda d: math.exp(-d / 0.7),
    "riesz": lambda d: d**-1.5,
}
ORACLES: dict[str, Callable[[np.ndarray], float]] = {
    "energy, s=0.0": lambda u: mean_over_pairs(u, lambda a, b: -math.log(angle(a, b))),
    "energy, s=1.0": lambda u: mean_over_pairs(u, lambda a, b: 1 / angle(a, b)),
    "energy, s=2.5": lambda u: mean_over_pairs(u, lambda a, b: angle(a, b) ** -2.5),
    **{
        f"{name}, {metric}": lambda u, k=kernel, m=distance: mean_over_pairs(u, lambda a, b: k(m(a, b)))
        for name, kernel in KERNELS.items()
        for metric, distance in (("chordal", chord), ("geodesic", angle))
    },
    "koleo": lambda u: -mean_over_nearest(u, lambda a, b: math.log(chord(a, b))),
    "mma": lambda u: -mean_over_nearest(u, angle),
    "mmcs": lambda u: mean_over_nearest(u, lambda a, b: 1 + float(a @ b), max),
}


@pytest.mark.parametrize("name", PAIRWISE)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_pairwise_loss_is_that_of_a_double_loop(name, dtype):
    x = vectors(15, 5, clump=0.8, dtype=dtype)
    expected = ORACLES[name](unit(x))
    value = PAIRWISE[name](x)
    assert value.dtype == dtype
    assert value.item() == pytest.approx(expected, rel=1e-9 if dtype == torch.float64 else 1e-4)
    assert PAIRWISE[name](x, reduction="sum").item() == pytest.approx(15 * expected, rel=1e-4)


def test_spherical_variance_and_mean_resultant_length_add_to_one():
    x = vectors(clump=1.0)
    resultant = np.linalg.norm(unit(x).mean(axis=0))
    assert F.mean_resultant_length(x).item() == pytest.approx(resultant)
    assert F.spherical_variance(x).item() == pytest.approx(1 - resultant)
    assert F.mean_resultant_length(x, "sum").item() == pytest.approx(len(x) * resultant)


def test_lloyd_is_the_squared_angle_to_the_nearest_point():
    x = vectors(clump=0.5)
    samples = unit(torch.randn(300, 6, generator=seeded(), dtype=torch.float64))
    nearest = [min(angle(y, point) for point in unit(x)) for y in samples]
    assert F.lloyd(x, 300, seeded()).item() == pytest.approx(np.mean(np.square(nearest)))


@every(PAIRWISE)
def test_more_than_max_points_are_sampled(loss):
    x = vectors(50)
    value, grad = gradient(loss, x, max_points=10, generator=seeded(), reduction="sum")
    rows = torch.randperm(50, generator=seeded())[:10]
    torch.testing.assert_close(value, 50 * loss(x[rows]))
    assert set(grad.norm(dim=1).nonzero().flatten().tolist()) <= set(rows.tolist())


@every(ALL)
def test_sum_is_the_mean_times_the_number_of_points(loss):
    x = vectors(23)
    torch.testing.assert_close(loss(x, generator=seeded(), reduction="sum"), 23 * loss(x, generator=seeded()))


# --- training ----------------------------------------------------------------------------------------------------


def spread(x: Tensor) -> tuple[float, float]:
    """Minimum angle and mean resultant length."""
    u = unit(x)
    cosines = u @ u.T
    np.fill_diagonal(cosines, -1)
    return float(np.arccos(cosines.max())), float(np.linalg.norm(u.mean(axis=0)))


MODULES = [
    modules.SlicedDispersion(),
    modules.SlicedDispersion(circles=4),
    modules.AxisAlignedSlicedDispersion(circles=4),
    modules.MeanResultantLength(),
    *(modules.HypersphericalEnergy(s=s) for s in (0.0, 1.0, 2.0)),
    *(
        modules.KernelDispersion(k, m, bandwidth=0.5)
        for k in ("gaussian", "laplace", "riesz")
        for m in ("chordal", "geodesic")
    ),
    modules.KoLeo(),
    modules.MaximumMinimumAngle(),
    modules.MaximumMeanCosine(),
    modules.Lloyd(),
]
LOCAL = (modules.KoLeo, modules.MaximumMinimumAngle, modules.MaximumMeanCosine)


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_gradient_descent_spreads_clumped_points(module):
    torch.manual_seed(2)
    x = (torch.randn(1, 8) + 0.2 * torch.randn(24, 8)) * (0.5 + torch.rand(24, 1))
    least, resultant = spread(x)
    x.requires_grad_()
    optimizer = torch.optim.Adam([x], lr=0.03)
    for _ in range(200):
        optimizer.zero_grad()
        module(x).backward()
        optimizer.step()
    trained_least, trained_resultant = spread(x)
    if not isinstance(module, modules.MeanResultantLength):  # promises the resultant only: opposite clumps satisfy it
        assert trained_least > 2.5 * least
    if not isinstance(module, LOCAL):  # promise the distance to the nearest neighbor only
        assert trained_resultant < 0.75 * resultant


# --- precision, masks, degenerate inputs -------------------------------------------------------------------------


@every(ALL)
def test_autocast_changes_nothing(loss):
    x = vectors(clump=1.0, dtype=torch.float32).requires_grad_()
    plain = loss(x, generator=seeded())
    with torch.autocast("cpu", torch.bfloat16):
        assert (x @ x.T).dtype == torch.bfloat16
        under = loss(x, generator=seeded())
    assert under.dtype == torch.float32
    assert torch.equal(plain, under)
    assert torch.equal(*(torch.autograd.grad(value, x)[0] for value in (plain, under)))


@every(ALL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_vectors_are_computed_in_float32(loss, dtype):
    x = vectors(clump=1.0, dtype=torch.float32).to(dtype)
    value, grad = gradient(loss, x, generator=seeded())
    assert value.dtype == torch.float32
    assert grad.dtype == dtype
    assert torch.equal(value, loss(x.float(), generator=seeded()))


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_masked_tokens_do_not_count(module):
    x = vectors(24, 6, clump=1.0, dtype=torch.float32).reshape(4, 6, 6).requires_grad_()
    mask = torch.rand(4, 6, generator=seeded()) < 0.6
    with torch.no_grad():
        x[~mask] = torch.nan
    torch.manual_seed(0)
    value = module(x, mask)
    value.backward()
    torch.manual_seed(0)
    torch.testing.assert_close(value, module(x.detach()[mask]))
    assert (x.grad[~mask] == 0).all()
    assert x.grad[mask].isfinite().all()
    assert x.grad[mask].norm() > 0


def test_leading_dimensions_are_flattened():
    x = vectors(24, 6).reshape(2, 3, 4, 6)
    torch.testing.assert_close(modules.KoLeo()(x), F.koleo(x.reshape(24, 6)))
    torch.testing.assert_close(modules.KoLeo(reduction="sum")(x, torch.ones(2, 3, 4).bool()), 24 * modules.KoLeo()(x))


@every(ALL)
@pytest.mark.parametrize("n", [0, 1])
def test_fewer_than_two_points_give_zero_with_a_graph(loss, n):
    value, grad = gradient(loss, vectors(2)[:n], generator=seeded())
    assert value.item() == 0
    assert (grad == 0).all()
    assert grad.shape == (n, 6)
    nothing, grad = gradient(loss, torch.zeros(5, 6), reduction="sum")
    assert nothing.item() == 0
    assert (grad == 0).all()


@every(ALL)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_zero_vectors_contribute_nothing(loss, reduction):
    x = vectors(10, clump=1.0)
    padded = torch.zeros(13, 6, dtype=x.dtype)
    rows = torch.tensor([0, 1, 2, 4, 5, 6, 8, 9, 10, 12])
    padded[rows] = x
    value, grad = gradient(loss, padded, generator=seeded(), reduction=reduction)
    expected, expected_grad = gradient(loss, x, generator=seeded(), reduction=reduction)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(grad[rows], expected_grad)
    assert (grad[[3, 7, 11]] == 0).all()


@every(ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_copies_and_opposites_keep_loss_and_gradient_finite(loss, dtype):
    one = vectors(1, dtype=torch.float32)
    for x in (one.expand(5, 6), torch.cat([one, one, -one, -one]), torch.cat([one, one * (1 + 1e-3)])):
        value, grad = gradient(loss, x.to(dtype), generator=seeded())
        assert value.isfinite()
        assert grad.isfinite().all()


@every(SLICED)
def test_fewer_points_than_circles_are_fine(loss):
    value, grad = gradient(loss, vectors(2), generator=seeded())
    assert value > 0
    assert grad.isfinite().all()


@every(ALL)
def test_nan_is_not_hidden(loss):
    x = vectors()
    x[3, 2] = torch.nan
    assert loss(x, generator=seeded()).isnan()


@every(ALL)
def test_one_generator_state_gives_one_value(loss):
    x = vectors(60)
    options = {"max_points": 30} if loss in PAIRWISE.values() else {}
    assert torch.equal(loss(x, generator=seeded(7), **options), loss(x, generator=seeded(7), **options))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@every(ALL)
def test_a_cpu_generator_gives_the_same_loss_on_the_gpu(loss):
    x = vectors(clump=1.0, dtype=torch.float32)
    value, grad = gradient(loss, x, generator=seeded())
    value_gpu, grad_gpu = gradient(loss, x.cuda(), generator=seeded())
    torch.testing.assert_close(value_gpu.cpu(), value, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(grad_gpu.cpu(), grad, rtol=1e-2, atol=1e-3)


# --- options -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: modules.SlicedDispersion(circles=0), r"circles is 0, expected 1 or more"),
        (lambda: modules.AxisAlignedSlicedDispersion(circles=-3), r"circles is -3, expected 1 or more"),
        (lambda: modules.SlicedDispersion(circles=1.5), r"circles is 1\.5, expected 1 or more"),
        (lambda: modules.MeanResultantLength(reduction="none"), r"reduction is 'none', expected one of mean, sum"),
        (lambda: modules.HypersphericalEnergy(s=-1.0), r"s is -1\.0, expected 0 or more and finite"),
        (lambda: modules.HypersphericalEnergy(s=math.inf), r"s is inf, expected 0 or more and finite"),
        (lambda: modules.KernelDispersion(kernel="rbf"), r"kernel is 'rbf', expected one of gaussian, laplace"),
        (lambda: modules.KernelDispersion(metric="cosine"), r"metric is 'cosine', expected one of chordal, geodesic"),
        (lambda: modules.KernelDispersion(bandwidth=0.0), r"bandwidth is 0\.0, expected more than 0 and finite"),
        (lambda: modules.KernelDispersion(s=math.nan), r"s is nan, expected 0 or more and finite"),
        (lambda: modules.KoLeo(max_points=1), r"max_points is 1, expected 2 or more"),
        (lambda: modules.Lloyd(samples=0), r"samples is 0, expected 1 or more"),
        (lambda: F.sliced_dispersion(vectors(), circles=0), r"circles is 0, expected 1 or more"),
        (lambda: F.lloyd(vectors(), samples=0), r"samples is 0, expected 1 or more"),
        (lambda: F.koleo(vectors(), max_points=0), r"max_points is 0, expected 2 or more"),
        (lambda: F.mmd_dispersion(vectors(), kernel="rbf"), r"kernel is 'rbf', expected"),
        (lambda: F.minimum_hyperspherical_energy(vectors(), s=-2.0), r"s is -2\.0, expected 0 or more"),
        (lambda: F.koleo(vectors(), reduction="max"), r"reduction is 'max', expected one of mean, sum"),
        (lambda: F.random_great_circles(1), r"D is 1, expected 2 or more: a great circle needs two dimensions"),
        (
            lambda: F.axis_aligned_sliced_dispersion(vectors(5, 1)),
            r"D is 1, expected 2 or more: a great circle needs two dimensions",
        ),
        (lambda: F.mma(vectors().reshape(2, 10, 6)), r"shape \(2, 10, 6\).* expected floating-point vectors of shape"),
        (lambda: F.mma(torch.arange(12).reshape(4, 3)), r"type torch\.int64, expected floating-point"),
        (lambda: modules.KoLeo()(vectors(), torch.ones(20).long()), r"type torch\.int64, .*use mask\.bool\(\)"),
        (lambda: modules.KoLeo()(vectors(), torch.ones(19).bool()), r"mask has shape \(19,\).* expected shape \(20,\)"),
    ],
)
def test_bad_options_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_modules_say_their_options():
    assert str(modules.SlicedDispersion(circles=3)) == "SlicedDispersion(reduction='mean', circles=3)"


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_modules_are_chosen_by_class_path(module):
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--dispersion", type=modules.Dispersion)
    options = {k: v for k, v in vars(module).items() if not k.startswith("_") and k != "training"}
    config = parser.parse_object(
        {"dispersion": {"class_path": f"lightning_knnmt.dispersion.{type(module).__name__}", "init_args": options}}
    )
    assert str(parser.instantiate_classes(config).dispersion) == str(module)
