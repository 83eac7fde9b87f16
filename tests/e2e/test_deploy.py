"""What lies in deploy/ fits together: files exist, ports stay on loopback, settings are valid, no secret is in it."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from stream.errors import SettingsError
from stream.settings import Settings, load_settings

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
NEEDED = re.compile(r"\$\{(\w+):\?[^}]*\}")
"""A variable that compose refuses to start without."""


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What ``make-env.sh`` writes."""
    folder = tmp_path_factory.mktemp("deploy")
    shutil.copy(DEPLOY / "make-env.sh", folder)
    subprocess.run(["sh", str(folder / "make-env.sh")], check=True, capture_output=True)
    assert (folder / ".env").stat().st_mode & 0o077 == 0
    return dict(line.split("=", 1) for line in (folder / ".env").read_text(encoding="utf-8").splitlines())


def environment_of(service: str, secrets: dict[str, str]) -> dict[str, str]:
    """A service's environment as compose would fill it in."""
    given = SERVICES[service].get("environment", {})
    return {key: NEEDED.sub(lambda found: secrets[found[1]], str(value)) for key, value in given.items()}


def test_every_yaml_and_json_file_parses() -> None:
    files = [path for path in DEPLOY.rglob("*") if path.suffix in (".yaml", ".yml", ".json")]
    assert len(files) >= 8
    for path in files:
        assert yaml.safe_load(path.read_text(encoding="utf-8")), path


def test_ports_are_published_on_loopback_only() -> None:
    ports = [port for service in SERVICES.values() for port in service.get("ports", ())]
    assert len(ports) >= 6
    assert [port for port in ports if not port.startswith("127.0.0.1:")] == []
    assert not any("network_mode" in service or service.get("privileged") for service in SERVICES.values())


def test_the_services_are_all_there() -> None:
    assert set(SERVICES) == {"sightwire", "sightwire-cuda", "redis", "mediamtx", "prometheus", "grafana"}
    profiles = {name: service["profiles"] for name, service in SERVICES.items() if "profiles" in service}
    assert profiles == {"sightwire": ["cpu"], "sightwire-cuda": ["cuda"]}
    for service in SERVICES.values():
        assert set(service.get("depends_on", ())) <= set(SERVICES)
        assert re.search(r":[\w.-]+$", service["image"]), "an image without a version changes by itself"


def test_mounted_files_volumes_and_secrets_exist() -> None:
    for name, service in SERVICES.items():
        for mount in service.get("volumes", ()):
            source = mount.split(":")[0]
            if source.startswith("."):
                assert (DEPLOY / source).exists(), f"{name}: {mount}"
            else:
                assert source in COMPOSE["volumes"], f"{name}: {mount}"
        assert set(service.get("secrets", ())) <= set(COMPOSE["secrets"]), name


def test_the_secrets_are_made_and_none_has_a_default(secrets: dict[str, str]) -> None:
    text = (DEPLOY / "compose.yaml").read_text(encoding="utf-8")
    used = set(re.findall(r"\$\{(\w+)", text))
    assert used == set(NEEDED.findall(text)), "a variable with a default, or with none and no complaint"
    used |= {secret["environment"] for secret in COMPOSE["secrets"].values()}
    assert used == set(secrets)
    assert all(len(value) >= 32 for value in secrets.values())
    assert len(set(secrets.values())) == len(secrets)


def test_making_the_secrets_again_changes_none(tmp_path: Path) -> None:
    shutil.copy(DEPLOY / "make-env.sh", tmp_path)
    (tmp_path / ".env").write_text("REDIS_PASSWORD=mine\n", encoding="utf-8")
    for _ in range(2):
        subprocess.run(["sh", str(tmp_path / "make-env.sh")], check=True, capture_output=True)
    lines = (tmp_path / ".env").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "REDIS_PASSWORD=mine"
    assert len(lines) == 5


