"""Initialisations by name: their shapes, the function at the start, recipes against formulas."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from contexts import KINDS, RANK, context, kept, task
from peft import get_peft_model
from torch.nn.functional import normalize

import oracle
from effect.context import Context
from effect.groups import GROUPS, singular_groups
from effect.inits import START
from effect.of_peft import BY_PEFT, adapted
from models import observe, weight_of

SUBTRACTING = ("pissa", "olora", "corda-kpm", "corda-ipm", "lora-ga")


def exact(kind):
    """By layer: W, x (T, n), g (T, m) in float64, and the number of loss terms."""
    its = task(kind)
    seen, terms = observe(its.model, its.targets, its.samples, its.shift)
    return {n: (weight_of(its.model, n).double(), x, g) for n, (x, g) in seen.items()}, terms


def inverse_root(S, damping=0.0):
    values, Q = torch.linalg.eigh(S)
    return Q * (values + damping).rsqrt() @ Q.T


def close(actual, expected, rel=2e-6):
    """float32 of a float64 value; relative to the largest."""
    error = (actual.double() - expected).abs().max() / expected.abs().max()
    assert error < rel, float(error)


def same_rows(actual, expected, rel=2e-6):
    """The same rows up to the sign of each."""
    signs = (actual.double() * expected).sum(1, keepdim=True).sign()
    close(actual.double() * signs, expected, rel)


# Of all but the groups, for which these models have too few directions.

ALL = [name for name in START if not name.startswith("groups.")]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("kind", KINDS)
def test_every_start_is_of_all_targets_and_keeps_the_function(kind, name, one_thread):
    if kind == "vit" and name.endswith(".self"):
        with pytest.raises(ValueError, match="no causal language model"):
            START[name](context(kind))
        return
    starts = START[name](context(kind))
    assert list(starts) == list(context(kind).weights) == task(kind).targets
    for layer, W in context(kind).weights.items():
        start, (m, n) = starts[layer], W.shape
        assert start.A.shape == (RANK, n) and start.B.shape == (m, RANK)
        tensors = [x for x in (start.A, start.B, start.A0, start.B0) if x is not None]
        assert all(x.dtype == torch.float32 and x.isfinite().all() for x in tensors)
        assert all(not x.requires_grad for x in tensors)
        assert start.A.any(1).all()  # every row can learn
        assert (start.A0 is None) == (start.B0 is None)
        if start.A0 is not None:
            assert torch.equal(start.A0, start.A) and torch.equal(start.B0, start.B)
            assert start.B.any(0).all()
        elif name == "orthogonal":
            assert (start.B @ start.A).abs().max() < 1e-6 < start.B.abs().max()
        else:
            assert not start.B.any()
    for layer, W in context(kind).weights.items():  # the shared model is what it was
        assert torch.equal(W, weight_of(task(kind).model, layer))


def test_names_are_of_what_they_say():
    assert len(FORMS) == 2 * 10 * 2  # M and P, ten magnitudes, two starts
    subtracted = {n for n in ALL if START[n](context("llama"))[LAYER].A0 is not None}
    assert subtracted & set(BY_PEFT) == set(SUBTRACTING)
    assert {n for n in ALL if n.endswith(".untouched")} < subtracted
    assert not {n for n in ALL if n.endswith(".zero")} & subtracted


LAYER = "model.layers.1.self_attn.k_proj"  # 16 × 32: fewer outputs than inputs


# PEFT's own.


@pytest.mark.parametrize("name", BY_PEFT)
@pytest.mark.parametrize("kind", KINDS)
def test_peft_takes_out_of_the_base_what_is_subtracted(kind, name, one_thread):
    starts = START[name](context(kind))
    model = adapted(context(kind), name)
    for layer, start in starts.items():
        its = model.base_model.model.get_submodule(layer)
        assert its.scaling["default"] == 1
        assert torch.equal(start.A, its.lora_A["default"].weight)
        assert torch.equal(start.B, its.lora_B["default"].weight)
        before = weight_of(task(kind).model, layer)
        after = its.base_layer.weight.detach()
        if name in SUBTRACTING:
            assert not torch.equal(after, before)
            largest = before.abs().max() + (start.B.abs() @ start.A.abs()).max()
            off = after.double() + start.B.double() @ start.A.double() - before.double()
            assert off.abs().max() < 1e-6 * largest
        else:
            assert torch.equal(after, before)


@pytest.mark.parametrize("name", ["lora", "gaussian", "orthogonal"])
def test_random_starts_are_of_the_seed_alone(name):
    its = context("llama")
    torch.manual_seed(its.seed)
    init = True if name == "lora" else name
    model = get_peft_model(its.load(), its.config(init_lora_weights=init))
    state = torch.get_rng_state()
    starts = START[name](its)
    assert torch.equal(torch.get_rng_state(), state)
    for layer, start in starts.items():
        expected = model.base_model.model.get_submodule(layer)
        assert torch.equal(start.A, expected.lora_A["default"].weight)
        assert torch.equal(start.B, expected.lora_B["default"].weight)


def test_eva_looks_at_inputs_of_labelled_tokens(one_thread):
    """Their principal components, to what PEFT's subspace iterations reach."""
    found = START["eva"](context("llama"))
    _, x, _ = exact("llama")[0]["model.layers.0.self_attn.q_proj"]
    rows = torch.cat([s["labels"] for s in task("llama").samples]) != -100
    assert 0 < int((~rows).sum()) < len(rows) == len(x)
    centred = x[rows] - x[rows].mean(0)
    values = torch.linalg.eigvalsh(centred.T @ centred).flip(0)
    A = found["model.layers.0.self_attn.q_proj"].A.double()
    close(A @ A.T, torch.eye(RANK, dtype=torch.float64), 1e-5)
    assert (centred @ A.T).square().sum() > 0.995 * values[:RANK].sum()


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
@pytest.mark.parametrize("kind", KINDS)
def test_corda_takes_the_tokens_of_a_batch_for_a_sample(kind, mode, one_thread):
    its = task(kind)
    samples = its.samples if mode == "ipm" else kept(kind)
    for layer in its.targets:
        C = 0
        parts = range(0, len(samples), 4)
        for i in parts:
            seen, _ = observe(its.model, [layer], samples[i : i + 4], its.shift)
            x = seen[layer][0]
            C = C + (x / x.max().abs()).T @ (x / x.max().abs()) / len(parts)
        C = C + 0.01 * C.diagonal().mean() * torch.eye(len(C), dtype=C.dtype)
        W = weight_of(its.model, layer).double()
        U, S, Vh = torch.linalg.svd(W @ C, full_matrices=False)
        part = slice(0, RANK) if mode == "ipm" else slice(-RANK, None)
        truth = U[:, part] * S[part] @ Vh[part] @ torch.linalg.inv(C)
        start = START[f"corda-{mode}"](context(kind))[layer]
        close(start.B @ start.A, truth, 2e-3)  # float32 in PEFT, and an inverse


