"""`stageflow approvals list|approve|deny`: decide from a shell on what a pipeline in another process waits for.

The only module of this room that imports click; the command line mounts `approvals` when it is asked for.
"""

from __future__ import annotations

import getpass
import json
import time
from datetime import UTC, datetime
from pathlib import Path

import click

from stageflow.core.errors import DefinitionError
from stageflow.tools.approval import ApprovalRequest, ApprovalStatus
from stageflow.tools.approval_sqlite import SQLiteApprovals

__all__ = ["approvals"]


@click.group(help="Read and decide the approval requests of running pipelines.")
@click.option(
    "--store",
    envvar="STAGEFLOW_APPROVALS",
    required=True,
    type=click.Path(path_type=Path, dir_okay=False),
    help="The file given to SQLiteApprovals (or STAGEFLOW_APPROVALS).",
)
@click.pass_context
def approvals(ctx: click.Context, store: Path) -> None:
    """Open the store that the subcommands work on; a missing file is a mistake, not a new store."""
    if not store.exists():
        raise click.UsageError(f"there is no approval store at {store}")
    try:
        ctx.obj = SQLiteApprovals(store)
    except DefinitionError as error:
        raise click.UsageError(str(error)) from error


@approvals.command("list", help="Show what waits for an answer.")
@click.option("--all", "everything", is_flag=True, help="Show answered and expired requests too.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")
@click.pass_obj
def list_command(service: SQLiteApprovals, everything: bool, as_json: bool) -> None:
    """Print requests, oldest first."""
    found = service.list_requests(None if everything else ApprovalStatus.PENDING)
    for request in found:
        click.echo(json.dumps(request.to_dict(), ensure_ascii=True) if as_json else describe(request, time.time()))
    if not found and not as_json:
        click.echo("nothing waits for approval")


def describe(request: ApprovalRequest, now: float) -> str:
    """Who asks, for what, with which arguments, why and until when, on five short lines without control characters."""
    lines = [f"{request.id}  {request.tool}  {request.status}"]
    origin = ", ".join(
        f"{label} {value}"
        for label, value in (("by", request.requested_by), ("stage", request.stage), ("run", request.run_id))
        if value
    )
    lines.append(f"  asked {_moment(request.created_at)}" + (f" {origin}" if origin else ""))
    lines.append(f"  why: {request.message}")
    lines.append(f"  arguments: {request.arguments}")
    if request.status is not ApprovalStatus.PENDING:
        by = f" by {request.decided_by}" if request.decided_by else ""
        why = f": {request.reason}" if request.reason else ""
        lines.append(f"  {request.status}{by}{why}")
    elif request.expires_at is None:
        lines.append("  waits for ever")
    else:
        lines.append(f"  until {_moment(request.expires_at)} ({max(0, request.expires_at - now):.0f} s left)")
    return "\n".join("".join(c if c.isprintable() else repr(c)[1:-1] for c in line) for line in lines)


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%SZ")


def _user() -> str | None:
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):
        return None


def _decide(
    service: SQLiteApprovals, request_id: str, status: ApprovalStatus, by: str | None, reason: str | None
) -> None:
    """Decide one request given by its id or the start of it; exit code 1 where it is unknown, ambiguous or over."""
    found = service.find(request_id)
    if len(found) != 1:
        raise click.ClickException(
            f"no request {request_id!r}" if not found else f"{len(found)} requests start with {request_id!r}: type more"
        )
    (request,) = found
    decide = service.approve if status is ApprovalStatus.APPROVED else service.deny
    if not decide(request.id, by=by or _user(), reason=reason):
        now = service.get(request.id)
        raise click.ClickException(f"{request.tool}: too late, the request is {now.status if now else 'gone'}")
    click.echo(f"{request.tool}: {status}")


@approvals.command("approve", help="Say yes to a request.")
@click.argument("request_id")
@click.option("--by", help="Who decides; by default your login name.")
@click.option("--reason", help="Why.")
@click.pass_obj
def approve_command(service: SQLiteApprovals, request_id: str, by: str | None, reason: str | None) -> None:
    """Approve one request."""
    _decide(service, request_id, ApprovalStatus.APPROVED, by, reason)


@approvals.command("deny", help="Say no to a request.")
@click.argument("request_id")
@click.option("--by", help="Who decides; by default your login name.")
@click.option("--reason", help="Why.")
@click.pass_obj
def deny_command(service: SQLiteApprovals, request_id: str, by: str | None, reason: str | None) -> None:
    """Deny one request."""
    _decide(service, request_id, ApprovalStatus.DENIED, by, reason)
