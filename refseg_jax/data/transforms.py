"""Pictures and masks between files, their own size, and the square the models see.

Nothing here imports JAX: input workers run these functions, and must not touch an accelerator.
"""

import io
import os

import numpy as np
from PIL import Image, ImageOps

from refseg_jax.errors import UserError

# ImageNet statistics, the ones the published encoders were trained with.
MEAN = np.array([0.485, 0.456, 0.406], np.float32)
STD = np.array([0.229, 0.224, 0.225], np.float32)


def read_image(
    picture: str | os.PathLike[str] | bytes, size: tuple[int, int] | None = None, name: str = ""
) -> np.ndarray:
    """Decodes a picture to uint8 [H, W, 3], RGB, turned upright by its EXIF orientation.

    Args:
      picture: a file, or what it contains.
      size: the (H, W) that annotations were drawn at. If only the picture as stored has that
        size, it is left as stored: the annotations then refer to the stored orientation.
      name: what to call the picture in errors, where it is no file.

    Raises:
      UserError: the file is missing, not a picture, damaged, or not of the given size.
    """
    name = name or ("the picture" if isinstance(picture, bytes) else str(picture))
    try:
        with Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture) as file:
            stored = to_rgb(file)
            upright = to_rgb(ImageOps.exif_transpose(file))
    except FileNotFoundError:
        raise UserError(f"no image file {name}") from None
    # Pillow reports damage in almost any way, depending on the format and where it is.
    except Exception as error:
        raise UserError(f"cannot read {name} as an image ({error}): replace the file") from error
    if size is None:
        return upright
    for image in (upright, stored):
        if image.shape[:2] == tuple(size):
            return image
    raise UserError(
        f"{name} is {len(stored)} x {len(stored[0])} (height x width), its annotations were drawn "
        f"at {size[0]} x {size[1]}: use the original image"
    )


def to_rgb(image: Image.Image) -> np.ndarray:
    """Any PIL image -> uint8 [H, W, 3].

    16-bit grey keeps its high byte, other deep grey images are stretched to their own range, and
    transparency is laid over white.
    """
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        values = np.asarray(image, np.float64)
        low, high = values.min(), values.max()
        # A 16-bit PNG may arrive as 32-bit integers: keep its scale rather than stretch it.
        if image.mode == "I" and low >= 0 and high <= 65535:
            low, high = 0.0, 255.0 if high <= 255 else 65535.0
        grey = (values - low) * (255.0 / max(high - low, 1e-12))
        image = Image.fromarray(grey.round().astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB"))


def resize_image(image: np.ndarray, size: int) -> np.ndarray:
    """uint8 [H, W, 3] -> uint8 [size, size, 3]: bilinear, antialiased where it shrinks."""
    resized = Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(resized)


def resize_mask(mask: np.ndarray, size: int) -> np.ndarray:
    """bool [H, W] -> bool [size, size]: output pixel i takes input pixel floor(i * H / size)."""
    height, width = mask.shape
    steps = np.arange(size)
    return mask[(steps * height // size)[:, None], steps * width // size]


def resize_map(values: np.ndarray, height: int, width: int) -> np.ndarray:
    """float [h, w] -> float32 [height, width]: bilinear with half-pixel centres.

    Brings a predicted map to a picture's own size (antialiased in the rare case that it shrinks).
    """
    image = Image.fromarray(np.asarray(values, np.float32))
    return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))


def normalize(image):
    """[..., 3] in 0 .. 255 -> float32 [..., 3] with ImageNet's mean and deviation taken out.

    Written with operators only, so it takes NumPy and JAX arrays alike.
    """
    return (image.astype(np.float32) / 255.0 - MEAN) / STD
