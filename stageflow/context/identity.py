"""Who a run belongs to."""

from __future__ import annotations

import os
from typing import Any

import msgspec


def new_run_id() -> str:
    """A random UUID (version 4) as text."""
    raw = bytearray(os.urandom(16))
    raw[6] = (raw[6] & 0x0F) | 0x40
    raw[8] = (raw[8] & 0x3F) | 0x80
    text = raw.hex()
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


class RunIdentity(msgspec.Struct, frozen=True, omit_defaults=True):
    """Six optional ids, all strings. Only the run id is ever generated; a run without one gets it when it starts."""

    pipeline_run_id: str | None = None
    request_id: str | None = None
    session_id: str | None = None
    user_id: str | None = None
    org_id: str | None = None
    interaction_id: str | None = None

    @classmethod
    def new(cls) -> RunIdentity:
        """An identity with a fresh run id."""
        return cls(pipeline_run_id=new_run_id())

    @classmethod
    def with_pipeline_run_id(cls, pipeline_run_id: str) -> RunIdentity:
        """An identity with this run id."""
        return cls(pipeline_run_id=pipeline_run_id)

    def with_request_id(self, request_id: str) -> RunIdentity:
        """A copy with this request id."""
        return msgspec.structs.replace(self, request_id=request_id)

    def with_session_id(self, session_id: str) -> RunIdentity:
        """A copy with this session id."""
        return msgspec.structs.replace(self, session_id=session_id)

    def with_user_id(self, user_id: str) -> RunIdentity:
        """A copy with this user id."""
        return msgspec.structs.replace(self, user_id=user_id)

    def with_org_id(self, org_id: str) -> RunIdentity:
        """A copy with this organisation id."""
        return msgspec.structs.replace(self, org_id=org_id)

    def with_interaction_id(self, interaction_id: str) -> RunIdentity:
        """A copy with this interaction id."""
        return msgspec.structs.replace(self, interaction_id=interaction_id)

    def to_dict(self) -> dict[str, str | None]:
        """All six keys, None where absent."""
        return {name: getattr(self, name) for name in self.__struct_fields__}

    def ids(self) -> dict[str, Any]:
        """Only the ids that are set."""
        return {name: value for name, value in self.to_dict().items() if value is not None}
