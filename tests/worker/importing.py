"""What the tests of the importer share: running it, and what must hold after it refused."""

from pathlib import Path

import torch
from click.testing import CliRunner, Result
from transformers import PreTrainedModel

from shared import db
from shared.store import base_models
from shared.tables import BaseModelRow
from worker import importer


def run(data_dir: Path, *arguments: str | Path) -> Result:
    return CliRunner().invoke(importer.main, list(map(str, arguments)), env={"LORAD_DATA_DIR": str(data_dir)})


def registered(data_dir: Path) -> list[BaseModelRow]:
    engine = db.open_engine(f"sqlite:///{data_dir / 'lorad.db'}")
    try:
        with db.read(engine) as tx:
            return base_models.list_all(tx)
    finally:
        engine.dispose()


def assert_refused(result: Result, data_dir: Path, *words: str) -> None:
    """One line that holds `words`, exit code 2, nothing registered and nothing left behind."""
    last = result.stderr.strip().splitlines()[-1]
    assert result.exit_code == 2, result.output
    assert last.startswith("error: ")
    assert all(word in last for word in words), last
    assert "Traceback" not in result.output
    assert not (data_dir / "lorad.db").exists() or registered(data_dir) == []
    assert [p for kind in ("tmp", "models") for p in (data_dir / kind).glob("*")] == []


def assert_same_logits(model: PreTrainedModel | torch.nn.Module, expected: PreTrainedModel) -> None:
    ids = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, expected(input_ids=ids).logits, atol=1e-5, rtol=1e-5)
