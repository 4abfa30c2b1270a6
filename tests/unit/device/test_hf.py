from __future__ import annotations

import copy
import json
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.checkpoints import engine_of
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from selfroute.device.base import DeviceConfig, Sampling
from selfroute.device.hf import HFEngine
from selfroute.device.prefix import SharedPrompts, pack
from selfroute.errors import ContextError, DeviceError, RejectedError
from selfroute.protocol import HELP_CALL, chat, parse
from selfroute.tasks.countdown import Countdown, CountdownConfig
from selfroute.train.warmstart import train_tokenizer
from selfroute.types import Answer, HelpCall

PROBLEMS = Countdown(CountdownConfig()).load("test")[:6]


def prompts(engine: HFEngine) -> list[list[int]]:
    return [engine.encode(chat(p.question)) for p in PROBLEMS]


def names(count: int = 1) -> list[list[str]]:
    return [[f"{p.id}/{i}" for i in range(count)] for p in PROBLEMS]


def double(engine: HFEngine) -> HFEngine:
    return HFEngine(copy.deepcopy(engine.model).double(), engine.tokenizer)


def tiny(kind: str) -> HFEngine:
    """A random model of another architecture, in float64."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer()
    shape = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model = LlamaForCausalLM(LlamaConfig(**shape)) if kind == "llama" else Qwen2ForCausalLM(Qwen2Config(**shape))
    return HFEngine(model.double().eval(), tokenizer)


def test_greedy_decoding_is_the_librarys(engine: HFEngine) -> None:
    groups = engine.generate(prompts(engine), names(), Sampling(temperature=0, max_tokens=80))
    for prompt, [response] in zip(prompts(engine), groups, strict=True):
        expected = engine.model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=80, do_sample=False
        )
        assert list(response.token_ids) == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_prompts_of_unequal_length_decode_as_the_librarys(kind: str) -> None:
    engine = tiny(kind)
    unequal = [p[: 10 + 7 * n] for n, p in enumerate(prompts(engine))]
    groups = engine.generate(unequal, names(), Sampling(temperature=0, max_tokens=24))
    for prompt, [response] in zip(unequal, groups, strict=True):
        expected = engine.model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=24, do_sample=False
        )
        assert list(response.token_ids) == expected[0, len(prompt) :].tolist()


def test_a_response_does_not_depend_on_its_batch_mates(engine: HFEngine) -> None:
    exact, sampling = double(engine), Sampling(max_tokens=100)
    together = exact.generate(prompts(engine), names(4), sampling)
    for n, prompt in enumerate(prompts(engine)):
        [alone] = exact.generate([prompt], [names(4)[n]], sampling)
        assert [r.token_ids for r in alone] == [r.token_ids for r in together[n]]
    in_pieces = exact.generate(prompts(engine), names(4), sampling.model_copy(update={"batch_size": 5}))
    assert [[r.token_ids for r in g] for g in in_pieces] == [[r.token_ids for r in g] for g in together]


def test_sampling_follows_the_models_distribution(engine: HFEngine) -> None:
    prompt = prompts(engine)[0]
    count = 4000
    [group] = engine.generate([prompt], [[f"s{i}" for i in range(count)]], Sampling(max_tokens=3))
    with torch.no_grad():
        start = [*prompt, *group[0].token_ids[:2]]
        same = [r for r in group if r.token_ids[:2] == group[0].token_ids[:2]]
        expected = torch.softmax(engine.model(torch.tensor([start])).logits[0, -1].double(), 0)
    counts = torch.bincount(torch.tensor([r.token_ids[2] for r in same]), minlength=len(expected)) / len(same)
    assert len(same) > 0.9 * count
    assert (counts - expected).abs().max() < 5 * (0.25 / len(same)) ** 0.5


def test_scores_are_the_log_odds_at_the_decision_point(engine: HFEngine) -> None:
    groups = engine.generate(prompts(engine), names(4), Sampling(max_tokens=160))
    checked = 0
    for prompt, group in zip(prompts(engine), groups, strict=True):
        for r in group:
            if not r.finished:
                assert r.score is None
                continue
            assert r.score is not None
            assert r.decision_index is not None
            with torch.no_grad():
                logits = engine.model(torch.tensor([[*prompt, *r.token_ids[: r.decision_index]]])).logits[0, -1]
            [point] = engine.points
            assert r.score == pytest.approx((logits[point.help] - logits[point.answer]).item(), abs=1e-3)
            assert (r.token_ids[r.decision_index] == point.help) == isinstance(parse(r.text), HelpCall)
            checked += 1
    assert checked > 15


def test_the_dial_turns_the_decision_and_nothing_before_it(engine: HFEngine) -> None:
    free = engine.generate(prompts(engine), names(4), Sampling(max_tokens=160))
    for bias, kind in ((50.0, HelpCall), (-50.0, Answer)):
        turned = engine.generate(prompts(engine), names(4), Sampling(max_tokens=160, decide="threshold", bias=bias))
        for a, b in zip(chain(*free), chain(*turned), strict=True):
            if a.finished:
                assert isinstance(parse(b.text), kind)
                assert b.token_ids[: a.decision_index] == a.token_ids[: a.decision_index]
                assert b.score == pytest.approx(a.score, abs=1e-3)


def test_help_can_be_forbidden_from_a_given_prefix_on(engine: HFEngine) -> None:
    exact = double(engine)
    asking = Sampling(max_tokens=160, decide="threshold", bias=50.0)
    groups = exact.generate(prompts(engine), names(2), asking)
    forbidden = Sampling(max_tokens=160, forbid_help=True)
    own = exact.generate(prompts(engine), names(2), forbidden)
    asked = [(n, g, r) for n, group in enumerate(groups) for g, r in enumerate(group) if r.finished]
    continued = exact.generate(
        [prompts(engine)[n] for n, _, _ in asked],
        [[names(2)[n][g]] for n, g, _ in asked],
        forbidden,
        starts=[r.token_ids[: r.decision_index] for _, _, r in asked],
    )
    assert len(asked) > 8
    for (n, g, r), [local] in zip(asked, continued, strict=True):
        assert isinstance(parse(r.text), HelpCall)
        assert isinstance(parse(local.text), Answer)
        # The same stream gives the same local answer as never having been allowed to ask.
        assert local.token_ids == own[n][g].token_ids


def test_the_token_limit_cuts(engine: HFEngine) -> None:
    done: list[int] = []
    groups = engine.generate(prompts(engine), names(2), Sampling(max_tokens=5), progress=done.append)
    assert all(len(r.token_ids) == 5 and not r.finished for group in groups for r in group)
    assert sum(done) == 12


def test_a_response_may_have_a_limit_of_its_own(engine: HFEngine) -> None:
    prompts = [engine.encode(chat(text)) for text in ("1 + 1", "2 + 2")]
    streams = [["a", "b"], ["c", "d"]]
    [[a, b], [c, d]] = engine.generate(prompts, streams, Sampling(max_tokens=30), limits=[[4, 30], [30, 3]])
    [[whole, same], [other, long]] = engine.generate(prompts, streams, Sampling(max_tokens=30))
    assert min(len(whole.token_ids), len(long.token_ids)) > 4
    assert (a.token_ids, a.finished) == (whole.token_ids[:4], False)
    assert (d.token_ids, d.finished) == (long.token_ids[:3], False)
    assert (b, c) == (same, other)


def test_shared_prompts_give_the_plain_gradient(engine: HFEngine) -> None:
    exact = double(engine)
    model, ids = exact.model, [p[: len(p) - 3 * n] for n, p in enumerate(prompts(engine)[:3])]
    rows = [(0, [5, 6, 7, 8]), (2, [9, 10]), (0, [11]), (1, [12, 13, 14])]

    def gradient() -> list[torch.Tensor]:
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    model.zero_grad()
    for owner, row in rows:
        logits = model(torch.tensor([[*ids[owner], *row]])).logits[0, len(ids[owner]) - 1 : -1]
        torch.nn.functional.cross_entropy(logits, torch.tensor(row), reduction="sum").backward()
    plain = gradient()
    model.zero_grad()
    shared = SharedPrompts(model, ids, exact.pad)
    for part in pack([row for _, row in rows], 6):
        logits, targets, mask = shared.logits([rows[i][0] for i in part], [rows[i][1] for i in part])
        torch.nn.functional.cross_entropy(logits[mask], targets[mask], reduction="sum").backward()
    shared.backward()
    for a, b in zip(plain, gradient(), strict=True):
        # The architecture's norms compute in float32, whatever the weights.
        assert (a - b).norm() <= 1e-5 * a.norm()


def test_packing_bounds_the_padded_size() -> None:
    rows = [[0] * n for n in (9, 1, 4, 4, 30, 2)]
    parts = list(pack(rows, 12))
    assert sorted(i for part in parts for i in part) == list(range(6))
    for part in parts:
        assert len(part) == 1 or len(part) * max(len(rows[i]) for i in part) <= 12


def test_a_missing_model_names_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="countdown-1m"):
        HFEngine.load(DeviceConfig(model=str(tmp_path)))
    for folder in (str(tmp_path / "none"), "runs/none/checkpoints/step-000200"):
        with pytest.raises(DeviceError, match="no such folder"):
            HFEngine.load(DeviceConfig(model=folder))
    saved = tmp_path / "run" / "checkpoints" / "step-000002"
    saved.mkdir(parents=True)
    (saved / "state.json").touch()
    with pytest.raises(DeviceError, match=f"it is a run; its newest checkpoint is {saved}"):
        HFEngine.load(DeviceConfig(model=str(tmp_path / "run")))
    for misspelt in ("countdown1m", "countdwn-1m"):
        with pytest.raises(DeviceError, match=r"did you mean countdown-1m\?"):
            HFEngine.load(DeviceConfig(model=misspelt))
    # Tests run without a network.
    with pytest.raises(DeviceError, match="run `hf download no/such --local-dir FOLDER`, and give that folder"):
        HFEngine.load(DeviceConfig(model="no/such"))


@pytest.mark.parametrize("name", ["a", "ab", "abc", "abcd"])
def test_weights_lie_as_torch_lays_them(engine: HFEngine, tmp_path: Path, name: str) -> None:
    """Wherever they lie in the file: matrix products round otherwise on unaligned memory."""
    engine.model.save_pretrained(tmp_path)
    engine.tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    # What a file says of itself shifts its weights.
    save_file(load_file(file), file, metadata={"format": "pt", "x": name * 8})
    loaded = HFEngine.load(DeviceConfig(model=str(tmp_path)))
    assert all(weight.data_ptr() % 64 == 0 for weight in loaded.model.parameters())


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_a_device_that_is_not_there_is_refused() -> None:
    assert HFEngine.load(DeviceConfig()).model.device.type in ("cpu", "mps")
    with pytest.raises(DeviceError, match="no cuda device here"):
        HFEngine.load(DeviceConfig(device="cuda"))


def test_a_model_without_a_chat_template_is_refused(engine: HFEngine) -> None:
    tokenizer = copy.deepcopy(engine.tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(DeviceError, match="no chat template"):
        HFEngine(engine.model, tokenizer)
    tokenizer.chat_template = "{{ raise_exception('Nothing is supported') }}"
    with pytest.raises(DeviceError, match="chat template refuses the prompt: Nothing is supported"):
        HFEngine(engine.model, tokenizer).encode(chat("1 + 1"))


def with_template(engine: HFEngine, template: str, *, thinking: bool = False) -> HFEngine:
    tokenizer = copy.deepcopy(engine.tokenizer)
    tokenizer.chat_template = template
    return HFEngine(engine.model, tokenizer, thinking=thinking)


def test_a_template_without_a_system_message_gets_it_in_the_users(engine: HFEngine) -> None:
    refuses = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}[model]"
    )
    made = with_template(engine, refuses)
    system, user = (m["content"] for m in chat("1 + 1"))
    assert made.decode(made.encode(chat("1 + 1"))) == f"[user]{system}\n\n{user}[model]"


def test_a_template_that_drops_the_system_message_gets_it_in_the_users(engine: HFEngine) -> None:
    drops = "{% for m in messages if m['role'] != 'system' %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}[model]"
    made = with_template(engine, drops)
    system, user = (m["content"] for m in chat("1 + 1"))
    assert made.decode(made.encode(chat("1 + 1"))) == f"[user]{system}\n\n{user}[model]"
    assert made.decode(made.encode(chat("1 + 1")[1:])) == f"[user]{user}[model]"


def test_an_end_token_that_is_not_marked_is_no_text(engine: HFEngine) -> None:
    backend = json.loads(engine.tokenizer.backend_tokenizer.to_str())
    for token in backend["added_tokens"]:
        token["special"] = token["special"] and token["content"] != "<|im_end|>"
    unmarked = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(backend)),
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        chat_template=engine.tokenizer.chat_template,
    )
    ids = unmarked.encode(f"So\n{HELP_CALL}<|im_end|>", add_special_tokens=False)
    assert unmarked.decode(ids, skip_special_tokens=True).endswith("<|im_end|>")
    made = HFEngine(engine.model, unmarked)
    assert made.decode(ids) == f"So\n{HELP_CALL}"
    # The tokenizer's own end token ends a response too, though the model's list has another.
    assert made.end_tokens == {ids[-1], unmarked.eos_token_id}


def test_layers_with_a_state_of_their_own_are_refused() -> None:
    engine = engine_of("qwen2")
    engine.model.config.layer_types = ["linear_attention", "full_attention", "full_attention"]
    with pytest.raises(DeviceError, match="layers that keep a state"):
        HFEngine(engine.model, engine.tokenizer)


@pytest.mark.parametrize("kind", ["rwkv", "xlstm"])
def test_a_state_outside_the_cache_is_refused(kind: str) -> None:
    engine = engine_of("qwen2")
    engine.model.config.model_type = kind
    with pytest.raises(DeviceError, match=f"a {kind} model has layers that keep a state"):
        HFEngine(engine.model, engine.tokenizer)


def test_what_does_not_fit_the_context_is_refused(engine: HFEngine) -> None:
    with pytest.raises(ContextError, match="a prompt of 1000 tokens, with up to 25 of the response"):
        engine.generate([[5] * 1000], [["a"]], Sampling(max_tokens=25))


def saved(engine: HFEngine, folder: Path, tokenizer: bool = True) -> DeviceConfig:
    engine.model.save_pretrained(folder)
    if tokenizer:
        engine.tokenizer.save_pretrained(folder)
    return DeviceConfig(model=str(folder))


def test_a_folder_without_a_tokenizer_is_named(engine: HFEngine, tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="the folder has no tokenizer"):
        HFEngine.load(saved(engine, tmp_path, tokenizer=False))


def test_a_token_that_the_model_lacks_is_refused_where_it_is_used(tmp_path: Path) -> None:
    """Gemma 3 1B's tokenizer has one for images, which the model of texts has no row for."""
    engine = engine_of("qwen2")
    engine.tokenizer = copy.deepcopy(engine.tokenizer)
    engine.tokenizer.add_tokens(["<one more>"])
    loaded = HFEngine.load(saved(engine, tmp_path))
    assert loaded.encode(chat("1 + 1"))
    with pytest.raises(RejectedError, match="the prompt has the token '<one more>', for which the model has no row"):
        loaded.encode(chat("a <one more>"))


