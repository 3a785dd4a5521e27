"""The room's public names: one home each."""

from __future__ import annotations

import importlib
from collections import Counter

import pytest

import stageflow.helpers

TOPICS = ("analytics", "guardrails", "memory", "providers", "runtime", "streaming", "timestamps", "uuids")


@pytest.mark.parametrize("topic", TOPICS)
def test_every_public_name_of_a_topic_is_offered(topic: str) -> None:
    module = importlib.import_module(f"stageflow.helpers.{topic}")
    for name in module.__all__:
        assert getattr(stageflow.helpers, name) is getattr(module, name)


def test_no_name_has_two_homes() -> None:
    names = Counter(name for topic in TOPICS for name in importlib.import_module(f"stageflow.helpers.{topic}").__all__)
    assert [name for name, count in names.items() if count > 1] == []
    assert set(names) == set(stageflow.helpers.__all__)
    with pytest.raises(AttributeError):
        stageflow.helpers.nothing_of_that_name  # noqa: B018
