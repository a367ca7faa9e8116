"""The error that a person reads when a model cannot be built as asked."""


class ConfigurationError(Exception):
    """A choice that cannot be built: the field's name, which a command line turns into its option, and a message.

    The message says what is wrong with its value, and the mend: "is 3: it must divide the width 512".
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field} {message}")
        self.field, self.message = field, message

    def __reduce__(self) -> tuple[type["ConfigurationError"], tuple[str, str]]:
        return ConfigurationError, (self.field, self.message)
