"""Records: averages, rates, alarms, and files that survive a killed process."""

import json
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from blip3o_jax.errors import UserError
from blip3o_jax.train import metrics as metrics_module
from blip3o_jax.train import writers
from blip3o_jax.train.metrics import Reporter, peak_tflops


class Memory:
    """Keeps what it is given."""

    def __init__(self):
        self.records = []

    def write(self, record):
        self.records.append(record)


def push(reporter, step, loss, weight=1.0, measured=None, norm=1.0):
    """Hands over the metrics of one step."""
    values = {"loss": (loss, 1.0), "loss_ce": (loss * weight, weight), "grad_norm": (norm, 1.0), "lr": (step, 1.0)}
    values |= {"images": (8.0, 8.0), "skipped_in_a_row": (0.0 if np.isfinite(loss) else 1.0, 1.0)}
    reporter.push(step, {name: (jnp.float32(a), jnp.float32(b)) for name, (a, b) in values.items()}, measured)


def pushed(losses, log_every=1, weights=None, first=1, state=None, **options):
    """The records of a series of losses, and the reporter."""
    settings = {"flops_per_step": None, "max_skipped": 3, "spike_deviations": 6.0, **options}
    memory = Memory()
    reporter = Reporter([memory], log_every, **settings, state=state)
    for index, loss in enumerate(losses):
        push(reporter, first + index, loss, 1.0 if weights is None else weights[index])
    reporter.flush()
    return memory.records, reporter


def test_an_interval_averages_by_weight_and_shows_the_last_learning_rate():
    records, _ = pushed([1.0, 2.0, 6.0, 4.0], log_every=2, weights=[1.0, 3.0, 1.0, 1.0])
    assert [record["step"] for record in records] == [2, 4]
    assert [record["loss"] for record in records] == [1.5, 5.0]
    assert [record["loss_ce"] for record in records] == [7 / 4, 5.0]
    assert [record["lr"] for record in records] == [2.0, 4.0]


def test_evaluations_that_run_again_write_no_number_that_is_not_of_json():
    memory = Memory()
    Reporter([memory], 1, None, 3, 6.0).write_results(7, {"val_loss": np.nan, "val_accuracy": 0.5})
    assert memory.records == [{"step": 7, "val_loss": None, "val_accuracy": 0.5}]


def test_a_step_is_read_only_when_the_next_has_been_given():
    memory = Memory()
    reporter = Reporter([memory], 1, None, 3, 6.0)
    push(reporter, 1, 1.0)
    assert memory.records == []
    push(reporter, 2, 1.0)
    assert [record["step"] for record in memory.records] == [1]


def test_state_carries_an_unfinished_interval_over():
    losses = [*(1 + 0.1 * np.random.default_rng(0).random(30)), 9.0, np.nan, 2.0]  # a spike, and a step that is skipped
    whole, _ = pushed(losses, log_every=33)
    _, reporter = pushed(losses[:-1], log_every=33)
    parts, _ = pushed(losses[-1:], log_every=33, first=33, state=json.loads(json.dumps(reporter.state())))
    assert (whole[0]["skipped"], whole[0]["loss_spikes"]) == (1, 1)
    names = ("step", "loss", "loss_ce", "grad_norm", "lr", "skipped", "loss_spikes")
    assert [parts[0][name] for name in names] == [whole[0][name] for name in names]


def test_rates_follow_the_clock(monkeypatch):
    ticks = iter(np.arange(100) * 2.0)
    monkeypatch.setattr(metrics_module.time, "monotonic", lambda: next(ticks))
    monkeypatch.setattr(metrics_module.jax, "device_count", lambda: 4)
    monkeypatch.setattr(metrics_module, "peak_tflops", lambda kind: 10.0)
    records, reporter = pushed([1.0] * 4, flops_per_step=40e12)
    assert records[0]["images_per_s"] is None  # no whole step was seen yet
    last = records[-1]
    assert (last["images_per_s"], last["seconds_per_step"]) == (4.0, 2.0)
    assert (last["tflops_per_device"], last["mfu"]) == (5.0, 0.5)
    reporter.exclude(1.0)  # half of the time until the next record belonged to an evaluation
    push(reporter, 5, 1.0)
    reporter.flush()
    assert records[-1]["seconds_per_step"] == 1.0
    for step in (6, 7):  # a step that leaves out three quarters of its rows
        push(reporter, step, 1.0, measured={"update_share": 0.25})
    reporter.flush()
    assert (records[-1]["seconds_per_step"], records[-1]["mfu"]) == (2.0, 0.125)
    assert pushed([1.0] * 2, log_every=2)[0][0]["seconds_per_step"] == 2.0  # the clock starts after the first step


