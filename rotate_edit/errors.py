"""The two ways a command may end badly, each with one sentence for a person."""


class BadInput(Exception):
    """What the user gave cannot be used (exit code 2): one sentence naming the thing and the way out."""


class Failure(Exception):
    """The input was fine but the job did not succeed (exit code 1): one sentence naming what went wrong."""


def quoted(text: object) -> str:
    """Foreign text for a message: in quotes, on one line, and never longer than sixty characters."""
    escaped = str(text).encode("unicode_escape").decode("ascii") if not str(text).isprintable() else str(text)
    return f'"{escaped}"' if len(escaped) <= 60 else f'"{escaped[:57]}..."'


def counted(number: int, one: str, many: str | None = None) -> str:
    """A number with its noun: "1 tensor", "2,048 tensors", "3 matrices"."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"
