"""The one exception that means "Septum was misused", as opposed to anything the modelled system can answer."""


class UsageError(Exception):
    """A wrong use of Septum: a bad file, an unknown name, a value out of range.

    The text is a single line that says what is wrong, where, and how to mend it. The command line prints it on stderr
    and ends with exit status 2.
    """
