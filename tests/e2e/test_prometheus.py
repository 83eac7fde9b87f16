"""A real Prometheus scrapes a real service, and every query of the dashboard is put to it."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from engines.tinypack import write_tiny_pack
from tests.e2e.command import free_port
from tests.e2e.conftest import missing

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
DASHBOARD = json.loads((DEPLOY / "grafana/dashboards/sightwire.json").read_text(encoding="utf-8"))
RULES = DEPLOY / "prometheus/rules.yml"
TOKEN = "token-of-the-test"
SCRAPE = "500ms"
WAIT_S = 120.0


@dataclass(frozen=True)
class Query:
    """One query of one panel."""

    panel: str
    expr: str
    legend: str

    @property
    def runnable(self) -> str:
        """With Grafana's variables filled in, as for "All" sources."""
        return self.expr.replace("$__rate_interval", "10s").replace("$source", ".*")


def dashboard_queries() -> list[Query]:
    return [
        Query(panel["title"], target["expr"], target["legendFormat"])
        for panel in DASHBOARD["panels"]
        for target in panel.get("targets", ())
    ]


class Prometheus:
    """A running server's HTTP API."""

    def __init__(self, url: str) -> None:
        self._client = httpx.Client(base_url=f"{url}/api/v1", timeout=60)

    def get(self, path: str, **params: Any) -> Any:
        """``data`` of a reply; an error of the server fails the test with its message."""
        reply = self._client.get(path, params=params).json()
        assert reply["status"] == "success", f"{params}: {reply.get('error')}"
        return reply["data"]

    def value(self, expr: str) -> float:
        """Sum of what an expression gives now; 0 for nothing."""
        return math.fsum(float(series["value"][1]) for series in self.get("/query", query=expr)["result"])

    def series(self, expr: str, last_s: float = 20.0) -> list[dict[str, str]]:
        """Labels of the series that have a number in the last seconds, asked for as Grafana does."""
        now = time.time()
        found = self.get("/query_range", query=expr, start=now - last_s, end=now, step=1)["result"]
        return [s["metric"] for s in found if any(math.isfinite(float(value)) for _, value in s["values"])]

    def close(self) -> None:
        self._client.close()


@dataclass(frozen=True)
class Service:
    """The service under test."""

    process: subprocess.Popen[str]
    port: int

    def metrics(self) -> str:
        """The page that Prometheus reads."""
        reply = httpx.get(
            f"http://127.0.0.1:{self.port}/metrics", headers={"Authorization": f"Bearer {TOKEN}"}, timeout=60
        )
        return reply.raise_for_status().text


def wait_for(what: str, condition: Callable[[], bool], seconds: float = WAIT_S) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"after {seconds:g} s still no {what}"
        time.sleep(0.1)


def has_counted(prometheus: Prometheus, counter: str) -> bool:
    return prometheus.value(counter) > 0


def tool(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        missing(f"{name} is not installed: apt-get install prometheus")
    return found


def end(process: subprocess.Popen[str], patience_s: float = 120.0) -> int:
    """SIGTERM; what does not heed it gets SIGABRT, for its log to say where it hangs. The exit code."""
    process.terminate()
    try:
        return process.wait(patience_s)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)
    try:
        return process.wait(patience_s)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def scene() -> str:
    """Three seconds dark and silent, three bright and loud, for a minute."""
    times = range(0, 60, 3)
    brightness = ",".join(f"{start}:{0.95 if start % 6 else 0.1}" for start in times)
    beeps = ",".join(f"{start + tenth / 10}" for start in times if start % 6 for tenth in range(30))
    return f"synthetic://yard?width=64&height=64&brightness={brightness}&beep={beeps}"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, tiny_pack: Path) -> Iterator[Service]:
    """``sightwire run`` on a scene, on a camera that refuses, and on one that asks for more than is kept.

    A frame every two seconds and a hop of 250 ms: eight windows close with each frame, and a slot holds two.
    """
    folder, port = tmp_path_factory.mktemp("service"), free_port()
    write_tiny_pack(folder / "crowded", name="crowded")
    config = folder / "sightwire.yaml"
    settings = {
        "sources": [
            {"id": "yard", "url": scene(), "packs": ["tiny"]},
            {"id": "crowd", "url": "synthetic://crowd?fps=0.5&audio=0&width=64&height=64", "packs": ["crowded"]},
            {"id": "gate", "url": f"rtsp://admin:secret@127.0.0.1:{free_port()}/x", "packs": ["tiny"]},
        ],
        "packs": [
            {"name": str(tiny_pack), "backend": "onnxruntime"},
            {"name": str(folder / "crowded"), "backend": "onnxruntime", "hop_s": 0.25},
        ],
        "engine": {"threads": 1},
        "http": {"port": port, "token": TOKEN},
    }
    config.write_text(yaml.safe_dump(settings), encoding="utf-8")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SIGHTWIRE_")}
    environment["SIGHTWIRE_HOME"] = str(folder / "home")
    command = [sys.executable, "-X", "faulthandler", "-c", "from stream.cli import main; main()"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [*command, "run", "--config", str(config), "--quiet"],
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=log,
            text=True,
        )
        try:
            wait_for("health", lambda: answers(process, f"http://127.0.0.1:{port}/healthz", folder / "log"))
            yield Service(process, port)
        finally:
            code = end(process)
    text = (folder / "log").read_text(encoding="utf-8")
    assert code == 0, text
    assert "secret" not in text