@pytest.fixture
def deployed(secrets: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Settings:
    """The settings that the service in compose.yaml gets."""
    for key, value in (environment_of("sightwire", secrets) | dockerfile_environment()).items():
        if key != "SIGHTWIRE_HOME":
            monkeypatch.setenv(key, value)
    return load_settings(DEPLOY / "sightwire.yaml", {})


def test_the_example_configuration_is_valid(deployed: Settings, secrets: dict[str, str]) -> None:
    assert deployed.http.host == "0.0.0.0"
    assert deployed.http.token is not None
    assert deployed.http.token.get_secret_value() == secrets["SIGHTWIRE_TOKEN"]
    assert deployed.redis.url is not None
    assert deployed.redis.url.get_secret_value() == f"redis://:{secrets['REDIS_PASSWORD']}@redis:6379/0"
    (source,) = deployed.sources
    assert source.id == "camera"
    assert source.url.get_secret_value() == f"rtsp://sightwire:{secrets['MEDIAMTX_READ_PASSWORD']}@mediamtx:8554/camera"
    assert [pack.name for pack in deployed.packs] == ["/usr/share/sightwire/packs/base"]


def test_the_example_configuration_is_refused_without_a_token() -> None:
    with pytest.raises(SettingsError, match=r"sightwire\.yaml:\d+: http: http\.token is required"):
        load_settings(DEPLOY / "sightwire.yaml", {})


def test_the_sources_in_the_comments_are_valid(tmp_path: Path) -> None:
    text = (DEPLOY / "sightwire.yaml").read_text(encoding="utf-8")
    shown = re.sub(r"^# ?(?=sources:|  )", "", text, flags=re.MULTILINE)
    (tmp_path / "sightwire.yaml").write_text(shown, encoding="utf-8")
    settings = load_settings(tmp_path / "sightwire.yaml", {"http": {"token": "t"}})
    assert [source.id for source in settings.sources] == ["gate", "yard"]


def test_prometheus_reads_the_secret_and_the_service_that_compose_runs() -> None:
    (job,) = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text(encoding="utf-8"))["scrape_configs"]
    assert job["authorization"]["credentials_file"] == f"/run/secrets/{SERVICES['prometheus']['secrets'][0]}"
    ((target,),) = (config["targets"] for config in job["static_configs"])
    host, port = target.split(":")
    config = yaml.safe_load((DEPLOY / "sightwire.yaml").read_text(encoding="utf-8"))
    assert (host, int(port)) == ("sightwire", config["http"]["port"])
    assert SERVICES["sightwire-cuda"]["networks"]["default"]["aliases"] == [host]


def test_grafana_finds_its_data_source_and_dashboard() -> None:
    provisioning = DEPLOY / "grafana/provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources/prometheus.yaml").read_text(encoding="utf-8"))[
        "datasources"
    ]
    assert source["url"] == "http://prometheus:9090"
    (provider,) = yaml.safe_load((provisioning / "dashboards/sightwire.yaml").read_text(encoding="utf-8"))["providers"]
    mounts = dict(mount.split(":")[1::-1] for mount in SERVICES["grafana"]["volumes"])
    folder = DEPLOY / mounts[provider["options"]["path"]]
    home = SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (folder / Path(home).name).is_file()
    assert SERVICES["grafana"]["environment"]["GF_AUTH_ANONYMOUS_ENABLED"] == "false"


