"""LAVT, the baseline of the papers.

python -m refseg_jax.main --config configs/lavt.py
    A small model on the embedded shapes, from scratch: 2 CPU cores.
python -m refseg_jax.main --config configs/lavt.py:refcoco
    The recipe of the authors' code (Swin-B, BERT-base, 480 x 480, batch 32, 40 epochs); also
    refcoco+, refcocog_umd, refcocog_google. Paper, oIoU: RefCOCO 72.73 / 75.82 / 68.79 (val /
    testA / testB).
python -m refseg_jax.main --config configs/lavt.py:refcoco,small
    A laptop-size model on real data, from scratch.

Further words: swin_small.
"""

from ml_collections import ConfigDict

from configs import common

WORDS = ("small", "swin_small")


def released_groups(layers: int, trained: int) -> tuple[tuple[str, float, float], ...]:
    """`config.optim.groups` as released, for a BERT of `layers` of which the first are `trained`.

    BERT's embeddings and last layers stay as they are; no weight decay for the vision encoder's
    norms (the last of which are the decoder's first) and position tables.
    """
    frozen = "|".join(["embeddings", *(f"blocks_{i}" for i in range(trained, layers))])
    return (
        (rf"^bert/({frozen})/", 0.0, 0.0),
        (r"^swin/.*(norm\d?/|bias_table$)", 1.0, 0.0),
        (r"^decoder/stage_norm", 1.0, 0.0),
        (r"", 1.0, 1.0),
    )


def get_config(variant: str = "") -> ConfigDict:
    words = common.parse_variant(variant, WORDS)
    config = common.get_common(words)
    embedded = config.data.dataset == "shapes"

    config.model = ConfigDict(dict(name="lavt", dtype="float32"))
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
    config.model.fusion_heads = (1, 1, 1, 1)  # Of each stage's attention to the words.
    config.model.class_weights = (0.9, 1.1)  # Background, foreground.

    config.data.max_tokens = 20
    config.data.sampling = "ref"
    config.optim.lr = 5e-5
    config.train.update(batch_size=32, eval_every=1325)  # An epoch of RefCOCO.

    if "swin_small" in words:
        config.model.swin.update(embed_dim=96, num_heads=(3, 6, 12, 24), window=7)
    if embedded or "small" in words:
        config.model.swin.update(embed_dim=32, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8))
        config.model.swin.update(window=4 if embedded else 7, drop_path=0.0)
        config.model.bert.update(hidden=128, layers=2, heads=4, intermediate=256, dropout=0.0)
        config.model.bert.max_positions = 64
        config.data.sampling = "sentence"
        config.optim.update(lr=1e-3, warmup_steps=100, clip_norm=1.0)
        config.train.update(batch_size=16, log_every=20)
    else:
        config.optim.groups = released_groups(config.model.bert.layers, trained=10)
    if embedded:
        config.data.image_size = 128
        config.data.max_tokens = 14
        config.train.update(steps=3000, eval_every=500, checkpoint_every=500)
        config.eval.limit_in_training = 300
    elif "small" in words:
        config.data.image_size = 256
    return config
