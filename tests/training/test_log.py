"""The log of a run: what it writes and when, what it refuses, what it takes back."""

import json
import math
from pathlib import Path

import pytest

from gpt2_jax.files import CheckpointError
from gpt2_jax.training.log import (
    Evaluation,
    MetricsLog,
    Outlets,
    Pending,
    TrainingError,
    forget_after,
    plot_curves,
    read_metrics,
)


def open_log(file, log_every=1, callback=None):
    """A log whose learning rate is a tenth of the updates made before."""
    return MetricsLog(
        Outlets(file, callback=callback),
        first_step=0,
        last_step=9,
        log_every=log_every,
        tokens_per_step=8,
        learning_rate=lambda step: step / 10,
    )


def numbers(loss, grad_norm=1.0):
    """Metrics of a step."""
    return {"loss": loss, "grad_norm": grad_norm}


def test_a_step_is_written_when_the_next_one_was_started(tmp_path):
    file = tmp_path / "metrics.jsonl"
    with open_log(file) as log:
        log.started(Pending(1, 0, numbers(3.0)))
        assert read_metrics(file) == []
        log.started(Pending(2, 1, numbers(2.0)))
        [line] = read_metrics(file)
        log.settle()
        log.settle()  # nothing is left to settle
    assert (line["step"], line["loss"], line["learning_rate"]) == (1, 3.0, 0.0)
    assert line["tokens_per_second"] > 0
    assert [line["step"] for line in read_metrics(file)] == [1, 2]


def test_lines_come_at_intervals(tmp_path):
    file = tmp_path / "metrics.jsonl"
    with open_log(file, log_every=3) as log:
        for step in range(1, 8):
            log.started(Pending(step, step - 1, numbers(1.0)))
        log.settle()
    assert [line["step"] for line in read_metrics(file)] == [3, 6]


def test_a_callback_gets_what_the_file_gets_until_it_raises(tmp_path):
    file = tmp_path / "metrics.jsonl"
    told = []

    def callback(step, values):
        told.append({"step": step} | values)
        if "val_loss" in values:
            raise OSError("no network")

    with open_log(file, callback=callback) as log:
        log.started(Pending(1, 0, numbers(3.0)))
        log.settle()
        assert log.callback_error is None
        log.evaluated(Evaluation(1, 2.5, 2.0, "a text"))
        log.started(Pending(2, 1, numbers(2.0)))
        log.settle()
        assert str(log.callback_error) == "no network"
    lines = read_metrics(file)
    assert told == lines[:2] and len(lines) == 3
    assert told[1].keys() == {"step", "val_loss", "bits_per_byte", "sample"}


def test_without_a_file_a_number_that_is_not_finite_is_found_all_the_same(capsys):
    with open_log(None) as log:
        log.evaluated(Evaluation(1, 2.5, 2.0, "a text"))
        log.started(Pending(2, 1, numbers(math.nan)))
        with pytest.raises(TrainingError, match="Step 2, batch 1"):
            log.settle()
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("loss, grad_norm", [(math.nan, 1.0), (1.0, math.inf)])
def test_a_number_that_is_not_finite_is_named_once_and_not_written(tmp_path, loss, grad_norm):
    file = tmp_path / "metrics.jsonl"
    with open_log(file) as log:
        log.started(Pending(7, 6, numbers(loss, grad_norm)))
        with pytest.raises(
            TrainingError, match=f"Step 7, batch 6: the loss is {loss} and.*{grad_norm}"
        ):
            log.settle()
        log.settle()
    assert read_metrics(file) == []


def test_an_evaluation_in_nats_and_bits(tmp_path, capsys):
    file = tmp_path / "metrics.jsonl"
    with open_log(file) as log:
        assert log.val_loss is None
        log.evaluated(Evaluation(5, math.log(8), 2.0, "a text"))
        log.evaluated(Evaluation(6, 1.0, None, None))
        assert log.val_loss == 1.0
    first, second = read_metrics(file)
    assert first["bits_per_byte"] == pytest.approx(1.5)  # 3 bits a token of 2 bytes
    assert first["sample"] == "a text"
    assert second == {"step": 6, "val_loss": 1.0}
    printed = capsys.readouterr().err
    assert (
        "step 5: validation loss 2.0794 nats per token, 1.5000 bits per byte\na text\n" in printed
    )
    assert "step 6: validation loss 1.0000 nats per token\n" in printed


def test_what_was_written_half_is_left_out_and_later_steps_are_taken_back(tmp_path):
    file = tmp_path / "metrics.jsonl"
    assert read_metrics(file) == []
    lines = [{"step": step} for step in (1, 2, 3)]
    written = "".join(json.dumps(line) + "\n" for line in lines)
    file.write_text(written + '{"step": 4, "lo')
    assert read_metrics(file) == lines
    forget_after(file, 2)
    assert file.read_text() == '{"step": 1}\n{"step": 2}\n'


@pytest.mark.parametrize(
    "content, number",
    [
        (b'{"step": 1}\nnotes of mine\n', 2),
        (b"[1]\n", 1),
        (b'{"step": 1}\n{"loss": 1.0}\n{"step": 3}\n', 2),
        (b'{"step": 1}\n\xff\xfe\n', 2),
        (b'{"step": "1"}\n', 1),
        (b"[" * 100_000 + b"\n", 1),
    ],
)
def test_what_is_none_of_metrics_is_refused_by_its_line_and_stays(tmp_path, content, number):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"metrics.jsonl, line {number}: expected a line of"):
        forget_after(file, 0)
    assert file.read_bytes() == content


@pytest.mark.parametrize("torn", [b"", b"{", b'{"step": 2, "text": "\xc3', b"\0\0\0"])
def test_a_line_that_was_cut_off_is_repaired(tmp_path, torn):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 1}\n' + torn)
    forget_after(file, 9)
    assert file.read_bytes() == b'{"step": 1}\n'


def test_a_log_whose_file_is_gone_or_whose_disk_is_full_says_so(tmp_path):
    file = tmp_path / "metrics.jsonl"
    with open_log(file) as log:
        file.unlink()
        with pytest.raises(TrainingError, match="metrics.jsonl is gone"):
            log.evaluated(Evaluation(1, 1.0, None, None))
    with open_log(Path("/dev/full")) as log:
        with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
            log.evaluated(Evaluation(1, 1.0, None, None))


def test_curves_are_drawn_of_what_there_is(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
    plot_curves(file, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_curves_without_a_point_are_drawn_without_a_warning(tmp_path):
    plot_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")  # warnings are errors here
    assert (tmp_path / "curves.png").stat().st_size > 1000
