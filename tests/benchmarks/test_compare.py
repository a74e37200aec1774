"""Verdicts of bench compare on times that are drawn, never measured."""

import itertools
import json
import random
import subprocess
from collections import Counter

import pytest

from massl_fast import hardware, records
from massl_fast.benchmarks import intervals
from massl_fast.benchmarks.compare import BETTER, FEW, NOISY, SAME, WORSE, compare
from massl_fast.benchmarks.intervals import median_interval, shift, spread_percent
from massl_fast.cli import main


def times(generator: random.Random, middle: float, spread: float = 0.02, count: int = 30) -> list[float]:
    """Log-normal times with now and then one that something else delayed."""
    delay = lambda: generator.uniform(1.2, 3) if generator.random() < 0.05 else 1  # noqa: E731
    return [middle * generator.lognormvariate(0, spread) * delay() for _ in range(count)]


def row(samples, name="time", unit="ms", better="lower", exact=False, **case):
    return records.record("kernels", {"case": "loss", **case}, {name: records.figure(samples, unit, better, exact=exact)})


@pytest.mark.parametrize("slower", [1.1, 1 / 1.1])
def test_a_change_of_ten_percent_is_found_and_none_is_made_up(slower):
    generator = random.Random(0)
    found, alarms = Counter(), Counter()
    for _ in range(20):
        before = row(times(generator, 1.0))
        found[compare([before], [row(times(generator, slower))])[0][0].verdict] += 1
        alarms[compare([before], [row(times(generator, 1.0))])[0][0].verdict] += 1
    assert found[WORSE if slower > 1 else BETTER] >= 19
    assert alarms[WORSE] == alarms[BETTER] == 0


def test_busy_stretches_neither_hide_a_change_nor_make_one_up():
    """Samples of both sides taken in turn, an eighth of them in stretches in which the machine did something else, too."""
    generator = random.Random(3)
    found, alarms = Counter(), Counter()
    for _ in range(20):
        busy = [1.2 if (i // 3 + number) % 8 == 0 else 1.0 for number in [generator.randrange(8)] for i in range(30)]
        side = lambda middle, busy=busy: row([s * b for s, b in zip(times(generator, middle, spread=0.03), busy)])  # noqa: E731
        before = side(1.0)
        found[compare([before], [side(1.1)])[0][0].verdict] += 1
        alarms[compare([before], [side(1.0)])[0][0].verdict] += 1
    assert found[WORSE] >= 19
    assert alarms[WORSE] == alarms[BETTER] == 0


def test_noise_is_not_taken_for_sameness():
    generator = random.Random(1)
    difference = compare([row(times(generator, 1.0, spread=0.6))], [row(times(generator, 1.0, spread=0.6))])[0][0]
    assert difference.verdict == NOISY
    assert difference.resolution_percent > 10


@pytest.mark.parametrize(
    ("before", "after", "better", "exact", "verdict"),
    [
        ([1.0] * 10, [1.2] * 10, "lower", False, WORSE),
        ([1.0] * 10, [1.2] * 10, "higher", False, BETTER),
        ([1.0] * 10, [1.04] * 10, "lower", False, SAME),
        ([1.0] * 6, [2.0] * 7, "lower", False, FEW),
        ([100], [106], "lower", True, WORSE),
        ([100], [104], "lower", True, SAME),
        ([0.0], [1.0], "lower", True, WORSE),
    ],
)
def test_verdicts(before, after, better, exact, verdict):
    sides = [[row(samples, better=better, exact=exact)] for samples in (before, after)]
    assert compare(*sides)[0][0].verdict == verdict


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        ((1.0, 1.02), (1.2, 1.3), WORSE),
        ((1.3, 1.2), (1.02, 1.0), BETTER),
        ((1.0, 1.25), (1.2, 1.4), NOISY),  # the machine changed between records as much as the figure did
        ((1.0,), (1.2, 0.99), NOISY),
    ],
)
def test_records_of_a_case_must_agree_on_a_change(before, after, verdict):
    generator = random.Random(6)
    sides = [[row(times(generator, middle, spread=0.005)) for middle in side] for side in (before, after)]
    assert compare(*sides)[0][0].verdict == verdict


