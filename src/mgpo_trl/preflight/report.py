"""What a preflight found, as text and JSON."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

GOOD, BAD, UNSURE = "ok", "PROBLEM", "note"
REPORT_FILE = "preflight.json"


@dataclass
class Finding:
    """One line of the report."""

    name: str
    """What was looked at."""
    verdict: str
    """`"ok"`, `"PROBLEM"`, or `"note"` for what was not or can not be judged."""
    text: str
    """What was found; further lines are shown indented."""
    figures: dict[str, Any] = field(default_factory=dict)
    """The same as numbers."""


@dataclass
class PreflightReport:
    """Every finding, in the order in which they were made."""

    findings: list[Finding] = field(default_factory=list)
    """The lines of the report."""

    def add(self, name: str, verdict: str, text: str, **figures) -> None:
        """Append a finding."""
        self.findings.append(Finding(name, verdict, text, figures))

    @property
    def problems(self) -> list[Finding]:
        """Findings that speak against starting the run."""
        return [finding for finding in self.findings if finding.verdict == BAD]

    def text(self) -> str:
        """One paragraph a finding, and the verdict."""
        width = max(len(finding.name) for finding in self.findings)
        lines = []
        for finding in self.findings:
            first, *rest = finding.text.splitlines()
            lines.append(f"{finding.verdict:<8}{finding.name:<{width + 2}}{first}")
            lines += [" " * (width + 10) + line for line in rest]
        names = ", ".join(finding.name for finding in self.problems)
        lines.append(f"Not ready: {names}." if names else "Ready to start.")
        return "\n".join(lines)

    def save(self, directory: Path) -> Path:
        """Write `preflight.json` into `directory`."""
        path = Path(directory, REPORT_FILE)
        record = {"ready": not self.problems, "findings": [asdict(finding) for finding in self.findings]}
        path.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return path
