"""The one error family of the package: every message is written for the person who has to act on it."""

from collections.abc import Iterator
from contextlib import contextmanager


class UltrafuserError(ValueError):
    """A setting, file or tensor is not what it has to be.

    The message names the setting or tensor, what was expected, what came, and what to do about it. The
    command line prints it on one line and exits with code 2; the server maps it to an OpenAI error.
    """


class ShapeError(UltrafuserError):
    """A tensor has the wrong shape or dtype."""


class RecipeError(UltrafuserError):
    """A recipe, or a value that came from one, is not valid."""


class DataError(UltrafuserError):
    """A row of a data file is malformed; the message carries the file and the line."""


class TemplateError(UltrafuserError):
    """A chat template cannot be aligned with the response tokens, or a conversation cannot be read."""


class ConversationTooLongError(TemplateError):
    """A conversation does not fit the context of a specialist."""


class CheckpointError(UltrafuserError):
    """A model folder is incomplete, inconsistent or in a form that is not loaded (such as a pickle)."""


@contextmanager
def located(where: str) -> Iterator[None]:
    """Put the place of a conversation, such as file and line, before what is wrong with it.

    Args:
        where: the place.

    Raises:
        TemplateError: of the same class as one that is raised inside.
    """
    try:
        yield
    except TemplateError as error:
        raise type(error)(f"{where}: {error}") from error