def answers(process: subprocess.Popen[str], url: str, log: Path) -> bool:
    assert process.poll() is None, log.read_text(encoding="utf-8")
    try:
        return httpx.get(url, timeout=2).status_code == 200
    except httpx.TransportError:
        return False


def scrape_config(folder: Path, port: int) -> Path:
    """The deployed configuration, pointed at the service of the test."""
    config = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text(encoding="utf-8"))
    config["global"] = {"scrape_interval": SCRAPE, "evaluation_interval": "1s"}
    (job,) = config["scrape_configs"]
    (folder / "token").write_text(TOKEN, encoding="utf-8")
    job["authorization"]["credentials_file"] = "token"
    job["static_configs"] = [{"targets": [f"127.0.0.1:{port}"]}]
    shutil.copy(RULES, folder)
    path = folder / "prometheus.yml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory, service: Service) -> Iterator[Prometheus]:
    """A server that scrapes the service twice a second."""
    folder, port = tmp_path_factory.mktemp("prometheus"), free_port()
    command = [
        tool("prometheus"),
        f"--config.file={scrape_config(folder, service.port)}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--log.level=warn",
    ]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, text=True)
        server = Prometheus(f"http://127.0.0.1:{port}")
        try:
            wait_for("Prometheus", lambda: answers(process, f"http://127.0.0.1:{port}/-/ready", folder / "log"))
            yield server
        finally:
            server.close()
            end(process)


@pytest.fixture(scope="module")
def busy(prometheus: Prometheus) -> Prometheus:
    """With everything happened that the dashboard shows: events of each kind, a lost source, dropped windows."""
    wait_for("scrape", lambda: prometheus.value("up") == 1)
    wait_for("windows", lambda: prometheus.value('sightwire_windows_total{result="ok"}') >= 3)
    wait_for("dropped windows", lambda: prometheus.value('sightwire_dropped_total{reason="stale"}') > 0)
    for kind in ("action", "class", "segmentation", "source"):
        events = f'sightwire_events_total{{kind="{kind}"}}'
        wait_for(f"{kind} event", partial(has_counted, prometheus, events))
    return prometheus


def test_every_panel_has_data(busy: Prometheus) -> None:
    queries = dashboard_queries()
    assert len(queries) >= 20
    empty: list[Query] = queries

    def all_have_data() -> bool:
        nonlocal empty
        empty = [query for query in empty if not busy.series(query.runnable)]
        return not empty

    try:
        wait_for("data", all_have_data)
    except AssertionError:
        pytest.fail("\n".join(f"no data: {query.panel}: {query.runnable}" for query in empty))


def test_every_label_of_a_legend_is_there(busy: Prometheus) -> None:
    for query in dashboard_queries():
        named = set(re.findall(r"{{\s*(\w+)\s*}}", query.legend))
        labels = busy.series(query.runnable)
        known = {label for series in labels for label in series}
        quiet = all("none" in series.values() for series in labels)  # nothing of it has happened: a line at zero
        assert named <= known or quiet, f"{query.panel}: {query.legend} of {known}"


def test_the_numbers_are_those_of_the_run(busy: Prometheus) -> None:
    wait_for("two sources", lambda: busy.value("sightwire_source_up") == 2)
    assert busy.value('sightwire_source_up{source="gate"}') == 0
    refused = 'sightwire_source_failed_attempts_total{source="gate", reason="refused"}'
    wait_for("second attempt", lambda: busy.value(refused) >= 2)
    decoded = 'rate(sightwire_frames_total{source="yard", stage="decoded"}[5s])'
    wait_for("frame rate", lambda: 15 < busy.value(decoded) < 40)
    wait_for("empty spool", lambda: busy.value("sightwire_spool_events") == 0)
    assert busy.value('sightwire_encoder_frames_total{result="reused"}') > 0


def test_the_variable_lists_the_sources(busy: Prometheus) -> None:
    (variable,) = (v for v in DASHBOARD["templating"]["list"] if v["name"] == "source")
    call = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"]["query"])
    assert call is not None
    metric, label = call.groups()
    assert busy.get(f"/label/{label}/values", **{"match[]": metric}) == ["crowd", "gate", "yard"]


