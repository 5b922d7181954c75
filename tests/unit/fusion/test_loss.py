"""The chunked loss: value and gradients of the plain formula, and never (tokens x vocabulary) in memory."""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ultrafuser.errors import ShapeError
from ultrafuser.fusion import Head, fused_cross_entropy, token_losses
from ultrafuser.fusion.loss import IGNORE_INDEX

N, R, H, V = 3, 13, 6, 37


class LargestTensor(TorchDispatchMode):
    """Remembers the largest result of any operation, views and in-place ones included."""

    largest = 0
    products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.largest = max(self.largest, *sizes, 0)
        return result


def leaves(shared: bool, full: bool, dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Tensor]:
    """Everything that gets a gradient, by name."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [H] * N if shared else [H, H + 2, H - 1]
    tensors = {f"state{j}": torch.randn(R, size, generator=generator) for j, size in enumerate(sizes)}
    tensors["scores"] = torch.randn(R, N, generator=generator)
    for j, size in enumerate(sizes[: 1 if shared else N]):
        tensors[f"head{j}"] = torch.randn(V, size, generator=generator)
        if full and j != 1:
            tensors[f"bias{j}"] = torch.randn(V, generator=generator)
    return {name: tensor.to(dtype).requires_grad_() for name, tensor in tensors.items()}


def heads_of(tensors: dict[str, Tensor], full: bool) -> list[Head]:
    count = sum(name.startswith("head") for name in tensors)
    return [
        Head(tensors[f"head{j}"], tensors.get(f"bias{j}"), 0.5 + j if full else 1.0) for j in range(count)
    ]


def labels_of(which: str, seed: int = 1) -> Tensor:
    labels = torch.randint(0, V, (R,), generator=torch.Generator().manual_seed(seed))
    if which == "some":
        labels[::3] = IGNORE_INDEX
    return torch.full_like(labels, IGNORE_INDEX) if which == "none" else labels


def plain(tensors: dict[str, Tensor], full: bool, labels: Tensor, num_items: int | None) -> Tensor:
    """The formula as the paper writes it, in the tensors' dtype."""
    heads = heads_of(tensors, full)
    heads = heads * N if len(heads) == 1 else heads
    weights = tensors["scores"].softmax(-1)
    logits = sum(
        weights[:, j, None]
        * h.scale
        * (tensors[f"state{j}"] @ h.weight.T + (0 if h.bias is None else h.bias))
        for j, h in enumerate(heads)
    )
    total = F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")
    return total / (max(int((labels != IGNORE_INDEX).sum()), 1) if num_items is None else num_items)


def chunked(tensors: dict[str, Tensor], full: bool, labels: Tensor, **settings) -> Tensor:
    states = [tensors[f"state{j}"] for j in range(N)]
    weights = tensors["scores"].softmax(-1)
    return fused_cross_entropy(states, weights, heads_of(tensors, full), labels, **settings)


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "separate"])
@pytest.mark.parametrize("full", [False, True], ids=["plain", "bias-scale"])
@pytest.mark.parametrize(
    ("which", "num_items", "chunk"),
    [("all", None, 1), ("all", None, 5), ("some", None, 4), ("some", 29, 4), ("all", None, R), ("all", 7, 100),
     ("none", None, 4)],
)  # fmt: skip
def test_value_and_all_gradients_equal_the_plain_formula(shared, full, which, num_items, chunk):
    labels = labels_of(which)
    exact = leaves(shared, full)
    reference = plain(exact, full, labels, num_items)
    (2.5 * reference).backward()
    single = leaves(shared, full, torch.float32)
    loss = chunked(single, full, labels, num_items=num_items, chunk_tokens=chunk)
    (2.5 * loss).backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(reference.item(), rel=1e-5, abs=1e-6)
    for name, tensor in single.items():
        scale = float(exact[name].grad.abs().max())
        assert torch.allclose(tensor.grad.double(), exact[name].grad, rtol=1e-4, atol=1e-6 + 1e-5 * scale), (
            name
        )
    assert which == "none" or exact["scores"].grad.abs().max() > 0


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "separate"])
def test_never_holds_tokens_times_vocabulary(shared):
    tokens, width, vocabulary, chunk = 512, 16, 2048, 32
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(tokens, width, generator=generator).requires_grad_() for _ in range(N)]
    scores = torch.randn(tokens, N, generator=generator).requires_grad_()
    heads = [Head(torch.randn(vocabulary, width).requires_grad_()) for _ in range(1 if shared else N)]
    labels = torch.randint(0, vocabulary, (tokens,), generator=generator)
    with LargestTensor() as seen:
        fused_cross_entropy(states, scores.softmax(-1), heads, labels, chunk_tokens=chunk).backward()
    allowed = max(chunk * vocabulary, vocabulary * width, tokens * width * N)
    assert chunk * vocabulary <= seen.largest <= allowed < tokens * vocabulary / 8


