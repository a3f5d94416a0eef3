"""AlignFormer.

python -m refseg_jax.main --config configs/alignformer.py
    A small model on the embedded shapes, from scratch: 2 CPU cores.
python -m refseg_jax.main --config configs/alignformer.py:refcoco
    The paper's recipe (Swin-B, BERT-base, 480 x 480, batch 32, 40 epochs); also refcoco+,
    refcocog_umd, refcocog_google. Give pretrained encoders as --config.init.swin=FILE
    --config.init.bert=bert-base-uncased. Paper, oIoU: RefCOCO 73.73 / 77.00 / 70.64 (val / testA /
    testB), RefCOCO+ 64.55 / 70.19 / 56.18, RefCOCOg 63.56 / 64.83 / 62.12 (val U, test U, val G).
python -m refseg_jax.main --config configs/alignformer.py:refcoco,small
    A laptop-size model on real data, from scratch.

Further words, for the paper's ablations (tables 2-4): swin_small, per_pixel, vlua, no_fusion,
no_cmic.
"""

from ml_collections import ConfigDict

from configs import common

WORDS = ("per_pixel", "vlua", "no_fusion", "no_cmic")


def get_config(variant: str = "") -> ConfigDict:
    words = common.parse_variant(variant, WORDS)
    config = common.get_common("alignformer", words)

    config.model.fusion = "vlba"  # "vlua": language never updated; "none".
    config.model.grouping = True  # False: per-pixel classification (table 2).
    config.model.lateral = False  # Stage 1 joins the 1/4 map.
    config.model.query = "cls"  # What of the language starts the query; "mean" of its tokens.
    config.model.gate_hidden = 1.0
    config.model.fuse_hidden = 1.0  # Hidden width of fuse(.), in output widths.
    config.model.prior = 0.0  # Foreground share that the logits start from; 0: as printed.
    config.model.dim = 256
    config.model.heads = 8
    config.model.points = 4
    config.model.pixel_layers = 6
    config.model.pixel_remat = False
    config.model.pixel_ffn = 1024
    config.model.decoder_layers = 6
    config.model.decoder_ffn = 2048
    config.model.dropout = 0.0
    config.model.cmic_weight = 0.5
    config.model.cmic_samples = 20

    config.eval.select_by = "overall"  # What the paper compares by.

    if common.is_small(words):
        common.make_small(config)
        config.model.update(query="mean", fuse_hidden=2.0, prior=0.05)
        config.model.update(dim=64, heads=4, pixel_layers=1, pixel_ffn=128, lateral=True)
        config.model.update(decoder_layers=3, decoder_ffn=128, cmic_weight=0.02)
        if config.data.dataset == "shapes":  # docs/training.md has the rates that were tried.
            config.optim.lr = 5e-4

    if "vlua" in words:
        config.model.fusion = "vlua"
    if "no_fusion" in words:
        config.model.fusion = "none"
    if "per_pixel" in words:
        config.model.update(grouping=False, cmic_weight=0.0)
    if "no_cmic" in words:
        config.model.cmic_weight = 0.0
    return config