def test_lora_ga_is_of_the_mean_gradient(one_thread):
    its = task("llama")
    for layer in (LAYER, "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"):
        G = 0
        for i in range(0, len(its.samples), 4):
            seen, terms = observe(its.model, [layer], its.samples[i : i + 4], its.shift)
            G = G + seen[layer][1].T @ seen[layer][0] / terms / 3
        U, S, Vh = torch.linalg.svd(G, full_matrices=False)
        start = START["lora-ga"](context("llama"))[layer]
        two = slice(RANK, 2 * RANK)
        same_rows(start.A, Vh[:RANK], 1e-3)
        same_rows(start.B.T, (U[:, two] * S[two] * len(G) ** 0.25 / 4).T, 1e-3)


# Published recipes.


@pytest.mark.parametrize("kind", KINDS)
def test_milora_and_farss_take_small_singular_triplets(kind):
    layers, _ = exact(kind)
    milora, farss = START["milora"](context(kind)), START["farss"](context(kind))
    for name, (W, x, g) in layers.items():
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        truth = U[:, -RANK:] * S[-RANK:] @ Vh[-RANK:]
        close(milora[name].B @ milora[name].A, truth, 1e-4)
        scores = [
            S[i] ** 2 * (x @ Vh[i]).square().mean() * (g @ U[:, i]).square().mean()
            for i in range(len(S))
        ]
        low = sorted(torch.stack(scores).argsort()[:RANK].tolist())
        close(farss[name].B @ farss[name].A, U[:, low] * S[low] @ Vh[low])
        close(farss[name].A.norm(dim=1), S[low].sqrt())


# From here on the formulas take the context's moments, which test_effect_moments.py has compared
# with sums over tokens: inverses would enlarge what the model's float32 changes.


def newton(its):
    S_X, S_Y, G = its.S_X, its.S_Y, its.G
    iX, iY = (inverse_root(S, 1e-3 * S.diagonal().mean()) for S in (S_X, S_Y))
    U, sigma, Vh = torch.linalg.svd(iY @ G @ iX, full_matrices=False)
    return Vh[:RANK] @ iX, sigma[:RANK], iY @ U[:, :RANK]


