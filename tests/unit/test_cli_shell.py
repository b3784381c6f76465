"""The command-line shell: verbs, help, errors and exit statuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from ascend_v4 import __version__, env
from ascend_v4.cli import main as shell
from ascend_v4.cli.output import emit_json, say
from ascend_v4.errors import AscendV4Error, ConfigError

ROOT = Path(__file__).resolve().parents[2]
BROKEN_PIPE_WRITER = """
import click
from ascend_v4.cli import main as shell
@click.command()
def endless():
    while True:
        click.echo("x" * 4096)
shell.VerbGroup.get_command = lambda self, ctx, name: endless
shell.main(["inspect"])
"""


@pytest.fixture
def verb(monkeypatch):
    """Stand `inspect` in by a function of our own."""

    def install(function):
        command = click.Command("inspect", callback=function)
        monkeypatch.setattr(shell.VerbGroup, "get_command", lambda self, ctx, name: command)
        return CliRunner().invoke(shell.cli, ["inspect"])

    return install


def raising(error):
    def run():
        raise error

    return run


def test_help_lists_every_verb_with_its_line(run_cli):
    result = run_cli("--help")
    assert result.exit_code == 0
    for verb_name in shell.VERBS:
        assert f"  {verb_name} " in result.stdout


def test_version_is_the_packages(run_cli):
    assert run_cli("--version").stdout == f"ascend-v4 {__version__}\n"


def test_help_and_version_import_neither_torch_nor_a_verb():
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from ascend_v4.cli.main import cli\n"
        "cli.main(['--help'], standalone_mode=False); cli.main(['--version'], standalone_mode=False)\n"
        "loaded = [name for name in sys.modules if name.startswith('ascend_v4.cli.')]\n"
        "assert sorted(loaded) == ['ascend_v4.cli.main', 'ascend_v4.cli.output'], loaded"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_module_and_console_script_are_the_same_command():
    done = subprocess.run(
        [sys.executable, "-m", "ascend_v4", "--version"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, f"ascend-v4 {__version__}\n")


@pytest.mark.parametrize("verb_name", shell.VERBS)
def test_every_verb_has_help_of_its_own(verb_name, run_cli):
    result = run_cli(verb_name, "--help")
    assert result.exit_code == 0
    assert f"ascend-v4 {verb_name}" in result.stdout


@pytest.mark.parametrize(
    ("typed", "meant"), [("serv", "serve"), ("inspekt", "inspect"), ("checkpoint", "make-checkpoint")]
)
def test_unknown_verb_gets_the_closest_name(typed, meant, run_cli):
    result = run_cli(typed)
    assert result.exit_code == 2
    assert f"Did you mean '{meant}'?" in result.stderr
    assert result.stdout == ""


def test_verb_unlike_any_other_gets_the_list(run_cli):
    result = run_cli("zzz")
    assert result.exit_code == 2
    assert "Use one of: make-checkpoint, inspect" in result.stderr


def test_project_error_is_one_line_on_stderr_and_status_2(verb):
    result = verb(raising(AscendV4Error("the shard is 3 bytes short.")))
    assert (result.exit_code, result.stdout, result.stderr) == (2, "", "error: the shard is 3 bytes short.\n")


def test_interrupt_is_one_line_and_status_130(verb):
    result = verb(raising(KeyboardInterrupt()))
    assert (result.exit_code, result.stdout, result.stderr) == (130, "", "interrupted\n")


def test_our_own_bug_keeps_its_traceback(verb):
    result = verb(raising(ZeroDivisionError("bug")))
    assert isinstance(result.exception, ZeroDivisionError)


def test_reader_that_goes_away_ends_the_command_quietly():
    writer = subprocess.Popen(
        [sys.executable, "-c", BROKEN_PIPE_WRITER], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert writer.stdout is not None
    assert writer.stderr is not None
    writer.stdout.read(10)
    writer.stdout.close()
    complaint = writer.stderr.read()
    writer.stderr.close()
    assert (writer.wait(timeout=60), complaint) == (141, b"")


def test_json_result_is_alone_on_stdout(verb):
    def run():
        say("reading 3 shards")
        emit_json({"tensors": 3, "name": "模"})

    result = verb(run)
    assert json.loads(result.stdout) == {"tensors": 3, "name": "模"}
    assert result.stdout.isascii()
    assert result.stderr == "reading 3 shards\n"


def test_json_result_refuses_nan():
    with pytest.raises(ValueError, match="JSON compliant"):
        emit_json({"loss": float("nan")})


def test_environment_table_names_each_variable_once_and_explains_it():
    names = [variable.name for variable in env.VARIABLES]
    declared = {value for value in vars(env).values() if isinstance(value, env.Variable)}
    assert len(set(names)) == len(names)
    assert declared == set(env.VARIABLES)
    assert all(name.startswith("ASCEND_V4_") for name in names)
    assert all(variable.meaning.endswith(".") for variable in env.VARIABLES)


@pytest.mark.parametrize(
    ("value", "expected"), [("1", True), ("on", True), ("0", False), (" No ", False), ("", True)]
)
def test_flag_reads_common_words_and_empty_is_the_default(value, expected, monkeypatch):
    flag = env.FlagVariable(name="ASCEND_V4_TEST", meaning="For this test.", default=True)
    monkeypatch.setenv("ASCEND_V4_TEST", value)
    assert flag.read() is expected


def test_flag_refuses_other_words(monkeypatch):
    flag = env.FlagVariable(name="ASCEND_V4_TEST", meaning="For this test.", default=True)
    monkeypatch.setenv("ASCEND_V4_TEST", "maybe")
    with pytest.raises(ConfigError, match="ASCEND_V4_TEST is 'maybe'; it must be 1 or 0"):
        flag.read()


@pytest.mark.parametrize("value", ["0", "9", "-1", "1_0", "1.5", "two", "9" * 30, "²"])
def test_count_refuses_what_is_no_number_within_bounds(value, monkeypatch):
    count = env.CountVariable(name="ASCEND_V4_TEST", meaning="For this test.", low=1, high=8)
    monkeypatch.setenv("ASCEND_V4_TEST", value)
    with pytest.raises(ConfigError, match=r"whole number in \[1, 8\]"):
        count.read()


def test_count_reads_a_number_and_unset_is_the_default(monkeypatch):
    count = env.CountVariable(name="ASCEND_V4_TEST", meaning="For this test.", low=1, high=8)
    monkeypatch.setenv("ASCEND_V4_TEST", "8")
    assert count.read() == 8
    monkeypatch.delenv("ASCEND_V4_TEST")
    assert count.read() is None


def test_absurdly_long_value_is_refused(monkeypatch):
    text = env.TextVariable(name="ASCEND_V4_TEST", meaning="For this test.")
    monkeypatch.setenv("ASCEND_V4_TEST", "x" * 5000)
    with pytest.raises(ConfigError, match="5000 characters"):
        text.read()
