"""GGUF: the file that llama.cpp, Ollama and LM Studio load.

It is written for Llama and Qwen2 models whose tokenizer is a byte-level BPE that splits text in a way that llama.cpp
knows by name. Left out on purpose: everything else, which llama.cpp's own converter writes from the
folder that `--to hf` makes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import gguf
import numpy as np
from numpy.typing import NDArray

from selfroute.errors import ExportError
from selfroute.export.folder import ordered_ends

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from selfroute.device.base import Sampling

Kind = Literal["f16", "q8_0", "q4_0"]
"""How the matrices are kept: 16 bits a weight, 8.5 or 4.5."""

_KINDS = {
    "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    "q4_0": (gguf.GGMLQuantizationType.Q4_0, gguf.LlamaFileType.MOSTLY_Q4_0),
}

_ARCHITECTURES = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2}
"""By `model_type` of the Hugging Face config."""

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {
    # The regex, and whether words of the vocabulary are taken whole, without merges.
    (_WORDS + r"\p{N}" + _REST, False): "qwen2",
    (_WORDS + r"\p{N}{1,3}" + _REST, True): "llama-bpe",
}
"""Ways to split text that llama.cpp knows, and its names for them."""

_CONVERTER = (
    "export it with --to hf, and write the GGUF with llama.cpp's own converter: "
    "python convert_hf_to_gguf.py FOLDER --outtype f16"
)


def write(
    path: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    kind: Kind,
    *,
    name: str,
    sampling: Sampling,
) -> None:
    """Write a model, its tokenizer, chat template and sampling defaults into one file, whole or not at all.

    Raises:
        ExportError: the model or its tokenizer is not of those that this writes; the message names the way out.
    """
    shape = model.config
    architecture = _ARCHITECTURES.get(shape.model_type)
    if architecture is None:
        raise ExportError(f"GGUF is written for {' and '.join(_ARCHITECTURES)}, not {shape.model_type}: {_CONVERTER}")
    if shape.hidden_act != "silu":
        raise ExportError(f"llama.cpp computes SiLU in a {shape.model_type}, not {shape.hidden_act}: {_CONVERTER}")
    if len(tokenizer) > shape.vocab_size:
        raise ExportError(
            f"the tokenizer has {len(tokenizer)} tokens and the model rows for {shape.vocab_size} of them"
        )
    split = split_of(tokenizer)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    writer = gguf.GGUFWriter(temporary, gguf.MODEL_ARCH_NAMES[architecture])
    try:
        writer.add_name(name)
        _add_shape(writer, shape)
        _add_tokenizer(writer, tokenizer, split, shape.vocab_size, ordered_ends(model, tokenizer))
        _add_sampling(writer, sampling)
        quantized, file_type = _KINDS[kind]
        writer.add_file_type(file_type)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for tensor_name, tensor in tensors(model):
            as_kind = _kept_as(tensor_name, tensor, quantized, tied=bool(shape.tie_word_embeddings))
            writer.add_tensor(tensor_name, gguf.quantize(tensor, as_kind), raw_dtype=as_kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def split_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """llama.cpp's name for the way in which a tokenizer splits text before it merges bytes.

    Raises:
        ExportError: it is no byte-level BPE, or splits text in another way.
    """
    parts = _parts(tokenizer)
    model, splitter = parts["model"], parts["pre_tokenizer"] or {}
    steps = splitter.get("pretokenizers", [splitter])
    plain_bytes = {"add_prefix_space": False, "use_regex": False}
    normal = (parts["normalizer"] or {"type": "NFC"})["type"]
    if (
        model["type"] == "BPE"
        and [step.get("type") for step in steps] == ["Split", "ByteLevel"]
        and steps[0]["behavior"] == "Isolated"
        and not steps[0]["invert"]
        and plain_bytes.items() <= steps[1].items()
        # llama.cpp takes text as it comes; composed text, as most is, is the same in both.
        and normal == "NFC"
        and not any(model.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"))
    ):
        found = SPLITS.get((steps[0]["pattern"].get("Regex", ""), bool(model.get("ignore_merges"))))
        if found:
            return found
    known = ", ".join(SPLITS.values())
    raise ExportError(
        f"GGUF is written for byte-level BPE tokenizers that split text as {known} do; this one does not: {_CONVERTER}"
    )


def tensors(model: PreTrainedModel) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """A model's tensors in float32, by llama.cpp's names.

    Raises:
        ExportError: there is one that the architecture does not have.
    """
    shape = model.config
    names = gguf.get_tensor_name_map(_ARCHITECTURES[shape.model_type], shape.num_hidden_layers)
    for key, value in model.state_dict().items():
        if key == "lm_head.weight" and shape.tie_word_embeddings:
            continue
        name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise ExportError(f"the model has a tensor that {shape.model_type} has not, {key}: {_CONVERTER}")
        tensor = value.detach().float().cpu().numpy()
        if shape.model_type == "llama" and ".q_proj." in key:
            tensor = interleaved(tensor, shape.num_attention_heads)
        if shape.model_type == "llama" and ".k_proj." in key:
            tensor = interleaved(tensor, shape.num_key_value_heads)
        yield name, tensor
    factors = _rope_factors(model)
    if factors is not None:
        yield "rope_freqs.weight", factors


def interleaved(rows: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """The rows of a query or key projection in the order of llama.cpp's `llama`.

    It rotates pairs of neighbours, where Hugging Face rotates the halves of a head against each other.

    >>> interleaved(np.arange(8, dtype=np.float32), heads=2).tolist()
    [0.0, 2.0, 1.0, 3.0, 4.0, 6.0, 5.0, 7.0]
    """
    half = rows.shape[0] // heads // 2
    return rows.reshape(heads, 2, half, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _rope_factors(model: PreTrainedModel) -> NDArray[np.float32] | None:
    """What each rotary frequency is divided by (Llama 3.1 and later); None where all stand as they are.

    Raises:
        ExportError: they change in a way that these factors do not say.
    """
    rope = model.config.rope_parameters
    if rope["rope_type"] == "default":
        return None
    if rope["rope_type"] != "llama3":
        raise ExportError(f"the model's rotary embedding is of type {rope['rope_type']}: {_CONVERTER}")
    dimensions = _head_size(model.config)
    plain = rope["rope_theta"] ** -(np.arange(0, dimensions, 2) / dimensions)
    scaled = model.get_decoder().rotary_emb.inv_freq.double().cpu().numpy()
    factors: NDArray[np.float32] = (plain / scaled).astype(np.float32)
    return factors


def _kept_as(
    name: str, tensor: NDArray[np.float32], wanted: gguf.GGMLQuantizationType, *, tied: bool
) -> gguf.GGMLQuantizationType:
    """How one tensor is kept: vectors whole, and the output layer, with a part in every token, in 8 bits or more."""
    output = name == "output.weight" or (tied and name == "token_embd.weight")
    if tensor.ndim < 2:
        return gguf.GGMLQuantizationType.F32
    if wanted != gguf.GGMLQuantizationType.F16 and tensor.shape[-1] % gguf.GGML_QUANT_SIZES[wanted][0]:
        return gguf.GGMLQuantizationType.F16
    if output and wanted == gguf.GGMLQuantizationType.Q4_0:
        return gguf.GGMLQuantizationType.Q8_0
    return wanted


def _add_shape(writer: gguf.GGUFWriter, shape: Any) -> None:
    if getattr(shape, "use_sliding_window", False):
        raise ExportError(f"the model attends within a sliding window: {_CONVERTER}")
    size = _head_size(shape)
    writer.add_context_length(shape.max_position_embeddings)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_block_count(shape.num_hidden_layers)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_head_count(shape.num_attention_heads)
    writer.add_head_count_kv(shape.num_key_value_heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_layer_norm_rms_eps(shape.rms_norm_eps)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(shape.rope_parameters["rope_theta"])
    writer.add_vocab_size(shape.vocab_size)


def _head_size(shape: Any) -> int:
    return int(getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads)


def _add_tokenizer(
    writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase, split: str, size: int, ends: list[int]
) -> None:
    vocabulary, added = tokenizer.get_vocab(), tokenizer.added_tokens_decoder
    # A model may have more rows than its tokenizer has tokens.
    tokens, kinds = [f"[PAD{n}]" for n in range(size)], [gguf.TokenType.UNUSED] * size
    for token, number in vocabulary.items():
        tokens[number], kinds[number] = token, gguf.TokenType.NORMAL
    for number, token in added.items():
        kinds[number] = gguf.TokenType.CONTROL if token.special else gguf.TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    merges = _parts(tokenizer)["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_eos_token_id(ends[0])
    if len(ends) > 1:
        writer.add_eot_token_id(ends[1])
    if tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(_begins_with_bos(tokenizer))
    writer.add_chat_template(tokenizer.get_chat_template())


def _add_sampling(writer: gguf.GGUFWriter, sampling: Sampling) -> None:
    """What the model was measured with: its own distribution, not cut as llama.cpp's defaults cut it."""
    writer.add_sampling_temp(sampling.temperature)
    writer.add_sampling_top_k(0)
    writer.add_sampling_top_p(1.0)
    writer.add_sampling_min_p(0.0)
    writer.add_sampling_penalty_repeat(1.0)


def _begins_with_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether prompts begin with the token of a beginning, as an engine adds it: not where a chat template, by which
    the model was trained, leaves out what the tokenizer puts before a plain text."""
    if tokenizer.bos_token_id is None or tokenizer.encode("a")[0] != tokenizer.bos_token_id:
        return False
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    return str(prompt).startswith(tokenizer.bos_token)


def _parts(tokenizer: PreTrainedTokenizerBase) -> Mapping[str, Any]:
    """The content of a tokenizer.json."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ExportError(f"GGUF is written for tokenizers that have a tokenizer.json: {_CONVERTER}")
    read: dict[str, Any] = json.loads(backend.to_str())
    return read