@pytest.mark.parametrize("kind", KINDS)
def test_the_whitened_gradient(kind):
    free, paired, cg = (
        START[n](context(kind)) for n in ("whitened.zero", "whitened.untouched", "cg-lora")
    )
    for name, its in context(kind).moments.items():
        R, sigma, L = newton(its)
        A, B = normalize(R, dim=1) / math.sqrt(3), -normalize(L, dim=0) / math.sqrt(3)
        same_rows(free[name].A, A)
        same_rows(paired[name].A, A)
        close(paired[name].B @ paired[name].A, B @ A, 1e-5)
        step = -(L * sigma) @ R
        product = cg[name].B.double() @ cg[name].A.double()
        close(product / product.norm(), step / step.norm(), 1e-5)
        for factor in (cg[name].A, cg[name].B):
            close(factor.square().sum(), torch.tensor(RANK / 3, dtype=torch.float64))


@pytest.mark.parametrize("kind", KINDS)
def test_lora_da_without_variance(kind):
    found = START["lora-da"](context(kind))
    for name, its in context(kind).moments.items():
        S, y = its.S_X, its.S_Y.diagonal()
        S = S + 1e-3 * S.diagonal().mean() * torch.eye(len(S), dtype=S.dtype)
        delta = -(its.G @ torch.linalg.inv(S)) / (y + 1e-3 * y.mean()).unsqueeze(1)
        U, sigma, Vh = torch.linalg.svd(delta, full_matrices=False)
        same_rows(found[name].A, Vh[:RANK] / 32)
        truth = U[:, :RANK] * sigma[:RANK] / sigma[0] @ Vh[:RANK] / 1024
        close(found[name].B @ found[name].A, truth, 1e-5)


# Directions of the inputs.


@pytest.mark.parametrize("power", [0.0, -0.25])
@pytest.mark.parametrize("kind", KINDS)
def test_eva_at_loras_magnitude(kind, power):
    found = START["eva-ref.p-0.25" if power else "eva-ref"](context(kind))
    for name, its in context(kind).moments.items():
        values, Q = torch.linalg.eigh(its.S_X)
        rows = (Q[:, -RANK:] * values[-RANK:] ** power).T.flip(0)
        same_rows(found[name].A, rows * math.sqrt(RANK / 3) / rows.norm())


def contrasted(S, S0, delta):
    """Unit generalised eigenvectors as rows, and eigenvalues, by S₀'s inverse root."""
    root = inverse_root(S0 + delta * torch.eye(len(S0), dtype=S0.dtype))
    values, Q = torch.linalg.eigh(root @ S @ root)
    return values.flip(0)[:RANK], (root @ Q).T.flip(0)[:RANK]


