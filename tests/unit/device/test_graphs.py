"""Steps of fixed shape against the growing cache, and what a captured graph does with them."""

from __future__ import annotations

import copy
import gc
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from tests.unit.device.test_architectures import prompts
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

from selfroute.device.base import DeviceConfig, Sampling
from selfroute.device.decode import Decoder, NewSteps
from selfroute.device.graphs import SMALLEST, StaticSteps, has_fixed_shapes
from selfroute.device.growing import GrowingSteps
from selfroute.device.hf import HFEngine
from selfroute.device.prefix import SharedPrompts
from selfroute.errors import DivergenceError
from selfroute.protocol import DecisionPoint, chat
from selfroute.tasks.countdown import Countdown, CountdownConfig
from selfroute.types import Response

PROBLEMS = Countdown(CountdownConfig()).load("test")[:6]


class Tape(TorchDispatchMode):
    """Records the kernels of a step with their tensors, as a CUDA graph does, and runs them again.

    Python does not run again: a length that it knew, a value that it read, a tensor that it made, stay as they were.
    """

    # What capturing forbids: values that Python reads, shapes that depend on values, and copies from the host.
    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "lift_fresh", "is_nonzero", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in self.FORBIDDEN, name
        made = func(*args, **(kwargs or {}))
        self.kernels.append((func, args, kwargs or {}, [x for x in tree_leaves(made) if isinstance(x, Tensor)]))
        return made

    def replay(self) -> None:
        for func, args, kwargs, outputs in self.kernels:
            again = [x for x in tree_leaves(func(*args, **kwargs)) if isinstance(x, Tensor)]
            for old, new in zip(outputs, again, strict=True):
                # Views and what is written in place are in the same memory anyway.
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Taped(StaticSteps):
    """What a GPU does, with a tape in place of its graph."""

    replays = 0

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.captures = True

    def _aside(self) -> Tensor:
        return self._step()

    def _capture(self) -> Any:
        before = [x.clone() for x in self._buffers()]
        with Tape() as tape:
            self._logits_BV = self._step()
        # Capturing runs nothing.
        for buffer, x in zip(self._buffers(), before, strict=True):
            buffer.copy_(x)
        Taped.replays += 1
        return tape

    def _buffers(self) -> list[Tensor]:
        cache = [x for layer in self.cache.layers for x in (layer.keys, layer.values)]
        return [self.slot, self.positions_B1, self.mask_B11L, *cache]


class Untaped(StaticSteps):
    """Launched kernel by kernel, wherever it is."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.captures = False


def generated(
    engine: HFEngine, steps: NewSteps, generate: Callable[[HFEngine], list[list[Response]]]
) -> list[list[Response]]:
    engine.steps = steps
    try:
        return generate(engine)
    finally:
        engine.steps = GrowingSteps


def assert_the_same(engine: HFEngine, generate: Callable[[HFEngine], list[list[Response]]]) -> list[Response]:
    """Replayed steps give the responses of a growing cache, in double precision; they are returned."""
    expected, found = (
        [r for group in generated(engine, steps, generate) for r in group] for steps in (GrowingSteps, Taped)
    )
    assert [r.token_ids for r in found] == [r.token_ids for r in expected]
    for a, b in zip(found, expected, strict=True):
        assert (a.text, a.finished, a.decision_index) == (b.text, b.finished, b.decision_index)
        assert a.score == (None if b.score is None else pytest.approx(b.score, abs=1e-5))
    return expected


def names(rows: int, count: int) -> list[list[str]]:
    return [[f"{p}/{i}" for i in range(count)] for p in range(rows)]


@pytest.fixture(scope="module")
def exact(engine: HFEngine) -> HFEngine:
    """The shipped model in double precision."""
    return HFEngine(copy.deepcopy(engine.model).double(), engine.tokenizer)


@pytest.fixture(scope="module")
def asked(exact: HFEngine) -> list[list[int]]:
    """Prompts of unequal length."""
    return [exact.encode(chat(p.question))[3 * n :] for n, p in enumerate(PROBLEMS)]


def test_every_architecture_decodes_as_with_a_growing_cache(tiny: HFEngine) -> None:
    """42 rows that end at any of 20 tokens, so that the batch shrinks to 21 and each size is captured."""
    assert has_fixed_shapes(tiny.model) == (tiny.model.config.model_type != "gemma3_text")
    if not has_fixed_shapes(tiny.model):
        return
    tiny.end_tokens = frozenset(range(2, 22))
    # Forms that share a token or a prefix, and come up often.
    tiny.points = (DecisionPoint((30,), 31, 32), DecisionPoint((), 40, 41), DecisionPoint((5, 30), 31, 33))
    before = Taped.replays
    for sampling in (
        Sampling(max_tokens=48),
        Sampling(max_tokens=48, decide="threshold", bias=-0.3),
        Sampling(max_tokens=48, forbid_help=True),
    ):
        found = assert_the_same(tiny, lambda e, s=sampling: e.generate(prompts(e), names(3, 14), s))
        assert len({len(r.token_ids) for r in found}) > 10
        assert any(r.finished for r in found)
        assert not sampling.forbid_help or not any(40 in r.token_ids for r in found)
    assert Taped.replays - before >= 6


def test_l_is_noted_at_every_form_of_the_decision_point(exact: HFEngine, asked: list[list[int]]) -> None:
    """In unfinished rows too, in rows that went on after a decision, and never after a row's end."""
    sampling = Sampling(max_tokens=100)
    [[sample]] = exact.generate(asked[:1], [["any"]], sampling)
    often = [token for token, _ in Counter(sample.token_ids).most_common(4)]
    engine = HFEngine(exact.model, exact.tokenizer)
    engine.points = (DecisionPoint((), *often[:2]), DecisionPoint((often[0],), *often[1:3]), *exact.points)
    for steps in (GrowingSteps, StaticSteps, Taped):
        engine.steps = steps
        names = [str(n) for n in range(36)]
        decoder = Decoder(engine, asked, [0, 1, 2, 3, 4, 5] * 6, [[]] * 36, names, [100] * 36, sampling)
        with torch.no_grad():
            responses = decoder.run(None)
        noted = [(row, index) for row, scores in enumerate(decoder.scores) for index in scores]
        assert noted == [
            (row, index)
            for row, r in enumerate(responses)
            for index, token in enumerate(r.token_ids)
            if any(point.ends(r.token_ids[:index]) and token in (point.help, point.answer) for point in engine.points)
        ]
        assert len(noted) > 300


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(max_tokens=160),
        Sampling(max_tokens=100, temperature=0),
        Sampling(max_tokens=100, temperature=0.6, batch_size=33),
        Sampling(max_tokens=100, decide="threshold", bias=1.0),
        Sampling(max_tokens=100, forbid_help=True),
        Sampling(max_tokens=5),
        Sampling(max_tokens=1),
    ],
    ids=str,
)
def test_decisions_and_limits_are_those_of_a_growing_cache(
    exact: HFEngine, asked: list[list[int]], sampling: Sampling
) -> None:
    found = assert_the_same(exact, lambda e: e.generate(asked, names(6, 6), sampling))
    assert (sampling.max_tokens < 10) == (not any(r.finished for r in found))
    if sampling.max_tokens > 10:
        assert sum(r.score is not None for r in found) > 5


