"""A web page to try a trained model on: an image and an expression in, a mask out.

python -m refseg_jax.demo --workdir runs/alignformer

Gradio makes the page; `pip install -e .[demo]` brings it.
"""

import argparse
import os
import sys
import types

import numpy as np

from refseg_jax import checkpoint, pictures
from refseg_jax.data import Source, open_source
from refseg_jax.errors import UserError, command
from refseg_jax.predict import Predictor, describe, facts, load_image, warnings
from refseg_jax.processes import use_compile_cache

EXAMPLES = 6
SIDE = 480  # px, of what smaller pictures are scaled to


def answer(
    predictor: Predictor, image: str | os.PathLike | None, text: str
) -> tuple[np.ndarray, np.ndarray, str]:
    """What the page shows for an image file and an expression.

    Returns:
      (the image with its mask, its foreground probability as heat, both uint8 [H, W, 3] at the
      image's own size or, if that is less, `SIDE` px on the long side; confidence, area and box in
      the image's own pixels, a line each).

    Raises:
      UserError: no image, one that cannot be read, or an empty expression.
    """
    if image is None:
        raise UserError("there is no image yet: choose one")
    pixels = load_image(image)
    found = predictor(pixels, text)
    told = "\n".join((describe(facts(found)), *warnings(facts(found))))
    mask, heat = found.mask, pictures.heat(pixels, found.probability)
    if max(mask.shape) < SIDE:
        pixels, mask, heat = (pictures.fit(picture, SIDE) for picture in (pixels, mask, heat))
    return pictures.overlay(pixels, mask), heat, told


def pick_examples(source: Source, count: int = EXAMPLES) -> list[tuple[np.ndarray, str]]:
    """(image uint8 [H, W, 3], expression) of `count` refs, from the first to the last."""
    picked = np.unique(np.linspace(0, len(source) - 1, count).round().astype(int))
    refs = [source[int(i)] for i in picked]
    return [(source.image(ref), ref.sentences[0].text) for ref in refs]


def import_gradio() -> types.ModuleType:
    """Gradio, or a UserError that says how to get it."""
    try:
        import gradio
    except ModuleNotFoundError as e:
        raise UserError(f"the page needs gradio (pip install -e .[demo]): {e}") from e
    return gradio


def make_page(predictor: Predictor, title: str, examples: list[tuple[np.ndarray, str]]):
    """The page, a `gradio.Blocks`; `examples` may be empty."""
    gradio = import_gradio()

    def ask(image, text):
        try:
            return answer(predictor, image, text)
        except UserError as e:
            raise gradio.Error(str(e), print_exception=False) from e

    # Pictures that are an hour old, and at the end all, are deleted.
    with gradio.Blocks(title=title, analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gradio.Markdown(f"# {title}")
        with gradio.Row():
            # The file as it is: `load_image` knows more kinds, and turns them upright.
            image = gradio.Image(type="filepath", image_mode=None, label="Image", height=420)
            mask = gradio.Image(label="Mask", format="png", interactive=False, height=420)
            heat = gradio.Image(label="Probability", format="png", interactive=False, height=420)
        with gradio.Row():
            with gradio.Column():
                text = gradio.Textbox(label="Expression", placeholder="the dog on the left")
                button = gradio.Button("Segment", variant="primary")
            told = gradio.Textbox(label="Found", lines=4, interactive=False)
        gradio.on([button.click, text.submit], ask, [image, text], [mask, heat, told])
        if examples:
            gradio.Examples([list(example) for example in examples], [image, text])
    return page


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m refseg_jax.demo", description="A web page to try a trained model on."
    )
    parser.add_argument("--workdir", required=True, help="directory of a training run")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 for the whole network")
    parser.add_argument("--port", type=int, default=7860)
    return parser.parse_args(argv)


@command
def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status, 2 for bad input."""
    arguments = _arguments(argv)
    use_compile_cache()
    import_gradio()
    predictor = Predictor.from_workdir(arguments.workdir)
    config = checkpoint.read_config(arguments.workdir)
    try:
        examples = pick_examples(open_source(config.data, config.data.select_split))
    except UserError as e:  # The data need not be where the model is.
        print(f"no examples: {e}", file=sys.stderr)
        examples = []
    # Compiles, so that the first question is answered as fast as the others.
    predictor(np.zeros((64, 64, 3), np.uint8), "a")
    page = make_page(predictor, f"{config.model.name}: {arguments.workdir}", examples)
    try:
        _, url, _ = page.launch(
            server_name=arguments.host,
            server_port=arguments.port,
            show_error=True,
            quiet=True,
            prevent_thread_lock=True,
        )
    except (OSError, OverflowError) as e:
        raise UserError(f"cannot serve at {arguments.host}:{arguments.port}: {e}") from e
    print(f"{url} (Ctrl-C ends it)", flush=True)
    page.block_thread()
    return 0


if __name__ == "__main__":
    sys.exit(main())
