"""The network against torch.nn: forward, gradients, batch norm, dropout, initialisation, names."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from core.functional import model, prng
from core.predict import Residual
from core.spec import resolve

VARIANTS = [
    {},
    {"dropout": 0.0},
    {"norm": "none"},
    {"norm": "none", "dropout": 0.0, "activation": "relu", "widths": [24]},
    {"activation": "gelu"},
    {"activation": "tanh", "widths": [8, 8, 8, 8]},
    {"widths": []},
    {"norm": "layer"},
    {"norm": "layer", "expansion": 4, "activation": "gelu"},
    {"expansion": 2, "widths": [12, 12, 7]},
    {"norm": "none", "expansion": 3, "dropout": 0.0, "widths": [8]},
]
BATCH = 20


def double(tensors):
    return {name: t.double() if t.is_floating_point() else t for name, t in tensors.items()}


def images(batch=BATCH, dtype=torch.float64):
    return torch.randn(batch, 3072, dtype=dtype)


@pytest.fixture(params=VARIANTS, ids=str)
def spec(request, small_spec):
    return small_spec(**request.param)


@pytest.fixture
def twins(spec, sequential):
    """Parameters and statistics in float64, with values that no initialisation has, and the module with the same."""
    params, stats = map(double, model.init(spec, 0))
    params = {name: p + 0.1 * torch.randn_like(p) if p.ndim == 1 else p for name, p in params.items()}
    stats = {n: s + 0.2 * torch.rand_like(s) if s.is_floating_point() else s + 3 for n, s in stats.items()}
    module = sequential(spec).double()
    module.load_state_dict({**params, **stats}, strict=True)
    return params, stats, module


def test_names_and_shapes_are_those_of_sequential(spec, sequential):
    params, stats = model.init(spec, 0)
    module = sequential(spec)
    module.load_state_dict({**params, **stats}, strict=True)
    assert set(params) == {name for name, _ in module.named_parameters()}
    assert set(stats) == {name for name, _ in module.named_buffers()}
    assert {**params, **stats}.keys() == module.state_dict().keys()
    assert all(t.dtype == {**params, **stats}[name].dtype for name, t in module.state_dict().items())
    for expected, found in zip((params, stats), model.template(spec), strict=True):
        assert {n: (t.shape, t.dtype) for n, t in expected.items()} == {n: (t.shape, t.dtype) for n, t in found.items()}
        assert all(t.is_meta for t in found.values())


def test_the_layers_of_sequential_written_out(sequential):
    """The module of these tests is built from the table of layers, so its order is said here once by hand."""
    spec = resolve({"widths": [8, 4], "activation": "gelu", "dropout": 0.3})
    hidden = [nn.BatchNorm1d, nn.GELU, nn.Dropout, nn.Linear]
    assert [type(module) for module in sequential(spec)] == [nn.Flatten, nn.Linear, *hidden, *hidden]
    assert [(m.in_features, m.out_features) for m in sequential(spec) if isinstance(m, nn.Linear)] == [
        (3072, 8),
        (8, 4),
        (4, 10),
    ]
    assert {m.p for m in sequential(spec) if isinstance(m, nn.Dropout)} == {0.3}
    plain = resolve({"widths": [8], "activation": "relu", "norm": "none", "dropout": 0.0})
    assert [type(module) for module in sequential(plain)] == [nn.Flatten, nn.Linear, nn.ReLU, nn.Linear]


def test_the_blocks_of_sequential_written_out(sequential):
    """As above, of residual blocks; and a mask for the hidden layer of each."""
    spec = resolve({"widths": [8, 8, 4], "norm": "layer", "activation": "gelu", "dropout": 0.3, "expansion": 4})
    network = sequential(spec)
    assert [type(module) for module in network] == [
        *(nn.Flatten, nn.Linear, Residual, Residual, nn.Linear, Residual, nn.Linear)
    ]
    for i in (2, 3, 5):
        assert [type(module) for module in network[i]] == [nn.LayerNorm, nn.Linear, nn.GELU, nn.Dropout, nn.Linear]
    found = [(m.in_features, m.out_features) for m in network.modules() if isinstance(m, nn.Linear)]
    assert found == [(3072, 8), (8, 32), (32, 8), (8, 32), (32, 8), (8, 4), (4, 16), (16, 4), (4, 10)]
    assert model.dropout_widths(spec) == [32, 32, 16]
    assert model.dropout_widths(resolve({**spec, "expansion": 0})) == [8, 8, 4]
    plain = sequential(resolve({"widths": [3072], "norm": "none", "dropout": 0.0, "expansion": 1}))
    assert [type(module) for module in plain] == [nn.Flatten, nn.Linear, Residual, nn.Linear]
    assert [type(module) for module in plain[2]] == [nn.Linear, nn.LeakyReLU, nn.Linear]


def test_a_residual_block_against_its_formula():
    """x + W2 gelu(W1 norm(x)), and no norm before the head."""
    spec = resolve({"widths": [6], "norm": "layer", "activation": "gelu", "dropout": 0.0, "expansion": 4})
    params, stats = map(double, model.init(spec, 0))
    params = {name: p + 0.1 * torch.randn_like(p) for name, p in params.items()}
    assert list(params) == [
        f"{layer}.{name}" for layer in ("1", "2.0", "2.1", "2.3", "3") for name in ("weight", "bias")
    ]
    x = images()
    h = F.linear(x, params["1.weight"], params["1.bias"])
    wide = F.linear(F.layer_norm(h, (6,), params["2.0.weight"], params["2.0.bias"]), params["2.1.weight"])
    h = h + F.linear(F.gelu(wide + params["2.1.bias"]), params["2.3.weight"], params["2.3.bias"])
    logits = F.linear(h, params["3.weight"], params["3.bias"])
    for train in (False, True):
        found, _ = model.forward(params, stats, x, spec, train=train)
        torch.testing.assert_close(found, logits, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", model.LAYERS)
def test_a_layer_updates_its_statistics(kind):
    layer = model.LAYERS[kind]
    made = layer.init(5, 5, torch.Generator().manual_seed(0))
    h = torch.randn(5, 3)
    out, after = layer.apply(made, h, model.Context("float32", True, iter([torch.ones(5, 3)])))
    assert out.shape == h.shape
    assert after.keys() == set(layer.statistics) <= made.keys()
    assert {n: (t.shape, t.dtype) for n, t in after.items()} == {n: (made[n].shape, made[n].dtype) for n in after}


@pytest.mark.parametrize("count", [0, 1, 3])
def test_the_masks_are_as_many_as_the_dropout_layers(small_spec, count):
    spec = small_spec(widths=[32, 32])
    params, stats = model.init(spec, 0)
    masks = [torch.ones(32, 4)] * count
    with pytest.raises(ValueError, match=f"there are {'more' if count > 2 else 'fewer'} dropout masks than dropout"):
        model.forward(params, stats, torch.randn(4, 3072), spec, masks, train=True)


def test_evaluation_mode(spec, twins):
    params, stats, module = twins
    x = images()
    logits, after = model.forward(params, stats, x, spec)
    assert logits.shape == (BATCH, 10)
    torch.testing.assert_close(logits, module.eval()(x), rtol=1e-11, atol=1e-11)
    assert after.keys() == stats.keys()
    assert all(torch.equal(after[name], stats[name]) for name in stats)


def test_evaluation_mode_treats_each_image_independently(spec, twins):
    params, stats, _ = twins
    x = images()
    together, _ = model.forward(params, stats, x, spec)
    alone = torch.cat([model.forward(params, stats, x[i : i + 1], spec)[0] for i in range(BATCH)])
    torch.testing.assert_close(together, alone, rtol=1e-11, atol=1e-11)


def test_images_may_come_as_planes(spec, twins):
    params, stats, _ = twins
    x = images()
    assert torch.equal(
        model.forward(params, stats, x, spec)[0], model.forward(params, stats, x.view(-1, 3, 32, 32), spec)[0]
    )


def masks_for(spec, batch=BATCH):
    if spec["dropout"] == 0:
        return []
    seed, step = torch.tensor([1, 2], dtype=torch.int32)
    masks = prng.dropout_masks(seed, step, torch.tensor(spec["dropout"]), model.dropout_widths(spec), batch)
    return [mask.double() for mask in masks]


def test_train_mode_forward_gradients_and_statistics(spec, twins, sequential):
    """Both get the same dropout masks."""
    params, stats, _ = twins
    masks = masks_for(spec)
    module = sequential(spec, masks).double()
    module.load_state_dict({**params, **stats}, strict=True)
    x, labels = images(), torch.arange(BATCH) % 10

    def loss(params):
        logits, after = model.forward(params, stats, x, spec, masks, train=True)
        return F.cross_entropy(logits, labels), (logits, after)

    grads, (_, (logits, after)) = torch.func.grad_and_value(loss, has_aux=True)(params)
    expected = module.train()(x)
    F.cross_entropy(expected, labels).backward()
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(
            grads[name], parameter.grad, rtol=1e-9, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
        )
    buffers = dict(module.named_buffers())
    assert after.keys() == buffers.keys()
    for name, value in after.items():
        torch.testing.assert_close(value, buffers[name], rtol=1e-12, atol=1e-12)


def test_train_mode_in_float32(sequential):
    """The default network's layers at the precision in which they are trained."""
    spec = resolve({"dropout": 0.0})
    params, stats = model.init(spec, 0)
    module = sequential(spec)
    module.load_state_dict({**params, **stats}, strict=True)
    x = images(64, torch.float32)
    logits, after = model.forward(params, stats, x, spec, train=True)
    torch.testing.assert_close(logits, module.train()(x), rtol=1e-4, atol=1e-5)
    for name, value in module.named_buffers():
        torch.testing.assert_close(after[name], value, rtol=1e-4, atol=1e-6)


