"""Errors meant for the user: one line that says what was wrong, what was received, what is accepted, what to do."""


class UserError(Exception):
    """Something the user can mend. The command line prints its message alone; `--debug` shows the traceback."""


class ConfigError(UserError):
    """A recipe, setting or data set is wrong. Several problems come as several lines, all at once."""


class ModelError(UserError):
    """A model folder cannot be loaded, or two models do not fit together."""


class RunError(UserError):
    """The run directory cannot be used: in use, finished, damaged or full."""


class NonFiniteError(UserError):
    """A loss or gradient is not finite; raised before the update is applied."""


class CollapseError(UserError):
    """The student's answers run to the budget or repeat themselves, and the recipe says stop; a checkpoint was saved."""


class TeacherError(UserError):
    """A teacher on another machine does not answer, refuses, or answers what cannot be trained on."""


class RolloutError(UserError):
    """An engine that samples does not answer, refuses, or does not sample from the student as it is."""
