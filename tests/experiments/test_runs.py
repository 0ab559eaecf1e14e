"""What ends a script: one line for what the user can mend, status 130 for Ctrl-C, a traceback for what nobody expected."""

import sys

import pytest
from absl import app

from experiments.runs import launch


def ended(monkeypatch, error):
    """The status with which a script ends whose main raises an error."""

    def main(arguments):
        raise error

    monkeypatch.setattr(sys, "argv", ["experiments/upscale.py"])
    monkeypatch.setattr(app, "run", lambda run: run(sys.argv))
    with pytest.raises(SystemExit) as caught:
        launch(main)
    return caught.value.code


@pytest.mark.parametrize("error", [ValueError("no image"), OSError("no image"), FloatingPointError("no image")])
def test_what_a_user_can_mend_is_one_line(monkeypatch, error):
    assert ended(monkeypatch, error) == "upscale: no image"


def test_an_interruption_is_no_traceback(monkeypatch, capsys):
    assert ended(monkeypatch, KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "upscale: interrupted\n"


def test_other_errors_keep_their_traceback(monkeypatch):
    monkeypatch.setattr(app, "run", lambda run: run([]))
    with pytest.raises(RuntimeError, match="a defect"):
        launch(lambda arguments: (_ for _ in ()).throw(RuntimeError("a defect")))
