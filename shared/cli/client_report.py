"""What training would see, on the terminal: problems by line, token counts, a histogram, one sample with its labels."""

from collections.abc import Sequence
from pathlib import Path

from rich.text import Text

from shared import ids
from shared.cli.client_output import Output
from shared.cli.http import Json, Service, ServiceError, path_of

_BAR = 40
_LABEL, _PLAIN = "bold green", "dim"


def file_id_of(service: Service, file_or_id: str) -> str:
    """The id of an uploaded file: of the local one, uploaded now, if there is one by this name."""
    path = Path(file_or_id)
    if path.is_file():
        uploaded: str = service.upload(path)["id"]
        return uploaded
    if ids.is_id(file_or_id, ids.FILE):
        return file_or_id
    raise ServiceError(f"{file_or_id!r} is neither a file here nor the id of an uploaded one", code="invalid_value")


def report(service: Service, out: Output, file_id: str, *, base: str | None, max_seq_len: int | None) -> None:
    """Print what is known of a file; raises ServiceError if it cannot be trained on."""
    path = "/files" + path_of(file_id, "report")
    lines = service.get(path)
    show_lines(out, lines)
    is_usable = lines["status"] != "error"
    if base is not None and is_usable:
        query: dict[str, str | int] = {"model": base} | ({"max_seq_len": max_seq_len} if max_seq_len else {})
        lines = service.get(path, query)
        tokens = lines["tokens"]
        out.note(f"\nas {base} sees it, with at most {tokens['max_seq_len']:,} tokens a sample:")
        show_tokens(out, tokens["data"])
    if out.as_json:
        out.json_line(lines)
    if not is_usable:
        raise ServiceError(f"{file_id} cannot be trained on", code="invalid_training_file")


def show_lines(out: Output, report: Json) -> None:
    """Format, number of samples, and the problems, a line each."""
    found = report["report"]
    if found is None:
        out.note(f"{report['id']} is not a data set")
        return
    packed = f", {found['compression']}" if found.get("compression") else ""
    out.note(f"{report['id']}: {found['format'] or 'no format'}{packed}, {found['num_samples']:,} samples")
    if found.get("ignored_keys"):
        out.note(f"keys that are skipped: {', '.join(map(printable, found['ignored_keys']))}")
    for problem in found["problems"]:
        place = f"line {problem['line']}" if problem["line"] else "file"
        where = f" {printable(problem['path'])}:" if problem["path"] else ""
        out.note(f"  {place}:{where} {printable(problem['message'])}")
    if (more := found["num_problems"] - len(found["problems"])) > 0:
        out.note(f"  and {more:,} more problems")


def show_tokens(out: Output, data: Json) -> None:
    """Counts, losses, histogram and an example of a token report."""
    out.note(
        f"{data['num_used']:,} of {data['num_samples']:,} samples, {data['num_tokens']:,} tokens,"
        f" {data['num_label_tokens']:,} of them learnt ({data['label_share']:.1%});"
        f" the median sample has {data['median']:,}, the longest {data['longest']:,}"
    )
    for what, why in {
        "truncated": "lose labels, being too long",
        "dropped": "are dropped: no label is left",
        "duplicates": "are as an earlier one",
    }.items():
        if count := data[f"num_{what}"]:
            lines = data["duplicate_lines" if what == "duplicates" else f"{what}_lines"]
            out.note(f"{count:,} {why} ({_lines(lines, count)})")
    _show_histogram(out, data["histogram"])
    if example := data["example"]:
        _show_example(out, example)


def show_estimate(out: Output, estimate: Json) -> None:
    """A dry run's answer."""
    if out.as_json:
        out.json_line(estimate)
        return
    hyper, training, lora = estimate["hyperparameters"], estimate["training"], estimate["lora"]
    targets = lora["target_modules"]
    out.note(
        f"{estimate['total_steps']:,} steps, {estimate['steps_per_epoch']:,} an epoch;"
        f" {estimate['num_tokens']:,} tokens, {estimate['num_label_tokens']:,} of them learnt"
    )
    out.note(
        f"batch size {hyper['batch_size']}, learning rate {training['learning_rate']:.3g} ({training['lr_schedule']}),"
        f" r {lora['r']}, alpha {lora['alpha']:g}, on {targets if isinstance(targets, str) else ', '.join(targets)}"
    )
    out.note(
        f"{estimate['trainable_parameters']:,} trained parameters; about {_gib(estimate['memory_bytes'])} of memory"
    )
    if (seconds := estimate["seconds"]) is None:
        out.note("how long it takes is not known: no job on this base model has succeeded here yet")
    else:
        out.note(f"about {_duration(seconds)}, at {estimate['tokens_per_second']:,.0f} tokens/s as of late")
    for which, data in estimate["data"].items():
        if data is not None:
            out.note(f"\n{which} data:")
            show_tokens(out, data)
    out.note("\nthis was a dry run: no job was made")


def printable(text: str) -> str:
    """A user's text without what a terminal would obey."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def _show_histogram(out: Output, buckets: Sequence[Json]) -> None:
    filled = [i for i, bucket in enumerate(buckets) if bucket["num_samples"]]
    if not filled:
        return
    most = max(bucket["num_samples"] for bucket in buckets)
    out.note("tokens a sample needs:")
    for i in range(filled[0], filled[-1] + 1):
        count, upper = buckets[i]["num_samples"], buckets[i]["max_tokens"]
        heading = f"> {buckets[i - 1]['max_tokens']}" if upper is None else f"<= {upper}"
        out.note(f"  {heading:>7} {'█' * -(-_BAR * count // most):<{_BAR}} {count:,}")


def _show_example(out: Output, example: Json) -> None:
    """The sample of one line; what is learnt is green, or in «» where there are no colours."""
    has_colours = out.console.color_system is not None
    out.note(f"line {example['line']}, learnt is what is {'green' if has_colours else 'in «»'}:")
    text = Text()
    for run in example["runs"]:
        piece = printable(run["text"])
        marked = f"«{piece}»" if run["is_label"] and not has_colours else piece
        text.append(marked, style=_LABEL if run["is_label"] else _PLAIN)
    if not example["is_whole"]:
        text.append(" [...]", style=_PLAIN)
    if not out.as_json:
        out.console.print(text, soft_wrap=True)


def _lines(lines: Sequence[int], count: int) -> str:
    shown = ", ".join(map(str, lines))
    return f"line{'s' if count > 1 else ''} {shown}{', ...' if count > len(lines) else ''}"


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / (1 << 30):.1f} GiB" if size_bytes >= 1 << 30 else f"{size_bytes / (1 << 20):.0f} MiB"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
