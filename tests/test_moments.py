import pytest
import torch

import oracle
from filet_kernels import Moments, SecondMoment, fisher_energies

SHAPES = [(24, 40), (40, 24), (32, 32), (1, 9), (9, 1), (1, 1)]


def batch(shape, T, dtype, device, seed=0):
    """W (m, n), x (T, n) and g (T, m) of one scale, so that no energy is lost in another."""
    m, n = shape
    generator = torch.Generator().manual_seed(seed)
    make = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)  # noqa: E731
    return tuple(t.to(dtype).to(device) for t in (make(m, n), make(T, n), make(T, m)))


def vectors(moments, W, x, g):
    every = {"x": x, "y": x @ W.T, "g": g, "h": g @ W}
    return {space: every[space] for space in (moments.input.space, moments.output.space)}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_smaller_space(shape):
    m, n = shape
    moments = Moments.zeros(shape)
    assert moments.input.space == ("x" if n <= m else "y")
    assert moments.output.space == ("g" if m <= n else "h")
    assert moments.input.sum.shape == moments.output.sum.shape == (min(m, n), min(m, n))


@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-10), (torch.float32, 1e-4)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_energies_equal_algorithm_1(shape, dtype, bound, device):
    W, x, g = batch(shape, 300, dtype, device)
    moments = Moments.zeros(shape, dtype=dtype, device=device)
    for rows in range(0, 300, 100):
        part = vectors(moments, W, x[rows : rows + 100], g[rows : rows + 100])
        moments.update(**part, loss_terms=7)
    truth = oracle.fisher_energies(W, x, g)
    found = fisher_energies(W, moments, normalization="sum")
    assert ((found - truth).abs() <= bound * truth).all()
    mean = fisher_energies(W, moments)
    torch.testing.assert_close(mean, found / 21**2, rtol=1e-12, atol=0)


@pytest.mark.parametrize("spaces", ["xg", "xh", "yg", "yh"])
@pytest.mark.parametrize("shape", [(24, 40), (40, 24)], ids=str)
def test_every_space_gives_the_same_energies(shape, spaces, device):
    W, x, g = batch(shape, 200, torch.float64, device)
    every = {"x": x, "y": x @ W.T, "g": g, "h": g @ W}
    sides = []
    for space in spaces:
        side = SecondMoment.zeros(space, every[space].shape[1], dtype=torch.float64, device=device)
        side.update(every[space])
        sides.append(side)
    moments = Moments(*sides, shape, torch.ones((), dtype=torch.int64, device=device))
    truth = oracle.fisher_energies(W, x, g)
    torch.testing.assert_close(fisher_energies(W, moments), truth, rtol=1e-10, atol=0)


def test_counts_are_separate_and_masked(device):
    W, x, g = batch((8, 8), 20, torch.float32, device)
    moments = Moments.zeros((8, 8), device=device)
    weights = torch.arange(20, device=device) % 4 != 0
    x[weights == 0] = float("nan")
    moments.update(x=x, weights=weights)
    moments.update(g=g[:5])
    assert (int(moments.input.count), int(moments.output.count)) == (15, 5)
    truth = oracle.fisher_energies(W, x[weights], g[:5])
    torch.testing.assert_close(fisher_energies(W, moments), truth, rtol=1e-4, atol=0)


def test_loss_scale_is_divided_out(device):
    W, x, g = batch((8, 8), 20, torch.float32, device)
    plain, scaled = (Moments.zeros((8, 8), device=device) for _ in range(2))
    plain.update(x=x)
    plain.update(g=g)
    scaled.update(x=x)
    scaled.update(g=g * 1024, alpha=1024.0**-2)
    assert torch.equal(fisher_energies(W, plain), fisher_energies(W, scaled))


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)], ids=str)
def test_merge_and_roundtrip(shape, device, tmp_path):
    W, x, g = batch(shape, 60, torch.float64, device)
    whole, first, second = (
        Moments.zeros(shape, dtype=torch.float64, device=device) for _ in range(3)
    )
    whole.update(**vectors(whole, W, x, g), loss_terms=60)
    first.update(**vectors(whole, W, x[:25], g[:25]), loss_terms=25)
    second.update(**vectors(whole, W, x[25:], g[25:]), loss_terms=35)
    before = first.input.sum.clone()
    merged = first.merged(second)
    assert torch.equal(first.input.sum, before)  # a new object
    torch.testing.assert_close(
        fisher_energies(W, merged), fisher_energies(W, whole), rtol=1e-12, atol=0
    )
    torch.save(merged.state_dict(), tmp_path / "moments.pt")
    loaded = Moments.from_state_dict(torch.load(tmp_path / "moments.pt", weights_only=True))
    assert torch.equal(fisher_energies(W, loaded), fisher_energies(W, merged))


def test_layer_that_saw_no_token_has_no_energy(device):
    W, _, _ = batch((8, 5), 1, torch.float32, device)
    energies = fisher_energies(W, Moments.zeros((8, 5), device=device))
    assert torch.equal(energies.cpu(), torch.zeros(5, dtype=torch.float64))


def test_empty_batch_changes_nothing(device):
    W, x, g = batch((8, 5), 30, torch.float32, device)
    moments = Moments.zeros((8, 5), device=device)
    moments.update(**vectors(moments, W, x, g), loss_terms=30)
    before = fisher_energies(W, moments)
    moments.update(**vectors(moments, W, x[:0], g[:0]))
    assert torch.equal(fisher_energies(W, moments), before)


def test_zero_columns_are_no_candidates(device):
    W, x, g = batch((8, 6), 30, torch.float32, device)
    W[:, 2] = 0
    moments = Moments.zeros((8, 6), device=device)
    moments.update(**vectors(moments, W, x, g))
    energies = fisher_energies(W, moments)
    assert energies.isnan().tolist() == [False, False, True, False, False, False]


def test_shared_input_is_counted_once(device):
    _, x, _ = batch((8, 6), 30, torch.float32, device)
    first = Moments.zeros((8, 6), device=device)
    second = Moments.zeros((4, 6), device=device, input=first.input)
    first.update(x=x)
    assert second.input is first.input and int(second.input.count) == 30


def test_bad_input_is_named():
    moments = Moments.zeros((8, 6))
    with pytest.raises(ValueError, match=r"y was given, but these moments use \['h', 'x'\]"):
        moments.update(y=torch.zeros(3, 8))
    with pytest.raises(ValueError, match="space='z'"):
        SecondMoment.zeros("z", 3)
    with pytest.raises(ValueError, match="input is in space 'g'"):
        Moments(SecondMoment.zeros("g", 8), moments.output, (8, 6), moments.loss_terms)
    with pytest.raises(ValueError, match=r"expected \(6, 6\) for W of shape \(8, 6\)"):
        Moments(SecondMoment.zeros("x", 8), moments.output, (8, 6), moments.loss_terms)
    with pytest.raises(ValueError, match="cannot merge moments of shape"):
        moments.merged(Moments.zeros((6, 8)))
    with pytest.raises(ValueError, match="cannot merge a moment in space 'g'"):
        SecondMoment.zeros("x", 3).merged(SecondMoment.zeros("g", 3))
    with pytest.raises(ValueError, match=r"W has shape \(6, 8\); expected \(8, 6\)"):
        fisher_energies(torch.zeros(6, 8), moments)
    with pytest.raises(ValueError, match="normalization='max'"):
        fisher_energies(torch.zeros(8, 6), moments, normalization="max")
