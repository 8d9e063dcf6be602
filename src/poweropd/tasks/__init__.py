"""Problems made by a program: `reasoning-gym` families, split by construction, with worked solutions for some."""

from poweropd.tasks.problems import Problem, Split, problems, split_of
from poweropd.tasks.solutions import STEPS, base_style_solution, worked_solution

__all__ = ["STEPS", "Problem", "Split", "base_style_solution", "problems", "split_of", "worked_solution"]
