"""CrossVLT.

python -m refseg_jax.main --config configs/crossvlt.py
    A small model on the embedded shapes, from scratch: 2 CPU cores.
python -m refseg_jax.main --config configs/crossvlt.py:refcoco
    The recipe of the authors' code (Swin-B, BERT-base, 480 x 480, 40 epochs) with the paper's batch
    of 16, where the code's own command has 2 x 6; also refcoco+, refcocog_umd, refcocog_google.
    What it freezes must be pretrained: give encoders as --config.init.swin=FILE
    --config.init.bert=bert-base-uncased. Paper, oIoU, which the authors take at the input size
    (--config.eval.protocol=input): RefCOCO 73.44 / 76.16 / 70.15 (val / testA / testB), RefCOCO+
    63.60 / 69.10 / 55.23, RefCOCOg 62.68 / 63.75 (val U, test U).
python -m refseg_jax.main --config configs/crossvlt.py:refcoco,small
    A laptop-size model on real data, from scratch.

Further words: paper (what the paper prints where the code differs), swin_small, resnet101 (table I:
RefCOCO 70.03 / 73.83 / 64.88), and for tables II and III uni, aux, no_align. Stages and depths are
fields: '--config.model.fusion_stages=(3,4)', '--config.model.align_stages=(3,4)',
--config.model.bert.layers=8 with '--config.model.language_depths=(2,1,1)'.
"""

from ml_collections import ConfigDict

from configs import common

WORDS = ("resnet101", "paper", "uni", "aux", "no_align")

# As released: BERT's embeddings and the temperatures stay as they are; no weight decay for the
# vision encoder's norms (the last of which are the decoder's first) and position tables.
GROUPS = (
    (r"^(bert/embeddings/|temperature$)", 0.0, 0.0),
    (r"^(swin|resnet)/.*(norm\d?/|bias_table$)", 1.0, 0.0),
    (r"^decoder/stage_norm", 1.0, 0.0),
    (r"", 1.0, 1.0),
)


def get_config(variant: str = "") -> ConfigDict:
    words = common.parse_variant(variant, WORDS)
    if {"resnet101", "swin_small"} <= words:
        raise ValueError(f"config variant {variant!r} names more than one backbone")
    config = common.get_common("crossvlt", words)

    config.model.backbone = "resnet" if "resnet101" in words else "swin"
    config.model.resnet = ConfigDict(dict(width=64, depths=(3, 4, 23, 3), variant="v1.5"))
    config.model.resnet.update(frozen_stats=False, remat=False)
    config.model.bert.layers = 6  # Of language stage 1; those of stages 2-4:
    config.model.language_depths = (2, 2, 2)  # The fusion layer counts.
    config.model.fusion_stages = (1, 2, 3, 4)
    config.model.direction = "bi"  # "uni": only the pixels attend to the words.
    config.model.align_stages = (1, 2, 3, 4)  # (): no alignment.
    config.model.align_loss = "align"  # "aux": segment every stage's pixels instead.
    config.model.align_at = "input"  # Resolution of the alignment loss, or the "stage"'s own.
    config.model.align_dim = 256
    config.model.head_dim = 64
    config.model.fusion_form = "released"  # "paper": eq. 1-4 as printed.
    config.model.shut_gates = True  # At first, almost.
    config.model.draws = "released"  # Of other new layers; or "flax".
    config.model.class_weights = (0.9, 1.1)  # Background, foreground.
    config.model.task_weight = 2.0
    config.model.align_weight = 1.0

    config.data.max_tokens = 21
    config.data.sampling = "ref"
    config.eval.select_by = "overall"  # As released.
    config.optim.update(lr=3e-5, groups=GROUPS)
    config.train.update(batch_size=16, eval_every=2650)  # An epoch of RefCOCO.

    if "uni" in words:
        config.model.direction = "uni"
    if "aux" in words:
        config.model.align_loss = "aux"
    if "no_align" in words:
        config.model.align_stages = ()
    if "paper" in words:
        config.model.update(class_weights=(1.0, 1.0), align_at="stage", fusion_form="paper")
        config.model.update(task_weight=1.0, align_weight=0.5)
        config.optim.lr = 3e-4
        if not words & {"aux", "no_align"}:  # Which have no temperatures.
            config.optim.groups = ((r"^temperature$", 1.0, 0.0), *GROUPS)
    if common.is_small(words):
        common.make_small(config)
        config.model.resnet.update(width=6, depths=(1, 1, 2, 1))
        config.model.update(language_depths=(1, 1, 1), align_dim=64, head_dim=24)
        config.model.update(shut_gates=False, draws="flax")
        if config.data.dataset == "shapes":  # A step takes longer than the other models'.
            config.train.update(steps=3000, eval_every=1000, checkpoint_every=500)
    return config
