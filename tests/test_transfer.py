import pytest
import torch

from filet.system.transfer import Staging, background_copies, values


def test_values(device: torch.device) -> None:
    scalars = [
        torch.tensor(2**62 + 1, device=device),
        torch.tensor(True, device=device),
        torch.tensor(0.1, dtype=torch.float64, device=device),
        torch.tensor(-3),
    ]
    assert values(scalars) == [2**62 + 1, True, 0.1, -3]
    assert values([]) == []


def test_background_copies(device: torch.device) -> None:
    """Copies of any size and layout, none of them a view of what is written afterwards."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "three pieces": torch.randn(2**24 + 2**23 + 5, generator=generator).to(device),
        "small": torch.randn(3, 5, generator=generator).bfloat16().to(device),
        "transposed": torch.randn(70, 130, generator=generator).to(device).T,
        "parameter": torch.nn.Parameter(torch.randn(4, generator=generator).to(device)),
        "empty": torch.empty(0, 7, device=device),
    }
    expected = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
    with background_copies(tensors) as copied:
        for name, tensor in tensors.items():
            copy = copied(name)
            tensor.detach().fill_(7)
            assert copy.device.type == "cpu" and not copy.requires_grad
            assert torch.equal(copy, expected[name]), name
        with pytest.raises(KeyError):
            copied("small")


def test_background_copies_end_with_the_block(device: torch.device) -> None:
    with pytest.raises(RuntimeError, match="mine"), background_copies({"a": torch.ones(3)}):
        raise RuntimeError("mine")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("shape", [(2, 500), (7, 33), (1,), (0, 4)])
def test_staging(shape: tuple[int, ...]) -> None:
    """Tensors of less and more than both buffers, one after the other, of any layout."""
    staging = Staging(piece=1024)
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator) for _ in range(5)]
    tensors += [tensor.T for tensor in tensors if tensor.dim() == 2]
    sent = [staging.copied(tensor, torch.device("cuda", 0)) for tensor in tensors]
    for tensor, goal in zip(tensors, sent, strict=True):
        assert goal.is_contiguous() and torch.equal(goal.cpu(), tensor)
