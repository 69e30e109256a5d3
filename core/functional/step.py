"""One training step and one evaluation step as pure functions. Everything that they need is an argument, everything
that they make is returned, and nothing is changed in place.

There is no `backward()` and no `optimizer.step()`: `torch.func.grad_and_value` turns the loss into a function that
returns its gradient, and the update is arithmetic from old parameters to new ones.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from core.functional import augment, locality, model, optim, prng
from core.spec import CIFAR10, FIELDS, DataInfo, Spec

State = dict  # {"params", "effective", "stats", "average", "opt", "step", "metrics"}: nested dicts of tensors
NEVER = 2**31 - 1  # `bad_step` of an epoch in which all numbers were finite


def init_state(spec: Spec, info: DataInfo = CIFAR10) -> State:
    """The state before the first step, on the CPU: a function of the resolved spec and its seed alone.

    Returns:
        params: the parameters, float32.
        effective: as core.functional.model.effective returns it.
        stats: the batch-norm statistics.
        average: the moving average of `params` and `stats`, without the counters; empty without spec["ema"].
        opt: the state of the optimizer.
        step: the number of steps so far, int32.
        metrics: sums since the start of the epoch: the `loss` over all examples (float64), the number of `correct`
            predictions (int64), and the first `bad_step` (int32), whose loss or gradient was not finite.
    """
    params, stats = model.init(spec, spec["seed"], info)
    envelope = locality.envelopes(spec, info)
    params = locality.rescaled(params, envelope)
    metrics = {
        "loss": torch.tensor(0.0, dtype=torch.float64),
        "correct": torch.tensor(0),
        "bad_step": torch.tensor(NEVER, dtype=torch.int32),
    }
    average = {}
    if spec["ema"]:
        average = {name: t.clone() for name, t in {**params, **stats}.items() if t.is_floating_point()}
    return {
        "params": params,
        "effective": model.effective(params, spec, envelope),
        "stats": stats,
        "average": average,
        "opt": optim.OPTIMIZERS[spec["optimizer"]].init(params),
        "step": torch.tensor(0, dtype=torch.int32),
        "metrics": metrics,
    }


def moving_average(average: dict, new: dict, decay: Tensor, step: Tensor) -> dict:
    """The exponential moving average after a step (Tarvainen and Valpola 2017). In the first steps new weights count
    for more than 1 - decay, so that the initial weights are soon forgotten."""
    t = step.to(decay.dtype)
    kept = torch.minimum(decay, (1 + t) / (10 + t))
    return {name: torch.lerp(new[name], old, kept.to(old.dtype)) for name, old in average.items()}


def trained(state: State) -> tuple[dict, dict]:
    """The parameters and batch-norm statistics that are evaluated: their moving average, if the run keeps one."""
    params, stats = ({name: state["average"].get(name, t) for name, t in state[k].items()} for k in ("params", "stats"))
    return params, stats


def cross_entropy(logits: Tensor, labels: Tensor, smoothing: Tensor) -> Tensor:
    """Cross-entropy of each example, [batch], from logits [batch, classes]; as torch.nn.functional.cross_entropy.

    Args:
        labels: int64 [batch], or the shares of the classes, float32 [batch, classes].
        smoothing: share of each label that is spread evenly over the classes, 0-d.
    """
    log_probabilities = torch.log_softmax(logits, 1)
    if not labels.is_floating_point():
        labels = (labels[:, None] == torch.arange(logits.shape[1], device=labels.device)).to(logits.dtype)
    target = labels * (1 - smoothing) + smoothing / logits.shape[1]
    return -(target * log_probabilities).sum(1)


def hyper_tensors(spec: Spec, steps_per_epoch: int, info: DataInfo = CIFAR10) -> dict[str, Any]:
    """The dynamic values of a resolved spec as tensors on the CPU.

    Returns:
        0-d tensors; the quantiles of `mixup`, [1025]; with local layers `envelope`, what
        core.functional.locality.envelopes returns.
    """
    values = {key: (spec[key], field.dynamic) for key, field in FIELDS.items() if field.dynamic not in ("", "derived")}
    values |= {name: (value, "float64") for name, value in optim.derived(spec, steps_per_epoch).items()}
    values |= {name: (value, "float32") for name, value in augment.derived(spec).items()}
    hyper: dict[str, Any] = {n: torch.tensor(v, dtype=getattr(torch, dtype)) for n, (v, dtype) in values.items()}
    if spec["locality"]:
        hyper["envelope"] = locality.envelopes(spec, info)
    return hyper


def make_train_step(spec: Spec, info: DataInfo = CIFAR10) -> Callable[[State, dict, dict], State]:
    """The train step of a spec.

    Args:
        spec: what core.spec.static returns. Dynamic values are not in it, so no step can use one as a constant.
        info: of the data set.

    Returns:
        A pure function of
            state: as `init_state` makes it;
            data: `images` uint8 [n, inputs], `labels` int64 [n], `order` int64 [steps, batch], the examples of this
                epoch; with spec["whiten"] also `whitening`, as core.functional.augment.whiten takes it;
            hyper: as `hyper_tensors` makes it;
        that returns the state after one step.
    """
    optimizer = optim.OPTIMIZERS[spec["optimizer"]]

    def train_step(state: State, data: dict, hyper: dict) -> State:
        step, order = state["step"], data["order"]
        envelope = hyper["envelope"] if spec["locality"] else {}
        batch = order.shape[1]
        examples = order.index_select(0, (step % order.shape[0]).view(1))[0]
        labels = data["labels"].index_select(0, examples)
        x = augment.augment(data["images"].index_select(0, examples), spec, hyper, step, info)
        target = labels
        if spec["mixup"]:
            x, target = augment.mixup(x, labels, hyper["mixup"], hyper["seed"], step, len(info.classes))
            labels = target.argmax(1)  # the label with the larger share counts as correct
        if spec["whiten"]:
            x = augment.whiten(x, data["whitening"], spec["precision"])
        masks: list[Tensor] = []
        if spec["dropout"]:
            masks = prng.dropout_masks(hyper["seed"], step, hyper["dropout"], model.dropout_widths(spec), batch)

        def loss_function(params: dict) -> tuple[Tensor, tuple]:
            logits, stats = model.forward(params, state["stats"], x, spec, masks, train=True)
            losses = cross_entropy(logits, target, hyper["label_smoothing"])
            return losses.mean(), (stats, logits, losses)

        differentiated = torch.func.grad_and_value(loss_function, has_aux=True)
        grads, (loss, (stats, logits, losses)) = differentiated({**state["params"], **state["effective"]})
        grads = model.enveloped({name: g.to(state["params"][name].dtype) for name, g in grads.items()}, envelope)
        if spec["clip"]:
            grads = optim.clipped(grads, hyper["clip"])
        scheduled = {**hyper, "lr": optim.scheduled_lr(spec["schedule"], hyper, step)}
        params, opt = optimizer.update(grads, state["opt"], state["params"], scheduled, step)
        # A bias gradient sums activation gradients, so a NaN anywhere reaches a bias: checking biases is enough.
        small = torch.stack([g.sum() for g in grads.values() if g.ndim == 1])
        finite = (small.sum() + loss).isfinite()
        metrics = {
            "loss": state["metrics"]["loss"] + losses.detach().to(state["metrics"]["loss"].dtype).sum(),
            "correct": state["metrics"]["correct"] + (logits.argmax(1) == labels).sum(),
            "bad_step": torch.minimum(state["metrics"]["bad_step"], torch.where(finite, NEVER, step)),
        }
        average = state["average"]
        if spec["ema"]:
            average = moving_average(average, {**params, **stats}, hyper["ema"], step)
        return {
            "params": params,
            "effective": model.effective(params, spec, envelope),  # compiled into the loop that writes the new weights
            "stats": stats,
            "average": average,
            "opt": opt,
            "step": step + 1,
            "metrics": metrics,
        }

    return train_step


class Answers(NamedTuple):
    """The predictions of a network for n images.

    Attributes:
        labels: the true classes, int64 [n].
        losses: the cross-entropy of each image without label smoothing, float32 [n].
        predicted: the predicted classes, int64 [n].
        probabilities: of the predicted classes, float32 [n].
        classes: how many classes there are.
    """

    labels: Tensor
    losses: Tensor
    predicted: Tensor
    probabilities: Tensor
    classes: int = 10


def answers(
    params: dict,
    stats: dict,
    images: Tensor,
    labels: Tensor,
    spec: Spec,
    examples: Tensor | None = None,
    batch: int = 1000,
    tta: str = "none",
    info: DataInfo = CIFAR10,
) -> Answers:
    """The predictions of a network in evaluation mode for all examples, in their order.

    Args:
        images: uint8 [n, inputs]. labels: int64 [n].
        examples: int64 indices of images; None for all images.
        batch: the number of images that are evaluated at once.
        tta: average the probabilities over these variants of each image; see core.functional.augment.views.
    """
    if examples is not None:
        labels = labels[examples]
    params = {**params, **model.effective(params, spec)}
    losses, predicted, probabilities = [], [], []
    for start in range(0, len(labels), batch):
        part = slice(start, start + batch)
        x = augment.normalise(images[part] if examples is None else images[examples[part]], info)
        logits = [model.forward(params, stats, view, spec)[0] for view in augment.views(x, tta, spec, info)]
        each = [torch.log_softmax(one, 1) for one in logits]
        log_probabilities = functools.reduce(torch.logaddexp, each) - math.log(len(each))
        losses.append(F.nll_loss(log_probabilities, labels[part], reduction="none"))
        predicted.append((log_probabilities if len(each) > 1 else logits[0]).argmax(1))
        probabilities.append(log_probabilities.amax(1).exp())
    return Answers(labels, torch.cat(losses), torch.cat(predicted), torch.cat(probabilities), len(info.classes))


def summary(result: Answers) -> dict:
    """`loss`, the mean cross-entropy; `accuracy`; for each class the number of `correct` predictions and the `count` of
    its images; `n`, the number of all images."""
    hit, n = result.predicted == result.labels, len(result.labels)
    return {
        "loss": result.losses.cpu().double().sum().item() / n,  # MPS has no float64
        "accuracy": hit.sum().item() / n,
        "correct": result.labels[hit].bincount(minlength=result.classes).tolist(),
        "count": result.labels.bincount(minlength=result.classes).tolist(),
        "n": n,
    }


def details(result: Answers, mistakes: int = 12) -> dict:
    """The details that comparisons and pictures need.

    Returns:
        right: whether each prediction is correct, a bit an image; the first image is the highest bit of the first byte.
        confusion: the number of images of each class (row) by predicted class (column).
        mistakes: the wrong predictions with the highest probabilities: index, label, predicted, probability.
    """
    labels, predicted, probabilities = result.labels.cpu(), result.predicted.cpu(), result.probabilities.cpu()
    hit, n = predicted == labels, result.classes
    bits = F.pad(hit.long(), (0, -len(hit) % 8)).view(-1, 8)
    order = probabilities.masked_fill(hit, -1).sort(descending=True, stable=True).indices
    return {
        "right": bytes((bits << torch.arange(7, -1, -1)).sum(1).tolist()),
        "confusion": (n * labels + predicted).bincount(minlength=n * n).view(n, n).tolist(),
        "mistakes": [
            {
                "index": i,
                "label": int(labels[i]),
                "predicted": int(predicted[i]),
                "probability": round(float(probabilities[i]), 6),
            }
            for i in order[: min(mistakes, int((~hit).sum()))].tolist()
        ],
    }


def evaluate(*arguments: Any, **options: Any) -> dict:
    """Loss and accuracy in evaluation mode: the `summary` of `answers`, which takes the same arguments."""
    return summary(answers(*arguments, **options))
