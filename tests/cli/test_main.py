"""The command line as a user meets it: exit codes, where output goes, and one message per mistake."""

import json
import os
import subprocess
import sys

import pytest

from stageflow.cli.main import COMMANDS, invoke


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["rnu"], "there is no command 'rnu'. Did you mean 'run'"),
        (["run"], "run: missing argument 'MODULE:GRAPH'"),
        (["run", "x.py", "--procesess", "2"], "run: no such option"),
        (["run", "x.py", "--lane", "gpu"], "invalid value for '--lane': 'gpu'"),
        (["run", "x.py", "--processes", "many"], "invalid value for '--processes'"),
        (["run", "no_such_module:graph"], "there is no module 'no_such_module'"),
        (["draw", "x.py", "--format", "png"], "invalid value for '--format'"),
        (["demo", "--root", "/no/such/folder"], "--root '/no/such/folder': there is no such folder"),
        (["demo", "--output", "/dev/null/x"], "--output '/dev/null/x' cannot be made"),
        (["completion", "tcsh"], "invalid value for"),
        (["--nonsense"], "no such option"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(args, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert invoke(args) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.startswith("stageflow: ")
    assert "Traceback" not in err
    assert len(err.splitlines()) <= 3


def test_help_lists_every_command_and_imports_none_of_them():
    code = (
        "import sys; from stageflow.cli.main import invoke; code = invoke(['--help']); "
        "loaded = [m for m in sys.modules if m.startswith(('rich', 'stageflow.demo', 'stageflow.runtime', 'httpx'))]; "
        "print('LOADED', loaded); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=True)
    assert all(f"  {name} " in done.stdout for name in COMMANDS)
    assert "LOADED []" in done.stdout


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_explains_itself(name, capsys):
    assert invoke([name, "--help"]) == 0
    assert "Usage: stageflow" in capsys.readouterr().out


def test_an_extra_that_is_missing_is_named(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "httpx", None)  # what importing it then raises is what a bare installation raises
    for module in [name for name in sys.modules if name.startswith("stageflow.websearch")]:
        monkeypatch.delitem(sys.modules, module)
    code = invoke(["web", "--help"])
    _, err = capsys.readouterr()
    assert code == 0 or (code == 2 and "pip install 'stageflow[web]'" in err)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_completion_script_is_for_our_command(shell, capsys):
    assert invoke(["completion", shell]) == 0
    assert "_STAGEFLOW_COMPLETE" in capsys.readouterr().out


def test_the_shell_completes_commands_and_files(tmp_path):
    (tmp_path / "shop.py").write_text("")
    environment = {**os.environ, "_STAGEFLOW_COMPLETE": "bash_complete"}
    command = [sys.executable, "-c", "from stageflow.cli.main import cli; cli(prog_name='stageflow')"]

    def complete(words: str, at: int) -> str:
        env = {**environment, "COMP_WORDS": words, "COMP_CWORD": str(at)}
        return subprocess.run(
            command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False
        ).stdout

    assert "plain,plan" in complete("stageflow pl", 1)
    assert "plain,shop.py:" in complete("stageflow run sh", 2)
    assert "plain,inline" in complete("stageflow run shop.py --lane in", 4)


def test_doctor_prints_facts_settings_and_speed(capsys):
    assert invoke(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["machine"]["cores"] >= 1
    assert 0 < facts["speed"]["round_trip"] < 1
    assert facts["speed"]["copy_rate"] > 1e6
    settings = {one["name"]: one for one in facts["settings"]}
    assert settings["threads"]["value"] == 32
    assert settings["threads"]["source"] == "default"


def test_doctor_says_where_a_value_came_from(capsys, monkeypatch):
    monkeypatch.setenv("STAGEFLOW_PROCESSES", "3")
    assert invoke(["doctor", "--no-measure"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "processes" in line and "environment" in line)
    assert line.split()[:2] == ["processes", "3"]


def test_a_wrong_environment_value_is_one_message(capsys, monkeypatch):
    monkeypatch.setenv("STAGEFLOW_PROCESSES", "many")
    assert invoke(["doctor", "--no-measure"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "STAGEFLOW_PROCESSES" in err
    assert "many" in err