@pytest.mark.parametrize("delta", ["0.1", "0.01", "0.001"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_contrast_solves_its_eigenproblem(kind, delta):
    forms = ("", ".p0.25", ".p0.5", ".untouched")
    found = [START[f"contrast.d{delta}{form}"](context(kind)) for form in forms]
    for name, W in context(kind).weights.items():
        S, S0, W = context(kind).moments[name].S_X, context(kind).keep_moments[name], W.double()
        # To equal traces first, as the method is told: it must not matter.
        S0 = S0 * (S.diagonal().sum() / S0.diagonal().sum())
        values, rows = contrasted(S, S0, float(delta) * S0.diagonal().mean())
        rows = normalize(rows, dim=1)
        for power, starts in zip((0, 0.25, 0.5), found, strict=False):
            sized = rows * values.unsqueeze(1) ** power
            same_rows(starts[name].A, sized * math.sqrt(RANK / 3) / sized.norm())
        start = found[3][name]
        same_rows(start.A, rows / math.sqrt(3))
        B = normalize(W @ start.A.double().T, dim=0) / math.sqrt(3)
        close(start.B, B)


@pytest.mark.parametrize("kind", KINDS)
def test_the_contrast_within_what_the_weight_sees(kind):
    plain, within = (START[n](context(kind)) for n in ("contrast.d0.01", "contrast-row.d0.01"))
    narrow = 0
    for name, W in context(kind).weights.items():
        m, n = W.shape
        if m >= n:
            assert torch.equal(plain[name].A, within[name].A)
            continue
        narrow += 1
        S, S0, W = context(kind).moments[name].S_X, context(kind).keep_moments[name], W.double()
        # a = Wᵀ z, in z: W S Wᵀ against W S₀ Wᵀ + δ W Wᵀ.
        damped = W @ (S0 + 0.01 * S0.diagonal().mean() * torch.eye(n, dtype=S0.dtype)) @ W.T
        _, z = contrasted(W @ S @ W.T, damped, 0.0)
        same_rows(within[name].A, normalize(z @ W, dim=1) / math.sqrt(3))
        assert not torch.allclose(plain[name].A.abs(), within[name].A.abs(), atol=1e-3)
    assert narrow


def fisher_of_outputs(sample, layers):
    """S_Y of a layer's outputs over all labels a model may draw after a text, float64."""
    model = copy.deepcopy(task("llama").model).double().eval()
    outputs = {}
    hooks = [
        model.get_submodule(n).register_forward_hook(lambda _, args, y, n=n: outputs.update({n: y}))
        for n in layers
    ]
    logs = model(**sample).logits[0].log_softmax(1)
    for hook in hooks:
        hook.remove()
    S = {n: 0 for n in layers}
    for log in logs:
        for value in log:
            gs = torch.autograd.grad(value, outputs.values(), retain_graph=True)
            for name, g in zip(outputs, gs, strict=True):
                S[name] = S[name] + value.exp().detach() * g[0].T @ g[0] / len(logs)
    return S


def test_keep_weighs_the_outputs_as_the_inputs(one_thread):
    """Their quotient is the largest there is, of labels drawn so often that they are all."""
    its = context("llama")
    ids = kept("llama")[0]["input_ids"][None]
    right = torch.nn.functional.pad(ids, (0, 3), value=1)  # padding that is a word
    mask = (torch.arange(right.shape[1]) < ids.shape[1]).long().expand(400, -1)
    keep = [{"input_ids": right.expand(400, -1), "attention_mask": mask}]
    many = Context(its.load, its.targets, RANK, 0, its.batches, keep)
    found, inputs = (START[f"filet-keep.d0.01{n}"](many) for n in (".both", ""))
    exact_S = fisher_of_outputs({"input_ids": ids}, its.targets)
    for name, S0 in exact_S.items():
        start, S = found[name], its.moments[name].S_Y
        assert torch.equal(start.A, inputs[name].A)
        damped = S0 + 0.01 * S0.diagonal().mean() * torch.eye(len(S0), dtype=S0.dtype)
        values, _ = contrasted(S, damped, 0.0)
        B = start.B.double()
        close(B.norm(dim=0), torch.full((RANK,), 3**-0.5, dtype=B.dtype))
        reached = torch.linalg.solve(B.T @ damped @ B, B.T @ S @ B).trace()
        assert 0.9 < reached / values.sum() <= 1 + 1e-9, name


# FILet.

PICK = {"M": lambda E: E.argsort()[:RANK], "P": lambda E: E.argsort(descending=True)[:RANK]}


def algorithm(W, x, g, terms, letter, normalization):
    """Energies, V̂ and Û of the chosen directions, in their order."""
    E = oracle.fisher_energies(W, x, g / terms if normalization == "mean" else g)
    chosen = PICK[letter](E)
    V = oracle.normalize_columns(W.T @ W)[:, chosen]
    return E[chosen], V, oracle.normalize_columns(W @ V)


# The library's moments are float32 sums: of the smallest energies they know about 1e-5.
FLOAT32 = 1e-4


FORMS = [
    name.split(".") for name in START if name.startswith(("filet-M.", "filet-P."))
]  # a random choice is tested below


@pytest.mark.parametrize("form", FORMS, ids=".".join)
@pytest.mark.parametrize("kind", KINDS)
def test_filet_is_algorithm_1_at_its_magnitude(kind, form):
    method, scaling, magnitude, start = form
    name, letter = ".".join(form), method[-1]
    found = START[name](context(kind))
    layers, terms = exact(kind)
    for layer, (W, x, g) in layers.items():
        normalization = "sum" if magnitude == "sum" else "mean"
        E, V, U = algorithm(W, x, g, terms, letter, normalization)
        c = {
            "fisher": E,
            "singular": (W @ V).norm(dim=0),
            "constant_min": E.min().expand(RANK),
            "constant_max": E.max().expand(RANK),
            "constant": torch.ones_like(E),
        }[scaling]
        if magnitude == "relative":
            c = c / c.mean() / 3
        close(found[layer].A, (V * c.sqrt()).T, FLOAT32)
        if start == "untouched":
            close(found[layer].B, U * c.sqrt(), FLOAT32)
        if magnitude == "relative":
            close(found[layer].A.square().sum(), torch.tensor(RANK / 3).double(), 1e-5)


@pytest.mark.parametrize("scaling", ["fisher", "singular", "constant"])
@pytest.mark.parametrize("letter", PICK)
@pytest.mark.parametrize("kind", KINDS)
def test_filet_with_orthonormal_directions(kind, letter, scaling):
    found = START[f"filet-{letter}-orthogonal.{scaling}.relative.untouched"](context(kind))
    layers, terms = exact(kind)
    for layer, (W, x, g) in layers.items():
        E, V, _ = algorithm(W, x, g, terms, letter, "mean")
        Q = []
        for v in V.T:  # Gram and Schmidt, in the order of the choice
            for q in Q:
                v = v - (v @ q) * q
            Q.append(v / v.norm())
        Q = torch.stack(Q, 1)
        ones = torch.ones(RANK, dtype=torch.float64)
        c = {"fisher": E, "singular": (W @ Q).norm(dim=0), "constant": ones}[scaling]
        c = c / c.mean() / 3
        close(found[layer].A, (Q * c.sqrt()).T, FLOAT32)
        close(found[layer].B, normalize(W @ Q, dim=0) * c.sqrt(), FLOAT32)


def test_a_random_choice_is_of_the_seed():
    found = START["filet-R.constant.relative.zero"](context("llama"))
    candidates = set()
    for name, W in context("llama").weights.items():
        V = normalize(W.double().T @ W.double(), dim=0)
        alike = (found[name].A.double() * math.sqrt(3) @ V).abs()
        best = alike.max(1)
        assert (best.values > 1 - 1e-6).all() and len(set(best.indices.tolist())) == RANK
        if W.shape[1] == 32:
            candidates.add(tuple(best.indices.tolist()))
    assert len(candidates) == 1  # as the library has it: one draw for layers of one width


# Groups.


@pytest.mark.parametrize("key", ["sigma", "energy"])
@pytest.mark.parametrize("scale", ["min", "max"])
@pytest.mark.parametrize("groups", [4, 5])
def test_groups_of_singular_directions(key, scale, groups):
    found = singular_groups(context("llama"), key, scale, groups)
    assert len(found) == groups
    assert found[0].key > found[-1].key
    for name, (W, x, g) in exact("llama")[0].items():
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        keys = S if key == "sigma" else (x @ Vh.T).square().mean(0) * (g @ U).square().mean(0)
        order, size = keys.argsort(descending=True), len(S) // groups
        c = S[-size:].mean() if scale == "min" else S[:size].mean()
        for i, group in enumerate(found):
            chosen = order[i * len(S) // groups :][:size]
            start = group.starts[name]
            assert start.A.shape == (size, W.shape[1])
            close(start.B @ start.A, c * U[:, chosen] @ Vh[chosen])
            close(start.A.norm(dim=1), c.sqrt().expand(size))
            assert torch.equal(start.A, start.A0) and torch.equal(start.B, start.B0)
            assert group.keys[name] == pytest.approx(float(keys[chosen].mean()), rel=1e-6)


def test_groups_refuse_what_they_cannot_be():
    with pytest.raises(ValueError, match="key='norm'"):
        singular_groups(context("llama"), "norm", "min")
    with pytest.raises(ValueError, match="scale='mean'"):
        singular_groups(context("llama"), "sigma", "mean")
    with pytest.raises(ValueError, match="16 singular directions; expected at least 20"):
        singular_groups(context("llama"), "sigma", "min", 20)


def test_a_group_has_a_name():
    W = torch.randn(40, 70, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def load():
        model = torch.nn.Sequential(torch.nn.Linear(70, 40, bias=False))
        model[0].weight.data = W.float()
        return model

    its = Context(load, ["0"], 0, 0, [])
    names = [name for name in START if name.startswith("groups.sigma.max.")]
    assert len(names) == GROUPS == 32
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    for number, name in enumerate(names):
        assert name.endswith(f".{number:02}")
        start, of = START[name](its)["0"], number * 40 // 32
        close(start.B @ start.A, S[0] * torch.outer(U[:, of], Vh[of]), 1e-5)


@pytest.mark.parametrize("name", ["contrast.d0.01", "cg-lora", "filet-M.fisher.relative.zero"])
def test_a_context_serves_every_rank(name):
    def fresh(rank):
        of = context("llama")
        return Context(of.load, of.targets, rank, of.seed, of.batches, of.keep)

    its = fresh(1)
    for rank in (2, 4, 3):
        its.rank = rank
        found, expected = START[name](its), START[name](fresh(rank))
        for layer, start in found.items():
            assert start.A.shape[0] == rank
            close(start.A.T @ start.A, (expected[layer].A.T @ expected[layer].A).double(), 1e-4)
