"""Checks on text that must not pass, and the GUARD stage that applies them.

A check is any object with `check(content, context) -> GuardrailResult`. All built-in ones are pure functions over the
text with linear-time patterns; instances pickle, so the stage may run in any lane.
"""

from __future__ import annotations

import ipaddress
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final, Protocol

from stageflow.core.errors import DefinitionError
from stageflow.core.kinds import StageKind
from stageflow.core.output import StageOutput

if TYPE_CHECKING:
    from stageflow.context.stage_context import StageContext

__all__ = [
    "ContentFilter",
    "ContentLengthCheck",
    "GuardrailCheck",
    "GuardrailResult",
    "GuardrailStage",
    "InjectionDetector",
    "PIIDetector",
    "PolicyViolation",
    "ViolationType",
]

PII_SEVERITY: Final = 0.8
BLOCKED_SEVERITY: Final = 0.9
INJECTION_SEVERITY: Final = 1.0


class ViolationType(StrEnum):
    """What kind of rule was broken."""

    PII_DETECTED = "pii_detected"
    PROFANITY = "profanity"
    TOXICITY = "toxicity"
    CONTENT_TOO_LONG = "content_too_long"
    RATE_LIMITED = "rate_limited"
    BLOCKED_TOPIC = "blocked_topic"
    INJECTION_ATTEMPT = "injection_attempt"
    CUSTOM = "custom"


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyViolation:
    """One broken rule. `severity` is 0 to 1; `location` is a half-open range of characters of the checked text."""

    type: ViolationType
    message: str
    severity: float = 1.0
    metadata: Mapping[str, Any] = field(default_factory=dict)
    location: tuple[int, int] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Type, message, severity always; metadata and location where set. Never the offending text itself."""
        shown: dict[str, Any] = {"type": self.type.value, "message": self.message, "severity": self.severity}
        if self.metadata:
            shown["metadata"] = dict(self.metadata)
        if self.location is not None:
            shown["location"] = list(self.location)
        return shown


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardrailResult:
    """The verdict of one check; `transformed_content` is the text to go on with, where the check changed it."""

    passed: bool
    violations: Sequence[PolicyViolation] = ()
    transformed_content: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def pass_(cls, **metadata: Any) -> GuardrailResult:
        """Nothing found."""
        return cls(passed=True, metadata=metadata)

    @classmethod
    def of(
        cls, violations: Sequence[PolicyViolation], *, transformed_content: str | None = None, **metadata: Any
    ) -> GuardrailResult:
        """Passed where there are no violations."""
        return cls(
            passed=not violations, violations=violations, transformed_content=transformed_content, metadata=metadata
        )


class GuardrailCheck(Protocol):
    """One rule set. `context` holds `user_id` and `session_id`, text or None."""

    def check(self, content: str, context: Mapping[str, str | None]) -> GuardrailResult:
        """Judge the text; must not wait, and raises only where it cannot judge (the stage then fails closed)."""


def _passes_luhn(digits: str) -> bool:
    total = 0
    for index, digit in enumerate(reversed(digits)):
        value = int(digit) * (2 if index % 2 else 1)
        total += value - 9 if value > 9 else value
    return total % 10 == 0


def _is_card(text: str) -> bool:
    digits = re.sub(r"\D", "", text)
    return 13 <= len(digits) <= 19 and _passes_luhn(digits)


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _always(text: str) -> bool:
    return True


# In this order: where two readings overlap (a card number holds a phone number) the earlier one keeps the place.
PII_PATTERNS: Final = {
    "email": (re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@(?:[\w-]{1,63}\.){1,8}[A-Za-z]{2,24}\b"), _always),
    "credit_card": (re.compile(r"(?<!\d)(?:\d[ -]?){12,18}\d(?!\d)"), _is_card),
    "ssn": (re.compile(r"(?<![\d-])(?!000|666|9\d\d)\d{3}-(?!00)\d{2}-(?!0000)\d{4}(?![\d-])"), _always),
    "ip_address": (
        re.compile(
            r"(?<![\w.:])(?:\d{1,3}(?:\.\d{1,3}){3}(?!\w|\.\d)"
            r"|(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?![\w:]|\.\d))"
        ),
        _is_address,
    ),
    "phone": (
        re.compile(r"(?<![\w.])(?:\+?\d{1,3}[ .-]?)?(?:\(\d{3}\)[ .-]?|\d{3}[ .-]?)\d{3}[ .-]?\d{4}(?![\w-]|\.\d)"),
        _always,
    ),
}


class PIIDetector:
    """Finds personal data: e-mail, phone, social security number, card number (checksum tested), IP address.

    Each hit is one violation of severity 0.8 with `pii_type` and its location. With `redact` the transformed content
    has every character of a hit replaced by `redaction_char`, so that lengths and later locations stay true.
    """

    def __init__(
        self, detect_types: Iterable[str] | None = None, redact: bool = False, *, redaction_char: str = "*"
    ) -> None:
        wanted = tuple(PII_PATTERNS) if detect_types is None else tuple(detect_types)
        unknown = sorted(set(wanted) - set(PII_PATTERNS))
        if unknown:
            raise DefinitionError(
                f"unknown PII types {', '.join(unknown)}", hint=f"known are {', '.join(PII_PATTERNS)}", unknown=unknown
            )
        if len(redaction_char) != 1:
            raise DefinitionError("redaction_char is one character", redaction_char=redaction_char)
        self.detect_types = tuple(name for name in PII_PATTERNS if name in wanted)
        self.redact = redact
        self.redaction_char = redaction_char

    def check(self, content: str, context: Mapping[str, str | None]) -> GuardrailResult:
        """All hits in the order of the text."""
        hits = sorted(self._hits(content))
        violations = [
            PolicyViolation(
                type=ViolationType.PII_DETECTED,
                message=f"{name} found",
                severity=PII_SEVERITY,
                metadata={"pii_type": name},
                location=(start, end),
            )
            for start, end, name in hits
        ]
        redacted = self._redacted(content, hits) if self.redact else None
        return GuardrailResult.of(violations, transformed_content=redacted, pii_types_checked=list(self.detect_types))

    def _hits(self, content: str) -> Iterator[tuple[int, int, str]]:
        taken = bytearray(len(content))
        for name in self.detect_types:
            pattern, is_real = PII_PATTERNS[name]
            for found in pattern.finditer(content):
                start, end = found.span()
                if any(taken[start:end]) or not is_real(found.group()):
                    continue
                taken[start:end] = b"\1" * (end - start)
                yield start, end, name

    def _redacted(self, content: str, hits: Sequence[tuple[int, int, str]]) -> str:
        parts: list[str] = []
        after = 0
        for start, end, _ in hits:
            parts += (content[after:start], self.redaction_char * (end - start))
            after = end
        return "".join((*parts, content[after:]))


LEET: Final = str.maketrans("0134578@$!|+", "oieastbasilt")
LEET_L: Final = str.maketrans({"1": "l", "!": "l"})
PROFANITY: Final = frozenset(
    ("asshole", "bastard", "bitch", "bullshit", "cunt", "damn", "dickhead", "fuck", "fucker", "fucking", "shit", "slut")
)
EDGE: Final = "!?.,;:|+\"'()[]{}<>*_-~`"


def _plain(text: str) -> str:
    """Lower case, compatibility forms folded, accents and invisible characters dropped."""
    if text.isascii():
        return text.lower()
    decomposed = unicodedata.normalize("NFKD", text)
    return "".join(c for c in decomposed if unicodedata.category(c) not in {"Mn", "Cf"}).casefold()


def _readings(token: str) -> set[str]:
    """The words a token may stand for: as written, and with digits and signs read as the letters they imitate."""
    plain = _plain(token)
    forms = {plain, plain.strip(EDGE)}
    forms |= {form.translate(LEET_L) for form in forms}
    forms |= {form.translate(LEET) for form in forms}
    words = set(forms)
    for form in forms:
        words.update(re.findall(r"[^\W_]+", form))
        words.add(re.sub(r"[\W_]+", "", form))
    return words


class ContentFilter:
    """Finds words and topics that are not allowed, also in leetspeak (`sh1t`, `$hit`, `s.h.i.t`).

    Words are compared with the raw and the normalised reading of every token; a violation carries `word` and the
    severity `profanity_severity`. `blocked_patterns` are case-insensitive regular expressions tried on the raw and on
    the normalised text: severity 0.9, with `pattern` and whether only the `normalized` text matched.
    """

    def __init__(
        self,
        profanity_words: Iterable[str] | None = None,
        blocked_patterns: Iterable[str] = (),
        *,
        profanity_severity: float = 0.7,
    ) -> None:
        self.words = PROFANITY if profanity_words is None else frozenset(_plain(word) for word in profanity_words)
        self.patterns = tuple(_compiled(pattern) for pattern in blocked_patterns)
        self.profanity_severity = profanity_severity

    def check(self, content: str, context: Mapping[str, str | None]) -> GuardrailResult:
        """Words first, in the order of the text, then patterns in the order given."""
        violations = list(self._profanity(content))
        normalised = _plain(content).translate(LEET)
        for pattern in self.patterns:
            found = pattern.search(content)
            if found is None and pattern.search(normalised) is None:
                continue
            violations.append(
                PolicyViolation(
                    type=ViolationType.BLOCKED_TOPIC,
                    message=f"blocked topic: {pattern.pattern}",
                    severity=BLOCKED_SEVERITY,
                    metadata={"pattern": pattern.pattern, "normalized": found is None},
                    location=found.span() if found is not None else None,
                )
            )
        return GuardrailResult.of(violations)

    def _profanity(self, content: str) -> Iterator[PolicyViolation]:
        for token in re.finditer(r"\S+", content):
            for word in sorted(self.words & _readings(token.group())):
                yield PolicyViolation(
                    type=ViolationType.PROFANITY,
                    message="profanity found",
                    severity=self.profanity_severity,
                    metadata={"word": word},
                    location=token.span(),
                )


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern, re.IGNORECASE)
    except re.error as error:
        raise DefinitionError(f"{pattern!r} is no regular expression: {error}", pattern=pattern) from error


INJECTION_PATTERNS: Final = tuple(
    re.compile(pattern, re.IGNORECASE | re.MULTILINE)
    for pattern in (
        (
            r"\b(?:ignore|disregard|forget|override|bypass)\s+(?:\w+\s+){0,3}?(?:previous|prior|above|earlier|preceding|"
            r"system|safety|your)\s+(?:\w+\s+){0,2}?(?:instructions?|prompts?|rules?|messages?|guidelines?|context)\b"
        ),
        r"\b(?:ignore|disregard|forget)\s+(?:everything|all)\s+(?:above|before|you\s+(?:were|have\s+been)\s+told)\b",
        r"\byou\s+are\s+(?:now|no\s+longer)\s+(?:an?\s+)?\w+",
        (
            r"\b(?:reveal|show|print|repeat|output|leak)\s+(?:me\s+)?(?:your|the)\s+(?:hidden\s+|initial\s+|secret\s+)?"
            r"(?:system\s+)?(?:prompt|instructions)\b"
        ),
        r"\b(?:pretend|act)\s+(?:to\s+be|as\s+if|as\s+though|like)\s+you\b",
        r"\b(?:jailbreak|do\s+anything\s+now|developer\s+mode\s+(?:enabled|on)|DAN\s+mode)\b",
        r"<\|(?:im_start|im_end|system|endoftext)\|>|\[/?INST\]|<</?SYS>>",
        r"^[ \t]*(?:###[ \t]*)?(?:system|assistant)[ \t]*:",
    )
)


class InjectionDetector:
    """Finds text that tries to give a model new orders; severity 1.0, with `matched_pattern` and the location."""

    def __init__(self, extra_patterns: Iterable[str] = ()) -> None:
        self.patterns = (*INJECTION_PATTERNS, *(_compiled(pattern) for pattern in extra_patterns))

    def check(self, content: str, context: Mapping[str, str | None]) -> GuardrailResult:
        """The first match of each pattern."""
        violations = [
            PolicyViolation(
                type=ViolationType.INJECTION_ATTEMPT,
                message="text that tries to give new orders",
                severity=INJECTION_SEVERITY,
                metadata={"matched_pattern": pattern.pattern},
                location=found.span(),
            )
            for pattern in self.patterns
            if (found := pattern.search(content)) is not None
        ]
        return GuardrailResult.of(violations)


class ContentLengthCheck:
    """Bounds the text in characters and in estimated tokens (characters // 4)."""

    def __init__(
        self, max_chars: int | None = None, max_tokens: int | None = None, min_chars: int | None = None
    ) -> None:
        self.max_chars = max_chars
        self.max_tokens = max_tokens
        self.min_chars = min_chars

    def check(self, content: str, context: Mapping[str, str | None]) -> GuardrailResult:
        """One violation per broken bound; too short is CUSTOM."""
        chars, tokens = len(content), len(content) // 4
        violations = []
        for size, limit, unit in ((chars, self.max_chars, "characters"), (tokens, self.max_tokens, "tokens")):
            if limit is not None and size > limit:
                violations.append(
                    PolicyViolation(
                        type=ViolationType.CONTENT_TOO_LONG,
                        message=f"{size} {unit}, allowed are {limit}",
                        metadata={"unit": unit, "size": size, "limit": limit},
                    )
                )
        if self.min_chars is not None and chars < self.min_chars:
            violations.append(
                PolicyViolation(
                    type=ViolationType.CUSTOM,
                    message=f"{chars} characters, needed are {self.min_chars}",
                    metadata={"unit": "characters", "size": chars, "limit": self.min_chars},
                )
            )
        return GuardrailResult.of(violations, chars=chars, tokens=tokens)


class GuardrailStage:
    """A GUARD stage that runs checks over one text.

    The text is `content_key`: the value of a declared dependency of that name, else that key of a dependency's mapping,
    else that input of the run; without `content_key` it is the snapshot's `input_text`. No text: SKIP. Each check sees
    what the one before made of the text. Violations below `violation_threshold` are ignored. The output has
    `guardrail_passed`, `violations`, `checks_run`, `transformed_content`; a failing one carries them too, so that a
    guard-retry policy can tell whether a re-run changed anything, and the stage that reruns why (`ctx.feedback`).

    With `fail_on_violation=False` the guard lets the text pass and leaves the audit event `guardrail.fail_open`; else
    violations fail the stage, with the event `guardrail.violations_detected` unless `log_violations=False`. A check
    that raises fails the stage in both cases.
    """

    kind = StageKind.GUARD

    def __init__(
        self,
        checks: Iterable[GuardrailCheck],
        content_key: str | None = None,
        fail_on_violation: bool = True,
        *,
        violation_threshold: float = 0.0,
        log_violations: bool = True,
    ) -> None:
        self.checks = tuple(checks)
        if not self.checks:
            raise DefinitionError("a guardrail without checks would pass everything", hint="give at least one check")
        self.content_key = content_key
        self.fail_on_violation = fail_on_violation
        self.violation_threshold = violation_threshold
        self.log_violations = log_violations

    def execute(self, ctx: StageContext) -> StageOutput:
        """Run every check; see the class."""
        content = self._content(ctx)
        if not content:
            return StageOutput.skip("no content to check")
        context = {"user_id": ctx.snapshot.user_id, "session_id": ctx.snapshot.session_id}
        violations: list[PolicyViolation] = []
        transformed = content
        for check in self.checks:
            result = check.check(transformed, context)
            violations += [found for found in result.violations if found.severity >= self.violation_threshold]
            if result.transformed_content is not None:
                transformed = result.transformed_content
        data: dict[str, Any] = {
            "guardrail_passed": not violations,
            "violations": [found.to_dict() for found in violations],
            "checks_run": [type(check).__name__ for check in self.checks],
            "transformed_content": transformed,
        }
        if not violations:
            return StageOutput.ok(data)
        if not self.fail_on_violation:
            ctx.emit("guardrail.fail_open", self._audit(ctx, data["violations"]))
            return StageOutput.ok(data)
        if self.log_violations:
            ctx.emit(
                "guardrail.violations_detected",
                {
                    "stage": ctx.stage_name,
                    "violation_count": len(violations),
                    "violations": data["violations"],
                    "fail_on_violation": True,
                },
            )
        kinds = ", ".join(dict.fromkeys(found.type.value for found in violations))
        return StageOutput.fail(f"{len(violations)} guardrail violation(s): {kinds}", data=data)

    def _audit(self, ctx: StageContext, violations: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "stage": ctx.stage_name,
            "pipeline_run_id": ctx.run_id,
            "request_id": ctx.snapshot.request_id,
            "execution_mode": ctx.snapshot.metadata.get("execution_mode", "production"),
            "violation_count": len(violations),
            "fail_on_violation": False,
            "violations": violations,
        }

    def _content(self, ctx: StageContext) -> str | None:
        if self.content_key is None:
            return ctx.snapshot.input_text
        found: Any = None
        if self.content_key in ctx.inputs:
            found = ctx.inputs[self.content_key]
        else:
            for value in ctx.inputs.values():
                if isinstance(value, Mapping) and self.content_key in value:
                    found = value[self.content_key]
                    break
            else:
                found = ctx.snapshot.inputs.get(self.content_key)
        if found is None or isinstance(found, str):
            return found
        raise DefinitionError(
            f"guardrail {ctx.stage_name!r}: {self.content_key!r} is {type(found).__name__}, not text",
            hint="name a stage, key or input whose value is text",
        )
