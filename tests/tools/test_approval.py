"""Both approval services, by one suite: four ends told apart, deadlines, keys, waiters, threads."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from stageflow.core.errors import DefinitionError
from stageflow.tools.approval import Approvals, ApprovalStatus, InMemoryApprovals, arguments_as_json
from stageflow.tools.approval_sqlite import SQLiteApprovals
from stageflow.tools.errors import ApprovalCancelledError, ApprovalMismatchError, ApprovalTimeoutError


@pytest.fixture(params=["memory", "sqlite"])
def service(request: pytest.FixtureRequest, tmp_path: Path, manual_time: Any) -> Approvals:
    if request.param == "memory":
        return InMemoryApprovals(clock=manual_time, wall=manual_time, sleep=manual_time.sleep)
    return SQLiteApprovals(tmp_path / "deep" / "a.sqlite", wall=manual_time, sleep=manual_time.sleep)


async def waiting(service: Approvals, **details: Any) -> tuple[asyncio.Task[bool], str]:
    """Ask in a task, and return it with the id of its request once that is there."""
    before = {one.id for one in service.pending_requests()}
    task = asyncio.create_task(service.request_approval("delete", "why not", **details))
    for _ in range(20):
        await asyncio.sleep(0)
    (new,) = [one.id for one in service.pending_requests() if one.id not in before]
    return task, new


def test_a_request_can_be_read_by_a_human(service: Approvals, manual_time: Any) -> None:
    asked = service.request(
        "delete_file",
        "the user asked for it",
        timeout=60,
        arguments={"path": "/tmp/x", "when": object},
        requested_by="ada",
        run_id="run-1",
        stage="cleanup",
    )
    (shown,) = service.pending_requests()
    assert shown == asked
    assert (shown.tool, shown.message, shown.requested_by) == ("delete_file", "the user asked for it", "ada")
    assert (shown.run_id, shown.stage, shown.status) == ("run-1", "cleanup", ApprovalStatus.PENDING)
    assert (shown.created_at, shown.expires_at) == (manual_time.now, manual_time.now + 60)
    assert shown.to_dict()["arguments"] == {"path": "/tmp/x", "when": "<type>"}
    assert service.pending_count == 1
    assert service.request("x").message


async def test_yes(service: Approvals, manual_time: Any) -> None:
    task, request_id = await waiting(service)
    assert service.approve(request_id, by="ada", reason="looks fine") is True
    assert await task is True
    ended = service.get(request_id)
    assert ended is not None
    assert (ended.status, ended.decided_by, ended.reason) == (ApprovalStatus.APPROVED, "ada", "looks fine")
    assert ended.decided_at == manual_time.now
    assert service.pending_requests() == []
    for again in (service.approve, service.deny, service.cancel):
        assert again(request_id) is False


async def test_no(service: Approvals) -> None:
    task, request_id = await waiting(service)
    assert service.deny(request_id, by="bob") is True
    assert await task is False


async def test_withdrawn(service: Approvals) -> None:
    task, request_id = await waiting(service)
    assert service.cancel(request_id, by="ops", reason="maintenance") is True
    with pytest.raises(ApprovalCancelledError) as caught:
        await task
    assert caught.value.fields == {
        "name": "delete", "request_id": request_id, "decided_by": "ops", "reason": "maintenance",
    }  # fmt: skip


async def test_too_late(service: Approvals, manual_time: Any) -> None:
    task, request_id = await waiting(service, timeout=10)
    await manual_time.advance(9.9)
    assert not task.done()
    await manual_time.advance(0.2)
    with pytest.raises(ApprovalTimeoutError) as caught:
        await task
    assert caught.value.fields["request_id"] == request_id
    assert caught.value.fields["timeout_seconds"] == 10
    assert service.approve(request_id) is False
    ended = service.get(request_id)
    assert ended is not None
    assert ended.status is ApprovalStatus.TIMED_OUT


def test_nobody_waits_and_it_times_out_all_the_same(service: Approvals, manual_time: Any) -> None:
    asked = service.request("x", timeout=10)
    manual_time.now += 10
    assert service.pending_requests() == []
    assert service.approve(asked.id) is False
    ended = service.get(asked.id)
    assert ended is not None
    assert ended.status is ApprovalStatus.TIMED_OUT


async def test_without_a_timeout_it_waits_for_ever(service: Approvals, manual_time: Any) -> None:
    task, request_id = await waiting(service, timeout=None)
    await manual_time.advance(10_000_000)
    assert not task.done()
    service.approve(request_id)
    assert await task is True


async def test_stopping_to_wait_leaves_no_request_behind(service: Approvals) -> None:
    task, request_id = await waiting(service)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    ended = service.get(request_id)
    assert ended is not None
    assert ended.status is ApprovalStatus.CANCELLED
    keyed, keyed_id = await waiting(service, key="k")
    keyed.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await keyed
    assert [one.id for one in service.pending_requests()] == [keyed_id]


async def test_a_decision_from_another_thread_wakes_every_waiter(service: Approvals) -> None:
    asked = service.request("x", timeout=None)
    waits = [asyncio.create_task(service.wait(asked.id)) for _ in range(3)]
    await asyncio.sleep(0)
    thread = threading.Thread(target=service.approve, args=(asked.id,))
    thread.start()
    ended = await asyncio.wait_for(asyncio.gather(*waits), 10)
    thread.join()
    assert {one.status for one in ended} == {ApprovalStatus.APPROVED}


def test_only_one_decision_counts(service: Approvals) -> None:
    asked = service.request("x", timeout=None)
    barrier = threading.Barrier(6)
    answers: list[bool] = []

    def decide(index: int) -> None:
        barrier.wait()
        act = (service.approve, service.deny, service.cancel)[index % 3]
        answers.append(act(asked.id, by=str(index)))

    threads = [threading.Thread(target=decide, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answers) == [False] * 5 + [True]


def test_unknown_requests(service: Approvals) -> None:
    assert service.approve("nope") is False
    assert service.deny("nope") is False
    assert service.cancel("nope") is False
    assert service.get("nope") is None
    with pytest.raises(DefinitionError):
        asyncio.run(service.wait("nope"))
    with pytest.raises(DefinitionError):
        service.request("x", timeout=0)


def test_a_key_finds_what_was_asked_or_answered(service: Approvals, manual_time: Any) -> None:
    asked = service.request("x", arguments={"a": 1}, key="k", timeout=10)
    assert service.request("x", arguments={"a": 1}, key="k", timeout=99) == asked
    assert service.request("x", arguments={"a": 1}, key="other").id != asked.id
    service.deny(asked.id, by="ada")
    found = service.request("x", arguments={"a": 1}, key="k")
    assert (found.id, found.status, found.decided_by) == (asked.id, ApprovalStatus.DENIED, "ada")
    manual_time.now += 1000
    assert service.request("x", arguments={"a": 1}, key="k").id == asked.id


def test_a_timeout_or_a_withdrawal_is_no_answer_so_the_key_asks_again(service: Approvals, manual_time: Any) -> None:
    first = service.request("x", key="k", timeout=10)
    manual_time.now += 11
    second = service.request("x", key="k", timeout=10)
    assert second.id != first.id
    service.cancel(second.id)
    third = service.request("x", key="k", timeout=10)
    assert third.id not in {first.id, second.id}
    assert [one.id for one in service.pending_requests()] == [third.id]


def test_an_answer_never_serves_another_question(service: Approvals) -> None:
    asked = service.request("delete", arguments={"path": "a"}, key="k")
    service.approve(asked.id)
    with pytest.raises(ApprovalMismatchError) as caught:
        service.request("delete", arguments={"path": "b"}, key="k")
    assert caught.value.fields["request_id"] == asked.id
    with pytest.raises(ApprovalMismatchError):
        service.request("create", arguments={"path": "a"}, key="k")


def test_history_in_memory_is_bounded(manual_time: Any) -> None:
    service = InMemoryApprovals(clock=manual_time, wall=manual_time, history=2)
    asked = [service.request("x", key=str(n)) for n in range(4)]
    for one in asked:
        service.approve(one.id)
    assert [service.get(one.id) is not None for one in asked] == [False, False, True, True]
    assert service.request("x", key="0").id not in {one.id for one in asked}


async def test_history_never_forgets_what_somebody_waits_for(manual_time: Any) -> None:
    service = InMemoryApprovals(clock=manual_time, wall=manual_time, sleep=manual_time.sleep, history=0)
    task, request_id = await waiting(service)
    service.approve(request_id)
    for n in range(3):
        service.deny(service.request(str(n)).id)
    assert await task is True


def test_arguments_are_shown_as_json() -> None:
    assert arguments_as_json(None) == "{}"
    assert arguments_as_json({"b": 1, "a": {3}}) == '{"a":[3],"b":1}'
    with pytest.raises(DefinitionError, match="human"):
        arguments_as_json({"text": "x" * 70_000})
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(DefinitionError):
        arguments_as_json(deep)


async def test_a_waiter_sees_what_another_object_decided(tmp_path: Path, manual_time: Any) -> None:
    path = tmp_path / "a.sqlite"
    mine = SQLiteApprovals(path, poll_interval=0.5, wall=manual_time, sleep=manual_time.sleep)
    task, request_id = await waiting(mine, timeout=None)
    other = SQLiteApprovals(path, wall=manual_time)
    assert [one.id for one in other.pending_requests()] == [request_id]
    other.approve(request_id, by="other")
    await manual_time.advance(0.4)
    assert not task.done()
    await manual_time.advance(0.1)
    assert await task is True


def test_files_are_private_and_others_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "a.sqlite"
    SQLiteApprovals(path)
    assert path.stat().st_mode & 0o077 == 0
    bad = tmp_path / "bad.sqlite"
    bad.write_text("this is no database, it is only long enough to look like a file of some kind" * 20)
    with pytest.raises(DefinitionError, match="cannot be used"):
        SQLiteApprovals(bad)
    with pytest.raises(DefinitionError):
        SQLiteApprovals(path, poll_interval=0)


def test_listing_and_finding(tmp_path: Path, manual_time: Any) -> None:
    service = SQLiteApprovals(tmp_path / "a.sqlite", wall=manual_time)
    asked = [service.request("x", timeout=10 + n) for n in range(3)]
    service.approve(asked[0].id)
    manual_time.now += 11.5
    assert [one.status.value for one in service.list_requests()] == ["approved", "timed_out", "pending"]
    assert [one.id for one in service.list_requests(ApprovalStatus.TIMED_OUT)] == [asked[1].id]
    assert [one.id for one in service.find(asked[2].id[:12])] == [asked[2].id]


MANY = """
import sys
from stageflow.tools.approval_sqlite import SQLiteApprovals
service = SQLiteApprovals(sys.argv[1])
asked = {service.request("x", key=f"k{n}", timeout=None).id for n in range(20)}
won = [one for one in sorted(asked) if service.approve(one, by=sys.argv[2])]
print(" ".join(sorted(asked)))
print(" ".join(won))
"""


def test_several_processes_ask_one_question_and_one_answer_counts(tmp_path: Path) -> None:
    path = str(tmp_path / "a.sqlite")
    processes = [
        subprocess.Popen([sys.executable, "-c", MANY, path, str(n)], stdout=subprocess.PIPE, text=True)
        for n in range(4)
    ]
    answers = [process.communicate(timeout=100)[0].splitlines() for process in processes]
    assert [process.returncode for process in processes] == [0] * 4
    asked = {line[0] for line in answers}
    assert len(asked) == 1, "every process found the same requests under the same keys"
    won = [one for line in answers for one in line[1].split()]
    assert sorted(won) == asked.pop().split()
