"""CRIS.

python -m refseg_jax.main --config configs/cris.py
    A small model on the embedded shapes, from scratch: 2 CPU cores.
python -m refseg_jax.main --config configs/cris.py:refcoco
    The recipe of the authors' code (CLIP's ResNet-101 and text transformer, 416 x 416, batch 64,
    50 epochs); also refcoco+, refcocog_umd, refcocog_google. Give CLIP's weights as
    --config.init.clip=FILE. Paper, mIoU: RefCOCO 70.47 / 73.18 / 66.10 (val / testA / testB).
python -m refseg_jax.main --config configs/cris.py:refcoco,small
    A laptop-size model on real data, from scratch.

Further words: resnet50.
"""

from ml_collections import ConfigDict

from configs import common

WORDS = ("resnet50",)

# As released: CLIP learns at a tenth of the rate, but for its tables of positions. (There the
# schedule sets the rates after the first epoch, in which CLIP has the whole one: not so here.)
GROUPS = (
    (r"^(vision|text)/(?!(attention_pool/)?positions$)", 0.1, 1.0),
    (r"", 1.0, 1.0),
)


def get_config(variant: str = "") -> ConfigDict:
    words = common.parse_variant(variant, WORDS)
    config = common.get_common("cris", words)
    common.use_clip(config, words)

    if "resnet50" in words:
        config.model.vision.update(depths=(3, 4, 6, 3), embed_dim=1024)
        config.model.text.embed_dim = 1024
    config.model.neck_dims = (256, 512, 1024)  # At 1/8, 1/16 (the words' width, too), 1/32.
    config.model.decoder_layers = 3
    config.model.heads = 8
    config.model.ffn = 2048
    config.model.dropout = 0.1
    config.model.sentence = "eot"  # The end mark's state; "mean" of the words.
    config.model.prior = 0.0  # Foreground share that the logits start from; 0: as released.

    config.data.update(image_size=416, letterbox=True)
    config.data.max_tokens = 22 if config.data.dataset == "refcocog" else 17
    config.data.update(sampling="ref", text_field="sent")
    # The rate falls after 35 of 50 epochs.
    config.optim.update(lr=1e-4, end_lr=1e-5, decay_share=0.7, schedule="step")
    config.optim.update(weight_decay=0.0, groups=GROUPS)
    config.train.update(epochs=50, batch_size=64, eval_every=662)  # An epoch of RefCOCO.
    config.eval.threshold = 0.35

    if common.is_small(words):
        common.make_small(config)
        config.model.vision.depths = (1, 1, 2)  # The decoder's map at 1/8 instead of 1/16.
        config.model.vision.pool_grid = config.data.image_size // 16
        config.model.text.hidden = 96
        config.model.update(neck_dims=(32, 96, 96), decoder_layers=2, heads=4, ffn=256)
        config.model.update(dropout=0.0, sentence="mean", prior=0.05)
        config.optim.update(end_lr=0.0, decay_share=1.0, schedule="poly", weight_decay=0.01)
        # The kernel that the sentence gives meets hundreds of numbers in every pixel: at the full
        # rate the mask jumps from step to step.
        config.optim.groups = ((r"^projector/sentence/", 0.1, 0.0), *common.GROUPS)
        if config.data.dataset == "shapes":
            config.train.update(steps=2800)
            config.eval.threshold = 0.3
    return config