def test_forward_changes_nothing(spec, twins):
    params, stats, _ = twins
    x = images()
    before = {name: t.clone() for name, t in {**params, **stats, "x": x}.items()}
    model.forward(params, stats, x, spec, masks_for(spec), train=True)
    assert all(torch.equal(t, before[name]) for name, t in {**params, **stats, "x": x}.items())


def test_train_mode_differs_from_evaluation_mode(small_spec):
    spec = small_spec()
    params, stats = map(double, model.init(spec, 0))
    x = images()
    evaluated, _ = model.forward(params, stats, x, spec)
    ones = [torch.ones_like(mask) for mask in masks_for(spec)]
    normalised, _ = model.forward(params, stats, x, spec, ones, train=True)
    with_dropout, _ = model.forward(params, stats, x, spec, masks_for(spec), train=True)
    assert not torch.allclose(evaluated, normalised)
    assert not torch.allclose(normalised, with_dropout)


@pytest.mark.parametrize(("features", "batch"), [(5, 2), (7, 3), (64, 128)])
def test_batch_norm_against_torch(features, batch):
    z = torch.randn(features, batch, dtype=torch.float64) * 3 + 7
    weight, bias = torch.randn(2, features, dtype=torch.float64)
    mean, variance = torch.randn(features, dtype=torch.float64), torch.rand(features, dtype=torch.float64)
    running = mean.clone(), variance.clone()
    expected = F.batch_norm(z.t(), *running, weight, bias, training=True, momentum=0.1, eps=1e-5)
    out, batch_mean, batch_variance = model.batch_norm(z, weight, bias)
    torch.testing.assert_close(out.t(), expected, rtol=1e-12, atol=1e-12)
    for before, now, after in zip((mean, variance), (batch_mean, batch_variance), running, strict=True):
        torch.testing.assert_close(0.9 * before + 0.1 * now, after, rtol=1e-12, atol=1e-12)