def test_records_of_equal_cases_are_put_together_and_others_named():
    a, b = [row([1.0] * 4), row([1.0] * 4), row([1.0] * 9, K=1)], [row([1.5] * 4), row([1.5] * 4), row([1.0] * 9, K=2)]
    differences, only_before, only_after = compare(a, b)
    assert [d.verdict for d in differences] == [WORSE]
    assert (only_before, only_after) == (["kernels: case loss, K 1"], ["kernels: case loss, K 2"])


def test_figures_without_a_better_side_are_not_judged():
    assert compare([row([1.0] * 9, better="")], [row([2.0] * 9, better="")])[0] == []


def test_the_interval_holds_the_median_as_often_as_it_says():
    generator = random.Random(2)
    held = 0
    for _ in range(2000):
        low, high = median_interval([generator.expovariate(1) for _ in range(20)])
        held += low <= 0.6931 <= high
    assert held / 2000 > 0.985
    assert median_interval([1.0] * 7) is None
    assert median_interval(list(range(8))) == (0, 7)


def test_the_shift_is_found_whatever_the_samples_are_like():
    generator = random.Random(4)
    held = 0
    for _ in range(1000):
        before, after = ([generator.expovariate(1) + more for _ in range(count)] for more, count in ((0, 12), (0.5, 15)))
        middle, (low, high) = shift(before, after)
        assert low <= middle <= high
        held += low <= 0.5 <= high
    assert held >= 997
    assert shift([1.0] * 6, [2.0] * 9) == (1.0, None)
    assert shift(list(range(7)), [10 * i for i in range(7)]) == (27, (-6, 60))


def test_the_place_of_a_shift_s_interval_is_the_count_of_orders(monkeypatch):
    orders = Counter(sum(b < a for a in chosen for b in set(range(9)) - set(chosen)) for chosen in itertools.combinations(range(9), 4))
    assert intervals._ways(4, 5) == intervals._ways(5, 4) == [orders[u] for u in range(21)]
    exact = intervals._rank.__wrapped__(58, 59)
    monkeypatch.setattr(intervals, "LARGEST_EXACT", 0)
    assert 0.99 * exact <= intervals._rank.__wrapped__(58, 59) <= exact


def test_spread_is_the_distance_of_the_quartiles():
    assert spread_percent([1, 2, 3]) == 0
    assert spread_percent([9, 10, 10, 10, 10, 10, 10, 11]) == 0
    assert spread_percent([8, 9, 10, 11, 12]) == pytest.approx(20)


@pytest.fixture
def files(tmp_path):
    def write(name, *rows):
        records.append(tmp_path / name, rows)
        return str(tmp_path / name)

    return write


def test_the_command_exits_by_its_verdict(files, capsys):
    before = files("a.jsonl", row([1.0] * 9), row([5.0] * 9, name="rate", better="higher", K=2))
    slower, same = files("b.jsonl", row([1.2] * 9)), files("c.jsonl", row([1.0] * 9))
    assert main(["bench", "compare", before, same]) == 0
    assert main(["bench", "compare", before, slower]) == 1
    told = capsys.readouterr().out
    assert "worse             +20.0 %  1 → 1.2 ms  time of kernels: case loss" in told
    assert "Only in" in told and "K 2" in told


def test_json_stands_alone_on_stdout(files, capsys):
    assert main(["bench", "compare", files("a.jsonl", row([1.0] * 9)), files("b.jsonl", row([1.2] * 9)), "--json"]) == 1
    captured = capsys.readouterr()
    (found,) = json.loads(captured.out)
    assert found["verdict"] == WORSE and found["figure"] == "time" and "1 figures compared" in captured.err


def test_figures_are_chosen_by_words(files, capsys):
    both = [files(name, row([time] * 9), row([9.0] * 9, name="time ratio")) for name, time in (("a.jsonl", 1.0), ("b.jsonl", 2.0))]
    assert main(["bench", "compare", *both]) == 1
    assert main(["bench", "compare", *both, "--figures", "ratio"]) == 0
    assert main(["bench", "compare", *both, "--figures", "memory"]) == 2
    assert "there are time, time ratio" in capsys.readouterr().err


