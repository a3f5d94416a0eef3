"""One forward pass and one train step at the paper's size (configs/*.py:refcoco).

python -m benchmarks.paper_size [--config alignformer] [--batch 1]

Prints a JSON line each: seconds to compile, seconds to run (after the first), peak memory of the
process in GiB so far. Parameters are random; the data is noise.
"""

import argparse
import json
import resource
import time

import jax

from benchmarks.paper import CONFIGS, paper_config, paper_state, positive, random_batch
from benchmarks.timing import seconds_of
from refseg_jax.predict import make_predict_step
from refseg_jax.train import train_step
from refseg_jax.train_state import init_state, init_variables


def measure(name, function, *arguments):
    begun = time.perf_counter()
    compiled = function.lower(*arguments).compile()
    compile_seconds = time.perf_counter() - begun
    (run_seconds,) = seconds_of(compiled, arguments, 1)
    row = {
        "what": name,
        "compile_s": round(compile_seconds, 1),
        "run_s": round(run_seconds, 2),
        "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "device": jax.devices()[0].device_kind,
    }
    print(json.dumps(row), flush=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", choices=CONFIGS, default="alignformer")
    parser.add_argument("--batch", type=positive, default=1)
    arguments = parser.parse_args()
    config, rows = paper_config(arguments.config), arguments.batch
    size, tokens = config.data.image_size, config.data.max_tokens
    model, tx, _ = paper_state(config)
    variables = jax.jit(lambda key: init_variables(model, key, size, tokens))(jax.random.key(0))
    batch = random_batch(config, rows)
    measure(f"{arguments.config} forward, batch {rows}", make_predict_step(model), variables, batch)
    state = init_state(variables, lambda _: tx, jax.random.key(1), use_ema=False)
    step = jax.jit(lambda state, batch: train_step(state, batch, model=model, tx=tx))
    measure(f"{arguments.config} train step, batch {rows}", step, state, batch)


if __name__ == "__main__":
    main()
