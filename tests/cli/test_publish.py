"""The commands that publish and repeat a run: push, reproduce."""

from pathlib import Path

import pytest
from shell import Shell

from rotate_edit.cli.publish import print_comparison
from rotate_edit.errors import Failure
from rotate_edit.reporting.reproduce import Difference


def test_reproduce_names_differences_and_fails_on_serious_ones(capsys: pytest.CaptureFixture[str]) -> None:
    found = [Difference("serious", "efficacy", "1", "0.5"), Difference("note", "torch", "2.13", "3.0")]
    with pytest.raises(Failure, match=r"^1 serious difference: this is not the same result\.$"):
        print_comparison(found, 40)
    printed = capsys.readouterr().out
    for word in ("2 differences", "serious", "efficacy", "0.5", "torch"):
        assert word in printed
    print_comparison(found[1:], 40)
    assert "Reproduced: 40 hashes, numbers and settings agree." in capsys.readouterr().out
    print_comparison([], 1)
    assert capsys.readouterr().out == "Reproduced: 1 hash, number or setting agree.\n"


def test_push_and_reproduce_refuse_what_is_not_there(shell: Shell, tmp_path: Path) -> None:
    assert shell("push", "nothing", "me/model") == 2
    assert "holds no model/" in shell.error
    assert shell("push", "nothing", "model") == 2
    assert "owner/name" in shell.error
    assert shell("reproduce", "nothing.json") == 2
    assert "has no readable nothing.json" in shell.error
    assert list(tmp_path.iterdir()) == []
