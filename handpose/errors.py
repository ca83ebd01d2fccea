"""The one exception for mistakes of the user, raised at the edge of the program."""


class UserError(ValueError):
    """A mistake the user can mend: one sentence with the value, the file and the remedy.

    The scripts print it without a traceback and leave with status 2; every other exception is a defect of ours.
    """
