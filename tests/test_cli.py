"""`python -m attn_gate`: help, exit codes, missing extras, and what `info` prints."""

import argparse
import sys
from types import SimpleNamespace

import pytest

from attn_gate import backends, cli, info
from attn_gate._version import __version__


def test_without_a_command_prints_the_help(capsys):
    assert cli.main([]) == 2
    printed = capsys.readouterr().out
    assert all(f"    {name} " in printed for name in cli.COMMANDS)


def test_unknown_command_is_refused(capsys):
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["inform"])
    assert exit_info.value.code == 2
    assert "'inform'" in capsys.readouterr().err


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_teaches_by_examples(name, capsys):
    with pytest.raises(SystemExit) as exit_info:
        cli.main([name, "--help"])
    assert exit_info.value.code == 0
    printed = capsys.readouterr().out
    assert f"python -m attn_gate {name}" in printed.partition("examples:")[2]


def test_missing_extra_gives_the_pip_command(monkeypatch, capsys):
    def run(args: argparse.Namespace) -> int:
        raise ModuleNotFoundError("No module named 'rich.table'", name="rich.table")

    command = SimpleNamespace(add_arguments=lambda parser: None, run=run)
    monkeypatch.setitem(sys.modules, cli.COMMANDS["demo"].module, command)
    assert cli.main(["demo"]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "needs rich" in message and 'pip install "attn_gate[demo]"' in message


def test_a_missing_module_of_our_own_is_not_hidden(monkeypatch):
    monkeypatch.setitem(cli.COMMANDS, "demo", cli.Command("attn_gate.no_such_module", "demo", ""))
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        cli.main(["demo"])


@pytest.mark.parametrize("rich", ["with rich", "without rich"])
def test_info_names_every_backend(rich, monkeypatch, capsys):
    if rich == "with rich":
        pytest.importorskip("rich")
    else:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    assert cli.main(["info"]) == 0
    printed = capsys.readouterr().out
    assert __version__ in printed
    for name, usable, reason in backends.report():
        assert name in printed
        assert usable or reason.split()[0] in printed


def test_info_prints_reasons_literally(capsys):
    info.print_report({"torch": "2.10"}, [("triton", False, 'pip install "attn_gate[triton]"')])
    assert "attn_gate[triton]" in capsys.readouterr().out
