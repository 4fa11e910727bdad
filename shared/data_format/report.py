"""A data set as a whole: its samples one by one, or a report of all that is wrong with it."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from shared.data_format.fields import Fields
from shared.data_format.formats import parse
from shared.data_format.lines import is_gzipped, numbered_lines
from shared.data_format.samples import Kind, Problem, Sample
from shared.errors import InvalidTrainingFile

MAX_PROBLEMS: Final = 50
"""How many problems a report lists; it counts all of them."""


@dataclass(frozen=True)
class FileReport:
    """What a whole file holds. `format` is None and `num_samples` 0 where no line could be read."""

    format: Kind | None
    compression: str | None
    """"gzip" or None."""
    num_samples: int
    num_problems: int
    problems: list[Problem]
    ignored_keys: list[str]
    """Keys that keep books and teach nothing; they are in the file and training does not see them."""

    @property
    def is_valid(self) -> bool:
        return self.num_problems == 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def check_file(path: Path) -> FileReport:
    """Reads the whole file and reports; raises for no content, however bad."""
    found: list[Problem] = []
    ignored: set[str] = set()
    num_samples = num_problems = 0
    kind: Kind | None = None
    for item in _scan(path, ignored):
        if isinstance(item, Problem):
            num_problems += 1
            if len(found) < MAX_PROBLEMS:
                found.append(item)
        else:
            num_samples += 1
            kind = kind or item.kind
    with path.open("rb") as file:
        compression = "gzip" if is_gzipped(file) else None
    return FileReport(
        format=kind,
        compression=compression,
        num_samples=num_samples,
        num_problems=num_problems,
        problems=found,
        ignored_keys=sorted(ignored),
    )


def read_samples(path: Path) -> Iterator[Sample]:
    """The file's samples, one at a time; raises InvalidTrainingFile that names the line at the first problem."""
    for item in _scan(path, set()):
        if isinstance(item, Problem):
            raise InvalidTrainingFile(str(item), param="training_file")
        yield item


def _scan(path: Path, ignored: set[str]) -> Iterator[Sample | Problem]:
    """Every sample and problem in the file's order; adds the keys that it skips to `ignored`."""
    kind: Kind | None = None
    is_empty = True
    with path.open("rb") as file:
        for line, text in numbered_lines(file):
            if isinstance(text, Problem):
                is_empty = False
                yield text
                continue
            if is_empty and text.lstrip().startswith("["):
                message = "this is a JSON array; write its objects one a line, as `jq -c '.[]'` does"
                yield Problem(line, "", "json_array", message)
                return
            is_empty = False
            fields = Fields(line)
            sample = parse(text, fields)
            yield from fields.problems
            ignored |= fields.ignored
            if sample is None:
                continue
            kind = kind or sample.kind
            if sample.kind == kind:
                yield sample
            else:
                message = f"this is a {sample.kind} line in a {kind} file; one file has one format"
                yield Problem(line, "", "mixed_formats", message)
    if is_empty:
        yield Problem(0, "", "empty_file", "there is no line to train on")
