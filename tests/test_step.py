"""The train step and the evaluation step: pure, right against torch.nn and torch.optim, and honest about NaN."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.optim.lr_scheduler import OneCycleLR

from core.data import loader
from core.functional import augment, model, prng, step
from core.functional.tree import flatten, leaves, tree_map
from core.spec import static
from tests.test_optim import PEERS


def close(one, other, rtol, atol, but=()):
    one, other = flatten(one), flatten(other)
    assert one.keys() == other.keys()
    for path in one:
        if not path.endswith(tuple(but) or "//"):
            torch.testing.assert_close(one[path], other[path], rtol=rtol, atol=atol, msg=lambda m, p=path: f"{p}: {m}")


VARIANTS = [
    {},
    {"norm": "none", "optimizer": "sgd", "schedule": "cosine"},
    {"augment": "flip+shift", "optimizer": "adamw", "weight_decay": 0.1, "label_smoothing": 0.1},
    {"whiten": 20, "ema": 0.9, "precision": "bfloat16", "augment": "flip+shift", "shift_fill": "reflect"},
    {"augment": "flip+shift", "cutout": 8, "mixup": 0.5},
    {"augment": "flip", "rotate": 20.0, "zoom": 0.2, "whiten": 20, "mixup": 0.5},
    {"optimizer": "muon", "weight_decay": 0.1, "clip": 0.5},
    {"optimizer": "nesterov", "schedule": "one-cycle", "clip": 0.5, "precision": "bfloat16"},
    {"norm": "layer", "expansion": 2, "activation": "gelu", "widths": [24, 24, 16]},
    {"locality": [2.0, 5.0], "ema": 0.9},
    {"locality": [3.0], "whiten": 20, "augment": "flip"},
]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_the_step_is_pure(small_spec, step_inputs, changes):
    """Its inputs are as before, its outputs share no memory with them, and it gives the same bits again."""
    spec = small_spec(**changes)
    inputs = dict(zip(("state", "data", "hyper"), step_inputs(spec), strict=True))
    before = {path: t.clone() for path, t in flatten(inputs).items()}
    train_step = step.make_train_step(static(spec))
    generator = torch.get_rng_state()
    one, other = train_step(**inputs), train_step(**inputs)
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(t, before[path]) for path, t in flatten(inputs).items())
    shapes = [{path: (t.dtype, t.shape) for path, t in flatten(tree).items()} for tree in (one, inputs["state"])]
    assert shapes[0] == shapes[1]
    memory = {t.untyped_storage().data_ptr() for t in leaves(inputs)}
    assert not memory & {t.untyped_storage().data_ptr() for t in leaves(one)}
    close(one, other, 0, 0)
    assert int(one["step"]) == 1


def batches(data, steps):
    for i in range(steps):
        examples = data["order"][i % len(data["order"])]
        yield data["images"][examples], data["labels"][examples]


@pytest.mark.parametrize(
    "changes", [{"norm": "batch"}, {"norm": "none"}, {"norm": "layer"}, {"norm": "layer", "expansion": 4}], ids=str
)
def test_three_steps_against_a_module_in_float64(small_spec, step_inputs_in_float64, sequential, changes):
    """In float64, so that Adam does not turn the rounding error of a zero gradient (a bias before batch norm has one)
    into a step of its own."""
    spec = small_spec(dropout=0.0, weight_decay=0.01, **changes)
    state, data, hyper = step_inputs_in_float64(spec)
    module = sequential(spec).double().train()
    module.load_state_dict({**state["params"], **state["stats"]}, strict=True)
    adam = torch.optim.Adam(module.parameters(), lr=spec["lr"], weight_decay=0.01)
    train_step = step.make_train_step(static(spec))
    for images, labels in batches(data, 3):
        adam.zero_grad()
        F.cross_entropy(module(augment.normalise(images)), labels).backward()
        adam.step()
        state = train_step(state, data, hyper)
        for name, value in module.state_dict().items():
            ours = {**state["params"], **state["stats"]}[name]
            torch.testing.assert_close(ours, value, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("name", ["nesterov", "muon"])
def test_a_run_with_one_cycle_and_clipping_against_a_module_in_float64(
    small_spec, step_inputs_in_float64, sequential, name
):
    """All eight steps of the cycle; gradients of both more and less than the largest norm."""
    # Without batch norm: what Adam makes of the rounding error of a zero gradient is not to be compared.
    spec = small_spec(
        dropout=0.0, norm="none", optimizer=name, lr=0.05, weight_decay=0.01, schedule="one-cycle", clip=1.25, epochs=1
    )
    state, data, hyper = step_inputs_in_float64(spec)
    module = sequential(spec).double().train()
    module.load_state_dict(state["params"], strict=True)
    peer = PEERS[name](list(module.parameters()), lr=spec["lr"], weight_decay=0.01)
    schedules = [
        OneCycleLR(each, max_lr=spec["lr"], total_steps=8, cycle_momentum=False)
        for each in getattr(peer, "peers", [peer])
    ]
    train_step = step.make_train_step(static(spec))
    norms = []
    for images, labels in batches(data, 8):
        module.zero_grad()
        F.cross_entropy(module(augment.normalise(images)), labels).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(module.parameters(), spec["clip"]).item())
        peer.step()
        state = train_step(state, data, hyper)
        for parameter, value in module.state_dict().items():
            torch.testing.assert_close(
                state["params"][parameter], value, rtol=1e-9, atol=1e-9, msg=lambda m, n=parameter: f"{n}: {m}"
            )
        if len(norms) < 8:
            for schedule in schedules:
                schedule.step()
    assert min(norms) < spec["clip"] < max(norms)


def test_ten_losses_against_a_module(small_spec, step_inputs, sequential):
    """In the float32 of a real run, loss and number of right answers step by step."""
    spec = small_spec(dropout=0.0)
    state, data, hyper = step_inputs(spec)
    module = sequential(spec).train()
    module.load_state_dict({**state["params"], **state["stats"]}, strict=True)
    adam = torch.optim.Adam(module.parameters(), lr=spec["lr"])
    train_step = step.make_train_step(static(spec))
    total = 0.0
    for images, labels in batches(data, 10):
        adam.zero_grad()
        loss = F.cross_entropy(module(augment.normalise(images)), labels)
        loss.backward()
        adam.step()
        state = train_step(state, data, hyper)
        ours = state["metrics"]["loss"].item() / len(labels) - total
        total += ours
        assert ours == pytest.approx(loss.item(), rel=1e-4)
    assert int(state["step"]) == 10


def test_the_loss_falls_on_real_images(small_spec, cifar10_slice):
    """All that a run has (dropout, batch norm, Adam) on 512 images, ten times over."""
    spec = small_spec(widths=[64, 32])
    images, labels = (t[:512] for t in cifar10_slice)
    train_step, state = step.make_train_step(static(spec)), step.init_state(spec)
    hyper = step.hyper_tensors(spec, 8)
    before = step.evaluate(state["params"], state["stats"], images, labels, spec)
    for epoch in range(10):
        order = loader.epoch_order(torch.arange(512), 64, spec["seed"], epoch)
        for _ in range(8):
            state = train_step(state, {"images": images, "labels": labels, "order": order}, hyper)
    after = step.evaluate(state["params"], state["stats"], images, labels, spec)
    assert after["loss"] < 0.7 * before["loss"]
    assert after["accuracy"] > 0.5
    assert int(state["metrics"]["bad_step"]) == step.NEVER


def test_metrics_are_sums_over_the_examples(small_spec, step_inputs):
    spec = small_spec(dropout=0.0)
    state, data, hyper = step_inputs(spec)
    images, labels = next(batches(data, 1))
    logits, _ = model.forward(state["params"], state["stats"], augment.normalise(images), spec, train=True)
    after = step.make_train_step(static(spec))(state, data, hyper)
    assert after["metrics"]["loss"].item() == pytest.approx(F.cross_entropy(logits, labels, reduction="sum").item())
    assert after["metrics"]["correct"].item() == (logits.argmax(1) == labels).sum().item()


def test_the_place_in_the_order_follows_the_step(small_spec, step_inputs):
    """Step n takes row n, and after the last row the first one of the next epoch's order."""
    spec = small_spec(dropout=0.0)
    state, data, hyper = step_inputs(spec)
    train_step = step.make_train_step(static(spec))
    for n in (0, 3, 7, 8, 19):
        at = {**state, "step": torch.tensor(n, dtype=torch.int32)}
        alone = {**data, "order": data["order"][n % 8][None]}
        close(train_step(at, data, hyper), train_step(at, alone, hyper), 0, 0)


