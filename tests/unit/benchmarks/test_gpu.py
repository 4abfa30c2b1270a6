"""The GPU benchmark's formulas, by hand and against what the update does."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(Path(__file__).parents[3] / "benchmarks")
    return importlib.import_module("gpu")


def test_the_work_is_a_step_of_qwens_shape(gpu: ModuleType) -> None:
    work = gpu.Work()
    assert (work.rows, work.prompt_tokens, work.max_tokens) == (256, 256, 720)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(work.config)
    assert sum(p.numel() for p in model.parameters()) == 1_543_714_304
    small = sum(p.numel() for p in model.parameters() if p.ndim == 1)
    assert work.layer_weights + work.vocabulary * work.width + small == 1_543_714_304


def test_decoding_reads_the_weights_once_a_token_and_each_rows_own_cache(gpu: ModuleType) -> None:
    work = gpu.Work(
        problems=1, responses=3, prompt_tokens=10, max_tokens=2, vocabulary=7, width=8, inner=5, layers=1, heads=4,
        kv_heads=2,
    )  # fmt: skip
    # q, o: 8 x 8; k, v: 8 x 4; three of 8 x 5; the output layer, 7 x 8.
    assert work.layer_weights == 2 * 64 + 2 * 32 + 3 * 40 == 312
    # Keys and values of 4 numbers a position; 10 and 11 positions in 3 rows.
    assert gpu.decoding_bytes(work, 2) == 2 * (2 * (312 + 56) + 3 * 8 * (10 + 11)) == 2480
    # 5.5 TB at the shape that is measured, or 1.6 s on an H100.
    assert gpu.decoding_bytes(gpu.Work(), 2) == pytest.approx(5.475e12, rel=1e-3)


def test_the_updates_arithmetic_is_what_the_update_does(gpu: ModuleType) -> None:
    """Counted by torch. What differs is known: kernels compute the masked half of attention too, and the backward pass
    leaves out what the prompts' last layer has beyond keys and values, which the prompts here are too short to show."""
    work = replace(gpu.TINY, prompt_tokens=2, max_tokens=60, layers=6, micro_batch_tokens=10_000)
    engine = gpu.make_engine(work, "cpu")
    engine.model.set_attn_implementation("eager")
    update = gpu.sides(engine, work)["update"]
    with FlopCounterMode(display=False) as counter:
        update()
    masked = 12 * work.layers * work.width * (work.max_tokens - 1) / 2 * work.rows * work.max_tokens
    assert counter.get_total_flops() == pytest.approx(gpu.update_flops(work) + masked, rel=0.02)


def test_shares_are_of_the_limits(gpu: ModuleType) -> None:
    work = gpu.Work()
    seconds = {"graphs": [2.0, 4.0], "growing": [20.0, 10.0], "update": [5.0]}
    peaks = {"graphs": 40.0, "growing": 40.5, "update": 60.0}
    found = gpu.summary(work, seconds, peaks, 3.35, 989)
    share = found["sampling"]["graphs"]["share_of_bandwidth"]
    assert share["max"] == pytest.approx(5.475 / 3.35 / 2, rel=1e-3)
    assert share["min"] == pytest.approx(share["max"] / 2)
    assert found["sampling"]["growing"]["tokens_per_s"]["max"] == 256 * 720 / 10
    assert found["speedup_by_graphs"] == {"median": 6.25, "min": 2.5, "max": 10.0}
    assert found["update"]["model_flops_utilisation"]["median"] == pytest.approx(gpu.update_flops(work) / 5 / 989e12)
    rows = gpu.table(found).splitlines()
    assert len(rows) == 5
    assert "| sampling, captured graphs | 3.00 [2.00, 4.00] |" in rows[2]
    assert rows[4].endswith("| 60.0 |")


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("NVIDIA H100 80GB HBM3", (3.35, 989)),
        ("NVIDIA H100 PCIe", (2.0, 756)),
        ("NVIDIA H200", (4.8, 989)),
        ("NVIDIA A100-SXM4-80GB", (2.04, 312)),
        ("NVIDIA L40S", (0.864, 362)),
        ("NVIDIA L4", (0.3, 121)),
        ("NVIDIA GeForce RTX 4090", (1.01, 165)),
        ("Another", (None, None)),
    ],
)
def test_limits_go_by_the_gpus_name(gpu: ModuleType, name: str, found: tuple[float | None, float | None]) -> None:
    assert gpu.limits(name) == found
