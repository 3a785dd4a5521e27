"""The immutable input of a run: identity, inputs, conversation, enrichments, extensions, metadata."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import msgspec

from stageflow.context.identity import RunIdentity

_T = TypeVar("_T")
_replace = msgspec.structs.replace


class Message(msgspec.Struct, frozen=True, omit_defaults=True):
    """One turn of a conversation."""

    role: str
    content: str
    metadata: dict[str, Any] = {}

    @classmethod
    def new(cls, role: str, content: str) -> Message:
        """A message of any role."""
        return cls(role, content)

    @classmethod
    def user(cls, content: str) -> Message:
        """A message of the user."""
        return cls("user", content)

    @classmethod
    def assistant(cls, content: str) -> Message:
        """A message of the assistant."""
        return cls("assistant", content)

    @classmethod
    def system(cls, content: str) -> Message:
        """A system message."""
        return cls("system", content)


class Conversation(msgspec.Struct, frozen=True, omit_defaults=True):
    """Messages in order, and the routing decision taken on them."""

    messages: tuple[Message, ...] = ()
    routing_decision: str | None = None

    def with_messages(self, messages: Iterable[Message]) -> Conversation:
        """A copy with these messages instead."""
        return _replace(self, messages=tuple(messages))

    def add_message(self, message: Message) -> Conversation:
        """A copy with one more message."""
        return _replace(self, messages=(*self.messages, message))

    def with_routing_decision(self, decision: str) -> Conversation:
        """A copy with this decision."""
        return _replace(self, routing_decision=decision)

    def last_user_message(self) -> str | None:
        """Content of the latest message with role `user`."""
        return next((message.content for message in reversed(self.messages) if message.role == "user"), None)


class Enrichments(msgspec.Struct, frozen=True, omit_defaults=True):
    """What was looked up before the run."""

    profile: Any = None
    memory: Any = None
    documents: tuple[Any, ...] = ()
    web_results: tuple[Any, ...] = ()
    custom: dict[str, Any] = {}

    def with_profile(self, profile: Any) -> Enrichments:
        """A copy with this profile."""
        return _replace(self, profile=profile)

    def with_memory(self, memory: Any) -> Enrichments:
        """A copy with this memory."""
        return _replace(self, memory=memory)

    def with_documents(self, documents: Iterable[Any]) -> Enrichments:
        """A copy with these documents."""
        return _replace(self, documents=tuple(documents))

    def with_web_results(self, web_results: Iterable[Any]) -> Enrichments:
        """A copy with these results."""
        return _replace(self, web_results=tuple(web_results))

    def with_custom(self, key: str, value: Any) -> Enrichments:
        """A copy with one more custom entry."""
        return _replace(self, custom={**self.custom, key: value})


class ExtensionBundle(msgspec.Struct, frozen=True):
    """Data of extensions by type name. Unknown ones survive a round trip untouched; typed ones convert on `get_as`."""

    entries: dict[str, Any] = {}

    def register(self, name: str, data: Any) -> ExtensionBundle:
        """A copy with this extension; the last one wins. Structs and dataclasses are stored as builtins."""
        return ExtensionBundle({**self.entries, name: msgspec.to_builtins(data)})

    def get(self, name: str, default: Any = None) -> Any:
        """The stored data."""
        return self.entries.get(name, default)

    def get_as(self, name: str, type_: type[_T]) -> _T:
        """The stored data converted to `type_` (msgspec rules). KeyError if absent, msgspec.ValidationError if it
        does not fit."""
        return msgspec.convert(self.entries[name], type_)

    def contains(self, name: str) -> bool:
        """Whether the extension is present."""
        return name in self.entries

    def to_dict(self) -> dict[str, Any]:
        """The entries, flat."""
        return dict(self.entries)


class ContextSnapshot(msgspec.Struct, frozen=True, omit_defaults=True):
    """Everything a run may read. Encoded once per run, shared by every attempt that asks for it."""

    run_id: RunIdentity = RunIdentity()
    inputs: dict[str, Any] = {}
    conversation: Conversation = Conversation()
    enrichments: Enrichments = Enrichments()
    extensions: ExtensionBundle = ExtensionBundle()
    input_text: str | None = None
    metadata: dict[str, Any] = {}

    @classmethod
    def new(cls, inputs: Mapping[str, Any] | None = None) -> ContextSnapshot:
        """A snapshot with a fresh run id."""
        return cls(run_id=RunIdentity.new(), inputs=dict(inputs or {}))

    def with_run_id(self, run_id: RunIdentity) -> ContextSnapshot:
        """A copy with this identity."""
        return _replace(self, run_id=run_id)

    def with_inputs(self, inputs: Mapping[str, Any]) -> ContextSnapshot:
        """A copy with these inputs merged in; new keys win."""
        return _replace(self, inputs={**self.inputs, **inputs})

    def with_conversation(self, conversation: Conversation) -> ContextSnapshot:
        """A copy with this conversation."""
        return _replace(self, conversation=conversation)

    def with_enrichments(self, enrichments: Enrichments) -> ContextSnapshot:
        """A copy with these enrichments."""
        return _replace(self, enrichments=enrichments)

    def with_extensions(self, extensions: ExtensionBundle) -> ContextSnapshot:
        """A copy with these extensions."""
        return _replace(self, extensions=extensions)

    def with_input_text(self, input_text: str) -> ContextSnapshot:
        """A copy with this text."""
        return _replace(self, input_text=input_text)

    def with_metadata(self, key: str, value: Any) -> ContextSnapshot:
        """A copy with one more metadata entry."""
        return _replace(self, metadata={**self.metadata, key: value})

    @property
    def pipeline_run_id(self) -> str | None:
        """The run id."""
        return self.run_id.pipeline_run_id

    @property
    def request_id(self) -> str | None:
        """The request id."""
        return self.run_id.request_id

    @property
    def session_id(self) -> str | None:
        """The session id."""
        return self.run_id.session_id

    @property
    def user_id(self) -> str | None:
        """The user id."""
        return self.run_id.user_id

    def to_dict(self) -> dict[str, Any]:
        """Composed keys and the six ids flattened; `input_text` and `metadata` only when set."""
        shown: dict[str, Any] = {
            "run_id": self.run_id.to_dict(),
            "conversation": msgspec.to_builtins(self.conversation),
            "enrichments": msgspec.to_builtins(self.enrichments),
            "extensions": self.extensions.to_dict(),
            **self.run_id.to_dict(),
        }
        if self.inputs:
            shown["inputs"] = dict(self.inputs)
        if self.input_text is not None:
            shown["input_text"] = self.input_text
        if self.metadata:
            shown["metadata"] = dict(self.metadata)
        return shown