def test_the_token_is_needed_and_used(prometheus: Prometheus, service: Service) -> None:
    assert httpx.get(f"http://127.0.0.1:{service.port}/metrics").status_code == 401
    wait_for("scrape", lambda: prometheus.value("up") == 1)
    (target,) = prometheus.get("/targets")["activeTargets"]
    assert (target["health"], target["lastError"]) == ("up", "")


def test_every_alert_can_be_evaluated(busy: Prometheus) -> None:
    def evaluated() -> list[dict[str, Any]]:
        rules: list[dict[str, Any]] = busy.get("/rules")["groups"][0]["rules"]
        return rules

    wait_for("evaluation", lambda: all(rule["health"] != "unknown" for rule in evaluated()))
    assert {rule["name"]: rule.get("lastError") for rule in evaluated() if rule["health"] != "ok"} == {}

    # The camera that refuses is noticed (pending: the rule waits two minutes), the one that delivers is not.
    # A rule may have been evaluated before the first scrape, hence the waiting.
    def down() -> list[str]:
        (rule,) = (rule for rule in evaluated() if rule["name"] == "SightwireSourceDown")
        return [alert["labels"]["source"] for alert in rule["alerts"]]

    wait_for("the alert", lambda: down() == ["gate"])


def test_the_names_are_in_order(busy: Prometheus, service: Service) -> None:
    done = subprocess.run(
        [tool("promtool"), "check", "metrics"], input=service.metrics(), capture_output=True, text=True
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


ALERTS = {
    "SightwireDown": ["up{job='sightwire', instance='a'} 0x20"],
    "SightwireSourceDown": ["sightwire_source_up{instance='a', source='gate'} 0x20"],
    "SightwireDropsRising": ["sightwire_dropped_total{source='gate', stage='batch_slot', reason='stale'} 0+60x20"],
    "SightwireInferenceFails": ["sightwire_inference_failures_total{reason='InferenceFailed'} 0+1x20"],
    "SightwireSpoolGrowing": ["sightwire_spool_events 0+5x20"],
    "SightwireEventsLate": [
        "sightwire_event_latency_seconds_bucket{kind='action', le='2.5'} 0x20",
        "sightwire_event_latency_seconds_bucket{kind='action', le='5'} 0+60x20",
        "sightwire_event_latency_seconds_bucket{kind='action', le='+Inf'} 0+60x20",
    ],
    "SightwireEventLoopLag": ["sightwire_event_loop_lag_seconds 0.5x20"],
}
QUIET = [
    "up{job='sightwire', instance='a'} 1x20",
    "sightwire_source_up{instance='a', source='gate'} 1x20",
    # A file that was read to its end is not down.
    "sightwire_source_up{instance='a', source='clip'} 0x20",
    "sightwire_source_state{instance='a', source='clip', state='ended'} 1x20",
    "sightwire_dropped_total{source='gate', stage='window_frames', reason='unsampled'} 0+600x20",
    "sightwire_inference_failures_total{reason='InferenceFailed'} 3x20",
    "sightwire_spool_events 5x20",
    "sightwire_event_latency_seconds_bucket{kind='action', le='0.5'} 0+60x20",
    "sightwire_event_latency_seconds_bucket{kind='action', le='+Inf'} 0+60x20",
    # A single late timer is no alert.
    "sightwire_event_loop_lag_seconds 0x9 0.5 0x9",
]


def rule_test(series: list[str], firing: list[str]) -> dict[str, Any]:
    """A case for ``promtool test rules``: what fires after 18 minutes of these series."""
    names = {alert: f'count by (alertname) (ALERTS{{alertname="{alert}", alertstate="firing"}})' for alert in ALERTS}
    pairs = (text.rsplit("} ", 1) if "} " in text else text.split(" ", 1) for text in series)
    inputs = [{"series": name + ("}" if "{" in name else ""), "values": values} for name, values in pairs]
    expected = [
        {
            "expr": expr,
            "eval_time": "18m",
            "exp_samples": [{"labels": f'{{alertname="{alert}"}}', "value": 1}] if alert in firing else [],
        }
        for alert, expr in names.items()
    ]
    return {"interval": "1m", "input_series": inputs, "promql_expr_test": expected}


def test_each_alert_fires_on_its_cause_and_only_then(tmp_path: Path) -> None:
    rules = yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"][0]["rules"]
    assert sorted(rule["alert"] for rule in rules) == sorted(ALERTS)
    cases = [rule_test(series, [alert]) for alert, series in ALERTS.items()] + [rule_test(QUIET, [])]
    shutil.copy(RULES, tmp_path)
    test = {"rule_files": ["rules.yml"], "evaluation_interval": "1m", "tests": cases}
    (tmp_path / "test.yml").write_text(yaml.safe_dump(test), encoding="utf-8")
    done = subprocess.run([tool("promtool"), "test", "rules", "test.yml"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
