"""The contestants in JAX: with optax, and with Keras 3. Their packages are imported only where they take part."""

import functools
import os
from collections.abc import Callable
from typing import Any

from benchmarks.peers import Contestant, Work
from core.spec import CIFAR10

Train = Callable[[Any, Any, Any, Any], tuple[Any, Any]]  # what is learnt, x, labels, step -> what is learnt, loss


class Scan(Contestant):
    """The steps of a round as one jitted `lax.scan` over the order of the examples, with the state donated.

    In turns on a CPU with a `fori_loop`, a scan is 1 to 4% faster at batch 128, and the same at 512. It is compiled
    once for each number of steps.
    """

    def __init__(self, work: Work) -> None:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # a GPU's memory is for all contestants
        import jax
        import jax.numpy as jnp

        jax.config.update("jax_platforms", work.device.type)
        if work.device.type == "cuda":  # a CPU has one way to multiply float32
            matmul = {"float32": "highest", "tf32": "tensorfloat32"}.get(work.precision)
            jax.config.update("jax_default_matmul_precision", matmul)
        learnt, train = self.make(work)
        images, labels, order = (jnp.asarray(t.cpu().numpy()) for t in (work.images, work.labels, work.order))
        mean, std = (jnp.repeat(jnp.asarray(values), 1024) * 255 for values in (CIFAR10.mean, CIFAR10.std))

        @functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
        def many(steps, state, images, labels, order):
            def step(state, examples):
                learnt, t, total = state
                x = (images[examples].astype(jnp.float32) - mean) / std
                learnt, loss = train(learnt, x, labels[examples], t)
                return (learnt, t + 1, total + loss), None

            return jax.lax.scan(step, state, order[(state[1] + jnp.arange(steps)) % len(order)])[0]

        self.state, self.many = (learnt, jnp.int32(0), jnp.float32(0)), many
        self.data, self.count, self.total = (images, labels, order), 0, 0.0

    def make(self, work: Work) -> tuple[Any, Train]:
        """What is learnt, as it begins, and the function that trains it on one batch."""
        raise NotImplementedError

    def run(self, steps: int) -> None:
        self.state = self.many(steps, self.state, *self.data)
        self.state[-1].block_until_ready()
        self.count += steps

    def loss(self) -> float:
        total = float(self.state[-1])
        mean = (total - self.total) / self.count
        self.total, self.count = total, 0
        return mean


class Jax(Scan):
    """JAX and optax: data resident, a round as one donated lax.scan; in bfloat16 products with float32 results.

    The generator "rbg" draws and compiles faster than the default one. Of the forms of bfloat16, the one whose three
    products all read bfloat16 and return float32 is the fastest on a CPU: with `preferred_element_type` alone the
    gradient's products mix precisions (5% slower), and with bfloat16 results XLA takes three times as long.
    """

    def make(self, work: Work) -> tuple[Any, Train]:
        import jax
        import jax.numpy as jnp
        import optax

        adam = optax.adam(1e-3)
        multiply = bfloat16_product() if work.precision == "bfloat16" else jnp.matmul

        def init(key):
            layers = []
            for inputs, outputs in zip(work.sizes[:-1], work.sizes[1:], strict=True):
                key, wkey, bkey = jax.random.split(key, 3)
                bound = inputs**-0.5
                layers.append(
                    {
                        "w": jax.random.uniform(wkey, (inputs, outputs), minval=-bound, maxval=bound),
                        "b": jax.random.uniform(bkey, (outputs,), minval=-bound, maxval=bound),
                        "scale": jnp.ones(outputs),
                        "shift": jnp.zeros(outputs),
                    }
                )
            for name in ("scale", "shift"):
                del layers[-1][name]
            return layers

        def forward(layers, stats, x, key):
            new = []
            for layer, (running_mean, running_var) in zip(layers[:-1], stats, strict=True):
                h = multiply(x, layer["w"]) + layer["b"]
                mu, var = h.mean(0), h.var(0)
                h = (h - mu) * jax.lax.rsqrt(var + 1e-5) * layer["scale"] + layer["shift"]
                h = jax.nn.leaky_relu(h, 0.01)
                key, sub = jax.random.split(key)
                x = jnp.where(jax.random.bernoulli(sub, 0.8, h.shape), h / 0.8, 0)
                unbiased = var * (work.batch / (work.batch - 1))
                new.append((0.9 * running_mean + 0.1 * mu, 0.9 * running_var + 0.1 * unbiased))
            return multiply(x, layers[-1]["w"]) + layers[-1]["b"], new

        def train(learnt, x, labels, t):
            layers, stats, opt = learnt
            key = jax.random.fold_in(jax.random.key(0, impl="rbg"), t)

            def loss_function(layers):
                logits, new = forward(layers, stats, x, key)
                return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), new

            (loss, stats), grads = jax.value_and_grad(loss_function, has_aux=True)(layers)
            updates, opt = adam.update(grads, opt, layers)
            return (optax.apply_updates(layers, updates), stats, opt), loss

        layers = init(jax.random.key(0))
        stats = [(jnp.zeros(n), jnp.ones(n)) for n in work.sizes[1:-1]]
        return (layers, stats, adam.init(layers)), train


