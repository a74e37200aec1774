"""A run that was killed and resumed equals one that was left alone, bit for bit."""

from kill_and_resume import compare


def test_killed_and_resumed_run_repeats_the_metrics(tmp_path):
    assert "equal, bit for bit" in compare(kills=1, workplace=tmp_path)
