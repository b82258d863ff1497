"""Optimizer steps of one network, compared with loops written by hand."""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from switokd.config.optimizers import SGD, Adam, AdamW
from switokd.config.sections import Network
from switokd.distillation.topology import Role
from switokd.errors import UsageError
from switokd.training.build import make_optimizer
from switokd.training.ema import moving_average
from switokd.training.learner import ForwardPass, Learner
from switokd.training.optimizer import OptimizerStep, loss_scaler, parameter_groups
from switokd.training.reducer import GradientReducer
from switokd.training.schedules import AccumulationWindow


def network() -> nn.Module:
    """Return a small network with BatchNorm; its weights are always the same."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    """Return batches of 5 samples."""
    g = torch.Generator().manual_seed(1)
    return [
        (torch.randn(5, 6, generator=g), torch.randint(3, (5,), generator=g)) for _ in range(count)
    ]


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9, weight_decay=1e-2)


def learner(
    model: nn.Module | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    dtype: torch.dtype | None = None,
    **settings: Any,
) -> Learner:
    """Return a learner of `model`, or of `network()`; settings: arguments of `OptimizerStep`."""
    model = model or network()
    reducer = GradientReducer("s", list(model.parameters()))
    optimizer_step = OptimizerStep(optimizer or sgd(model), reducer, **settings)
    return Learner("s", Role.TEACHER, model, ForwardPass(model, dtype), optimizer_step)


def learn(one: Learner, count: int, paused: Collection[int] = ()) -> nn.Module:
    """Train for `count` steps as `train_step` does; a paused step has a forward pass too."""
    for step, (x, y) in enumerate(batches(count), 1):
        z = one.forward(x)
        if step not in paused:
            one.backward(F.cross_entropy(z, y), step)
        one.update(step)
    return one.model


def differences(a: nn.Module, b: nn.Module) -> list[str]:
    """Return the names of the tensors that are not equal bit by bit."""
    theirs = b.state_dict()
    return [key for key, value in a.state_dict().items() if not torch.equal(value, theirs[key])]


def plain(count: int) -> nn.Module:
    """Train with the usual PyTorch loop."""
    model = network()
    optimizer = sgd(model)
    for x, y in batches(count):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return model


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"window": AccumulationWindow(1, 3, 7)},
        {"clip_norm": 1e30},
        {"scaler": torch.amp.GradScaler("cpu", init_scale=2.0**10)},
        {"average": moving_average("s", network(), 0.5)},
    ],
    ids=["default", "accumulate-1", "clip-never-reached", "power-of-two-scale", "average"],
)
def test_settings_without_effect_change_no_bit(settings: dict[str, Any]) -> None:
    assert differences(learn(learner(**settings), 7), plain(7)) == []


def accumulated(windows: list[list[int]], learned: Collection[int]) -> nn.Module:
    """Train with the mean of each window's gradients, added up by hand."""
    model = network()
    optimizer = sgd(model)
    data = batches(windows[-1][-1])
    for window in windows:
        total = [torch.zeros_like(p) for p in model.parameters()]
        for step in window:
            x, y = data[step - 1]
            loss = F.cross_entropy(model(x), y)  # BatchNorm's statistics move in paused steps too
            if step in learned:
                grads = torch.autograd.grad(loss, list(model.parameters()))
                total = [t + g / len(window) for t, g in zip(total, grads, strict=True)]
        if learned & set(window):  # type: ignore[operator]
            for parameter, gradient in zip(model.parameters(), total, strict=True):
                parameter.grad = gradient
            optimizer.step()
    return model


@pytest.mark.parametrize(
    ("paused", "why"),
    [
        ([], "none paused"),
        ([2, 4], "some"),
        ([3, 6], "in a window's last step"),
        ([4, 5, 6], "in a whole window"),
        ([1], "in the first step"),
        ([7, 8], "in the whole of the last window"),
    ],
)
def test_accumulation_is_the_mean_over_the_window(paused: list[int], why: str) -> None:
    window = AccumulationWindow(size=3, steps_per_epoch=8, total_steps=8)
    model = learn(learner(window=window), 8, paused)
    expected = accumulated([[1, 2, 3], [4, 5, 6], [7, 8]], set(range(1, 9)) - set(paused))
    torch.testing.assert_close(model.state_dict(), expected.state_dict(), rtol=1e-6, atol=1e-7)
    assert len(differences(model, plain(8))) > 0, why