def test_seed_and_step_change_the_mask_and_nothing_else_does(small_spec, step_inputs):
    spec = small_spec()
    state, data, hyper = step_inputs(spec)
    data = {**data, "order": data["order"][:1]}
    train_step = step.make_train_step(static(spec))

    def loss(seed=0, n=0):
        at = {**state, "step": torch.tensor(n, dtype=torch.int32)}
        return train_step(at, data, {**hyper, "seed": torch.tensor(seed, dtype=torch.int32)})["metrics"]["loss"].item()

    assert loss() == loss()
    assert len({loss(), loss(seed=1), loss(n=1), loss(n=2)}) == 4


@pytest.mark.parametrize(
    "name", ["lr", "weight_decay", "clip", "label_smoothing", "dropout", "rotate", "zoom", "cutout", "mixup"]
)
def test_every_hyper_parameter_reaches_the_step(small_spec, step_inputs, name):
    spec = small_spec(optimizer="sgd", clip=0.1, rotate=5, zoom=0.1, cutout=8, mixup=0.2)
    state, data, hyper = step_inputs(spec)
    train_step = step.make_train_step(static(spec))
    one = train_step(state, data, hyper)["params"]["1.weight"]
    other = train_step(state, data, {**hyper, name: hyper[name] + (1 if name == "cutout" else 0.25)})["params"][
        "1.weight"
    ]
    assert not torch.equal(one, other)


