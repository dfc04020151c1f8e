"""The two ways a command may end badly, each with one sentence for a person."""


class BadInput(Exception):
    """What the user gave cannot be used (exit code 2).

    Its message is one sentence that names the thing and the way out.
    """


class Failure(Exception):
    """The input was fine but the job did not succeed (exit code 1).

    Its message is one sentence that names what went wrong.
    """


def quoted(text: object) -> str:
    """Quote foreign text for a message.

    Args:
        text: The text, or anything that can be made one.

    Returns:
        The text in quotes, on one line. Between the quotes there are never more than sixty characters.
    """
    escaped = str(text).encode("unicode_escape").decode("ascii") if not str(text).isprintable() else str(text)
    return f'"{escaped}"' if len(escaped) <= 60 else f'"{escaped[:57]}..."'


def counted(number: int, one: str, many: str | None = None) -> str:
    """Write a number with its noun: "1 tensor", "2,048 tensors", "3 matrices".

    Args:
        number: The number.
        one: The noun's singular.
        many: The noun's plural. By default the singular with an "s".

    Returns:
        The number and the noun.
    """
    return f"{number:,} {one if number == 1 else many or one + 's'}"
