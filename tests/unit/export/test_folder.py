"""A run's model as a folder: merged, checked, with a card that says what the run says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.checkpoints import engine_of
from tests.commands import selfroute
from tests.exported import CHECKPOINT, run_of_the_shipped_model
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from selfroute import api
from selfroute.device.base import DeviceConfig, LoRA, Sampling
from selfroute.device.hf import SAME_DAY, HFEngine
from selfroute.errors import ExportError
from selfroute.export.card import card, described, measured
from selfroute.export.folder import as_trained, check_tags, export, sampling_defaults
from selfroute.protocol import HELP_CALL, INSTRUCTION, chat
from selfroute.records import read_json, write_json, write_records
from selfroute.train.warmstart import train_tokenizer


def test_the_folder_answers_as_the_checkpoint_does(run_dir: Path, engine: HFEngine) -> None:
    run_of_the_shipped_model(run_dir)
    said = selfroute("export", run_dir, "--to", "hf")
    folder = run_dir / "exports" / f"{CHECKPOINT}-hf"
    assert f"exported: {folder}" in said
    again = HFEngine.load(DeviceConfig(model=str(folder)))
    prompt = [engine.encode(chat("Use each of the numbers 2, 3, 7 exactly once to make 13."))]
    assert again.encode(chat("hi")) == engine.encode(chat("hi"))
    sampling = Sampling(max_tokens=40)
    assert again.generate(prompt, [["a"]], sampling) == engine.generate(prompt, [["a"]], sampling)
    # What loads it without selfroute draws as it was measured.
    settings = AutoModelForCausalLM.from_pretrained(folder).generation_config
    assert (settings.do_sample, settings.temperature, settings.top_k, settings.top_p) == (True, 1.0, 0, 1.0)
    assert settings.max_new_tokens == 160
    # A server may run as another user.
    assert len({file.stat().st_mode for file in folder.iterdir() if file.suffix in (".safetensors", ".json")}) == 1


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_nothing_cuts_what_was_measured(temperature: float) -> None:
    """Base models come with cuts of their own, which engines take for the model's defaults."""
    engine = engine_of("qwen2")
    sampling = Sampling(temperature=temperature, max_tokens=40)
    made = sampling_defaults(engine.model, engine.tokenizer, sampling)
    ends = [engine.tokenizer.eos_token_id, *(engine.end_tokens - {engine.tokenizer.eos_token_id})]
    assert (made.eos_token_id, made.pad_token_id, made.max_new_tokens) == (ends, engine.tokenizer.pad_token_id, 40)
    drawn = (True, 0.7, 1.0, 0) if temperature else (False, None, None, None)
    assert (made.do_sample, made.temperature, made.top_p, made.top_k) == drawn
    assert made.to_diff_dict().keys() <= {
        *("bos_token_id", "eos_token_id", "pad_token_id", "max_new_tokens", "transformers_version"),
        *("do_sample", "temperature", "top_p", "top_k"),
    }


def test_a_greedy_folder_is_greedy_to_every_engine(run_dir: Path) -> None:
    run_of_the_shipped_model(run_dir, evaluation={"temperature": 0.0})
    # As a base model might come.
    defaults = run_dir / "checkpoints" / CHECKPOINT / "generation_config.json"
    write_json(defaults, {**read_json(defaults), "min_p": 0.15, "typical_p": 0.9, "no_repeat_ngram_size": 3})
    selfroute("export", run_dir, "--to", "hf")
    folder = run_dir / "exports" / f"{CHECKPOINT}-hf"
    written = read_json(folder / "generation_config.json")
    assert (written["temperature"], written.get("do_sample", False)) == (0.0, False)
    assert not written.keys() & {"min_p", "typical_p", "no_repeat_ngram_size"}
    assert AutoModelForCausalLM.from_pretrained(folder).generation_config.do_sample is not True