def test_forms_only_gradients_that_are_asked_for():
    tensors, labels = leaves(False, False, torch.float32), labels_of("all")
    counts = {}
    for case in ("all", "heads frozen", "no_grad"):
        for name, tensor in tensors.items():
            tensor.requires_grad_(case != "heads frozen" or not name.startswith("head"))
        with LargestTensor() as seen, torch.no_grad() if case == "no_grad" else nullcontext():
            loss = chunked(tensors, False, labels, chunk_tokens=R)
        counts[case] = seen.products
        assert loss.requires_grad == (case != "no_grad")
    assert counts == {"all": 3 * N, "heads frozen": 2 * N, "no_grad": N}


def test_a_second_backward_is_an_error_not_another_gradient():
    """Backward scales the formed gradients in place; it must not go on from scaled ones."""
    tensors = leaves(True, False, torch.float32)
    loss = chunked(tensors, False, labels_of("all"))
    (3 * loss).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"in-?place"):
        loss.backward()


def test_bfloat16_stays_near_float32():
    labels, settings = labels_of("some"), {"chunk_tokens": 4}
    single, half = leaves(False, True, torch.float32), leaves(False, True, torch.bfloat16)
    loss, rough = chunked(single, True, labels, **settings), chunked(half, True, labels, **settings)
    loss.backward()
    rough.backward()
    assert rough.item() == pytest.approx(loss.item(), rel=0.02)
    for name, tensor in half.items():
        assert tensor.grad.dtype == torch.bfloat16
        error = (tensor.grad.float() - single[name].grad).norm() / single[name].grad.norm()
        assert error < 0.05, name


def test_autocast_with_float32_heads():
    """As in a Trainer with bf16: float32 weights, and either dtype of hidden states."""
    labels, reference = labels_of("some"), leaves(False, True, torch.float32)
    loss = chunked(reference, True, labels)
    loss.backward()
    tensors = leaves(False, True, torch.float32)
    states = [tensors["state0"].bfloat16(), tensors["state1"], tensors["state2"].bfloat16()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weights = tensors["scores"].softmax(-1)
        rough = fused_cross_entropy(states, weights, heads_of(tensors, True), labels, chunk_tokens=4)
    rough.backward()
    assert rough.dtype == torch.float32
    assert rough.item() == pytest.approx(loss.item(), rel=0.02)
    for name, tensor in tensors.items():
        assert tensor.grad.dtype == torch.float32
        assert (tensor.grad - reference[name].grad).norm() / reference[name].grad.norm() < 0.05, name


def test_token_losses_are_the_terms_of_the_mean():
    tensors, labels = leaves(False, True, torch.float32), labels_of("all")
    states, weights = [tensors[f"state{j}"] for j in range(N)], tensors["scores"].softmax(-1)
    losses = token_losses(states, weights, heads_of(tensors, True), labels, chunk_tokens=4)
    assert losses.shape == (R,)
    assert not losses.requires_grad
    assert losses.mean().item() == pytest.approx(chunked(tensors, True, labels).item(), rel=1e-5)
    one_hot = F.one_hot(torch.full((R,), 1), N).float()
    own = F.cross_entropy(1.5 * (states[1] @ tensors["head1"].T), labels, reduction="none")
    assert torch.allclose(token_losses(states, one_hot, heads_of(tensors, True), labels), own, atol=1e-5)
    assert token_losses([s[:0] for s in states], weights[:0], heads_of(tensors, True), labels[:0]).shape == (
        0,
    )


@pytest.mark.parametrize("label", [-1, -7, V])
def test_labels_that_are_no_tokens_are_refused(label):
    labels = labels_of("some")
    labels[4] = label
    with pytest.raises(ShapeError, match=rf"labels must lie in \[0, {V}\) or be -100"):
        chunked(leaves(True, False, torch.float32), False, labels)


def test_labels_of_another_shape_are_refused():
    with pytest.raises(ShapeError, match="leading shape of gate_weights"):
        chunked(leaves(True, False, torch.float32), False, labels_of("all")[:-1])
