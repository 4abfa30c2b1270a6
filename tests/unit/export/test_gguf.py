"""The GGUF that is written, read back by gguf's own reader; llama.cpp itself reads it in tests/e2e."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from tests.checkpoints import engine_of
from tokenizers import Regex, Tokenizer, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from selfroute.device.base import Sampling
from selfroute.device.hf import HFEngine
from selfroute.errors import ExportError
from selfroute.export.gguf import SPLITS, interleaved, split_of, tensors, write
from selfroute.train.warmstart import train_tokenizer


def splitting(pattern: str, *, ignore_merges: bool = False) -> PreTrainedTokenizerFast:
    """The shipped models' tokenizer, splitting text in another way."""
    made: Tokenizer = train_tokenizer().backend_tokenizer
    steps: list[Any] = [
        pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    made.pre_tokenizer = pre_tokenizers.Sequence(steps)
    made.model.ignore_merges = ignore_merges
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|im_end|>", chat_template="{{ messages }}")


def read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray[Any, Any]]]:
    """A file's settings and its tensors in float32."""
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {t.name: gguf.dequantize(t.data, t.tensor_type) for t in reader.tensors}


def test_the_shipped_model_is_written_whole(engine: HFEngine, tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", engine.model, engine.tokenizer, "f16", name="tiny f16", sampling=Sampling())
    fields, written = read(tmp_path / "m.gguf")
    about = {
        "general.architecture": "llama", "general.name": "tiny f16", "llama.context_length": 1024,
        "llama.block_count": 4, "llama.embedding_length": 128, "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2, "llama.rope.dimension_count": 32, "llama.vocab_size": 385,
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "qwen2", "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False, "tokenizer.chat_template": engine.tokenizer.chat_template,
        "general.sampling.temp": 1.0, "general.sampling.top_k": 0,
    }  # fmt: skip
    assert {name: fields[name] for name in about} == about
    assert fields["tokenizer.ggml.tokens"] == engine.tokenizer.convert_ids_to_tokens(list(range(385)))
    assert fields["tokenizer.ggml.token_type"] == [gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * 382
    # The weights were shipped in 16 bits: none is rounded. The output layer is the embedding.
    assert {name: t.shape for name, t in written.items()} == {name: t.shape for name, t in tensors(engine.model)}
    for name, tensor in tensors(engine.model):
        assert np.array_equal(written[name], tensor), name
    assert "output.weight" not in written
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.parametrize(("kind", "error"), [("q8_0", 0.01), ("q4_0", 0.12)])
def test_fewer_bits_stay_near_the_weights(engine: HFEngine, tmp_path: Path, kind: Any, error: float) -> None:
    write(tmp_path / "m.gguf", engine.model, engine.tokenizer, kind, name="tiny", sampling=Sampling())
    _, written = read(tmp_path / "m.gguf")
    for name, tensor in tensors(engine.model):
        off = np.sqrt(((written[name] - tensor) ** 2).mean() / (tensor**2).mean())
        # Of four bits the output layer keeps eight; vectors are kept as they are.
        limit = 0 if tensor.ndim == 1 else 0.01 if name == "token_embd.weight" else error
        assert off <= limit, (name, off)
    sizes = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert sizes["blk.0.ffn_up.weight"] == kind.upper()
    assert sizes["token_embd.weight"] == "Q8_0"


def test_query_and_key_rows_are_put_as_llama_rotates_them() -> None:
    # Two heads of four: the first half of each is rotated against its second.
    rows = np.arange(8, dtype=np.float32)[:, None]
    assert interleaved(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_qwen2_keeps_its_rows_and_biases() -> None:
    model = engine_of("qwen2").model
    named, own = dict(tensors(model)), model.state_dict()
    assert np.array_equal(named["blk.0.attn_q.weight"], own["model.layers.0.self_attn.q_proj.weight"])
    assert np.array_equal(named["blk.2.attn_k.bias"], own["model.layers.2.self_attn.k_proj.bias"])
    assert "rope_freqs.weight" not in named


def test_llama_3s_frequencies_are_divided_as_the_model_divides_them() -> None:
    model = engine_of("llama").model
    factors = dict(tensors(model))["rope_freqs.weight"]
    # Of the long waves by 32, of the short ones by 1, and between the two by something between.
    assert factors[0] == pytest.approx(1)
    assert factors[-1] == pytest.approx(32)
    assert np.all(np.diff(factors) >= -1e-5)
    assert np.allclose(500000.0 ** -(np.arange(0, 16, 2) / 16) / factors, model.get_decoder().rotary_emb.inv_freq)


@pytest.mark.parametrize(("pattern", "ignore_merges", "name"), [(*split, name) for split, name in SPLITS.items()])
def test_known_ways_to_split_have_llama_cpps_name(pattern: str, ignore_merges: bool, name: str) -> None:
    assert split_of(splitting(pattern, ignore_merges=ignore_merges)) == name


@pytest.mark.parametrize(
    ("pattern", "ignore_merges"),
    # Words of the vocabulary that are taken whole make other tokens.
    [(r"\p{N}|\P{N}+", False), (next(iter(SPLITS))[0], True)],
)
def test_other_tokenizers_are_left_to_llama_cpps_converter(pattern: str, ignore_merges: bool) -> None:
    with pytest.raises(ExportError, match=r"convert_hf_to_gguf\.py"):
        split_of(splitting(pattern, ignore_merges=ignore_merges))


@pytest.mark.parametrize(("template", "added"), [("{{ bos_token }}{{ messages }}", True), ("{{ messages }}", False)])
def test_a_beginning_is_added_where_prompts_had_one(
    engine: HFEngine, tmp_path: Path, template: str, added: bool
) -> None:
    """Llama 3's tokenizer puts one before a text; many of its fine-tunes have a chat template without."""
    words = splitting(next(iter(SPLITS))[0])
    words.add_special_tokens({"bos_token": "<|endoftext|>"})
    first = words.bos_token_id
    words.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", first)]
    )
    words.chat_template = template
    assert words.encode("a")[0] == first
    write(tmp_path / "m.gguf", engine.model, words, "f16", name="m", sampling=Sampling())
    assert read(tmp_path / "m.gguf")[0]["tokenizer.ggml.add_bos_token"] is added


def test_every_end_token_is_written(engine: HFEngine, tmp_path: Path) -> None:
    model = copy.deepcopy(engine.model)
    # The tokenizer's own is missing in the model's list.
    model.generation_config.eos_token_id = [0]
    write(tmp_path / "m.gguf", model, engine.tokenizer, "f16", name="m", sampling=Sampling())
    fields = read(tmp_path / "m.gguf")[0]
    assert (fields["tokenizer.ggml.eos_token_id"], fields["tokenizer.ggml.eot_token_id"]) == (2, 0)


def test_what_llama_cpp_would_compute_otherwise_is_refused(engine: HFEngine, tmp_path: Path) -> None:
    model = copy.deepcopy(engine.model)
    model.config.hidden_act = "gelu"
    with pytest.raises(ExportError, match="computes SiLU in a llama, not gelu"):
        write(tmp_path / "m.gguf", model, engine.tokenizer, "f16", name="m", sampling=Sampling())
    words = copy.deepcopy(engine.tokenizer)
    words.add_tokens(["<one more>"])
    with pytest.raises(ExportError, match="the tokenizer has 386 tokens and the model rows for 385"):
        write(tmp_path / "m.gguf", engine.model, words, "f16", name="m", sampling=Sampling())
    assert not list(tmp_path.iterdir())


def test_other_architectures_are_left_to_llama_cpps_converter(tmp_path: Path) -> None:
    tiny = engine_of("gemma3_text")
    with pytest.raises(ExportError, match=r"not gemma3_text: .*convert_hf_to_gguf\.py"):
        write(tmp_path / "m.gguf", tiny.model, tiny.tokenizer, "f16", name="m", sampling=Sampling())
    assert not list(tmp_path.iterdir())