def test_weights_change_only_at_the_end_of_a_window_with_gradients() -> None:
    one = learner(window=AccumulationWindow(2, 4, 8))
    start = copy.deepcopy([*one.model.parameters()])
    (x, y), *_ = batches(1)
    one.backward(F.cross_entropy(one.forward(x), y), 1)
    one.update(1)
    assert all(map(torch.equal, one.model.parameters(), start))
    one.update(2)  # paused in this step; the first step's gradients count
    moved = copy.deepcopy([*one.model.parameters()])
    assert not any(map(torch.equal, moved[:2], start))
    momentum = one.optimizer.state_dict()["state"]
    for step in (3, 4):
        one.update(step)
    assert all(map(torch.equal, one.model.parameters(), moved))
    torch.testing.assert_close(one.optimizer.state_dict()["state"], momentum, rtol=0, atol=0)


@pytest.mark.parametrize("scaler", [None, torch.amp.GradScaler("cpu", init_scale=2.0**10)])
def test_clipping_limits_the_norm_of_the_whole_gradient(
    scaler: torch.amp.GradScaler | None,
) -> None:
    (x, y), *_ = batches(1)
    free, clipped = learner(), learner(clip_norm=0.1, scaler=scaler)
    for one in (free, clipped):
        one.backward(F.cross_entropy(one.forward(x), y), 1)
    whole = torch.cat([p.grad.flatten() for p in free.model.parameters() if p.grad is not None])
    clipped.update(1)
    grads = [p.grad.flatten() for p in clipped.model.parameters() if p.grad is not None]
    assert whole.norm() > 0.2
    torch.testing.assert_close(torch.cat(grads), whole * (0.1 / whole.norm()), rtol=1e-4, atol=0)


def test_clipping_applies_to_the_mean_of_a_window() -> None:
    (x, y), *_ = batches(1)
    one = learner(window=AccumulationWindow(2, 2, 2), clip_norm=0.1)
    for step in (1, 2):
        one.backward(F.cross_entropy(one.forward(x), y), step)
        one.update(step)
    grads = [p.grad.flatten() for p in one.model.parameters() if p.grad is not None]
    assert torch.cat(grads).norm().item() == pytest.approx(0.1, rel=1e-4)


def test_the_moving_average_equals_a_hand_calculation() -> None:
    average = moving_average("s", network(), 0.75)
    one = learner(average=average)
    by_hand: dict[str, Tensor] = {}
    for step, (x, y) in enumerate(batches(6), 1):
        z = one.forward(x)
        if step != 4:  # paused: weights and average stay unchanged
            one.backward(F.cross_entropy(z, y), step)
        one.update(step)
        if step != 4:
            for key, value in one.model.state_dict().items():
                before = by_hand.get(key, value)
                by_hand[key] = (0.75 * before.double() + 0.25 * value.double()).clone()
    floats = {k: v for k, v in average.module.state_dict().items() if v.is_floating_point()}
    assert {"1.running_mean", "0.weight", "3.bias"} <= set(floats)
    for key, value in floats.items():
        torch.testing.assert_close(value.double(), by_hand[key], rtol=1e-5, atol=1e-7)
    assert one.averaged is average.module
    assert average.module.state_dict()["1.num_batches_tracked"] == 6  # an integer is copied


def test_a_model_that_cannot_be_copied_is_a_usage_error() -> None:
    class Held(nn.Linear):
        def __deepcopy__(self, memo: Any) -> Held:
            raise TypeError("cannot pickle 'generator' object\nmore")

    words = "average starts as a copy of big, which cannot be copied: cannot pickle 'generator'"
    with pytest.raises(UsageError, match=words) as caught:
        moving_average("big", Held(1, 1), 0.9)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("fused", [False, True])
def test_overflowed_gradients_are_skipped_and_the_scale_is_halved(fused: bool) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    model, section = network(), SGD(lr=0.3)
    optimizer = make_optimizer(
        Network(role="student", model="mine:x", optimizer=section), model, fused
    )
    one = learner(model, optimizer, clip_norm=1.0, scaler=scaler)
    start = copy.deepcopy([*one.model.parameters()])
    (x, y), *_ = batches(1)
    one.backward(F.cross_entropy(one.forward(x), y) * 1e36, 1)
    one.update(1)
    assert all(map(torch.equal, one.model.parameters(), start))
    assert scaler.get_scale() == 2.0**9
    one.backward(F.cross_entropy(one.forward(x), y), 2)
    one.update(2)
    assert not any(map(torch.equal, one.model.parameters(), start))