def test_rows_that_begin_with_tokens_of_their_own(exact: HFEngine, asked: list[list[int]]) -> None:
    """Unequal starts, one of them none, one as long as the limit, which still gets a token."""
    starts = [[11, 12], [], [13] * 30, [14] * 9, [15] * 29, [16] * 12]
    found = assert_the_same(
        exact,
        lambda e: e.generate(asked, names(6, 6), Sampling(max_tokens=30, forbid_help=True), starts=starts),
    )
    for n, start in enumerate(starts):
        for r in found[6 * n : 6 * n + 6]:
            assert list(r.token_ids[: len(start)]) == start
            assert len(start) < len(r.token_ids) <= max(30, len(start) + 1)


def test_responses_have_limits_of_their_own(exact: HFEngine, asked: list[list[int]]) -> None:
    limits = [[1 + (7 * p + 11 * g) % 40 for g in range(7)] for p in range(6)]
    exact.end_tokens, ends = frozenset({len(exact.tokenizer)}), exact.end_tokens
    try:
        found = assert_the_same(exact, lambda e: e.generate(asked, names(6, 7), Sampling(max_tokens=40), limits=limits))
    finally:
        exact.end_tokens = ends
    assert [len(r.token_ids) for r in found] == [n for group in limits for n in group]


def test_progress_counts_each_response_once(exact: HFEngine, asked: list[list[int]]) -> None:
    for steps in (GrowingSteps, StaticSteps):
        done: list[int] = []
        generated(
            exact, steps, lambda e, d=done: e.generate(asked, names(6, 6), Sampling(max_tokens=60), progress=d.append)
        )
        assert sum(done) == 36
        assert min(done) > 0


def test_what_is_not_a_number_stops(exact: HFEngine, asked: list[list[int]]) -> None:
    broken = HFEngine(copy.deepcopy(exact.model), exact.tokenizer)
    with torch.no_grad():
        broken.model.get_output_embeddings().weight[7] = torch.nan
    for steps in (GrowingSteps, StaticSteps):
        with pytest.raises(DivergenceError):
            generated(broken, steps, lambda e: e.generate(asked, names(6, 1), Sampling(max_tokens=3)))


def test_attention_as_it_is_written_takes_the_same_mask(exact: HFEngine, asked: list[list[int]]) -> None:
    written = HFEngine(copy.deepcopy(exact.model), exact.tokenizer)
    written.model.set_attn_implementation("eager")
    assert has_fixed_shapes(written.model)
    # Of one length: in double precision this attention makes padding into what is not a number.
    even = [prompt[-50:] for prompt in asked]
    assert_the_same(written, lambda e: e.generate(even, names(6, 6), Sampling(max_tokens=40)))


