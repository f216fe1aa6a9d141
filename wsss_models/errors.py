"""What goes wrong by the user's side: the whole call, or one input of it."""


class UsageError(Exception):
    """The call cannot be done as it was written. Exit code 2."""


class InputError(Exception):
    """One input cannot be used; the others can. The message names the argument, what was expected and what came."""
