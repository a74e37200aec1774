import json

import pytest
import torch

from massl_fast.run.checkpoint import CheckpointFolder
from massl_fast.run.reading import read_run


def write(folder, rows=(), tail="", config="train: {epochs: 2}\n", summary=None):
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(config)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def test_reads_a_complete_run(tmp_path):
    rows = [
        {"step": 0, "knn_untrained_k20_percent": 30.0},
        {"step": 5, "loss": 2.0},
        {"step": 10, "loss": 1.0, "knn_teacher_k20_percent": 44.0},
    ]
    run = read_run(write(tmp_path / "r", rows, summary={"steps": 10}))
    assert run.notes == [] and run.last_step == 10 and run.setting("train", "epochs") == 2
    assert run.series("loss") == ([5, 10], [2.0, 1.0])
    assert run.knn() == {"untrained": {20: ([0], [30.0])}, "teacher": {20: ([10], [44.0])}}
    assert run.setting("train", "nothing") is None and run.setting("nothing", "nothing") is None


def test_a_line_cut_off_by_a_kill_is_left_out_and_told(tmp_path):
    run = read_run(write(tmp_path / "r", [{"step": 5, "loss": 2.0}], tail='{"step": 10, "lo'))
    assert run.series("loss") == ([5], [2.0])
    assert run.notes == [
        "1 of 2 lines of metrics.jsonl are cut off or damaged and were left out.",
        "There is no summary.json: the run has not reached its end. Its last logged step is 5.",
    ]


def test_nulls_booleans_and_infinities_are_no_numbers(tmp_path):
    values = ["null", "NaN", "Infinity", "true", "3"]
    tail = "".join(f'{{"step": {step}, "loss": {value}}}\n' for step, value in enumerate(values))
    run = read_run(write(tmp_path / "r", tail=tail + '[1]\n"text"\n{"loss": 1}\n'))
    assert run.series("loss") == ([4], [3])
    assert "3 of 8 lines" in run.notes[0]


def test_of_two_lines_for_a_step_the_later_counts_key_by_key(tmp_path):
    run = read_run(write(tmp_path / "r", [{"step": 5, "loss": 2.0, "kl_nats": 1.0}, {"step": 3, "loss": 4.0}, {"step": 5, "loss": 1.0}]))
    assert run.series("loss") == ([3, 5], [4.0, 1.0]) and run.series("kl_nats") == ([5], [1.0])


def test_a_summary_older_than_the_metrics_is_told(tmp_path):
    run = read_run(write(tmp_path / "r", [{"step": 8}], summary={"steps": 5}))
    assert run.notes == ["summary.json is of an earlier end at step 5; the run was continued and has logged step 8."]


@pytest.mark.parametrize(
    ("train", "saved", "told"),
    [
        ("stop_at_step: 8, steps: 20", 8, "stopped at step 8 of 20, as set"),
        ("stop_at_step: 8, steps: 0, epochs: 2.5", 8, "stopped at step 8 of 10, as set"),
        ("stop_at_step: 6, steps: 20", 8, "stopped at step 8 of 20, as set"),  # continued from step 8: nothing was left to do
        ("stop_at_step: 8, steps: 20", 4, ""),  # killed as it saved
        ("stop_at_step: 8, steps: 20", None, ""),
        ("stop_at_step: 9, steps: 20", 8, ""),  # killed before
        ("stop_at_step: 8, steps: 8", 8, ""),  # killed before its summary
        ("stop_at_step: 0, steps: 20", 8, ""),
        ("stop_at_step: [8], steps: 20", 8, ""),
        ("steps: 20", 8, ""),
    ],
)
def test_a_run_that_stopped_as_asked_says_so(tmp_path, train, saved, told):
    folder = write(tmp_path / "r", [{"step": 4}, {"step": 8}], config=f"train: {{{train}}}\n")
    if saved:
        CheckpointFolder(folder / "checkpoints").save(saved, {"objective/pointer": torch.zeros(1)}, {"steps_per_epoch": 4})
    run = read_run(folder)
    assert run.stopped == told
    assert ("as set (train.stop_at_step); the same command without it continues." in run.notes[0]) == bool(told)
    assert ("has not reached its end" in run.notes[0]) != bool(told)


def test_damaged_files_are_told(tmp_path):
    folder = write(tmp_path / "r", config="a: [")
    (folder / "summary.json").write_text("{")
    (folder / "metrics.jsonl").unlink()
    notes = " ".join(read_run(folder).notes)
    for part in ("config.yaml cannot be read", "summary.json cannot be read", "There is no metrics.jsonl"):
        assert part in notes


def test_config_of_a_stranger_runs_nothing(tmp_path):
    run = read_run(write(tmp_path / "r", config="!!python/object/apply:os.system ['touch /tmp/owned']\n"))
    assert run.settings == {} and "config.yaml cannot be read" in run.notes[0]


def test_what_is_no_run_is_a_sentence(tmp_path):
    with pytest.raises(ValueError, match="There is no folder"):
        read_run(tmp_path / "missing")
    with pytest.raises(ValueError, match=r"neither config\.yaml nor metrics\.jsonl"):
        read_run(tmp_path)
