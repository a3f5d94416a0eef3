"""JMCELN.

python -m refseg_jax.main --config configs/jmceln.py
    A small model on the embedded shapes, from scratch: 2 CPU cores.
python -m refseg_jax.main --config configs/jmceln.py:refcoco
    The paper's recipe (CLIP's ResNet-101 and text transformer, 416 x 416, batch 20, 60 epochs);
    also refcoco+, refcocog_umd, refcocog_google. Give CLIP's weights as --config.init.clip=FILE.
    Paper, mIoU: RefCOCO 74.40 / 77.69 / 70.43 (val / testA / testB), RefCOCO+ 66.99 / 72.69 /
    57.34, RefCOCOg 64.08 / 64.99 (val U, test U).
python -m refseg_jax.main --config configs/jmceln.py:refcoco,small
    A laptop-size model on real data, from scratch.

Further words, the rows of table 2 (RefCOCO testB): baseline (62.57), no_cascade (68.03), no_lsran
(without PAN too: 69.23), no_pan (69.46), no_adaptive (69.11). n and Q are fields:
--config.model.stages=3 --config.model.queries=10.
"""

from ml_collections import ConfigDict

from configs import common

WORDS = ("baseline", "no_cascade", "no_lsran", "no_pan", "no_adaptive")


def get_config(variant: str = "") -> ConfigDict:
    words = common.parse_variant(variant, WORDS)
    config = common.get_common("jmceln", words)
    common.use_clip(config, words)

    config.model.vision.pool = False
    config.model.sentence = "eot"  # The end mark's state; "mean" of the words.
    config.model.levels = 3  # The encoder's last maps, which the neck joins.
    config.model.dim = 1024
    config.model.heads = 8
    config.model.lsran = True
    config.model.window = 13  # Of LSRAN's attention, in cells of the 1/8 map.
    config.model.dilations = (1, 6, 12, 18)
    config.model.stages = 6
    config.model.queries = 20  # Contextual embeddings.
    config.model.pan = True
    config.model.adaptive = True
    config.model.doublings = 3  # Of the map's size at the end.
    config.model.prior = 0.0  # Foreground share that the logits start from; 0: nothing special.

    config.data.image_size = 416
    config.data.max_tokens = 30
    config.optim.update(lr=6e-6)
    config.train.update(epochs=60, batch_size=20, eval_every=6032)  # An epoch of RefCOCO.

    if common.is_small(words):
        common.make_small(config)
        # On a coarser map than 1/16 the sentence could not tell the objects apart.
        config.model.vision.update(width=24, depths=(1, 1, 2))
        config.model.levels = 2
        config.model.update(dim=96, heads=4, window=5, dilations=(1, 2, 3, 4))
        config.model.update(stages=2, queries=10, doublings=2, sentence="mean", prior=0.05)
        if config.data.dataset == "shapes":
            config.train.update(steps=3600)
            config.eval.threshold = 0.3

    if words & {"baseline", "no_lsran"}:
        config.model.lsran = False
    if words & {"baseline", "no_cascade"}:
        config.model.stages = 0
    if words & {"no_lsran", "no_pan"}:
        config.model.pan = False
    if "no_adaptive" in words:
        config.model.adaptive = False
    return config