class Late(float):
    """A metric that the device has not computed yet."""

    def is_ready(self):
        return False


def test_waiting_for_a_batch_counts_while_the_device_is_idle(monkeypatch):
    now, memory = [0.0], Memory()
    monkeypatch.setattr(metrics_module.time, "monotonic", lambda: now[0])
    reporter = Reporter([memory], 1, None, 3, 6.0)
    push(reporter, 1, 1.0)
    push(reporter, 2, 1.0)  # the first interval begins
    now[0] = 4.0
    reporter.batch_arrived(3.0)  # step 2 has been finished by now
    now[0] = 9.0
    late = {name: (Late(1), Late(1)) for name in ("loss", "grad_norm", "lr")}
    reporter.push(3, late | {"skipped_in_a_row": (Late(0), Late(1))})
    reporter.batch_arrived(2.0)  # the device computes meanwhile
    push(reporter, 4, 1.0)
    reporter.batch_arrived(9.0)  # longer than the interval, as if most of it belonged to an evaluation
    now[0] = 10.0
    reporter.batch_arrived(9.0)
    reporter.flush()
    assert [record["seconds_per_step"] for record in memory.records] == [None, 4.0, 5.0, 1.0]
    assert [record["data_wait"] for record in memory.records] == [None, 0.75, 0.0, 1.0]


def test_results_of_evaluations_have_a_record_at_any_step():
    memory = Memory()
    reporter = Reporter([memory], 10, None, 3, 6.0)
    push(reporter, 3, 1.0)
    reporter.add({"val_loss": 2.0})
    reporter.flush()
    assert [(record["step"], record["val_loss"]) for record in memory.records] == [(3, 2.0)]


def test_a_spike_is_announced(capsys):
    rng = np.random.default_rng(0)
    losses = [*(1 + 0.1 * rng.random(60)), 0.0, 3.0, 1.0]  # a fall is none
    records, _ = pushed(losses)
    assert [record["step"] for record in records if record["loss_spikes"]] == [62]
    assert "step 62: loss 3" in capsys.readouterr().err


def still(reporter, steps):
    """Hands over (loss, gradient norm) of steps."""
    for step, (loss, norm) in enumerate(steps, 1):
        push(reporter, step, loss, norm=norm)
    reporter.flush()


def test_a_run_in_which_no_parameter_learns_ends():
    with pytest.raises(UserError, match="step 3: gradient norm 0 since the first step"):
        still(Reporter([], 1, None, 3, 6.0), [(1.0, 0.0)] * 3)
    half = Reporter([], 1, None, 3, 6.0)
    still(half, [(1.0, 0.0)] * 2)
    with pytest.raises(UserError, match="step 1: gradient norm 0"):  # a resumed run goes on counting
        still(Reporter([], 1, None, 3, 6.0, json.loads(json.dumps(half.state()))), [(1.0, 0.0)])


@pytest.mark.parametrize(
    "steps",
    [[(0.0, 0.0)] * 9, [(1.0, 0.1), *[(1.0, 0.0)] * 9]],
    ids=["batches without effect have no loss either", "once there was a gradient"],
)
def test_a_run_may_have_steps_without_a_gradient(steps):
    memory = Memory()
    still(Reporter([memory], 1, None, 3, 6.0), steps)
    assert len(memory.records) == len(steps)


