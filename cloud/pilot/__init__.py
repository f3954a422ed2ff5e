"""What a short trial with a few devices says about the task with many: pure, from records to findings."""

from cloud.pilot.findings import DeviceFinding, Findings, Month, Reason, Suggestion, Wish
from cloud.pilot.grades import Grade, Grades, Shares, grade_device
from cloud.pilot.judging import judge
from cloud.pilot.trial import Trial

__all__ = [
    "DeviceFinding",
    "Findings",
    "Grade",
    "Grades",
    "Month",
    "Reason",
    "Shares",
    "Suggestion",
    "Trial",
    "Wish",
    "grade_device",
    "judge",
]