def test_the_moving_average_is_over_parameters_and_statistics(small_spec, step_inputs):
    """Against the recursion written out, where half of the steps use a smaller decay than they are given."""
    spec = small_spec(ema=0.5)
    state, data, hyper = step_inputs(spec)
    train_step = step.make_train_step(static(spec))
    expected = {name: t.double() for name, t in {**state["params"], **state["stats"]}.items()}
    for n in range(16):
        state = train_step(state, data, hyper)
        decay = min(0.5, (1 + n) / (10 + n))
        new = {**state["params"], **state["stats"]}
        expected = {name: decay * old + (1 - decay) * new[name].double() for name, old in expected.items()}
    assert {name for name in expected if name not in state["average"]} == {
        "2.num_batches_tracked",
        "6.num_batches_tracked",
    }
    for name, t in state["average"].items():
        torch.testing.assert_close(t.double(), expected[name], rtol=1e-5, atol=1e-6)
    params, stats = step.trained(state)
    assert all({**params, **stats}[name] is t for name, t in state["average"].items())
    assert stats["2.num_batches_tracked"].item() == 16


def test_without_an_average_the_trained_network_is_the_last(small_spec, step_inputs):
    state, *_ = step_inputs(small_spec())
    assert step.trained(state) == (state["params"], state["stats"])


@pytest.mark.parametrize(
    ("tta", "fill", "mode"),
    [("flip", "zeros", "constant"), ("shifts", "zeros", "constant"), ("shifts", "reflect", "reflect")],
)
def test_answers_with_tta_average_the_probabilities(small_spec, invented, tta, fill, mode):
    """Against a loop in NumPy over the moves."""
    spec = small_spec(shift_fill=fill)
    params, stats = model.init(spec, 1)
    images, labels = invented.test_images, invented.test_labels
    x = augment.normalise(images).view(-1, 3, 32, 32).numpy()
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)), mode)
    total = 0
    for down, right in [(1, 1)] if tta == "flip" else itertools.product(range(3), repeat=2):
        moved = padded[:, :, down : down + 32, right : right + 32]
        for view in (moved, moved[..., ::-1]):
            view = torch.from_numpy(view.copy()).flatten(1)
            total = total + model.forward(params, stats, view, spec)[0].softmax(1)
    mean = total / (2 if tta == "flip" else 18)
    found = step.answers(params, stats, images, labels, spec, tta=tta)
    assert torch.equal(found.predicted, mean.argmax(1))
    torch.testing.assert_close(found.probabilities, mean.amax(1))
    torch.testing.assert_close(found.losses, -mean.log()[torch.arange(100), labels])
    flipped = torch.from_numpy(images.view(-1, 3, 32, 32).numpy()[..., ::-1].copy()).flatten(1)
    other = step.answers(params, stats, flipped, labels, spec, tta=tta)
    torch.testing.assert_close(found.losses, other.losses)
    assert not torch.equal(found.losses, step.answers(params, stats, images, labels, spec).losses)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
