"""What the launcher cannot mend by itself."""

from services.errors import StartupError


class LauncherError(StartupError):
    """A part of the suite cannot start or stop.

    The message is one line for the operator: it names the cause and then the mend. The command line prints it as it
    stands and exits with code 2.
    """

    def __init__(self, cause: str, mend: str) -> None:
        """Join cause and mend into the one line that is printed.

        Args:
            cause: What is wrong, with the path, process or name concerned. No trailing full stop.
            mend: What the operator can do about it. No trailing full stop.
        """
        super().__init__(f"{cause}; {mend}".replace("\n", " "))
        self.cause = cause
        self.mend = mend
