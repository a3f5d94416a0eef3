"""CoupAlign.

python -m refseg_jax.main --config configs/coupalign.py
    A small model on the embedded shapes, from scratch: 2 CPU cores.
python -m refseg_jax.main --config configs/coupalign.py:refcoco
    The paper's recipe (Swin-B, BERT-base, 448 x 448, batch 16, 50 epochs); also refcoco+,
    refcocog_umd, refcocog_google. Give pretrained encoders as --config.init.swin=FILE
    --config.init.bert=bert-base-uncased. Paper, oIoU: RefCOCO 74.70 / 77.76 / 70.58 (val / testA /
    testB), RefCOCO+ 62.92 / 68.34 / 56.69, G-Ref 62.84 / 62.22 (val U, test U).
python -m refseg_jax.main --config configs/coupalign.py:refcoco,small
    A laptop-size model on real data, from scratch.

Further words: swin_small; the backbones of the supplement's tables 1-2, resnet101 and darknet53
(RefCOCO val 68.93, 68.16); the ablations of table 4: no_wpa, uni, no_sma, no_aux. Tables 3 and 5
are fields: --config.model.queries=20, '--config.model.wpa_stages=(3,4)'.
"""

from ml_collections import ConfigDict

from configs import common

WORDS = ("resnet101", "darknet53", "no_wpa", "uni", "no_sma", "no_aux")


def get_config(variant: str = "") -> ConfigDict:
    words = common.parse_variant(variant, WORDS)
    if len(words & {"resnet101", "darknet53", "swin_small"}) > 1:
        raise ValueError(f"config variant {variant!r} names more than one backbone")
    config = common.get_common("coupalign", words)

    config.model.backbone = "swin"  # Or "resnet", "darknet":
    config.model.resnet = ConfigDict(dict(width=64, depths=(3, 4, 23, 3), variant="v1.5"))
    config.model.darknet = ConfigDict(dict(width=32, depths=(2, 8, 8, 4)))
    for encoder in (config.model.resnet, config.model.darknet):
        encoder.update(frozen_stats=False, remat=False)
    config.model.wpa_stages = (1, 2, 3, 4)  # (): words and pixels meet after the encoders only.
    config.model.direction = "bi"  # "uni": only the pixels attend to the words.
    config.model.joint_dim = 768
    config.model.shut_gates = True  # Gates of the alignment start narrow.
    config.model.heads = 8
    config.model.position_grid = 14  # Learned positions: the side of the 1/32 map.
    config.model.sma = True  # False: a linear classifier of the pixels.
    config.model.queries = 100  # Mask proposals.
    config.model.generator_dim = 256
    config.model.generator_layers = 6
    config.model.generator_ffn = 2048
    config.model.generator_pre_norm = True
    config.model.dropout = 0.0
    config.model.seg_dim = 512
    config.model.sentence = "cls"  # What stands for the sentence; "mean" of its tokens.
    config.model.similarity_temperature = 1.0
    config.model.prior = 0.0  # Foreground share that the logits start from; 0: as printed.
    config.model.aux_weight = 0.1
    config.model.aux_temperature = 0.1
    config.model.aux_normalize = True

    config.data.image_size = 448
    config.data.max_tokens = 30
    config.eval.select_by = "overall"  # What the paper compares by.
    config.optim.update(lr=3e-5, end_lr=1.5e-5, decay_share=0.5)
    config.train.update(epochs=50, batch_size=16, eval_every=7540)  # An epoch of RefCOCO.

    if common.is_small(words):
        common.make_small(config)
        # Three stages: on a coarser map the mask proposals have nothing to tell apart.
        config.model.swin.update(depths=(1, 1, 2), num_heads=(1, 2, 4))
        config.model.bert.layers = 3
        config.model.update(wpa_stages=(1, 2, 3), joint_dim=64, shut_gates=False, heads=4)
        config.model.update(position_grid=5, queries=20)
        config.model.update(generator_dim=64, generator_layers=2, generator_ffn=128, seg_dim=64)
        config.model.update(sentence="mean", prior=0.05, similarity_temperature=0.1)
        config.model.resnet.update(width=8, depths=(1, 1, 2))
        config.model.darknet.update(width=8, depths=(1, 1, 2))
        config.optim.update(end_lr=0.0, decay_share=1.0)
        if config.data.dataset == "shapes":  # A step takes less time than the other models'.
            config.train.update(steps=5400)

    if "resnet101" in words:
        config.model.backbone = "resnet"
    if "darknet53" in words:
        config.model.backbone = "darknet"
    if "no_wpa" in words:
        config.model.wpa_stages = ()
    if "uni" in words:
        config.model.direction = "uni"
    if "no_sma" in words:
        config.model.sma = False
    if "no_aux" in words:
        config.model.aux_weight = 0.0
    return config