def bfloat16_product() -> Callable:
    """A matrix product of bfloat16 operands with a float32 result, as are the two products of its gradient."""
    import jax
    import jax.numpy as jnp

    def product(a, b):
        return jnp.matmul(a.astype(jnp.bfloat16), b.astype(jnp.bfloat16), preferred_element_type=jnp.float32)

    def forward(a, b):
        a, b = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
        return product(a, b), (a, b)

    def backward(operands, grad):
        a, b = operands
        return product(grad, b.T), product(a.T, grad)

    multiply = jax.custom_vjp(product)
    multiply.defvjp(forward, backward)
    return multiply


class Keras(Scan):
    """Keras 3 on JAX: stateless_call and stateless_apply in the same donated lax.scan; bfloat16 by "mixed_bfloat16"."""

    def make(self, work: Work) -> tuple[Any, Train]:
        os.environ["KERAS_BACKEND"] = "jax"
        import jax
        import jax.numpy as jnp
        import keras
        from keras import initializers, layers

        policy = "mixed_bfloat16" if work.precision == "bfloat16" else "float32"

        def dense(inputs, outputs):
            """As torch.nn.Linear initialises it: uniform within 1 / sqrt(inputs)."""
            bound = inputs**-0.5
            kernel, bias = initializers.RandomUniform(-bound, bound), initializers.RandomUniform(-bound, bound)
            return layers.Dense(outputs, kernel_initializer=kernel, bias_initializer=bias, dtype=policy)

        keras.utils.set_random_seed(0)
        stack = [keras.Input((work.sizes[0],))]
        for inputs, outputs in zip(work.sizes[:-2], work.sizes[1:-1], strict=True):
            stack += [
                dense(inputs, outputs),
                layers.BatchNormalization(momentum=0.9, epsilon=1e-5),
                layers.LeakyReLU(negative_slope=0.01),
                layers.Dropout(0.2),
            ]
        model = keras.Sequential([*stack, dense(*work.sizes[-2:])])
        adam = keras.optimizers.Adam(1e-3, epsilon=1e-8)
        adam.build(model.trainable_variables)
        criterion = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

        def loss_function(params, others, x, labels):
            logits, others = model.stateless_call(params, others, x, training=True)
            return criterion(labels, logits.astype(jnp.float32)), others

        def train(learnt, x, labels, t):
            params, others, opt = learnt
            (loss, others), grads = jax.value_and_grad(loss_function, has_aux=True)(params, others, x, labels)
            params, opt = adam.stateless_apply(opt, grads, params)
            return (params, others, opt), loss

        # Copies: the model keeps its own, and these are donated.
        variables = (model.trainable_variables, model.non_trainable_variables, adam.variables)
        return tuple([jnp.array(v.value) for v in group] for group in variables), train
