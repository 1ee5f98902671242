"""Linear probes as the frozen head, and the folder that they are written into."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import Dinov2Config, Dinov2ForImageClassification

from effect.images import pixels
from effect.probe import fit_probe, write_folder
from models import randomised


def test_a_probe_is_the_minimum():
    """The gradient of the penalised loss vanishes, by its formula, for one of the penalties."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (200,), generator=generator)
    x = torch.randn(200, 4, generator=generator, dtype=torch.float64)
    x[:, 0] = 7 + 5 * (x[:, 0] + labels)
    W, b = fit_probe(x, labels.to(torch.uint8), 3)
    residual = (F.linear(x, W, b).softmax(1) - F.one_hot(labels, 3)) / 200
    assert residual.sum(0).abs().max() < 1e-6
    z = (x - x.mean(0)) / x.std(0)
    gradient, own = residual.T @ z, W * x.std(0)
    penalty = -float((gradient * own).sum() / own.square().sum())
    assert penalty == pytest.approx(10 ** round(np.log10(penalty)), rel=1e-4)
    assert (gradient + penalty * own).abs().max() < 1e-6


@pytest.mark.parametrize("rounding", [0, 1e-9])
def test_a_constant_feature_has_no_weight(rounding):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 2, (100,), generator=generator)
    x = torch.randn(100, 3, generator=generator, dtype=torch.float64) + labels[:, None]
    W, b = fit_probe(x, labels, 2)
    constant = 0.5 + rounding * torch.randn(100, 1, generator=generator, dtype=torch.float64)
    wider, same = fit_probe(torch.cat([x[:, :1], constant, x[:, 1:]], 1), labels, 2)
    assert torch.equal(wider[:, 1], torch.zeros(2, dtype=torch.float64))
    assert torch.allclose(wider[:, [0, 2, 3]], W, atol=1e-6)
    assert torch.allclose(same, b, atol=1e-6)


def test_a_folder_has_rounded_weights_and_a_probe_of_every_data_set(tmp_path, capsys):
    config = Dinov2Config(
        image_size=8,
        patch_size=4,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        architectures=["Dinov2ForImageClassification"],
    )
    plain = randomised(Dinov2ForImageClassification(config)).state_dict()
    weights = {n: x for n, x in plain.items() if not n.startswith("classifier.")}
    (tmp_path / "data").mkdir()
    files, generator = {}, torch.Generator().manual_seed(0)
    for name, classes in (("a", 2), ("b", 3)):
        for part, count in (("train", 60), ("test", 20)):
            labels = torch.randint(0, classes, (count,), generator=generator)
            grey = (
                torch.randint(0, 90, (count, 8, 8), generator=generator)
                + 80 * labels[:, None, None]
            )
            files[name, part] = grey.to(torch.uint8), labels
            held = {"images": grey.to(torch.uint8).numpy(), "labels": labels.numpy()}
            np.savez(tmp_path / "data" / f"{name}_{part}.npz", **held)
    classes = ["a/0", "a/1", "b/0", "b/1", "b/2"]
    how = {"width": 32, "dtype": torch.float16, "count": 50}
    write_folder(tmp_path, config, weights, classes, **how)
    said = capsys.readouterr().out.splitlines()
    found = load_file(tmp_path / "model" / "model.safetensors")
    assert {n: x.dtype for n, x in found.items()} == {
        n: torch.float32 if n.startswith("classifier.") else torch.float16 for n in plain
    }
    named = json.loads((tmp_path / "model" / "config.json").read_text())["id2label"]
    assert list(named.values()) == classes
    model = Dinov2ForImageClassification.from_pretrained(tmp_path / "model", dtype=torch.float32)
    model.eval()
    for line, (name, own) in zip(said, (("a", slice(0, 2)), ("b", slice(2, 5))), strict=True):
        grey, labels = files[name, "test"]
        with torch.no_grad():
            logits = model(pixel_values=pixels(grey, 8)).logits[:, own]
        loss, right = F.cross_entropy(logits, labels), (logits.argmax(1) == labels).double().mean()
        assert right > 0.9
        assert line == f"{name}: 20 test rows, loss {loss:.4f}, accuracy {right:.4f}"
        # The bias is at its minimum over the rows that the probe learned from.
        grey, labels = (x[:50] for x in files[name, "train"])
        with torch.no_grad():
            p = model(pixel_values=pixels(grey, 8)).logits[:, own].softmax(1)
        assert torch.allclose(p.mean(0), F.one_hot(labels).float().mean(0), atol=1e-5)
