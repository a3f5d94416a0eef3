"""Pictures and masks between files, their own size, and the square the models see.

Nothing here imports JAX: input workers run these functions, and must not touch an accelerator.
"""

import io
import os

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from refseg_jax.errors import UserError

# Mean and deviation of the pixels that published encoders were trained with, of RGB in 0 .. 1.
PIXELS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "darknet": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}
GREY = (123, 117, 104)  # The mean pixel of CLIP's; what surrounds a letterboxed picture.


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
            stored = upright = to_rgb(file)
            if _turned(file):
                upright = to_rgb(ImageOps.exif_transpose(file))
    except FileNotFoundError:
        raise UserError(f"no image file {name}") from None
    except UnidentifiedImageError:  # It would name the object that the contents are in.
        raise UserError(f"cannot read {name} as an image (of no known kind): replace it") from None
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


def read_resized(
    picture: bytes, size: tuple[int, int], side: int, letterbox: bool = False
) -> np.ndarray | None:
    """`resize_image(read_image(picture, size), side, letterbox)`, to the bit, with fewer copies.

    None if the picture is not a plain one: then those two say what it is, or what is wrong.
    """
    try:
        with Image.open(io.BytesIO(picture)) as file:
            file.load()
            plain = file.mode == "RGB" and not file.has_transparency_data and not _turned(file)
            if plain and file.size == (size[1], size[0]):
                return _resize(file, side, letterbox)
    except Exception:  # Whatever is wrong, `read_image` meets it again.
        pass
    return None


def _turned(image: Image.Image) -> bool:
    """Whether a loaded image has an EXIF orientation other than upright."""
    return image.getexif().get(0x0112, 1) != 1


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


def place(height: int, width: int, size: int, letterbox: bool) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of a picture of `height` x `width` in a square of side `size`.

    It fills the square, or, as a letterbox, keeps its shape and lies in the middle.
    """
    if not letterbox:
        return 0, 0, size, size
    scale = size / max(height, width)
    h, w = (max(1, round(side * scale)) for side in (height, width))
    left, top = (size - w) // 2, (size - h) // 2
    return left, top, left + w, top + h


def resize_image(image: np.ndarray, size: int, letterbox: bool = False) -> np.ndarray:
    """uint8 [H, W, 3] -> uint8 [size, size, 3]: bilinear, antialiased where it shrinks.

    It lies where `place` says; what a letterbox leaves is grey.
    """
    return _resize(Image.fromarray(image), size, letterbox)


def _resize(image: Image.Image, size: int, letterbox: bool) -> np.ndarray:
    # Not by draft: JPEG's own halving would give other pixels, and is of no use above half size.
    return _put(image, size, letterbox, Image.Resampling.BILINEAR, GREY)


def _put(image: Image.Image, size: int, letterbox: bool, resample, rest) -> np.ndarray:
    """The square of side `size` with `image` where `place` says, on the colour `rest`."""
    left, top, right, bottom = place(image.height, image.width, size, letterbox)
    resized = image.resize((right - left, bottom - top), resample)
    if resized.size != (size, size):
        square = Image.new(image.mode, (size, size), rest)
        square.paste(resized, (left, top))
        resized = square
    return np.asarray(resized)


def resize_mask(mask: np.ndarray, size: int, letterbox: bool = False) -> np.ndarray:
    """bool [H, W] -> bool [size, size]: a pixel takes the one in which its centre lies.

    As `resize_image` and `resize_map` have it, so that image and mask stay in place.
    """
    # Turned: masks come from run-length codes, which go down the columns.
    turned = Image.fromarray(mask.T.view(np.uint8))
    return _put(turned, size, letterbox, Image.Resampling.NEAREST, 0).T.view(bool)


def resize_map(
    values: np.ndarray, height: int, width: int, letterbox: bool = False, bicubic: bool = False
) -> np.ndarray:
    """float [S, S] -> float32 [height, width]: bilinear, or bicubic, with half-pixel centres.

    Brings a map of the square that the model sees to the size of the picture that lies in it as
    `place` says (antialiased in the rare case that it shrinks). Without `letterbox` the map may
    have any shape.
    """
    image = Image.fromarray(np.asarray(values, np.float32))
    if letterbox:
        image = image.crop(place(height, width, image.height, letterbox))
    resample = Image.Resampling.BICUBIC if bicubic else Image.Resampling.BILINEAR
    return np.asarray(image.resize((width, height), resample))


def normalize(image, pixels: str = "imagenet"):
    """[..., 3] in 0 .. 255 -> float32 [..., 3] with the mean and deviation of `pixels` taken out.

    Written with operators only, so it takes NumPy and JAX arrays alike.
    """
    mean, deviation = np.array(PIXELS[pixels], np.float32)
    return (image.astype(np.float32) / 255.0 - mean) / deviation


def normalize_for(model, image):
    """`normalize` as the `model` was made for: by its `pixels`, if it has any, or ImageNet's."""
    return normalize(image, getattr(model, "pixels", "imagenet"))