def test_cross_entropy_against_torch(smoothing):
    logits, labels = torch.randn(50, 10, dtype=torch.float64) * 5, torch.arange(50) % 10
    expected = F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
    ours = step.cross_entropy(logits, labels, torch.tensor(smoothing, dtype=torch.float64))
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    shares = torch.rand(50, 10, dtype=torch.float64).softmax(1)
    expected = F.cross_entropy(logits, shares, reduction="none", label_smoothing=smoothing)
    ours = step.cross_entropy(logits, shares, torch.tensor(smoothing, dtype=torch.float64))
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def test_the_loss_of_mixed_examples_is_that_of_both_labels_by_their_shares(small_spec, step_inputs):
    """Against torch, from the same draws; the prediction is right if it is the label with the larger share."""
    spec = small_spec(dropout=0.0, mixup=1.0, label_smoothing=0.1)
    state, data, hyper = step_inputs(spec)
    images, labels = next(batches(data, 1))
    share = prng.inverse_transform(prng.bits(hyper["seed"], prng.MIXUP, state["step"], 64), hyper["mixup"])
    x, partners = augment.normalise(images), torch.arange(-1, 63)
    mixed = torch.lerp(x[partners], x, share[:, None])
    logits, _ = model.forward(state["params"], state["stats"], mixed, spec, train=True)
    one, other = (F.cross_entropy(logits, y, label_smoothing=0.1, reduction="none") for y in (labels, labels[partners]))
    after = step.make_train_step(static(spec))(state, data, hyper)
    expected = (share * one + (1 - share) * other).sum().item()
    assert after["metrics"]["loss"].item() == pytest.approx(expected, rel=1e-5)
    larger = torch.where(share > 0.5, labels, labels[partners])
    assert after["metrics"]["correct"].item() == (logits.argmax(1) == larger).sum().item()
    assert 10 < (share > 0.5).sum() < 54


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_the_first_bad_step_is_kept(small_spec, step_inputs, bad):
    """Even if a later step is finite again, since its weights cannot be trusted."""
    spec = small_spec()
    state, data, hyper = step_inputs(spec)
    train_step = step.make_train_step(static(spec))
    for n in range(6):
        if n == 3:
            good = state
            state = {**state, "params": {**state["params"], "9.weight": state["params"]["9.weight"] * bad}}
        state = train_step(state, data, hyper)
        assert int(state["metrics"]["bad_step"]) == (step.NEVER if n < 3 else 3)
        if n == 3:
            state = {**good, "step": state["step"], "metrics": state["metrics"]}
    assert all(t.isfinite().all() for t in state["params"].values())


def test_a_learning_rate_that_diverges_is_noticed(small_spec, step_inputs):
    spec = small_spec(optimizer="sgd", lr=1e30, norm="none", dropout=0.0)
    state, data, hyper = step_inputs(spec)
    train_step = step.make_train_step(static(spec))
    for _ in range(4):
        state = train_step(state, data, hyper)
    assert 0 < int(state["metrics"]["bad_step"]) < 4


