"""Errors a user can act on. The command line prints their message alone, without a traceback."""


class SidrecError(Exception):
    """Base of every error whose message names the cause and what to do."""


class DataError(SidrecError, ValueError):
    """Bad input data; the message names file, column and row (or key)."""


class CodecMismatchError(SidrecError, ValueError):
    """SIDs of one codec met another codec."""


class RunMismatchError(SidrecError, ValueError):
    """An output folder holds the results of another run."""
