"""What is wrong with one request, said all together."""

from dataclasses import dataclass, field

from shared.errors import InvalidRequest


@dataclass
class Problems:
    """Collects errors, each with the field at fault, until there is nothing more to look at."""

    found: list[InvalidRequest] = field(default_factory=list)

    def add(self, param: str, message: str, kind: type[InvalidRequest] = InvalidRequest) -> None:
        self.found.append(kind(message, param=param))

    def raise_if_any(self) -> None:
        """Raise one error with every message, and class and `param` of the first."""
        if self.found:
            first = self.found[0]
            raise type(first)(" ".join(error.message for error in self.found), param=first.param)
