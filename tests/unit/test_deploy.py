"""The files in deploy/, as far as they can be checked without a cluster, Docker or a running systemd."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from selfroute.config import validate
from selfroute.serve.config import GatewayConfig
from selfroute.serve.workers import CLOSING_S

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
MANIFESTS: list[Any] = list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text()))


def manifest(kind: str) -> Any:
    (found,) = [m for m in MANIFESTS if m["kind"] == kind]
    return found


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda m: m["kind"])
def test_kubernetes_knows_every_field(manifest: Any) -> None:
    kubernetes_validate.validate(manifest, "1.34", strict=True)


def test_the_pods_run_the_config_that_stands_beside_them() -> None:
    config = validate(GatewayConfig, tomllib.loads(manifest("ConfigMap")["data"]["gateway.toml"]), "gateway.toml")
    spec = manifest("Deployment")["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    (port,) = container["ports"]
    assert port["containerPort"] == config.port
    assert config.keys
    assert config.store.startswith("postgresql://")
    # What is under way ends before the pod is killed.
    pre_stop_s = float(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert spec["terminationGracePeriodSeconds"] >= pre_stop_s + config.drain_s + CLOSING_S
    # The gateway refuses names that it does not know.
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert {"name": "Host", "value": "localhost"} in container[probe]["httpGet"]["httpHeaders"]
    assert container["readinessProbe"]["timeoutSeconds"] > 5
    (env,) = container["envFrom"]
    assert env == {"secretRef": {"name": "selfroute"}}
    selector = manifest("Service")["spec"]["selector"]
    assert selector.items() <= manifest("Deployment")["spec"]["template"]["metadata"]["labels"].items()


@pytest.mark.slow
def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    """Fails, and does not skip, where there is no systemd-analyze: apt-get install systemd."""
    text = (DEPLOY / "selfroute.service").read_text()
    unit = tmp_path / "selfroute.service"
    unit.write_text(text.replace("/opt/selfroute/bin/selfroute", shutil.which("true") or ""))
    analyze = shutil.which("systemd-analyze")
    assert analyze, "apt-get install systemd"
    done = subprocess.run([analyze, "verify", "--man=no", unit], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    # 0 to 100; the unit is "OK" below 50.
    done = subprocess.run(
        [analyze, "security", "--offline=yes", "--threshold=25", "--no-pager", unit], capture_output=True, timeout=60
    )
    assert done.returncode == 0, done.stdout
    stop_s = float(re.search(r"TimeoutStopSec=(\d+)", text)[1])  # type: ignore[index]
    assert stop_s > GatewayConfig().drain_s + CLOSING_S


def test_the_dockerfile() -> None:
    text = re.sub(r"\\\n", " ", (DEPLOY / "Dockerfile").read_text())
    steps = [line.split(maxsplit=1) for line in text.splitlines() if line and not line.startswith("#")]
    copied = [name for step, rest in steps if step == "COPY" and "--from" not in rest for name in rest.split()[:-1]]
    assert all((ROOT / name).exists() for name in copied)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    asked = re.search(r'"\.\[(.*)\]"', text)
    assert asked
    assert set(asked[1].split(",")) <= set(extras)
    last = dict(steps)
    assert last["USER"] == "10001"
    assert json.loads(last["ENTRYPOINT"]) == ["selfroute", "serve"]
    assert json.loads(last["HEALTHCHECK"].removeprefix("CMD "))[0] == "python"
