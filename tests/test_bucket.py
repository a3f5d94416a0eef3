"""A run's directory in a bucket: what lies beside the checkpoints is written and read there."""

import json
import pathlib
import time
from unittest import mock

import fsspec
import numpy as np
import pytest
import safetensors.numpy
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem

from refseg_jax import checkpoint, logging, run
from refseg_jax.data import load_tokenizer
from refseg_jax.errors import UserError, bucket_errors
from refseg_jax.weights.darknet import convert_darknet
from refseg_jax.weights.files import read_checkpoint
from tests import tiny


class Bucket(MemoryFileSystem):
    """What gs:// addresses lead to here."""

    store, pseudo_dirs = {}, [""]
    protocol = ("gcs", "gs")

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("gs://", "memory://"))


@pytest.fixture
def bucket(monkeypatch):
    """An empty gs:// folder."""
    monkeypatch.setattr(fsspec, "filesystem", lambda name, **_: Bucket())
    Bucket.store.clear()
    Bucket.pseudo_dirs[:] = [""]
    return "gs://bucket/run"


def test_a_run_begins_in_a_bucket_and_is_found_again(bucket):
    config = tiny.config()
    tokenizer = run.prepare(config, bucket)
    assert json.loads(checkpoint.read_config(bucket).to_json()) == json.loads(config.to_json())
    again = load_tokenizer(f"{bucket}/{checkpoint.TOKENIZER_FILE}")
    assert again.tokens("second circle") == tokenizer.tokens("second circle")
    assert not checkpoint.saved_steps(bucket)
    folder = epath.Path(bucket) / "checkpoints" / "last" / "5"
    (folder / "item").mkdir(parents=True)
    assert not checkpoint.saved_steps(bucket)  # A kill left it so.
    (folder / "commit_success.txt").write_text("")
    assert checkpoint.saved_steps(bucket) == [5]


def test_checkpoints_of_a_bucket_go_there(bucket, monkeypatch):
    folders = []
    monkeypatch.setattr(checkpoint, "_Manager", lambda folder, **_: folders.append(str(folder)))
    checkpoint.Checkpoints(bucket)
    assert folders == [f"{bucket}/checkpoints/last", f"{bucket}/checkpoints/best"]


def test_what_others_write_to_a_bucket_is_seen(bucket):
    assert not Bucket(skip_instance_cache=True).dircache.use_listings_cache


def test_a_bucket_that_does_not_exist_is_one_line():
    with pytest.raises(UserError, match="Bucket does not exist: no-such: make it"), bucket_errors():
        raise FileNotFoundError("Bucket does not exist: no-such")  # As gcsfs has it.
    with pytest.raises(FileNotFoundError), bucket_errors():
        pathlib.Path("/no/such/file").read_text()


def test_weights_are_read_from_a_bucket(bucket):
    folder, arrays = epath.Path(bucket), {"a": np.arange(6.0), "b": np.eye(2)}
    places = {"a": "one.safetensors", "b": "two.safetensors"}
    for name, file in places.items():
        (folder / file).write_bytes(safetensors.numpy.save({name: arrays[name]}))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    for source, names in ((f"{bucket}/one.safetensors", ["a"]), (bucket, ["a", "b"])):
        read = read_checkpoint(source)
        assert str(read.path).startswith(source) and sorted(read.arrays) == names
        for name in names:
            np.testing.assert_array_equal(read.arrays[name], arrays[name])
    (folder / "cut.safetensors").write_bytes((folder / "one.safetensors").read_bytes()[:-8])
    for name, reason in (("no", "no checkpoint at"), ("cut", "not a whole")):
        with pytest.raises(UserError, match=reason) as error:
            read_checkpoint(f"{bucket}/{name}.safetensors")
        assert f"{bucket}/{name}.safetensors" in str(error.value)
        assert "/tmp" not in str(error.value)
    with pytest.raises(UserError, match=f"{bucket}/no.weights"):
        convert_darknet(f"{bucket}/no.weights", {})
    (folder / "short.weights").write_bytes(bytes(40))
    with pytest.raises(UserError, match=f"{bucket}/short.weights ends after 6 numbers"):
        convert_darknet(f"{bucket}/short.weights", {"params": {"x": np.zeros(9)}})


@pytest.mark.parametrize("remote", [False, True])
def test_metrics_are_there_after_every_row(bucket, remote, tmp_path, monkeypatch):
    workdir = bucket if remote else str(tmp_path)
    board = mock.Mock()  # Its own library writes to a bucket.
    monkeypatch.setattr("tensorboardX.SummaryWriter", lambda path, **_: board)
    writer = logging.MetricWriter(workdir, 0, 4)
    for step in (1, 2, 3):
        writer.write(step, {"loss": step / 2, "images_per_second": 1.0})
        assert [row["step"] for row in logging.read_metrics(workdir)] == list(range(1, step + 1))
    writer.close()
    writer = logging.MetricWriter(workdir, 2, 4)  # Resumed at step 2.
    writer.write(4, {"loss": 0.1, "images_per_second": 1.0})
    writer.close()
    assert [row["step"] for row in logging.read_metrics(workdir)] == [1, 2, 4]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("early", [True, False])
def test_a_board_that_cannot_be_written_does_not_hold_the_run_up(
    early, tmp_path, monkeypatch, capsys
):
    def full(_):
        raise OSError("No space left on device")

    monkeypatch.setattr("tensorboardX.record_writer.RecordWriter.flush", full)
    writer = logging.MetricWriter(str(tmp_path), 0, 100)
    worker = writer._board.file_writer.event_writer._worker
    if not early:  # Nothing is written before the end.
        worker._next_flush_time = time.time() + 60
    scalars = {"images_per_second": 1.0, **{f"loss{i}": 1.0 for i in range(12)}}
    writer.write(1, {"loss": 1.0, **scalars})
    if early:
        worker.join()
    for step in range(2, 9):
        writer.write(step, {"loss": 1.0, **scalars})
    writer.close()
    assert capsys.readouterr().err.count("TensorBoard's file cannot be written") == 1
    assert [row["step"] for row in logging.read_metrics(str(tmp_path))] == list(range(1, 9))
