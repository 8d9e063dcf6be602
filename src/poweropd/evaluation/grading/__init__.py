"""Grade final answers: extract, compare what is cheap to tell, leave the rest to processes that may hang or die of it."""

from poweropd.evaluation.grading.extraction import extract_answer
from poweropd.evaluation.grading.grader import Grade, Grader, GradeStatus, GradingMode

__all__ = ["Grade", "GradeStatus", "Grader", "GradingMode", "extract_answer"]