@pytest.mark.parametrize("fused", [False, True])
def test_an_overflow_in_the_first_step_leaves_momentum_at_zero(fused: bool) -> None:
    """PyTorch's fused SGD has allocated its momentum by then, but not initialised it."""

    def made(scaler: torch.amp.GradScaler | None = None) -> Learner:
        model, section = network(), SGD(lr=0.3)
        student = Network(role="student", model="mine:x", optimizer=section)
        optimizer = make_optimizer(student, model, fused)
        return learner(model, optimizer, scaler=scaler)

    ours, plain_one = made(loss_scaler(torch.device("cpu"))), made()
    (x, y), *more = batches(3)
    for size in {p.numel() for p in ours.model.parameters()}:  # fill freed memory with large values
        del [torch.full((size,), 7e30) for _ in range(20)][:]
    ours.backward(F.cross_entropy(ours.forward(x), y) * 1e36, 1)
    ours.update(1)
    held = [state["momentum_buffer"] for state in ours.optimizer.state.values()]
    assert len(held) == len(list(ours.model.parameters()))
    assert not any(buffer.any() for buffer in held)
    for step, (x, y) in enumerate(more, 2):
        for one in (ours, plain_one):
            one.backward(F.cross_entropy(one.forward(x), y), step)
            one.update(step)
    for a, b in zip(ours.model.parameters(), plain_one.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


def test_a_rank_without_a_loss_applies_the_gradients_of_other_ranks() -> None:
    """All shards of this rank were empty, or its teacher was paused in all other steps."""
    scaler = loss_scaler(torch.device("cpu"))
    sides = [(learner(scaler=scaler), scaler.get_scale()), (learner(), 1.0)]
    for one, scale in sides:
        one.backward(None, 1)
        for p in one.model.parameters():
            p.grad = torch.full_like(p, scale)
        one.update(1)
    models = [one.model for one, _ in sides]
    assert differences(*models) == []
    assert differences(models[0], network()) == [name for name, _ in network().named_parameters()]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_only_the_forward_pass_is_in_low_precision(dtype: torch.dtype) -> None:
    inside: list[torch.dtype] = []
    model = network()
    model[3].register_forward_hook(lambda module, args, z: inside.append(z.dtype))  # type: ignore[index]
    one = learner(model, dtype=dtype)
    (x, y), *_ = batches(1)
    z = one.forward(x)
    assert inside == [dtype]
    assert z.dtype is torch.float32
    assert one.predict(x).dtype is torch.float32
    one.backward(F.cross_entropy(z, y), 1)
    one.update(1)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}


@pytest.mark.parametrize("section", [SGD(lr=0.5), Adam(name="adam"), AdamW(name="adamw")])
def test_weight_decay_can_exclude_norms_and_biases(section: SGD | Adam | AdamW) -> None:
    """All gradients are zero, so only weight decay changes weights."""
    moved = {}
    for everywhere in (True, False):
        settings = {"weight_decay": 0.1, "decay_norms_and_biases": everywhere}
        optimizer = section.model_copy(update=settings)
        model = network()
        for parameter in model.parameters():
            parameter.data.fill_(1.0)
            parameter.grad = torch.zeros_like(parameter)
        step = make_optimizer(
            Network(role="student", model="mine:x", optimizer=optimizer), model, True
        )
        step.step()
        moved[everywhere] = {k for k, p in model.named_parameters() if not (p == 1.0).all()}
    assert moved[True] == {name for name, _ in network().named_parameters()}
    assert moved[False] == {"0.weight", "3.weight"}


def test_every_parameter_is_in_one_group() -> None:
    model = network()
    decayed, rest = parameter_groups(model, decay_norms_and_biases=False)
    assert isinstance(decayed, dict)
    assert isinstance(rest, dict)
    assert {id(p) for p in (*decayed["params"], *rest["params"])} == {
        id(p) for p in model.parameters()
    }
    assert "weight_decay" not in decayed
    assert rest["weight_decay"] == 0
    assert parameter_groups(model, True) == list(model.parameters())
    assert len(parameter_groups(nn.Linear(3, 3, bias=False), False)) == 1


def test_adamw_equals_pytorchs() -> None:
    ours, theirs = network(), network()
    section = AdamW(name="adamw", lr=0.02, betas=(0.8, 0.9), weight_decay=0.3)
    optimizers = (
        make_optimizer(Network(role="student", model="mine:x", optimizer=section), ours),
        torch.optim.AdamW(theirs.parameters(), lr=0.02, betas=(0.8, 0.9), weight_decay=0.3),
    )
    for x, y in batches(4):
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    assert differences(ours, theirs) == []
