"""What has been found so far."""

from transformer.modes.contract.report import Report, Violation


class Findings:
    """Violations and notes, each once, in the order in which they were found."""

    def __init__(self):
        self._violations, self._notes = {}, {}

    def violation(self, rule, block, operation, where, why) -> None:
        """Adds a violation; a second one of the same rule, block and line says nothing new."""
        key = rule, block, where
        self._violations.setdefault(key, Violation(str(rule), block, operation, where, why))

    def note(self, text: str) -> None:
        """Adds a note."""
        self._notes[text] = None

    def report(self) -> Report:
        """All of it."""
        return Report(list(self._violations.values()), list(self._notes))

    def __bool__(self):
        return bool(self._violations)
