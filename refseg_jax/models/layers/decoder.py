"""Convolutional mask decoders: their block, and the whole decoder of LAVT and CrossVLT."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from refseg_jax.models.layers.draws import FLAX
from refseg_jax.models.layers.layer_norm import LayerNorm
from refseg_jax.models.layers.norms import EPSILON, BatchNorm
from refseg_jax.models.layers.resize import resize_bilinear, resized_conv
from refseg_jax.models.layers.squares import pixels_of_squares


class JoiningConv(nn.Module):
    """3x3 convolution of two maps side by side, the coarse one first resized to the fine one.

    `__call__(coarse [B,h',w',C'], fine [B,h,w,C]) -> [B,h,w,dim]`; resizing keeps the corners'
    centres in place. Parameter `kernel` [3,3,C'+C,dim], that of `nn.Conv`; no bias.
    """

    dim: int
    dtype: jnp.dtype = jnp.float32
    kernel_init: nn.initializers.Initializer = FLAX

    @nn.compact
    def __call__(self, coarse: jax.Array, fine: jax.Array) -> jax.Array:
        C = coarse.shape[-1]
        shape = (3, 3, C + fine.shape[-1], self.dim)
        kernel = self.param("kernel", self.kernel_init, shape).astype(self.dtype)
        y = jax.lax.conv_general_dilated(
            fine, kernel[:, :, C:], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return y + resized_conv(coarse, kernel[:, :, :C], fine.shape[1:3], align_corners=True)


class ConvBlock(nn.Module):
    """Twice 3x3 convolution, batch norm, ReLU: [B,h,w,C] -> [B,h,w,dim].

    With `relu_first` the ReLU comes before the norm, and the convolutions have biases. With
    `coarse`, the first convolution is a `JoiningConv` of it and x.
    """

    dim: int
    dtype: jnp.dtype = jnp.float32
    relu_first: bool = False
    kernel_init: nn.initializers.Initializer = FLAX

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, coarse: jax.Array | None = None) -> jax.Array:
        for i in (1, 2):
            how = dict(dtype=self.dtype, kernel_init=self.kernel_init, name=f"conv{i}")
            if i == 1 and coarse is not None:
                x = JoiningConv(self.dim, **how)(coarse, x)
            else:
                x = nn.Conv(self.dim, (3, 3), use_bias=self.relu_first, **how)(x)
            norm = BatchNorm(dtype=self.dtype, name=f"norm{i}")
            x = norm(nn.relu(x), train) if self.relu_first else nn.relu(norm(x, train))
        return x


def class_difference(
    x: jax.Array, kernel: jax.Array, bias: jax.Array, squares: int = 1
) -> jax.Array:
    """The second class's logits minus the first's, all that masks and losses need.

    x [B,h,w,C], kernel [C,2], bias [2] -> f32 [B,h,w]. Both would be two lanes of a TPU's 128.
    With `squares` x has squares of pixels of that side in its channels (see squares.py):
    [B,h,w,squares²·C] -> [B,squares·h,squares·w].
    """
    kernel, bias = kernel[:, 1] - kernel[:, 0], bias[1] - bias[0]
    if squares == 1:
        return _along_channels(x, kernel.astype(x.dtype)) + bias
    each = jnp.kron(jnp.eye(squares**2), kernel[:, None]).astype(x.dtype)
    # A TPU's products round float32 to bfloat16 else.
    highest = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    y = jnp.einsum("bhwc,cp->bphw", x, each, precision=highest, preferred_element_type=jnp.float32)
    return pixels_of_squares(y, squares) + bias


@jax.custom_vjp
def _along_channels(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [B,h,w,C] times kernel [C], summed: f32 [B,h,w].

    In evaluation a TPU does it with the map that it is computing. Where gradients are taken the map
    is in memory, and a product with eight columns, seven of them zeros, takes less than a sum over
    lanes.
    """
    return jnp.einsum("bhwc,c->bhw", x, kernel, preferred_element_type=jnp.float32)


def _along_channels_forward(x, kernel):
    def by_product(x, kernel):
        columns = jnp.pad(kernel[:, None], ((0, 0), (0, 7)))
        return jnp.einsum("bhwc,ck->bhwk", x, columns, preferred_element_type=jnp.float32)[..., 0]

    if x.dtype == jnp.bfloat16:  # A TPU's products round float32 to that.
        y = jax.lax.platform_dependent(x, kernel, tpu=by_product, default=_along_channels)
    else:
        y = _along_channels(x, kernel)
    return y, (x, kernel)


def _along_channels_backward(saved, cotangent):
    return jax.vjp(_along_channels.fun, *saved)[1](cotangent)


_along_channels.defvjp(_along_channels_forward, _along_channels_backward)


class MaskDecoder(nn.Module):
    """Joins the stages' maps from coarse to fine by concatenation, and classifies the pixels.

    Half as wide as the coarsest map. Parameters: `stage_norm{i}` (LayerNorm of stage i's map,
    counted from 1), `from{i}` (the block that takes stage i's resolution to the next finer one's),
    `classifier`.
    """

    dtype: jnp.dtype = jnp.float32
    kernel_init: nn.initializers.Initializer = FLAX

    @nn.compact
    def __call__(
        self, features: list[jax.Array], size: tuple[int, int], train: bool
    ) -> dict[str, jax.Array]:
        """Maps [B,h_i,w_i,C_i], fine to coarse -> float32 logits at the image's `size`.

        `class_logits` [B,*size,2] of background and foreground, and `logits` [B,*size], the
        second's minus the first's; under `jit` what is not used is not computed. All resizing is
        bilinear and keeps the corners' centres in place.
        """
        maps = [
            LayerNorm(EPSILON, self.dtype, name=f"stage_norm{i}")(x)
            for i, x in enumerate(features, 1)
        ]
        x = maps.pop()
        dim = x.shape[-1] // 2
        how = dict(dtype=self.dtype, kernel_init=self.kernel_init)
        while maps:
            block = ConvBlock(dim, **how, name=f"from{len(maps) + 1}")
            x = block(maps.pop(), train, coarse=x)
        classifier = nn.Conv(2, (1, 1), **how, name="classifier")
        class_logits = classifier(x).astype(jnp.float32)
        params = classifier.variables["params"]
        logits = class_difference(x, params["kernel"][0, 0], params["bias"])
        return {
            "logits": resize_bilinear(logits, size, align_corners=True),
            "class_logits": resize_bilinear(class_logits, size, align_corners=True),
        }