@pytest.mark.parametrize("changes", [VARIANTS[0], *VARIANTS[2:]], ids=str)
def test_a_vmapped_step_equals_each_seed_alone(small_spec, step_inputs, changes):
    """A cohort of two seeds (and two learning rates) with an order of its own each; the images are shared."""
    specs = [small_spec(**changes, seed=0), small_spec(**changes, seed=1, lr=5e-4)]
    train_step = step.make_train_step(static(specs[0]))
    inputs = [step_inputs(spec) for spec in specs]
    alone = [train_step(*each) for each in inputs]
    state, data, hyper = (tree_map(lambda *t: torch.stack(t), *trees) for trees in zip(*inputs, strict=True))
    data = {**inputs[0][1], "order": data["order"]}
    shared = {name: 0 if name == "order" else None for name in data}
    together = torch.func.vmap(train_step, in_dims=(0, shared, 0))(state, data, hyper)
    for i, one in enumerate(alone):
        # A bias before batch norm has a gradient of rounding errors, which Adam scales up to a whole step. What Muon
        # makes of a weight is rounded in other places; see test_optim.py.
        but = ("1.bias", "5.bias", *(["params/5.weight"] if changes.get("optimizer") == "muon" else []))
        close(tree_map(lambda t, i=i: t[i], together), one, 1e-5, 1e-5, but)


def test_initial_state_is_a_function_of_the_spec(small_spec):
    close(step.init_state(small_spec()), step.init_state(small_spec()), 0, 0)
    one, other = step.init_state(small_spec(seed=1)), step.init_state(small_spec(seed=2))
    assert not torch.equal(one["params"]["1.weight"], other["params"]["1.weight"])
    assert int(one["step"]) == 0
    assert int(one["metrics"]["bad_step"]) == step.NEVER


@pytest.mark.parametrize("chosen", [None, torch.arange(90, 7, -3)], ids=["all", "some"])
def test_evaluation_counts_every_example(small_spec, invented, sequential, chosen):
    """The tail that does not fill a batch too."""
    spec = small_spec()
    params, stats = model.init(spec, 0)
    module = sequential(spec).eval()
    module.load_state_dict({**params, **stats}, strict=True)
    images, labels = invented.test_images, invented.test_labels
    found = step.evaluate(params, stats, images, labels, spec, chosen, batch=13)
    if chosen is not None:
        images, labels = images[chosen], labels[chosen]
    logits = module(augment.normalise(images)).detach()
    right = logits.argmax(1) == labels
    assert found["n"] == len(labels) == sum(found["count"])
    assert found["correct"] == [int(right[labels == c].sum()) for c in range(10)]
    assert found["count"] == [int((labels == c).sum()) for c in range(10)]
    assert found["accuracy"] == right.sum().item() / len(labels)
    assert found["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)


def test_the_answers_are_those_of_the_network(small_spec, invented, sequential):
    spec = small_spec()
    params, stats = model.init(spec, 0)
    module = sequential(spec).eval()
    module.load_state_dict({**params, **stats}, strict=True)
    images, labels = invented.test_images[:99], invented.test_labels[:99]  # 99 bits do not fill their bytes
    found = step.answers(params, stats, images, labels, spec, batch=13)
    probabilities = module(augment.normalise(images)).detach().softmax(1)
    torch.testing.assert_close(found.probabilities, probabilities.amax(1))
    assert torch.equal(found.predicted, probabilities.argmax(1))
    assert step.summary(found) == step.evaluate(params, stats, images, labels, spec, batch=13)

    details, right = step.details(found), found.predicted == labels
    assert len(details["right"]) == 13
    bits = [bool(details["right"][i // 8] & 128 >> i % 8) for i in range(104)]
    assert bits == [*right.tolist(), *[False] * 5]
    assert details["confusion"] == [
        [int(((labels == one) & (found.predicted == other)).sum()) for other in range(10)] for one in range(10)
    ]
    wrong = sorted(((-float(p), i) for i, p in enumerate(found.probabilities) if not right[i]))
    assert [(m["index"], m["probability"]) for m in details["mistakes"]] == [(i, round(-p, 6)) for p, i in wrong[:12]]
    assert all(
        (m["label"], m["predicted"]) == (labels[m["index"]], found.predicted[m["index"]]) for m in details["mistakes"]
    )
    perfect = step.details(found._replace(predicted=labels))
    assert perfect["mistakes"] == []
    assert sum(map(int.bit_count, perfect["right"])) == 99