@pytest.mark.parametrize(
    ("rope", "context"),
    [({}, 512), ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}, 2048),
     ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512)],
)  # fmt: skip
def test_a_stretched_context_counts(rope: dict[str, Any], context: int) -> None:
    engine = engine_of("qwen2")
    engine.model.config.rope_parameters = {**engine.model.config.rope_parameters, **rope}
    assert HFEngine(engine.model, engine.tokenizer).context == context


def test_weights_of_another_shape_are_an_error_of_the_device(tmp_path: Path) -> None:
    config = saved(engine_of("qwen2"), tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "intermediate_size": 192}))
    with pytest.raises(DeviceError, match="cannot load the device model"):
        HFEngine.load(config)


@pytest.mark.parametrize("settings", [{"forbid_help": True}, {"decide": "threshold", "bias": 100.0}])
def test_nothing_is_decided_in_the_models_own_thinking(engine: HFEngine, settings: dict[str, Any]) -> None:
    """It writes what it would without the dial; behind its thinking the dial has its way."""
    prompt = engine.encode(chat("1 + 1"))

    def begun(text: str, **changed: Any) -> str:
        start = engine.tokenizer.encode(text, add_special_tokens=False)
        sampling = Sampling(temperature=0, max_tokens=len(start) + 1, **changed)
        [[response]] = engine.generate([prompt], [["a"]], sampling, starts=[start])
        return response.text

    thinking = "<think>\nThe format is\n<"
    assert begun(thinking, **settings) == begun(thinking)
    led = "<answer" if "forbid_help" in settings else "<unknown"
    for outside in ("So\n<", "<think>\nSo\n</think>\n<", "So I <think>\n<"):
        assert led.startswith(begun(outside, **settings)[outside.rindex("<") :][:4])


def test_a_template_that_can_think_is_told_whether_to(engine: HFEngine) -> None:
    template = "{{ messages | map(attribute='content') | join('|') }}{% if enable_thinking is false %}<none>{% endif %}"
    silent, loud = (with_template(engine, template, thinking=thinking) for thinking in (False, True))
    said = "|".join(m["content"] for m in chat("1 + 1"))
    assert silent.decode(silent.encode(chat("1 + 1"))) == f"{said}<none>"
    assert loud.decode(loud.encode(chat("1 + 1"))) == said
