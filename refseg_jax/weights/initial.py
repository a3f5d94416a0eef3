"""Where a new run's parameters start, other than from scratch."""

from typing import Any

import jax
import ml_collections
import numpy as np

from refseg_jax import checkpoint
from refseg_jax.models.encoders.bert import BertConfig
from refseg_jax.models.encoders.swin import SwinConfig
from refseg_jax.weights import hf


def load_initial(
    config: ml_collections.ConfigDict, variables: Any, swin: SwinConfig, bert: BertConfig
) -> tuple[dict[str, Any], str]:
    """Parts of `variables` (a tree of shapes) to start from, and a line that says whence.

    Order: `config.init.checkpoint` (a run's workdir: everything) > pretrained encoders
    (`config.init.swin`, `.bert`: Hugging Face safetensors, a file or its directory) > scratch.

    Raises:
      UserError: a file is missing, damaged, or does not fit.
    """
    if config.init.checkpoint:
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        loaded = checkpoint.load_variables(config.init.checkpoint, variables, here)
        return jax.tree.map(np.asarray, loaded), f"all parameters from {config.init.checkpoint}"
    params, origins = {}, []
    for name, path, convert, encoder in (
        ("swin", config.init.swin, hf.swin_from_hf, swin),
        ("bert", config.init.bert, hf.bert_from_hf, bert),
    ):
        if path:
            params[name] = convert(hf.load_state(path), encoder)
            origins.append(f"{name} from {path}")
    return {"params": params}, ", ".join(
        [*origins, "the rest from scratch"] if origins else ["from scratch"]
    )