def test_running_statistics_begin_as_mean_and_variance_and_judge_from_the_21st_value_on():
    values, statistics = np.random.default_rng(0).normal(3, 2, 30), metrics_module.Statistics()
    for count, value in enumerate(values):
        assert (statistics.deviations(9.0) == 0) == (count < 20)
        statistics.add(value)
    np.testing.assert_allclose([statistics.mean, statistics.variance], [values.mean(), values.var()])
    assert statistics.deviations(9.0) == pytest.approx((9 - values.mean()) / values.std())


def test_skipped_steps_are_counted_and_do_not_enter_averages():
    records, _ = pushed([1.0, np.nan, 3.0], log_every=3)
    assert (records[0]["loss"], records[0]["skipped"]) == (2.0, 1)


def test_an_average_that_is_no_number_is_missing():
    assert pushed([1.0], weights=[np.inf])[0][0]["loss_ce"] is None


@pytest.mark.parametrize(
    ("kind", "peak"),
    [("NVIDIA H200", 989.0), ("NVIDIA A100-SXM4-80GB", 312.0), ("TPU v5 lite", 197.0), ("TPU v5p", 459.0),
     ("TPU v6 lite", 918.0), ("TPU7x", 1153.5), ("NVIDIA H100 80GB HBM3", 989.0), ("NVIDIA H100 PCIe", 756.0),
     ("NVIDIA H100 NVL", 835.0), ("NVIDIA H200 NVL", 835.0), ("cpu", None)],
)  # fmt: skip
def test_peaks_are_known_by_device_kind(kind, peak):
    assert peak_tflops(kind) == peak


def test_records_after_the_checkpoint_and_torn_lines_are_removed(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 3, 4)) + '{"step": 5, "lo')
    file = writers.JsonLines(path, 3)
    file.write({"step": 4, "loss": None})
    file.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4]
    assert "null" in path.read_text()
    path.write_text('{"step": 1}\n{"step": 2}')  # a line without its end
    writers.JsonLines(path, 3).close()
    assert path.read_text() == '{"step": 1}\n'


def test_the_console_leaves_out_missing_values_and_counts_of_0(capsys):
    writers.Console(9).write({"step": 3, "loss": 0.0, "mfu": None, "skipped": 0, "loss_spikes": 2})
    assert capsys.readouterr().out == "step 3/9  loss 0  loss_spikes 2\n"


def test_tensorboard_gets_scalars_and_images_and_forgets_later_steps(tmp_path):
    board = writers.TensorBoard(tmp_path, 4)
    board.write({"step": 5, "loss": 0.5, "mfu": None})
    board.image(5, "samples", np.zeros((8, 8, 3), np.uint8))
    board.close()
    version, start, loss, samples = _events(next(tmp_path.glob("events*")))
    assert version.file_version == "brain.Event:2"
    assert start.step == 5 and start.session_log.status == start.session_log.START
    assert (loss.step, loss.summary.value[0].tag, loss.summary.value[0].simple_value) == (5, "loss", 0.5)
    assert (samples.step, samples.summary.value[0].tag, samples.summary.value[0].image.width) == (5, "samples", 8)


def _events(path):
    """Records of an event file: the length in 8 bytes, a checksum in 4, the event, a checksum in 4."""
    data = path.read_bytes()
    while data:
        end = 12 + int.from_bytes(data[:8], "little")
        yield Event.FromString(data[12:end])
        data = data[end + 4 :]


FULL = """
import pathlib
import sys
from blip3o_jax.errors import reported
from blip3o_jax.train.writers import TensorBoard

with reported():
    board = TensorBoard(pathlib.Path(sys.argv[1]), 0)
    records = board._file._py_recordio_writer
    records._writer.close()
    records._writer = open("/dev/full", "wb")
    records._writer.write(b"begun")
    try:
        board.write({"step": 1, "loss": 0.5})
    finally:
        board.close()
"""


def test_a_full_disk_is_told_in_one_line(tmp_path):
    command = [sys.executable, "-c", FULL, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: disk: [Errno 28] No space left on device - ")
