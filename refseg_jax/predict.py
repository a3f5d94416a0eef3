"""Image + expression -> mask. As a class (`Predictor`) and as a command:

python -m refseg_jax.predict --workdir W --image photo.jpg --text "the dog on the left"
                             [--text "the cat" ...] [--out DIR]
"""

import argparse
import dataclasses
import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import ml_collections
import numpy as np
from etils import epath
from PIL import Image, ImageOps, PngImagePlugin

from refseg_jax import checkpoint, models, pictures
from refseg_jax.data import transforms
from refseg_jax.data.tokenizer import Tokenizer
from refseg_jax.errors import UserError, command, say
from refseg_jax.models.layers.resize import resize_bicubic, resize_bilinear
from refseg_jax.processes import use_compile_cache
from refseg_jax.sharding import jit_on_mesh, mesh_of_one, replicated
from refseg_jax.train_state import init_variables

_OURS = ("Software", "refseg_jax.predict")  # Written into every picture that `run` makes.
INPUTS = ("image", "tokens", "token_mask")  # What of a batch the model sees.

PredictFn = Callable[[Any, Mapping[str, Any]], jax.Array]


def make_predict_step(model: nn.Module, out_sharding: Any = None) -> PredictFn:
    """Jitted forward pass: (variables, batch) -> foreground probability f32 [B, H, W].

    The batch holds `image` uint8 [B, H, W, 3], `tokens` int32 [B, T] and `token_mask` bool [B, T];
    anything else in it is ignored. Probabilities are at the image's size: of bilinear logits, or
    themselves bicubic with the corners' centres in place, where the model `resizes_probabilities`
    (they may then lie a little outside 0 .. 1, as in the code that it reproduces). On a mesh,
    `out_sharding` should be the batch's, so that each process can read its own rows back.
    """

    def predict(variables, batch):
        image, tokens, token_mask = (batch[name] for name in INPUTS)
        outputs = model.apply(
            variables, transforms.normalize_for(model, image), tokens, token_mask, train=False
        )
        logits, size = outputs["logits"].astype(np.float32), image.shape[1:3]
        if getattr(model, "resizes_probabilities", False):
            return resize_bicubic(jax.nn.sigmoid(logits), size, align_corners=True)
        return jax.nn.sigmoid(resize_bilinear(logits, size))

    if out_sharding is None:
        return jax.jit(predict)
    return jit_on_mesh(out_sharding.mesh, predict, out_shardings=out_sharding)


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What the model points at, at the image's own size H x W.

    Attributes:
      mask: bool [H, W], True = the referred object.
      probability: f32 [H, W], foreground probability.
      truncated: the expression was longer than the model reads, and its end was ignored.
      unknown: words of it that the model reads as "an unknown word", one like another.
    """

    mask: np.ndarray
    probability: np.ndarray
    truncated: bool = False
    unknown: tuple[str, ...] = ()

    @property
    def confidence(self) -> float:
        """Mean foreground probability inside the mask; 0 if the mask is empty."""
        return float(self.probability[self.mask].mean()) if self.area else 0.0

    @property
    def area(self) -> int:
        """Number of pixels of the mask."""
        return int(self.mask.sum())

    @property
    def area_fraction(self) -> float:
        """Share of the image that the mask covers."""
        return self.area / self.mask.size

    @property
    def box(self) -> tuple[int, int, int, int] | None:
        """(x0, y0, x1, y1) in pixels, x1 and y1 exclusive; None if the mask is empty."""
        if not self.area:
            return None
        xs, ys = (np.flatnonzero(self.mask.any(axis)) for axis in (0, 1))
        return int(xs[0]), int(ys[0]), int(xs[-1]) + 1, int(ys[-1]) + 1


def load_image(image: str | os.PathLike | Image.Image | np.ndarray) -> np.ndarray:
    """A path, PIL image or array -> uint8 RGB [H, W, 3], upright (EXIF rotation applied).

    Arrays are uint8 or uint16 [H, W], or uint8 [H, W, 1 | 3 | 4].

    Raises:
      UserError: the file is missing or no image, or the array has another shape or dtype.
    """
    if hasattr(image, "__array__") and not isinstance(image, Image.Image):
        image = np.asarray(image)
        if image.ndim == 3 and image.shape[-1] == 1:
            image = image[..., 0]
        try:
            if not image.size:
                raise ValueError("it has no pixels")
            image = Image.fromarray(image)
        except (TypeError, ValueError) as e:
            raise UserError(
                f"image array {image.dtype}{list(image.shape)} is not an image: "
                "give uint8 [H, W, 3], [H, W, 4] or [H, W]"
            ) from e
    if not isinstance(image, Image.Image):
        return transforms.read_image(image)
    try:
        return transforms.to_rgb(ImageOps.exif_transpose(image))
    except Exception as e:  # A file that is opened but not read may be damaged in any way.
        raise UserError(f"cannot read the image ({e})") from e


def load_run(
    workdir: str | os.PathLike,
    sharding: jax.sharding.Sharding | None = None,
    given: ml_collections.ConfigDict | None = None,
) -> tuple[ml_collections.ConfigDict, nn.Module, Any]:
    """(config, model, best variables) of the run in `workdir`; variables laid out by `sharding`.

    `given`: another config of it, for how its model is computed where that may differ.

    Raises:
      UserError: `workdir` is no run, it has no checkpoint yet, or one that does not fit.
    """
    config = checkpoint.read_config(workdir)
    if given and "swin" in given.model:
        config.model.swin.cudnn = given.model.swin.cudnn
    model = models.build(config.model)
    abstract = jax.eval_shape(
        lambda: init_variables(
            model, jax.random.key(0), config.data.image_size, config.data.max_tokens
        )
    )
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return config, model, checkpoint.load_variables(workdir, abstract, sharding)


class Predictor:
    """A model ready to be asked. Compiled once, at the first call.

    Attributes:
      model, variables: the Linen module and what its `apply` takes, which stays on the device or
        devices where it is; arrays of NumPy go to JAX's default device.
      tokenizer: turns an expression into the model's tokens.
      image_size: side of the square the model sees; images of any size are resized to it.
      letterbox: they keep their shape in it, see `transforms.place`.
      max_tokens: longest expression, in tokens, that the model reads.
      threshold: probability above which a pixel is foreground.
      no_target_area: a mask of fewer pixels is taken as "there is none".
    """

    def __init__(
        self,
        model: nn.Module,
        variables: Any,
        tokenizer: Tokenizer,
        image_size: int,
        max_tokens: int,
        threshold: float = 0.5,
        no_target_area: int = 0,
        letterbox: bool = False,
    ):
        self.model = model
        self.variables = jax.device_put(variables)
        self.tokenizer = tokenizer
        self.image_size = image_size
        self.max_tokens = max_tokens
        self.threshold = threshold
        self.no_target_area = no_target_area
        self.letterbox = letterbox
        self._bicubic = getattr(model, "resizes_probabilities", False)
        # On a mesh the model takes its kernels for TPUs and its forms for GPUs.
        devices = {d for leaf in jax.tree.leaves(self.variables) for d in leaf.devices()}
        sharding = replicated(mesh_of_one(*devices)) if len(devices) == 1 else None
        self._predict = make_predict_step(model, sharding)

    @classmethod
    def from_workdir(cls, workdir: str | os.PathLike) -> "Predictor":
        """The best checkpoint of the run in `workdir`.

        Raises:
          UserError: see `load_run`.
        """
        config, model, variables = load_run(workdir)
        return cls(
            model,
            variables,
            Tokenizer.load(epath.Path(workdir) / checkpoint.TOKENIZER_FILE),
            config.data.image_size,
            config.data.max_tokens,
            config.eval.threshold,
            config.eval.get("no_target_area", 0),
            config.data.get("letterbox", False),
        )

    def __call__(
        self, image: str | os.PathLike | Image.Image | np.ndarray, text: str
    ) -> Prediction:
        """Segments the one object that `text` refers to.

        Args:
          image: path, PIL image or array, see `load_image`; any size, any colour mode.
          text: the referring expression.

        Raises:
          UserError: no readable image, or an empty expression.
        """
        pixels = load_image(image)
        tokens, token_mask, truncated = self.tokenizer.encode(text, self.max_tokens)
        batch = {
            "image": transforms.resize_image(pixels, self.image_size, self.letterbox)[None],
            "tokens": tokens[None],
            "token_mask": token_mask[None],
        }
        probability = np.asarray(self._predict(self.variables, batch)[0])
        back = *pixels.shape[:2], self.letterbox, self._bicubic
        probability = transforms.resize_map(probability, *back).clip(0, 1)
        mask = probability > self.threshold
        mask &= mask.sum() >= self.no_target_area
        unknown = self.tokenizer.unknown(text, self.max_tokens)
        return Prediction(mask, probability, truncated, unknown)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m refseg_jax.predict", description="Segments what an expression refers to."
    )
    parser.add_argument("--workdir", required=True, help="directory of a training run")
    parser.add_argument("--image", required=True, help="image file, any size")
    parser.add_argument(
        "--text",
        required=True,
        action="append",
        help="the expression, e.g. 'the dog on the left'; may be given again, each has its files",
    )
    parser.add_argument("--out", default=".", help="where the PNG files go (default: here)")
    parser.add_argument(
        "--threshold", type=float, help="foreground probability (default: the run's)"
    )
    parser.add_argument("--json", action="store_true", help="print a line of JSON for each text")
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Predicts, writes `<stem>_mask.png` and `<stem>_overlay.png`, and yields what to print.

    Of several texts the files are `<stem>_1_mask.png` and so on.

    Raises:
      UserError: see `Predictor`; or the output directory cannot be written, or has such a file that
        was not written here, as somebody's own mask may be.
    """
    if arguments.threshold is not None and not 0 <= arguments.threshold <= 1:
        raise UserError(f"--threshold={arguments.threshold} is no probability")
    Image.MAX_IMAGE_PIXELS = None  # Of a file that one names oneself, any size is meant.
    # The image first: a mistyped path should not wait for a model to load.
    image = load_image(arguments.image)
    stem, out = pathlib.Path(arguments.image).stem, pathlib.Path(arguments.out)
    several = len(arguments.text) > 1
    stems = [f"{stem}_{n}" if several else stem for n in range(1, len(arguments.text) + 1)]
    written = [{n: str(out / f"{each}_{n}.png") for n in ("mask", "overlay")} for each in stems]
    for path in (path for paths in written for path in paths.values() if os.path.exists(path)):
        if not _is_ours(path):
            raise UserError(
                f"{path} is there, and does not say that it was written by this command: delete "
                "it, or give another --out"
            )
    predictor = Predictor.from_workdir(arguments.workdir)
    if arguments.threshold is not None:
        predictor.threshold = arguments.threshold
    for text in arguments.text:  # All of them before anything is written.
        predictor.tokenizer.encode(text, predictor.max_tokens)
    ours = PngImagePlugin.PngInfo()
    ours.add_text(*_OURS)
    for text, paths in zip(arguments.text, written, strict=True):
        prediction = predictor(image, text)
        drawn = pictures.caption(pictures.overlay(image, prediction.mask), text)
        # Black and white in bytes: what reads one bit as a number would have 1 for white.
        mask = prediction.mask.astype(np.uint8) * 255
        try:
            out.mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask).save(paths["mask"], pnginfo=ours)
            # A photo is hardly smaller for the many times as long that more effort takes.
            Image.fromarray(drawn).save(paths["overlay"], compress_level=1, pnginfo=ours)
        except OSError as e:
            raise UserError(f"cannot write to --out {arguments.out}: {e}") from e
        yield {"text": text, **facts(prediction), **paths}


