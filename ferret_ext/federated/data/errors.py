"""What goes wrong with a user's data."""


class DataError(ValueError):
    """Data that cannot be used as asked; the text names the source, what was expected and what was found."""
