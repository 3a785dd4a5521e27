"""`approvals list|approve|deny` as a person types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from stageflow.tools.approval import ApprovalStatus
from stageflow.tools.approval_sqlite import SQLiteApprovals
from stageflow.tools.commands import approvals, describe


@pytest.fixture
def store(tmp_path: Path) -> SQLiteApprovals:
    return SQLiteApprovals(tmp_path / "a.sqlite")


def run(store: SQLiteApprovals, *args: str) -> Result:
    return CliRunner().invoke(approvals, ["--store", str(store.path), *args])


def test_list_shows_who_what_arguments_why_and_until_when(store: SQLiteApprovals) -> None:
    assert "nothing waits" in run(store, "list").output
    asked = store.request(
        "delete", "they asked\x1b[2J", arguments={"path": "/x"}, requested_by="ada", stage="gate", run_id="run-1"
    )
    forever = store.request("other", timeout=None)
    shown = run(store, "list")
    assert shown.exit_code == 0
    for text in (
        asked.id,
        "delete",
        "they asked\\x1b[2J",
        '{"path":"/x"}',
        "by ada",
        "stage gate",
        "run run-1",
        "until 2",
    ):
        assert text in shown.output
    assert "\x1b" not in shown.output
    assert "waits for ever" in shown.output
    lines = [json.loads(line) for line in run(store, "list", "--json").output.splitlines()]
    assert [line["id"] for line in lines] == [asked.id, forever.id]
    assert lines[0]["arguments"] == {"path": "/x"}


def test_decide_by_the_start_of_an_id(store: SQLiteApprovals) -> None:
    asked = store.request("delete")
    done = run(store, "deny", asked.id[:8], "--by", "bob", "--reason", "no way")
    assert (done.exit_code, done.output) == (0, "delete: denied\n")
    ended = store.get(asked.id)
    assert ended is not None
    assert (ended.status, ended.decided_by, ended.reason) == (ApprovalStatus.DENIED, "bob", "no way")
    again = run(store, "approve", asked.id)
    assert again.exit_code == 1
    assert "too late, the request is denied" in again.output
    everything = run(store, "list", "--all").output
    assert "denied by bob: no way" in everything
    assert asked.id not in run(store, "list").output


def test_the_login_name_decides_by_default(store: SQLiteApprovals, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGNAME", "carol")
    asked = store.request("delete")
    assert run(store, "approve", asked.id).exit_code == 0
    ended = store.get(asked.id)
    assert ended is not None
    assert ended.decided_by == "carol"


def test_mistakes(store: SQLiteApprovals, tmp_path: Path) -> None:
    unknown = run(store, "approve", "zzz")
    assert (unknown.exit_code, "no request 'zzz'" in unknown.output) == (1, True)
    store.request("a")
    store.request("b")
    ambiguous = run(store, "approve", "")
    assert (ambiguous.exit_code, "2 requests start with" in ambiguous.output) == (1, True)
    missing = CliRunner().invoke(approvals, ["--store", str(tmp_path / "no.sqlite"), "list"])
    assert missing.exit_code == 2
    assert not (tmp_path / "no.sqlite").exists()
    (tmp_path / "bad").write_text("no database " * 100)
    assert CliRunner().invoke(approvals, ["--store", str(tmp_path / "bad"), "list"]).exit_code == 2
    assert CliRunner().invoke(approvals, ["list"], env={"STAGEFLOW_APPROVALS": ""}).exit_code == 2
    by_env = CliRunner().invoke(approvals, ["list"], env={"STAGEFLOW_APPROVALS": str(store.path)})
    assert by_env.exit_code == 0


def test_the_time_left_is_shown(store: SQLiteApprovals) -> None:
    asked = store.request("delete", timeout=100)
    assert "(40 s left)" in describe(asked, asked.created_at + 60)
    assert "(0 s left)" in describe(asked, asked.created_at + 600)