def test_an_adapter_is_merged(run_dir: Path, tmp_path: Path) -> None:
    run_of_the_shipped_model(run_dir)
    device = DeviceConfig(lora=LoRA(rank=2))
    adapted = HFEngine.load(device)
    with torch.no_grad():
        for name, weight in adapted.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.05, generator=torch.Generator().manual_seed(0))
    checkpoint = run_dir / "checkpoints" / "step-000002"
    adapted.model.save_pretrained(checkpoint)
    adapted.tokenizer.save_pretrained(checkpoint)
    settings = api.run_config(run_dir).model_copy(update={"device": device}).model_dump(mode="json")
    folder = export(run_dir, checkpoint.name, settings, to="hf", out=tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor([adapted.encode(chat("hi"))])
    with torch.no_grad():
        expected = adapted.model(ids).logits
        assert torch.allclose(merged(ids).logits, expected, atol=1e-3)
        assert not torch.allclose(HFEngine.load(DeviceConfig()).model(ids).logits, expected, atol=1e-1)
    assert not (folder / "adapter_config.json").exists()


def test_a_folder_in_use_is_left_alone(run_dir: Path, tmp_path: Path) -> None:
    run_of_the_shipped_model(run_dir)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(ExportError, match="give another --out"):
        api.export(run_dir, out=tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_a_failed_export_leaves_nothing_behind(run_dir: Path, tmp_path: Path) -> None:
    run_of_the_shipped_model(run_dir)
    checkpoint = run_dir / "checkpoints" / CHECKPOINT
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.save_pretrained(checkpoint)
    with pytest.raises(ExportError, match=r"convert_hf_to_gguf\.py"):
        api.export(run_dir, "gguf", out=tmp_path / "out" / "f16")
    assert not list((tmp_path / "out").iterdir())


def test_tags_may_be_added_tokens_if_they_are_not_special() -> None:
    tokenizer = train_tokenizer()
    tokenizer.add_tokens(["<answer>"])
    check_tags(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["</answer>"]})
    with pytest.raises(ExportError, match="'</answer>' as a special token"):
        check_tags(tokenizer)


def test_a_template_makes_the_prompts_of_the_training() -> None:
    assert as_trained("{{ messages }}", thinking=True) == "{{ messages }}"
    dated = as_trained("{{ strftime_now('%d') }}{{ enable_thinking }}", thinking=False)
    assert dated.startswith(SAME_DAY)
    tokenizer = train_tokenizer()
    assert tokenizer.apply_chat_template(chat("hi"), chat_template=dated, tokenize=False) == "26 Jul 2024False"


def test_the_card_says_what_the_run_says(run_dir: Path) -> None:
    run_of_the_shipped_model(run_dir, budget=0.25, task={"name": "countdown", "number_max": 15})
    rows = [
        {"problem": str(n), "correct": n < 3, "route": "cloud" if n == 0 else "device", "device_correct": n < 2}
        for n in range(4)
    ]
    for name, checkpoint in (("budget-0.25", CHECKPOINT), ("after@demo-q4_0", CHECKPOINT), ("after", "step-000000")):
        write_records(run_dir / "evaluations" / name / "records.jsonl", rows)
        write_json(run_dir / "evaluations" / name / "evaluation.json", {"checkpoint": checkpoint, "sampling": {}})
    numbers = ["75.0 [30.1, 95.4]", "25.0 [4.6, 69.9]", "50.0 [15.0, 85.0]"]
    assert measured(run_dir, CHECKPOINT, best=False) == [
        ("selfroute evaluate run --engine URL (demo-q4_0)", numbers),
        ("selfroute evaluate run --budget 0.25", numbers),
    ]
    said = (api.export(run_dir) / "README.md").read_text()
    for part in ("countdown-1m", INSTRUCTION, HELP_CALL, "alpha_c = 0.25", "0.25 of the problems", *numbers):
        assert part in said
    assert "| data | countdown (number_max=15) |" in said
    assert "| cloud | oracle |" in said


def test_the_card_writes_settings_as_a_config_does(run_dir: Path) -> None:
    values = {"path": "units.jsonl", "columns": {"question": "ask", "answer": "a|b"}, "verifier": "exact"}
    cloud = {"name": "openai", "base_url": "https://host/v1", "model": "gpt-4.1"}
    run_of_the_shipped_model(run_dir, task={"name": "custom", **values}, cloud=cloud)
    settings = read_json(run_dir / "run.json")["config"]
    said = card(run_dir, CHECKPOINT, settings, "mine", file="", best=False)
    assert "| cloud | openai, `gpt-4.1` |" in said
    [data] = [line for line in said.splitlines() if line.startswith("| data |")]
    assert data.startswith('| data | custom (path="units.jsonl", columns.question="ask", columns.answer="a\\|b"')
    assert not any(word in data for word in ("None", "False", "{"))
    # A class of the user's own that is not at hand.
    assert described({"name": "gone.module:Own", "path": "x"}) == 'gone.module:Own (path="x")'