def test_other_hardware_and_versions_are_told(files, capsys):
    other = row([1.0] * 9)
    other["hardware"] = other["hardware"] | {"processor": "another"}
    other["versions"] = other["versions"] | {"torch": "1.0"}
    assert main(["bench", "compare", files("a.jsonl", row([1.0] * 9)), files("b.jsonl", other)]) == 0
    told = capsys.readouterr().out
    assert "Not the same hardware: processor" in told
    assert "Not the same versions: torch" in told


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("not json\n", "not a JSON object"),
        ('{"schema": 99}\n', "a record of schema 99; this program reads schema 1"),
        ('{"schema": 1, "kind": "step"}\n', "the record lacks date"),
        ("[1]\n", "a record of schema list"),
        ("", "holds no records"),
    ],
)
def test_a_file_that_is_not_one_gets_a_sentence(tmp_path, capsys, text, sentence):
    (tmp_path / "bad.jsonl").write_text(text)
    assert main(["bench", "compare", str(tmp_path / "bad.jsonl"), str(tmp_path)]) == 2
    assert sentence in capsys.readouterr().err


def test_a_missing_file_and_an_empty_folder_get_a_sentence(tmp_path, capsys):
    assert main(["bench", "compare", str(tmp_path / "none.jsonl"), str(tmp_path)]) == 2
    assert "Records cannot be read" in capsys.readouterr().err
    assert main(["bench", "compare", str(tmp_path), str(tmp_path)]) == 2
    assert "holds no .jsonl file" in capsys.readouterr().err


def test_nothing_in_common_gets_a_sentence(files, capsys):
    assert main(["bench", "compare", files("a.jsonl", row([1.0] * 9, K=1)), files("b.jsonl", row([1.0] * 9, K=2))]) == 2
    assert "no figure of a case in common" in capsys.readouterr().err


def test_a_record_says_how_it_came_about():
    made = row([1.0, 2.0, 3.0])
    assert made["figures"]["time"] == {"unit": "ms", "better": "lower", "median": 2.0, "samples": [1.0, 2.0, 3.0]}
    assert made["hardware"]["processor"] and made["hardware"]["cores"] >= 1 and "load_1_minute" in made["hardware"]
    assert made["versions"]["python"] and made["versions"]["torch"]
    assert set(made["git"]) == {"commit", "dirty"}
    assert json.loads(json.dumps(made)) == made


def test_records_themselves_are_no_change_of_the_code(tmp_path, monkeypatch):
    git = lambda *words: subprocess.run(["git", "-C", str(tmp_path), *words], check=True, capture_output=True)  # noqa: E731
    (tmp_path / "bench" / "results").mkdir(parents=True)
    for name in ("code.py", "bench/results/records.jsonl"):
        (tmp_path / name).write_text("before")
    git("init")
    git("add", ".")
    git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-m", "first")
    monkeypatch.setattr(hardware, "ROOT", tmp_path)
    state = hardware.git_state.__wrapped__  # uncached
    monkeypatch.delenv("MASSL_FAST_COMMIT", raising=False)
    (tmp_path / "bench" / "results" / "records.jsonl").write_text("after")
    assert len(state()["commit"]) == 40 and state()["dirty"] is False
    (tmp_path / "code.py").write_text("after")
    assert state()["dirty"] is True


def test_figures_are_finite_numbers():
    for samples in ([], [float("nan")], [float("inf"), 1.0]):
        with pytest.raises(ValueError, match="finite samples"):
            records.figure(samples, "ms", "lower")
    with pytest.raises(ValueError, match="better is"):
        records.figure(1.0, "ms", "faster")


def test_a_place_that_cannot_be_written_gets_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="Records cannot be written"):
        records.append(tmp_path / "file" / "records.jsonl", [row([1.0])])


def test_devices_have_folders_of_their_own():
    assert hardware.device_slug({"processor": "AMD EPYC 9R14", "gpu": "NVIDIA H200"}) == "nvidia-h200"
    assert hardware.device_slug({"processor": "AMD EPYC 9R14"}) == "cpu"