def test_batch_norm_gradients_against_torch():
    inputs = [torch.randn(6, 9, dtype=torch.float64), *torch.randn(2, 6, dtype=torch.float64)]
    weights = torch.randn(6, 9, dtype=torch.float64)

    def ours(z, weight, bias):
        return (model.batch_norm(z, weight, bias)[0] * weights).sum()

    def theirs(z, weight, bias):
        return (F.batch_norm(z.t(), None, None, weight, bias, training=True).t() * weights).sum()

    for a, b in zip(*(torch.func.grad(f, argnums=(0, 1, 2))(*inputs) for f in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("features", "batch"), [(1, 3), (5, 2), (7, 3), (64, 128)])
def test_layer_norm_against_torch(features, batch):
    """Output and gradients, far from zero mean and unit variance."""
    inputs = [torch.randn(features, batch, dtype=torch.float64) * 3 + 7, *torch.randn(2, features).double()]
    weights = torch.randn(features, batch, dtype=torch.float64)

    def ours(h, weight, bias):
        out, stats = model.layer_norm({"weight": weight, "bias": bias}, h, model.Context("float32", True, iter(())))
        assert not stats
        return (out * weights).sum(), out

    def theirs(h, weight, bias):
        out = F.layer_norm(h.t(), (features,), weight, bias, eps=1e-5).t()
        return (out * weights).sum(), out

    found = [torch.func.grad(f, argnums=(0, 1, 2), has_aux=True)(*inputs) for f in (ours, theirs)]
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-12, atol=1e-12)
    for a, b in zip(found[0][0], found[1][0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_statistics_follow_several_batches(small_spec, sequential):
    spec = small_spec(dropout=0.0)
    params, stats = map(double, model.init(spec, 0))
    module = sequential(spec).double().train()
    module.load_state_dict({**params, **stats}, strict=True)
    for _ in range(5):
        x = images()
        _, stats = model.forward(params, stats, x, spec, train=True)
        module(x)
    for name, value in module.named_buffers():
        torch.testing.assert_close(stats[name], value, rtol=1e-12, atol=1e-12)
    assert stats["2.num_batches_tracked"] == 5


def test_dropout_scales_so_that_the_mean_stays():
    """A linear layer behind a mask gives, on average over many draws, what it gives without."""
    spec = resolve({"widths": [4096], "norm": "none", "activation": "relu", "dropout": 0.3})
    params, stats = model.init(spec, 0)
    x = images(1, torch.float32)
    without, _ = model.forward(params, stats, x, spec)
    n = 400
    drawn = torch.stack(
        [
            model.forward(
                params,
                stats,
                x,
                spec,
                prng.dropout_masks(*torch.tensor([0, i], dtype=torch.int32), torch.tensor(0.3), [4096], 1),
                train=True,
            )[0]
            for i in range(n)
        ]
    )
    error = (drawn.mean(0) - without).abs() / (drawn.std(0) / n**0.5)
    assert error.max() < 6
    assert drawn.std(0).min() > 0


def test_dropout_drops_activations_of_every_hidden_layer(small_spec):
    """A mask of zeros leaves only the last bias, whichever layer it is put on."""
    spec = small_spec(widths=[8, 6, 4], norm="none")
    params, stats = map(double, model.init(spec, 0))
    for layer in range(3):
        masks = [torch.ones(width, BATCH, dtype=torch.float64) for width in spec["widths"]]
        masks[layer].zero_()
        logits, _ = model.forward(params, stats, images(), spec, masks, train=True)
        torch.testing.assert_close(logits, logits[:1].expand(BATCH, 10), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("changes", "layers"),
    [
        ({"widths": [400, 300, 2000]}, {"1": (3072, 400), "5": (400, 300), "9": (300, 2000), "13": (2000, 10)}),
        ({"widths": [300], "expansion": 4}, {"2.1": (300, 1200), "2.4": (1200, 300)}),
    ],
)
def test_init_is_distributed_as_linear(changes, layers):
    """Two-sample Kolmogorov-Smirnov at 1e-6 and fixed seeds, weights and biases of every layer."""
    params, _ = model.init(resolve(changes), 0)
    for name, (inputs, width) in layers.items():
        linear = nn.Linear(inputs, width)
        for ours, theirs in ((params[f"{name}.weight"], linear.weight), (params[f"{name}.bias"], linear.bias)):
            assert ours.shape == theirs.shape
            assert ours.abs().max() <= inputs**-0.5
            a, b = ours.flatten().sort().values, theirs.detach().flatten().sort().values
            where = torch.cat([a, b])
            apart = (torch.searchsorted(a, where, right=True) - torch.searchsorted(b, where, right=True)).abs().max()
            assert apart / len(a) < 2.7 * (2 / len(a)) ** 0.5


@pytest.mark.parametrize(("norm", "module"), [("batch", nn.BatchNorm1d), ("layer", nn.LayerNorm)])
def test_init_of_a_norm_is_that_of_torch(norm, module):
    params, stats = model.init(resolve({"norm": norm}), 0)
    found = {name: value for name, value in {**params, **stats}.items() if name.startswith("2.")}
    reference = module(1024).state_dict()
    assert found.keys() == {f"2.{name}" for name in reference}
    assert all(torch.equal(found[f"2.{name}"], value) for name, value in reference.items())


def test_init_is_a_function_of_the_seed(small_spec):
    before = torch.get_rng_state()
    one, again, other = (model.init(small_spec(), seed)[0] for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    linear = [name for name, p in one.items() if p.ndim == 2]
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in linear)
    assert not any(torch.isin(one[linear[0]].flatten()[:100], one[name]).any() for name in linear[1:])


def test_parameters_of_the_default_network():
    assert model.parameter_count(resolve({})) == 3_809_034


@pytest.mark.parametrize("changes", [{}, {"norm": "layer", "expansion": 4}], ids=str)
def test_bfloat16_products_are_near_float32(small_spec, changes):
    """With the copies of every weight matrix, as in a step."""
    half_spec = small_spec(precision="bfloat16", **changes)
    params, stats = model.init(half_spec, 0)
    copies = model.effective(params, half_spec)
    assert copies.keys() == {name for name, p in params.items() if p.ndim == 2}
    x = images(dtype=torch.float32)
    full, _ = model.forward(params, stats, x, small_spec(**changes))
    half, _ = model.forward({**params, **copies}, stats, x, half_spec)
    assert half.dtype == torch.float32
    assert not torch.equal(full, half)
    torch.testing.assert_close(half, full, rtol=0.05, atol=0.05)