def test_the_dashboard_is_laid_out_without_overlap() -> None:
    panels = json.loads((DEPLOY / "grafana/dashboards/sightwire.json").read_text(encoding="utf-8"))["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24, panel["title"]
        taken |= cells
        assert panel["type"] == "row" or panel["description"], panel["title"]


def test_mediamtx_asks_for_passwords() -> None:
    config = yaml.safe_load((DEPLOY / "mediamtx.yml").read_text(encoding="utf-8"))
    users = config["authInternalUsers"]
    assert [user["user"] for user in users] == ["publisher", "sightwire"]
    given = SERVICES["mediamtx"]["environment"]
    assert set(given) == {f"MTX_AUTHINTERNALUSERS_{n}_PASS" for n in range(len(users))}
    assert not any("pass" in user for user in users)


def test_valkey_takes_its_configuration(secrets: dict[str, str], tmp_path: Path) -> None:
    """By the real server, with the data folder moved: it refuses a line that it does not know."""
    from stream.sinks import embedded

    text = (DEPLOY / "valkey.conf").read_text(encoding="utf-8").replace("dir /data", f"dir {tmp_path}")
    lines = [*text.splitlines(), f"requirepass {secrets['REDIS_PASSWORD']}", "port 0", "unixsocket valkey.sock"]
    process = subprocess.Popen(
        [str(embedded._binary()), "-"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=tmp_path,
    )
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("\n".join(lines))
    process.stdin.close()
    said = []
    try:
        for line in process.stdout:
            said.append(line)
            if "Ready to accept connections" in line:
                process.terminate()
        assert process.wait(10) == 0, "".join(said)
    finally:
        process.kill()
    assert any("Ready to accept connections" in line for line in said), "".join(said)
    assert (tmp_path / "appendonlydir").is_dir()


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions, with continued lines joined."""
    text = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    lines = "\n".join(line for line in text.splitlines() if not line.startswith("#")).replace("\\\n", " ").splitlines()
    pairs = (line.strip().partition(" ") for line in lines if line.strip())
    return [(word, " ".join(rest.split())) for word, _, rest in pairs]


def stages() -> dict[str, list[tuple[str, str]]]:
    """Instructions by stage; the first of each is its FROM."""
    found: dict[str, list[tuple[str, str]]] = {}
    name = ""
    for word, rest in instructions():
        if word == "FROM":
            name = rest.rsplit(" AS ", 1)[1]
            found[name] = []
        if name:
            found[name].append((word, rest))
    return found


def chain(stage: str) -> list[tuple[str, str]]:
    """A stage's instructions after those of the stages it is made from."""
    own = stages()[stage]
    parent = own[0][1].split(" AS ")[0]
    return (chain(parent) if parent in stages() else []) + own


def dockerfile_environment() -> dict[str, str]:
    """What the ENV lines of the cpu image set, as far as Sightwire reads it."""
    text = " ".join(rest for word, rest in chain("cpu") if word == "ENV")
    return {key: value.strip("'") for key, value in re.findall(r"(SIGHTWIRE_\w+)=('[^']*'|\S+)", text)}


def test_the_dockerfile_copies_what_is_there() -> None:
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    allowed = {line[1:] for line in ignored if line.startswith("!")}
    copied = [rest for word, rest in instructions() if word == "COPY"]
    local = [source for rest in copied if not rest.startswith("--from=") for source in rest.split()[:-1]]
    assert set(local) == allowed
    for source in local:
        assert (ROOT / source).exists(), source
    for rest in copied:
        if found := re.match(r"--from=(\S+)", rest):
            assert found[1] in stages(), rest


def test_the_wheel_gets_everything_that_it_is_built_from() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    copied = {s for word, rest in stages()["wheel"] if word == "COPY" for s in rest.split()[:-1]}
    (packages,) = re.findall(r"^packages = (\[.*\])$", project, re.MULTILINE)[:1]
    assert {*json.loads(packages), "pyproject.toml", "README.md", "LICENSE"} <= copied


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_an_image_runs_unprivileged_and_without_torch(target: str) -> None:
    made = chain(target)
    words = [word for word, _ in made]
    assert [rest for word, rest in made if word == "USER"][-1] == "sightwire"
    assert {"HEALTHCHECK", "VOLUME", "ENTRYPOINT", "STOPSIGNAL"} <= set(words)
    assert "/healthz" in next(rest for word, rest in made if word == "HEALTHCHECK")
    # Nothing is installed in the image itself: the virtual environment is copied from a stage without the extra.
    assert not any("pip" in rest or "apt" in rest for word, rest in made if word == "RUN")
    (venv,) = (rest for word, rest in made if word == "COPY" and "--from=venv" in rest)
    installs = " ".join(rest for word, rest in chain(venv.split()[0].partition("=")[2]) if word == "RUN")
    assert "[openvino]" in installs
    assert not re.search(r"\[(train|demo|dev)\]|torch", installs)


def test_compose_names_stages_that_exist() -> None:
    builds = {name: service["build"] for name, service in SERVICES.items() if "build" in service}
    assert {name: build["target"] for name, build in builds.items()} == {"sightwire": "cpu", "sightwire-cuda": "cuda"}
    for build in builds.values():
        assert (DEPLOY / build["context"]).resolve() == ROOT
        assert (ROOT / build["dockerfile"]).is_file()
        assert build["target"] in stages()


def test_the_health_check_is_python_that_runs() -> None:
    """It fails where nothing listens, and for that reason only."""
    check = next(rest for word, rest in chain("cpu") if word == "HEALTHCHECK")
    command = json.loads(check[check.index("[") :])
    assert command[0] == "python"
    code = command[2].replace(":9464/", ":1/")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip().endswith("Connection refused>")


def test_no_secret_is_in_the_repository() -> None:
    for path in DEPLOY.rglob("*"):
        if path.is_file() and path.name != ".env" and path.suffix in ("", ".yaml", ".yml", ".conf", ".json", ".sh"):
            for line in path.read_text(encoding="utf-8").splitlines():
                found = re.search(r"(?i)\b\w*(?:password|token|secret|pass)\w*\s*[:=]\s*([A-Za-z0-9]{6,})\s*$", line)
                assert found is None, f"{path.name}: {line}"
    ignored = (DEPLOY / ".gitignore").read_text(encoding="utf-8").split()
    assert any(fnmatch.fnmatch(".env", pattern) for pattern in ignored)


def test_docker_takes_the_compose_file(secrets: dict[str, str]) -> None:
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, "compose", "version"], capture_output=True).returncode != 0:
        pytest.skip("docker compose is not installed; the other tests read the file themselves")
    for profile in ("cpu", "cuda"):
        command = [docker, "compose", "-f", str(DEPLOY / "compose.yaml"), "--profile", profile, "config", "--quiet"]
        done = subprocess.run(command, env=os.environ | secrets, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
