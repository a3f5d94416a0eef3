"""Drawing on images: translucent masks, outlines, captions. Of whatever shows pictures."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

PREDICTION_COLOR = (255, 0, 190)  # as rare in photographs as in the drawn scenes
TRUTH_COLOR = (0, 216, 255)


def fit(image: np.ndarray, longest: int) -> np.ndarray:
    """Scales an image uint8 [H, W, 3] or a mask bool [H, W] to `longest` px on its long side."""
    height, width = image.shape[:2]
    scale = longest / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    if image.dtype == bool:
        grey = Image.fromarray(image.astype(np.uint8) * 255).resize(size, Image.Resampling.BILINEAR)
        return np.asarray(grey) > 127
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))


def grow(mask: np.ndarray, radius: int) -> np.ndarray:
    """bool [H, W] dilated by a square of side 2 * radius + 1, at a cost that ignores the radius."""
    side = 2 * radius + 1
    for _ in range(2):  # one axis at a time; the two transpositions cancel
        total = np.cumsum(np.pad(mask, ((radius + 1, radius), (0, 0))), axis=0, dtype=np.int32)
        mask = (total[side:] > total[:-side]).T
    return mask


def outline(
    image: np.ndarray, mask: np.ndarray, color: tuple[int, int, int], width: int = 1
) -> np.ndarray:
    """Draws the mask's border, `width` px to either side, with a dark seam around the line.

    The seam keeps the line visible on a background of its own colour.
    """
    image = image.copy()
    for radius, paint in ((width + 1, (0, 0, 0)), (width, color)):
        image[grow(mask, radius) & grow(~mask, radius)] = paint
    return image


def overlay(
    image: np.ndarray,
    mask: np.ndarray,
    color: tuple[int, int, int] = PREDICTION_COLOR,
    alpha: float = 0.45,
) -> np.ndarray:
    """Translucent colour inside the mask, and its outline.

    Args:
      image: uint8 [H, W, 3].
      mask: bool [H, W].
      color: RGB of fill and outline.
      alpha: opacity of the fill, 0 .. 1.

    Returns:
      uint8 [H, W, 3].
    """
    filled = image.astype(np.float32)
    filled[mask] += alpha * (np.asarray(color, np.float32) - filled[mask])
    width = max(1, round(max(mask.shape) / 400))
    return outline(filled.round().astype(np.uint8), mask, color, width)


def heat(image: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Lays `values` f32 [H, W] in 0 .. 1, black to red to yellow to white, over a greyed image.

    Returns uint8 [H, W, 3].
    """
    glow = np.clip(3 * values[..., None] - np.arange(3), 0, 1) * 255
    return (0.4 * image.mean(2, keepdims=True) + 0.6 * glow).round().astype(np.uint8)


def caption(image: np.ndarray, text: str) -> np.ndarray:
    """Adds a strip with the text below the image, wrapped to the image's width.

    Returns uint8 [H', W', 3]; an image too narrow to read a caption is padded on the right.
    """
    height, width = image.shape[:2]
    font_size = min(max(14, round(max(height, width) / 36)), 64)
    font, pad = ImageFont.load_default(font_size), font_size // 2
    width = max(width, 12 * font_size)
    lines = _wrap(text, font, width - 2 * pad)
    line_height = round(1.3 * font_size)
    canvas = Image.new("RGB", (width, height + len(lines) * line_height + 2 * pad), "white")
    canvas.paste(Image.fromarray(image), (0, 0))
    draw = ImageDraw.Draw(canvas)
    for i, line in enumerate(lines):
        draw.text((pad, height + pad + i * line_height), line, fill=(20, 20, 20), font=font)
    return np.asarray(canvas)


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Greedy line breaking; a word wider than the line is broken where the line ends."""
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".strip()
        if font.getlength(joined) <= width:
            lines[-1] = joined
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return lines
