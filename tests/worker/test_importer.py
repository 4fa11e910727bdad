"""Importing a Transformers directory: the real program over real files."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from transformers import PreTrainedModel

from shared.store.layout import Layout
from tests.worker.importing import assert_refused, assert_same_logits, registered, run
from worker import importer
from worker.base_model import digest_directory, load_base_model


def test_directory_is_registered(source: Path, data_dir: Path) -> None:
    """A directory becomes a row and a copy, bit for bit, whose digest is the row's."""
    result = run(data_dir, "tiny", "--path", source, "--json")

    row = json.loads(result.stdout)
    stored = Layout(data_dir).model(row["id"])
    assert row["name"] == "tiny"
    assert row["digest"] == digest_directory(stored) == digest_directory(source)
    assert row["config"]["architecture"] == "llama"
    assert row["config"]["source"] == {"kind": "path", "name": "source"}
    assert [(r.id, r.config) for r in registered(data_dir)] == [(row["id"], row["config"])]
    assert list((data_dir / "tmp").iterdir()) == []


def test_summary_is_one_line(source: Path, data_dir: Path) -> None:
    """Without --json, one line on standard output says what was registered; progress is on standard error."""
    result = run(data_dir, "tiny", "--path", source)

    assert result.stdout.startswith("tiny: llama, ")
    assert result.stdout.count("\n") == 1
    assert "copying model.safetensors" in result.stderr


def test_import_again_gives_the_same_model(source: Path, data_dir: Path) -> None:
    """The same files under the same name are the model that is there already."""
    first = json.loads(run(data_dir, "tiny", "--path", source, "--json").stdout)

    again = json.loads(run(data_dir, "tiny", "--path", source, "--json").stdout)

    assert again == first
    assert len(list((data_dir / "models").iterdir())) == 1


def test_name_of_another_model_is_refused(source: Path, data_dir: Path) -> None:
    """Other files under a name that is taken are refused, and the first model stays."""
    run(data_dir, "tiny", "--path", source)
    generation = source / "generation_config.json"
    generation.write_text(generation.read_text() + "\n")

    result = run(data_dir, "tiny", "--path", source)

    assert result.exit_code == 2
    assert "holds another base model" in result.stderr
    assert len(registered(data_dir)) == len(list((data_dir / "models").iterdir())) == 1


@pytest.mark.parametrize("name", ["../up", "UPPER", "a..b", "", "x" * 65])
def test_bad_name_is_refused(source: Path, data_dir: Path, name: str) -> None:
    """A name that is not one is refused before anything is read."""
    assert_refused(run(data_dir, name, "--path", source), data_dir, "cannot name a model")


@pytest.mark.parametrize("options", [[], ["--bundled", "--path", "x"], ["--hub", "a/b", "--gguf", "c"]], ids=str)
def test_one_source_is_needed(data_dir: Path, options: list[str]) -> None:
    """None or two sources are an error that names all four."""
    assert_refused(run(data_dir, "tiny", *options), data_dir, "exactly one of --hub, --path, --gguf and --bundled")


def test_wrong_setting_is_one_line(source: Path, data_dir: Path) -> None:
    """A setting that is not one stops the program like any other error."""
    environment = {"LORAD_DATA_DIR": str(data_dir), "LORAD_PORT": "none"}

    result = CliRunner().invoke(importer.main, ["tiny", "--path", str(source)], env=environment)

    assert_refused(result, data_dir, "LORAD_PORT")


def test_refused_architecture_leaves_nothing(source: Path, data_dir: Path) -> None:
    """An architecture that does not work here is refused with its reason."""
    path = source / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "bloom"}))

    assert_refused(run(data_dir, "tiny", "--path", source), data_dir, "bloom is not supported", "ALiBi")


def test_code_is_refused(source: Path, data_dir: Path) -> None:
    """A model that brings code is refused, and the code does not run."""
    path = source / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": {"AutoConfig": "evil.Config"}}))
    (source / "evil.py").write_text("open('ran', 'w')")

    assert_refused(run(data_dir, "tiny", "--path", source), data_dir, "auto_map")


def test_pickled_weights_are_refused(source: Path, data_dir: Path) -> None:
    """A directory with only pickled weights says so."""
    (source / "model.safetensors").rename(source / "pytorch_model.bin")

    assert_refused(run(data_dir, "tiny", "--path", source), data_dir, "no model.safetensors", "pickle")


def test_damaged_weights_are_refused(source: Path, data_dir: Path) -> None:
    """Weights that do not load are never registered."""
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])

    assert_refused(run(data_dir, "tiny", "--path", source), data_dir, "cannot load the model")


@pytest.mark.parametrize("shard", ["../model.safetensors", "model-00002-of-00002.safetensors"])
def test_index_naming_what_is_not_there_is_refused(source: Path, data_dir: Path, shard: str) -> None:
    """An index may name only weights that lie beside it."""
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": shard}}))

    assert_refused(run(data_dir, "tiny", "--path", source), data_dir, "not beside it", shard)


def test_sharded_weights_are_taken(source: Path, data_dir: Path, tiny_llama: PreTrainedModel) -> None:
    """A model whose weights lie in several files with an index is registered whole."""
    (source / "model.safetensors").unlink()
    tiny_llama.save_pretrained(source, max_shard_size="40KB")
    assert len(list(source.glob("model-*-of-*.safetensors"))) > 1

    row = json.loads(run(data_dir, "tiny", "--path", source, "--json").stdout)

    base = load_base_model(Layout(data_dir).model(row["id"]), name="tiny", digest="d", device="cpu", dtype="float32")
    assert_same_logits(base.model, tiny_llama)


def test_other_files_are_left_alone(source: Path, data_dir: Path) -> None:
    """Only the files that make up a model are taken."""
    (source / "evil.py").write_text("")
    (source / "pytorch_model.bin").write_bytes(b"pickle")
    (source / "consolidated.safetensors").write_bytes(b"x")

    row = json.loads(run(data_dir, "tiny", "--path", source, "--json").stdout)

    taken = {p.name for p in Layout(data_dir).model(row["id"]).iterdir()}
    assert taken == {p.name for p in source.iterdir()} - {"evil.py", "pytorch_model.bin", "consolidated.safetensors"}
