"""LAVT, the baseline of the papers.

python -m refseg_jax.main --config configs/lavt.py
    A small model on the embedded shapes, from scratch: 2 CPU cores.
python -m refseg_jax.main --config configs/lavt.py:refcoco
    The recipe of the authors' code (Swin-B, BERT-base, 480 x 480, batch 32, 40 epochs); also
    refcoco+, refcocog_umd, refcocog_google. What it freezes must be pretrained: give encoders as
    --config.init.swin=FILE --config.init.bert=bert-base-uncased. Paper, oIoU, which the authors
    take at the input size (--config.eval.protocol=input): RefCOCO 72.73 / 75.82 / 68.79 (val /
    testA / testB).
python -m refseg_jax.main --config configs/lavt.py:refcoco,small
    A laptop-size model on real data, from scratch.

Further words: swin_small.
"""

from ml_collections import ConfigDict

from configs import common


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
    words = common.parse_variant(variant)
    config = common.get_common("lavt", words)

    config.model.fusion_heads = (1, 1, 1, 1)  # Of each stage's attention to the words.
    config.model.shut_gates = True  # At first, almost.
    config.model.draws = "released"  # Of other new layers; or "flax".
    config.model.class_weights = (0.9, 1.1)  # Background, foreground.

    config.data.max_tokens = 20
    config.data.sampling = "ref"
    config.train.update(batch_size=32, eval_every=1325)  # An epoch of RefCOCO.
    config.eval.select_by = "overall"  # As released.
    config.optim.update(lr=5e-5, groups=released_groups(config.model.bert.layers, trained=10))

    if common.is_small(words):
        common.make_small(config)
        config.model.update(fusion_heads=(2, 4, 4, 8), shut_gates=False, draws="flax")
    return config
