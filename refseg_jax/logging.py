"""JSON lines, TensorBoard and a progress bar behind one small writer; what each step adds."""

import json
import math
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from tqdm import tqdm

from refseg_jax.data.files import write_whole
from refseg_jax.errors import UserError

METRICS_FILE = "metrics.jsonl"


def read_metrics(workdir: str) -> list[dict[str, Any]]:
    """The rows written so far; what is none, such as a line cut off by a kill, is left out."""
    path = epath.Path(workdir) / METRICS_FILE
    rows = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


class MetricWriter:
    """Writes rows of scalars to `metrics.jsonl` and TensorBoard, and drives the progress bar.

    Rows after `start_step`, of a killed run that is being resumed, are dropped, so the file reads
    as if the run had never stopped; only the first mean after a restart is of fewer steps. Only the
    first process writes.
    """

    def __init__(self, workdir: str, start_step: int, total_steps: int, active: bool = True):
        self.active = active
        if not active:
            return
        from tensorboardX import SummaryWriter  # Late: where PyTorch is, it loads that too.

        self._path = epath.Path(workdir) / METRICS_FILE
        kept = [row for row in read_metrics(workdir) if row["step"] <= start_step]
        self._text = "".join(json.dumps(row) + "\n" for row in kept)
        write_whole(self._path, self._text)
        # A bucket's files cannot grow: there the whole is written again with every row.
        self._file = self._path.open("a") if "://" not in str(workdir) else None
        # What a killed run has written of later steps does not count.
        self._board = SummaryWriter(
            str(epath.Path(workdir) / "tensorboard"),
            purge_step=start_step + 1,
            flush_secs=10,
            max_queue=1000,  # Of a row, while its thread ends.
        )
        self._bar = tqdm(
            total=total_steps,
            initial=start_step,
            unit="step",
            dynamic_ncols=True,
            # A log file gets a line now and then instead of a redrawn one.
            mininterval=0.5 if sys.stderr.isatty() else 30,
        )

    def advance(self, step: int) -> None:
        """Moves the bar to `step`."""
        if self.active:
            self._bar.update(step - self._bar.n)

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """One row. The bar shows loss and images/s where the row has them."""
        if not self.active:
            return
        row = {"step": step, **{name: float(value) for name, value in scalars.items()}}
        line = json.dumps(row) + "\n"
        if self._file:
            self._file.write(line)
            self._file.flush()
        else:
            self._text += line
            self._path.write_text(self._text)
        # A file that cannot be written ends the thread that does; a full queue would wait for it.
        if self._board and not self._board.file_writer.event_writer._worker.is_alive():
            self._lose_board()
        if self._board:
            for name, value in scalars.items():
                self._board.add_scalar(name, float(value), step)
        if "loss" in row:
            self._bar.set_postfix_str(
                f"loss={row['loss']:.4f} {row['images_per_second']:.1f} images/s", refresh=False
            )

    def say(self, text: str) -> None:
        """A line for the person watching, above the bar."""
        if self.active:
            tqdm.write(text, file=sys.stderr)

    def _lose_board(self) -> None:
        self._board = None
        self.say(f"TensorBoard's file cannot be written: {METRICS_FILE} has what follows")

    def close(self) -> None:
        if self.active:
            self._bar.close()
            try:
                if self._board:
                    self._board.close()
            except Exception:  # Of a bucket, it may be any.
                self._lose_board()
            if self._file:
                self._file.close()


def check_finite(name: str, value: float, step: int) -> None:
    """Raises a UserError where a number of a step is not finite."""
    if not math.isfinite(value):
        raise UserError(
            f"{name} is {value} at step {step}: the run stops here and the last good checkpoint is "
            "kept. Try a lower config.optim.lr, config.optim.clip_norm or "
            "config.optim.warmup_steps in a new workdir"
        )


class Recorder:
    """Metrics of step n, fetched after step n + 1 is dispatched; stops the run if not finite."""

    def __init__(self, writer: MetricWriter, schedule: Callable, config: Any, total: int):
        self.writer, self.schedule, self.config = writer, schedule, config
        self.total = total
        self.pending = None
        self.rows = []
        self.once = {}  # What the next row says, and no other.
        self.restart_clock()

    def restart_clock(self) -> None:
        self.since, self.counted = time.perf_counter(), 0

    def add(self, step: int, scalars: dict[str, jax.Array]) -> None:
        previous, self.pending = self.pending, (step, scalars)
        if previous:
            self._take(*previous)

    def flush(self) -> None:
        if self.pending:
            self._take(*self.pending)
            self.pending = None

    def _take(self, step, scalars):
        scalars = {name: float(value) for name, value in jax.device_get(scalars).items()}
        for name in ("loss", "grad_norm"):
            check_finite(name, scalars[name], step)
        self.writer.advance(step)
        self.rows.append(scalars)
        self.counted += 1
        if step % self.config.log_every == 0 or step == self.total:
            means = {k: float(np.mean([row[k] for row in self.rows])) for k in scalars}
            seconds = time.perf_counter() - self.since
            means["lr"] = float(self.schedule(jnp.asarray(step - 1)))
            means["images_per_second"] = self.counted * self.config.batch_size / seconds
            self.writer.write(step, means | self.once)
            self.rows.clear()
            self.once.clear()
            self.restart_clock()
