"""One class for what a user did wrong: it ends a program in one line. A bug keeps its stack."""


class UserError(Exception):
    """Something that the user can put right; one line that says what and how."""

    def __init__(self, message):
        # A loader's worker passes its error on with the stack before it.
        super().__init__(message.rpartition("UserError: ")[2].strip())
