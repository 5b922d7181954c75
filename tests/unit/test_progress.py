from contextlib import suppress

import pytest

from ultrafuser.progress import ProgressBar


def test_lines_where_there_is_no_terminal(capsys):
    with ProgressBar("Training") as bar:
        assert capsys.readouterr().err == ""  # nothing has begun
        bar.update(0, 3)
        bar.update(1, 3)
        bar.update(1, 3, "loss 0.5")
    assert capsys.readouterr() == ("", "Training ...\nTraining: step 1/3, loss 0.5\n")


def test_quiet_is_quiet(capsys):
    with ProgressBar("Training", quiet=True) as bar:
        bar.update(1, 3, "loss 0.5")
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("keep", [True, False])
def test_a_bar_on_a_terminal_ends_with_its_block(capsys, monkeypatch, keep):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    bar = ProgressBar("Training", keep=keep)
    with suppress(KeyError), bar:
        bar.update(1, 3, "loss 0.5")
        raise KeyError
    shown = capsys.readouterr().err
    assert "Training" in shown
    assert "1/3" in shown
    assert "loss 0.5" in shown
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")  # the cursor is back
    assert shown.endswith("\x1b[2K") != keep
