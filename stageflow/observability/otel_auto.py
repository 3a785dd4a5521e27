"""`configured_sink`: OpenTelemetry where the program uses it, and not even an import where it does not."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stageflow.observability.otel import OtelSink


def configured_sink() -> OtelSink | None:
    """A sink for the global providers, or None. Nothing of OpenTelemetry is imported unless its SDK already is."""
    if "opentelemetry.sdk.trace" not in sys.modules and "opentelemetry.sdk.metrics" not in sys.modules:
        return None  # nobody can have set a provider
    from stageflow.observability.otel import configured

    return configured()