def _is_ours(path: str) -> bool:
    """Whether the picture at `path` was written by `run`."""
    try:
        with Image.open(path) as picture:
            return (_OURS[0], picture.info.get(_OURS[0])) == _OURS
    except Exception:  # Pillow's decoders raise almost anything.
        return False


def facts(prediction: Prediction) -> dict[str, Any]:
    """What a prediction is in numbers, ready for JSON."""
    return {
        "truncated": prediction.truncated,
        "unknown": prediction.unknown,
        "confidence": round(prediction.confidence, 4),
        "area": prediction.area,
        "area_fraction": round(prediction.area_fraction, 6),
        "box": prediction.box,
    }


def warnings(result: Mapping[str, Any]) -> list[str]:
    """What of the expression the model could not read, a sentence each; of `facts`."""
    found = []
    if result["truncated"]:
        found.append("The expression is too long, its end was ignored.")
    if result["unknown"]:
        words = ", ".join(repr(word) for word in result["unknown"])
        found.append(f"The model does not know {words}: it reads that as an unknown word.")
    return found


def describe(result: Mapping[str, Any]) -> str:
    """The result of `run`, or `facts`, for people: a line each for confidence, area, box, files."""
    box = "none: nothing found"
    if result["box"]:
        box = "x {} to {}, y {} to {} px".format(*(result["box"][i] for i in (0, 2, 1, 3)))
    return "\n".join(
        (
            f"confidence  {result['confidence']:.3f}",
            f"area        {result['area']} px ({100 * result['area_fraction']:.2f} % of the image)",
            f"box         {box}",
            *(f"{name:<11} {result[name]}" for name in ("mask", "overlay") if name in result),
        )
    )


@command
def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status, 2 for bad input."""
    arguments = _arguments(argv)
    use_compile_cache()
    for number, result in enumerate(run(arguments)):
        for warning in warnings(result):
            say(f"warning: {warning}")
        if arguments.json:
            print(json.dumps(result), flush=True)
            continue
        if len(arguments.text) > 1:
            print(f"{chr(10) * bool(number)}{result['text']}")
        print(describe(result), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
