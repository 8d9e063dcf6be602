"""What is said where verl is not; with the real verl, see test_verl.py."""

import sys

import pytest

from poweropd.errors import ConfigError
from poweropd.integrations.verl.check import check


def test_a_missing_verl_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "verl.trainer.distillation.losses", None)
    with pytest.raises(ConfigError, match=r"^verl 0\.9\.1 is needed here.*pip install 'poweropd\[verl\]'$"):
        check()
