"""AlignFormer.

python -m refseg_jax.main --config configs/alignformer.py
    A small model on the embedded shapes, from scratch: 2 CPU cores.
python -m refseg_jax.main --config configs/alignformer.py:refcoco
    The paper's recipe (Swin-B, BERT-base, 480 x 480, batch 32, 40 epochs); also refcoco+,
    refcocog_umd, refcocog_google. Paper, oIoU: RefCOCO 73.73 / 77.00 / 70.64 (val / testA /
    testB), RefCOCO+ 64.55 / 70.19 / 56.18, RefCOCOg 63.56 / 64.83 / 62.12 (val U, test U, val G).
python -m refseg_jax.main --config configs/alignformer.py:refcoco,small
    A laptop-size model on real data, from scratch.

Further words, for the paper's ablations (tables 2-4): swin_small, per_pixel, vlua, no_fusion,
no_cmic.
"""

from ml_collections import ConfigDict

from configs import common

WORDS = ("small", "swin_small", "per_pixel", "vlua", "no_fusion", "no_cmic")


def get_config(variant: str = "") -> ConfigDict:
    words = common.parse_variant(variant, WORDS)
    config = common.get_common(words)
    embedded = config.data.dataset == "shapes"

    config.model = ConfigDict(dict(name="alignformer", dtype="float32"))
    config.model.swin = ConfigDict(
        dict(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32), window=12)
    )
    config.model.swin.drop_path = 0.3
    config.model.swin.remat = False
    config.model.bert = ConfigDict(dict(hidden=768, layers=12, heads=12, intermediate=3072))
    config.model.bert.vocab_size = 0  # 0: the tokenizer's.
    config.model.bert.max_positions = 512
    config.model.bert.dropout = 0.1
    config.model.bert.remat = False
    config.model.fusion = "vlba"  # "vlua": language never updated; "none".
    config.model.grouping = True  # False: per-pixel classification (table 2).
    config.model.lateral = False  # Stage 1 joins the 1/4 map.
    config.model.query = "cls"  # What of the language starts the query; "mean" of its tokens.
    config.model.pixel_positions = False  # Sine positions on the patch embedding.
    config.model.fuse_hidden = 1.0  # Hidden width of fuse(.), in output widths.
    config.model.prior = 0.0  # Foreground share that the logits start from; 0: as printed.
    config.model.dim = 256
    config.model.heads = 8
    config.model.points = 4
    config.model.pixel_layers = 6
    config.model.pixel_ffn = 1024
    config.model.decoder_layers = 6
    config.model.decoder_ffn = 2048
    config.model.dropout = 0.0
    config.model.cmic_weight = 0.5
    config.model.cmic_samples = 20

    if "swin_small" in words:
        config.model.swin.update(embed_dim=96, num_heads=(3, 6, 12, 24), window=7)
    if embedded or "small" in words:
        # From scratch: see docs/training.md for why it differs from the recipe.
        config.model.swin.update(embed_dim=24, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8))
        config.model.swin.update(window=5 if embedded else 6, drop_path=0.0)
        config.model.bert.update(hidden=128, layers=2, heads=4, intermediate=256, dropout=0.0)
        config.model.bert.max_positions = 64
        config.model.update(query="mean", pixel_positions=True, fuse_hidden=2.0, prior=0.05)
        config.model.update(dim=64, heads=4, pixel_layers=1, pixel_ffn=128, lateral=True)
        config.model.update(decoder_layers=3, decoder_ffn=128, cmic_weight=0.02)
        config.optim.update(lr=1e-3, warmup_steps=100, clip_norm=1.0, b2=0.95)
        config.train.update(batch_size=16, log_every=20)
    if embedded:
        config.data.image_size = 80
        config.data.max_tokens = 16
        config.train.update(steps=3750, eval_every=1250, checkpoint_every=625)
        config.data.shapes_scenes.update(train=6000, val=100, testA=60, testB=60)
        # Unsure between a few objects, a model this small shares its belief among them.
        config.eval.update(batch_size=30, limit_in_training=300, threshold=0.2)
    elif "small" in words:
        config.data.image_size = 192

    if "vlua" in words:
        config.model.fusion = "vlua"
    if "no_fusion" in words:
        config.model.fusion = "none"
    if "per_pixel" in words:
        config.model.update(grouping=False, cmic_weight=0.0)
    if "no_cmic" in words:
        config.model.cmic_weight = 0.0
    return config