def test_adapters_decode_as_with_a_growing_cache(exact: HFEngine, asked: list[list[int]]) -> None:
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    adapted = HFEngine(peft.get_peft_model(copy.deepcopy(exact.model), settings), exact.tokenizer)
    assert has_fixed_shapes(adapted.model)
    plain = generated(exact, StaticSteps, lambda e: e.generate(asked, names(6, 6), Sampling(max_tokens=40)))
    found = assert_the_same(adapted, lambda e: e.generate(asked, names(6, 6), Sampling(max_tokens=40)))
    assert [r.token_ids for r in found] != [r.token_ids for group in plain for r in group]


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("qwen2", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
        ("mistral", {"sliding_window": 24}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}),
        ("gemma2", {}),
        ("mamba", {}),
        ("gpt2", {"n_embd": 32, "n_head": 4}),
    ],
)
def test_which_models_have_fixed_shapes(kind: str, settings: dict[str, Any]) -> None:
    shape = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 99,
    }  # fmt: skip
    config = AutoConfig.for_model(kind, **({} if kind == "gpt2" else shape), **settings)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert has_fixed_shapes(model) == (kind == "gpt2")


def test_kernels_that_take_lengths_and_quantized_weights_have_none(exact: HFEngine) -> None:
    for name, value in (("_attn_implementation", "flash_attention_2"), ("quantization_config", {"bits": 4})):
        model = copy.deepcopy(exact.model)
        assert has_fixed_shapes(model)
        setattr(model.config, name, value)
        assert not has_fixed_shapes(model)


def test_at_most_half_of_the_rows_that_run_are_over(exact: HFEngine, asked: list[list[int]]) -> None:
    with torch.no_grad():
        shared = SharedPrompts(exact.model, asked, exact.pad)
        steps = StaticSteps(exact.model, shared, torch.tensor([0]), 8)
    for rows in range(1, 300):
        for live in range(1, rows + 1):
            steps.rows = rows
            size = steps.fit(live)
            assert live <= size <= rows
            assert size <= SMALLEST or size < 2 * live


def test_every_address_stays_as_rows_leave(exact: HFEngine, asked: list[list[int]]) -> None:
    """A graph reads and writes where its buffers were when it was captured."""
    with torch.no_grad():
        shared = SharedPrompts(exact.model, asked, exact.pad)
        steps = StaticSteps(exact.model, shared, torch.arange(6).repeat(7), 8)

        def addresses() -> list[int]:
            cache = [x for layer in steps.cache.layers for x in (layer.keys, layer.values)]
            buffers = [steps.ids_B1, steps.positions_B1, steps.mask_B11L, steps.slot, *cache]
            return [x.data_ptr() for x in buffers]

        first = addresses()
        steps.logits(torch.arange(42))
        assert addresses() == first
        steps.keep(torch.tensor([41, 3, 5, 20]))
        assert len(steps.logits(torch.arange(4))) == 4
        assert addresses() == first


def test_nothing_outlives_a_call(exact: HFEngine, asked: list[list[int]]) -> None:
    """The update needs the memory: nothing waits for the garbage collector."""
    made: list[weakref.ref[StaticSteps]] = []

    def steps(*args: Any) -> StaticSteps:
        made.append(weakref.ref(new := Taped(*args)))
        return new

    gc.collect()
    gc.disable()
    try:
        generated(exact, steps, lambda e: e.generate(asked, names(6, 6), Sampling(max_tokens=8, batch_size=20)))
        assert [ref() for ref in made] == [None, None]
    finally:
        gc.enable()


@pytest.mark.parametrize("in_place", [True, False])
def test_weights_that_moved_are_seen_by_the_next_call(exact: HFEngine, asked: list[list[int]], in_place: bool) -> None:
    """As an optimizer moves them, in place, and as loading may, into other memory."""
    moved = HFEngine(copy.deepcopy(exact.model), exact.tokenizer)
    sampling = Sampling(max_tokens=40)
    before = generated(moved, Taped, lambda e: e.generate(asked, names(6, 6), sampling))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in moved.model.parameters():
            other = p * (1 + 0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
            if in_place:
                p.copy_(other)
            else:
                p.data = other
    after = assert_the_same(moved, lambda e: e.generate(asked, names(6, 6), sampling))
    assert [r.token_ids for r in after] != [r.token_ids for group in before for r in group]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_captured_graph_gives_what_its_kernels_give(dtype: str) -> None:
    captured = HFEngine.load(DeviceConfig(model="countdown-1m", device="cuda", dtype=dtype))
    assert captured.steps is StaticSteps
    asked = [captured.encode(chat(p.question))[3 * n :] for n, p in enumerate(PROBLEMS)]

    def generate(engine: HFEngine) -> list[list[Response]]:
        return engine.generate(asked, names(6, 20), Sampling(max_tokens=160))

    first = generate(captured)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    held = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    assert generate(captured) == first
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == held
    assert generated(captured, Untaped, generate) == first
    # Another cache rounds otherwise, so that a few responses part.
    growing = generated(captured, GrowingSteps, generate)
    same = [a.token_ids == b.token_ids for x, y in zip(growing, first, strict=True) for a, b in zip(x, y, strict=True)]
    assert sum(same) > (0.9 if dtype == "float32" else 0.2) * len(same)
