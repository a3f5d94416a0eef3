"""CrossVLT.

python -m refseg_jax.main --config configs/crossvlt.py
    A small model on the embedded shapes, from scratch: 2 CPU cores.
python -m refseg_jax.main --config configs/crossvlt.py:refcoco
    The recipe of the authors' code (Swin-B, BERT-base, 480 x 480, batch 16, 40 epochs); also
    refcoco+, refcocog_umd, refcocog_google. Paper, oIoU: RefCOCO 73.44 / 76.16 / 70.15 (val /
    testA / testB), RefCOCO+ 63.60 / 69.10 / 55.23, RefCOCOg 62.68 / 63.75 (val U, test U).
python -m refseg_jax.main --config configs/crossvlt.py:refcoco,small
    A laptop-size model on real data, from scratch.

Further words: paper (what the paper prints where the code differs), swin_small, and for tables II
and III uni, aux, no_align. Stages and depths are fields: --config.model.fusion_stages=(3,4),
--config.model.align_stages=(3,4), --config.model.bert.layers=8 with
--config.model.language_depths=(2,1,1).
"""

from ml_collections import ConfigDict

from configs import common

WORDS = ("small", "swin_small", "paper", "uni", "aux", "no_align")

# As released: BERT's embeddings and the temperatures stay as they are; no weight decay for the
# vision encoder's norms (the last of which are the decoder's first) and position tables.
GROUPS = (
    (r"^(bert/embeddings/|temperature$)", 0.0, 0.0),
    (r"^swin/.*(norm\d?/|bias_table$)", 1.0, 0.0),
    (r"^decoder/stage_norm", 1.0, 0.0),
    (r"", 1.0, 1.0),
)


def get_config(variant: str = "") -> ConfigDict:
    words = common.parse_variant(variant, WORDS)
    config = common.get_common(words)
    embedded = config.data.dataset == "shapes"

    config.model = ConfigDict(dict(name="crossvlt", dtype="float32"))
    config.model.swin = ConfigDict(
        dict(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32), window=12)
    )
    config.model.swin.drop_path = 0.3
    config.model.swin.remat = False
    # The layers of language stage 1; those of stages 2-4 follow in language_depths.
    config.model.bert = ConfigDict(dict(hidden=768, layers=6, heads=12, intermediate=3072))
    config.model.bert.vocab_size = 0  # 0: the tokenizer's.
    config.model.bert.max_positions = 512
    config.model.bert.dropout = 0.1
    config.model.bert.remat = False
    config.model.language_depths = (2, 2, 2)  # The fusion layer counts.
    config.model.fusion_stages = (1, 2, 3, 4)
    config.model.direction = "bi"  # "uni": only the pixels attend to the words.
    config.model.align_stages = (1, 2, 3, 4)  # (): no alignment.
    config.model.align_loss = "align"  # "aux": segment every stage's pixels instead.
    config.model.align_at = "input"  # Resolution of the alignment loss, or the "stage"'s own.
    config.model.align_dim = 256
    config.model.head_dim = 64
    config.model.class_weights = (0.9, 1.1)  # Background, foreground.
    config.model.task_weight = 2.0
    config.model.align_weight = 1.0

    config.data.max_tokens = 21
    config.data.sampling = "ref"
    config.optim.lr = 3e-5
    config.train.update(batch_size=16, eval_every=2650)  # An epoch of RefCOCO.

    if "swin_small" in words:
        config.model.swin.update(embed_dim=96, num_heads=(3, 6, 12, 24), window=7)
    if embedded or "small" in words:
        config.model.swin.update(embed_dim=32, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8))
        config.model.swin.update(window=4 if embedded else 7, drop_path=0.0)
        config.model.bert.update(hidden=128, layers=2, heads=4, intermediate=256, dropout=0.0)
        config.model.bert.max_positions = 64
        config.model.update(language_depths=(1, 1, 1), align_dim=64, head_dim=32)
        config.data.sampling = "sentence"
        config.optim.update(lr=1e-3, warmup_steps=100, clip_norm=1.0)
        config.train.log_every = 20
    else:
        config.optim.groups = GROUPS
    if embedded:
        config.data.image_size = 128
        config.data.max_tokens = 14
        config.train.update(steps=3000, eval_every=500, checkpoint_every=500)
        config.eval.limit_in_training = 300
    elif "small" in words:
        config.data.image_size = 256

    if "paper" in words:
        config.model.update(class_weights=(1.0, 1.0), align_at="stage")
        config.model.update(task_weight=1.0, align_weight=0.5)
        config.optim.lr = 3e-4
        config.optim.groups = ((r"^temperature$", 1.0, 0.0), *GROUPS)
    if "uni" in words:
        config.model.direction = "uni"
    if "aux" in words:
        config.model.align_loss = "aux"
    if "no_align" in words:
        config.model.align_stages = ()
    return config
