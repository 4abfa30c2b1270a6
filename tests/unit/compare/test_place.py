from __future__ import annotations

from pathlib import Path

import pytest
from tests.unit.compare.test_results import OURS as RECORDS
from tests.unit.compare.test_results import write
from tests.unit.compare.test_run import config

from selfroute.compare import place
from selfroute.compare.methods import OURS
from selfroute.compare.place import Place


def test_what_is_left_is_told_by_work_not_by_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(place.time, "monotonic", lambda: now[0])
    bed = tmp_path / "bed"
    write(bed, "device_only", 0, RECORDS)
    # Work: ours 2 (two rates) and 1, Task-Tuning the same, the probe 0.1 a seed, the bound of seed 1 0.03.
    matrix = config(["device_only", OURS, "task_tuning", "probe"], seeds=[0, 1], lrs=[1e-4, 2e-4])
    told = Place(matrix, bed)
    assert str(told) == "row 2 of 8"
    assert told.left == 7
    now[0] = 20 * 60.0
    write(bed, OURS, 0, RECORDS)
    # 2 of 6.23 in 20 minutes.
    assert str(told) == "row 3 of 8, 20 min, about 42 left"
    now[0] = 41 * 60.0
    write(bed, "task_tuning", 0, RECORDS)
    write(bed, "probe", 0, RECORDS)
    # 2.13 of 6.23 are left: ours and Task-Tuning with seed 1, its probe and the bound.
    assert str(told) == "row 5 of 8, 41 min, about 21 left"
