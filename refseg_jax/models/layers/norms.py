"""Normalisations over pixels, equal to PyTorch's in value and in running statistics."""

import flax.linen as nn
import jax
import jax.numpy as jnp

EPSILON = 1e-5


def instance_norm(x: jax.Array) -> jax.Array:
    """Every channel of every sample to mean 0 and variance 1 over its pixels: [B,S,C] -> same.

    Nothing is learned. Computed in float32; the dtype of `x` is kept.
    """
    mean, factor = instance_statistics(x)
    return ((x.astype(jnp.float32) - mean) * factor).astype(x.dtype)


def instance_statistics(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(mean, 1 / standard deviation), float32 [B,1,C], of every channel of [B,S,C] over its pixels.

    `EPSILON` is added to the variance.
    """
    y = x.astype(jnp.float32)
    if x.dtype == jnp.bfloat16:
        # What `moments` loses of the variance is less than what rounding to bfloat16 added to it.
        mean, var = moments(y, (1,), jnp.zeros((), jnp.float32))
        mean, var = mean[:, None], var[:, None]
    else:
        mean, var = y.mean(1, keepdims=True), y.var(1, keepdims=True)
    return mean, jax.lax.rsqrt(var + EPSILON)


def moments(x: jax.Array, axes: tuple[int, ...], near: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(mean, biased variance) of float32 `x` over `axes`.

    `near` is a guess of the mean, which broadcasts against `x`. Accelerators use it to read `x`
    once, and to make one all-reduce of a sharded batch instead of two in a row; a CPU is faster
    without.
    """
    return jax.lax.platform_dependent(
        x,
        near,
        cpu=lambda x, near: (x.mean(axes), x.var(axes)),
        default=lambda x, near: moments_at_once(x, axes, near),
    )


def moments_at_once(
    x: jax.Array, axes: tuple[int, ...], near: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The same from the sums of d = x - near and d^2: var = E[d^2] - E[d]^2.

    The variance's relative error in float32 is around 1e-7 (1 + (mean - near)^2 / var).
    """
    near = jax.lax.stop_gradient(near.astype(x.dtype))
    d = x - near
    mean, square = d.mean(axes), (d * d).mean(axes)
    return mean + near, jnp.maximum(square - mean * mean, 0.0)


# Mean, factor and bias of each channel.
Vectors = tuple[jax.Array, jax.Array, jax.Array]


def normalize_by(x: jax.Array, vectors: Vectors) -> jax.Array:
    """(x - mean) factor + bias, float32."""
    mean, factor, bias = vectors
    return (x.astype(jnp.float32) - mean) * factor + bias


class BatchNorm(nn.Module):
    """Batch normalisation over all but the last axis, in float32 inside.

    Parameters `scale`, `bias`; collection `batch_stats` with the running `mean`, `var`. As in
    PyTorch, and unlike `flax.linen.BatchNorm`, the running variance is the unbiased one. Under
    `jit` on a mesh the statistics are those of the whole batch.
    """

    momentum: float = 0.9  # PyTorch counts the other way: its 0.1.
    dtype: jnp.dtype = jnp.float32

    def __call__(self, x: jax.Array, train: bool, pixels: int = 1) -> jax.Array:
        """[..., C] -> same shape; with `train`, by the batch's statistics, which are recorded.

        Or [..., pixels·C], so many pixels side by side.
        """
        vectors = self.vectors(x, train, pixels)
        if pixels > 1:
            vectors = tuple(jnp.tile(v, pixels) for v in vectors)
        return normalize_by(x, vectors).astype(self.dtype)

    def vectors(self, x: jax.Array, train: bool, pixels: int = 1) -> Vectors:
        """What `__call__` gives `normalize_by`, float32 [C]."""
        C = x.shape[-1] // pixels
        scale, bias, running = self.weights(C)
        mean, var = (v.value for v in running)
        if train:
            x = x.astype(jnp.float32)
            others = tuple(range(x.ndim - 1))
            mean, var = moments(x, others, jnp.tile(mean, pixels) if pixels > 1 else mean)
            if pixels > 1:
                mean, var = mean.reshape(pixels, C), var.reshape(pixels, C)
                mean, var = mean.mean(0), var.mean(0) + mean.var(0)
            self.record(running, mean, var, x.size // C)
        return mean, scale * jax.lax.rsqrt(var + EPSILON), bias

    @nn.compact
    def weights(self, C: int) -> tuple[jax.Array, jax.Array, tuple[nn.Variable, nn.Variable]]:
        """(scale, bias, (running mean, running variance)) of C channels."""
        scale = self.param("scale", nn.initializers.ones, (C,))
        bias = self.param("bias", nn.initializers.zeros, (C,))
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (C,))
        running_var = self.variable("batch_stats", "var", jnp.ones, (C,))
        return scale, bias, (running_mean, running_var)

    def record(
        self,
        running: tuple[nn.Variable, nn.Variable],
        mean: jax.Array,
        var: jax.Array,
        count: int,
    ) -> None:
        """Moves the running statistics towards a batch's mean and biased variance.

        These are of `count` pixels.
        """
        if self.is_initializing():
            return
        unbiased = var * (count / max(count - 1, 1))
        for variable, new in zip(running, (mean, unbiased), strict=True):
            variable.value = self.momentum * variable.value + (1 - self.momentum) * new


class SwitchNorm(nn.Module):
    """Switchable normalisation (Luo et al., 2019) of maps, in float32 inside.

    Mean and variance are mixtures of those of the instance (each sample's channel), the layer
    (each sample) and the batch (each channel), with softmax weights learned for each of the two.
    Parameters `scale`, `bias` [C], `mean_mixture`, `var_mixture` [3] (instance, layer, batch);
    collection `batch_stats` with the running `mean`, `var` of the batch part, which take its place
    outside training. Under `jit` on a mesh the batch is the whole one.
    """

    momentum: float = 0.9
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """[B,h,w,C] -> same shape; with `train`, by the batch's statistics, which are recorded."""
        C = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (C,))
        bias = self.param("bias", nn.initializers.zeros, (C,))
        mixtures = [
            jax.nn.softmax(self.param(name, nn.initializers.ones, (3,)))
            for name in ("mean_mixture", "var_mixture")
        ]
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (C,))
        running_var = self.variable("batch_stats", "var", jnp.ones, (C,))
        x = x.astype(jnp.float32)
        # [B,C], from which the others follow.
        mean, var = moments(x, (1, 2), running_mean.value)

        def pooled(axis: int) -> tuple[jax.Array, jax.Array]:
            return (
                mean.mean(axis, keepdims=True),
                var.mean(axis, keepdims=True) + mean.var(axis, keepdims=True),
            )

        if train:
            batch = pooled(0)
            if not self.is_initializing():
                for running, new in zip((running_mean, running_var), batch, strict=True):
                    running.value = self.momentum * running.value + (1 - self.momentum) * new[0]
        else:
            batch = running_mean.value, running_var.value
        mean, var = (
            weights[0] * instance + weights[1] * layer + weights[2] * whole
            for weights, instance, layer, whole in zip(
                mixtures, (mean, var), pooled(1), batch, strict=True
            )
        )
        factor = scale * jax.lax.rsqrt(var + EPSILON)
        y = (x - mean[:, None, None]) * factor[:, None, None] + bias
        return y.astype(self.dtype)
