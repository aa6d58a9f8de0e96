"""The secured compose file: what it says, and, slowly, the same processes on loopback with strangers at the door."""

import datetime as dt
import os
import re
import socket
import ssl
import stat
import subprocess
from base64 import b64encode
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import yaml
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from cryptography.x509 import DNSName, load_pem_x509_certificate
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError
from flwr.proto.fleet_pb2 import ActivateNodeRequest
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.auth.superexec import create_superexec_auth_metadata, derive_auth_secret
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message
from flwr.supercore.runtime_version_compatibility import RuntimeVersionMetadata

from fedbasin.deploy.authority import SERVICES as CERTIFIED
from fedbasin.deploy.authority import write_secrets
from fedbasin.deploy.processes import Processes
from fedbasin.deploy.registration import register
from fedbasin.server.flower_run import FlowerRunError
from tests.needing import needed
from tests.waiting import LONG, wait_until

DEPLOY = Path(__file__).parents[2] / "deploy"


# Without Compose's tags, which say how values are merged.
SECURE = yaml.safe_load(re.sub("!override|!reset", "", (DEPLOY / "compose.secure.yaml").read_text()))
SERVICES = SECURE["services"]
PROXY = (DEPLOY / "secure/proxy.conf").read_text()


@pytest.fixture(scope="module")
def secrets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("secured") / "secrets"
    write_secrets(folder, 2)
    return folder


def test_no_program_speaks_without_tls():
    words = [str(service.get("command", "")) for service in SERVICES.values()]
    assert not [text for text in words if "insecure" in text]
    assert "insecure" not in SECURE["configs"]["flower-tls"]["content"]


def test_the_proxy_alone_is_published_and_lets_out_fleet_and_health_alone():
    assert [name for name, service in SERVICES.items() if "ports" in service] == ["proxy"]
    passed = re.findall(r"location (.+?) \{ proxy_pass", PROXY)
    assert passed == ["/v1/fleet/", "= /health"]
    assert "location / { return 404; }" in PROXY


def test_supernodes_reach_the_proxy_and_not_the_superlink():
    assert SERVICES["nodes"]["networks"] == ["clients"]
    assert "--superlink proxy:8443" in SERVICES["nodes"]["command"]
    assert "networks" not in SERVICES["superlink"]
    assert SECURE["networks"]["clients"]["internal"]


def test_every_secret_is_a_file_that_the_authority_makes(secrets):
    names = [Path(secret["file"].partition("}/")[2]) for secret in SECURE["secrets"].values()]
    assert all((secrets / name).is_file() for name in names)
    targets = {
        mounted.get("target", "")
        for s in SERVICES.values()
        for mounted in s.get("secrets", ())
        if mounted != "superexec"
    }
    for name in re.findall(r"/run/secrets/([\w.]+)", f"{yaml.dump(SECURE)}{PROXY}"):
        assert name in {*targets, "superexec", "nodes"}


def test_the_folder_of_secrets_is_its_owners_alone_and_is_never_overwritten(secrets):
    assert stat.S_IMODE(secrets.stat().st_mode) == 0o700
    with pytest.raises(FileExistsError):
        write_secrets(secrets, 2)
    for ignored in (".dockerignore", ".gitignore"):
        assert "deploy/secrets" in (DEPLOY.parent / ignored).read_text()


@pytest.mark.parametrize("service", CERTIFIED)
def test_certificates_are_for_the_names_of_their_services_and_no_others(secrets, service):
    authority, certificate = (
        load_pem_x509_certificate((secrets / f"{name}.crt").read_bytes()) for name in ("authority", service)
    )
    policy = PolicyBuilder().store(Store([authority]))
    for name in (*CERTIFIED[service], "localhost"):
        policy.build_server_verifier(DNSName(name)).verify(certificate, [])
    with pytest.raises(VerificationError):
        policy.build_server_verifier(DNSName("somebody-else")).verify(certificate, [])


def test_registration_without_keys_says_how_to_make_them(tmp_path):
    with pytest.raises(FlowerRunError, match=r"no key in .*fedbasin.deploy.authority"):
        register(tmp_path)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Federation:
    """The secured processes on loopback."""

    def __init__(self, folder, secrets, processes):
        self.folder, self.secrets, self.processes = folder, secrets, processes
        self.superlink, self.proxy = (f"127.0.0.1:{free_port()}" for _ in range(2))
        trust = ssl.create_default_context(cafile=self.authority)
        self.client = httpx.Client(verify=trust, trust_env=False, timeout=LONG)

    @property
    def authority(self):
        return str(self.secrets / "authority.crt")

    def start(self):
        port = self.superlink.partition(":")[2]
        words = SERVICES["superlink"]["command"].replace("/run/secrets", str(self.secrets)).split()[1:]
        words[words.index("--port") + 1] = port
        words[words.index("--database") + 1] = str(self.folder / "state.db")
        words[words.index("--host") + 1] = "127.0.0.1"
        started = self.processes.start("superlink", "flower-superlink", *words)
        wait_until(lambda: started.handle.poll() is not None or self.answers(self.superlink), "no SuperLink")
        (self.folder / "flwr").mkdir(exist_ok=True)
        (self.folder / "flwr/config.toml").write_text(
            f'[superlink]\ndefault = "own"\n[superlink.own]\naddress = "{self.superlink}"\n'
            f'root-certificates = "{self.authority}"\n'
        )
        text = PROXY.replace("superlink:8000", self.superlink).replace("8443", self.proxy.partition(":")[2])
        text = text.replace("/tmp/", f"{self.folder}/").replace("/run/secrets", str(self.secrets))
        text = text.replace("listen ", "listen 127.0.0.1:").replace("resolver 127.0.0.11 valid=5s;", "")
        (self.folder / "proxy.conf").write_text(text)

    @contextmanager
    def proxied(self):
        command = [needed("nginx"), "-c", self.folder / "proxy.conf", "-g", "daemon off;", "-e", "stderr"]
        with (self.folder / "nginx.log").open("w") as log:
            nginx = subprocess.Popen(command, stderr=log)
        try:
            wait_until(lambda: nginx.poll() is not None or self.answers(self.proxy), "no proxy")
            assert nginx.poll() is None, (self.folder / "nginx.log").read_text()
            yield
        finally:
            nginx.terminate()
            nginx.wait(LONG)

    def answers(self, address):
        try:
            return self.client.get(f"https://{address}/health").status_code == 200
        except httpx.TransportError:
            return False

    def post(self, address, path, message=None, headers=None, content=b""):
        content = content if message is None else message.SerializeToString()
        component = RuntimeVersionMetadata.from_local_component("SuperNode" if "fleet" in path else "SuperExec")
        kind = {"content-type": "application/protobuf", **dict(component.as_metadata())}
        url = f"https://{address}{path}"
        return self.client.post(url, content=content, headers=kind | (headers or {}))

    def node(self, name, key, authority=None, tls=True):
        """A SuperNode that is to end after two tries to connect."""
        trust = ("--root-certificates", authority or self.authority) if tls else ("--insecure",)
        keys = ("--auth-supernode-private-key", str(key)) if key else ()
        options = (*trust, *keys, "--superlink", self.proxy, "--port", str(free_port()), "--max-retries", "1")
        return self.processes.start(name, "flower-supernode", *options, "--isolation", "process")


@pytest.fixture(scope="module")
def federation(tmp_path_factory, secrets):
    folder = tmp_path_factory.mktemp("federation")
    environment = {**os.environ, "FLWR_HOME": str(folder / "flwr"), "FLWR_TELEMETRY_ENABLED": "0"}
    environment |= {"FLWR_DISABLE_UPDATE_CHECK": "1", "PYTHONUNBUFFERED": "1"}
    processes = Processes(folder, environment)
    online = Federation(folder, secrets, processes)
    try:
        online.start()
        with online.proxied():
            yield online
    finally:
        online.client.close()
        processes.end()


@pytest.fixture(scope="module")
def registered(federation, secrets):
    before = os.environ.get("FLWR_HOME")
    os.environ["FLWR_HOME"] = str(federation.folder / "flwr")
    try:
        yield register(secrets / "nodes"), register(secrets / "nodes")
    finally:
        os.environ.pop("FLWR_HOME")
        if before is not None:
            os.environ["FLWR_HOME"] = before


def signed(key, when):
    timestamp = when.isoformat()
    signature = sign_message(key, timestamp.encode())
    public = public_key_to_bytes(key.public_key())
    return {
        "flwr-public-key": b64encode(public).decode(),
        "flwr-timestamp": timestamp,
        "flwr-signature": b64encode(signature).decode(),
    }, ActivateNodeRequest(public_key=public, heartbeat_interval=30)


@pytest.mark.slow
@pytest.mark.deployed
class TestStrangers:
    """Real processes on loopback: Flower's, and nginx as the proxy."""

    def test_keys_are_registered_once(self, registered):
        assert registered == (["0", "1"], [])

    def test_a_registered_node_joins_through_the_proxy(self, federation, registered):
        node = federation.node("registered", federation.secrets / "nodes/0.key")
        wait_until(lambda: node.handle.poll() is not None or "online" in self.nodes(federation), "no node is online")
        assert node.handle.poll() is None

    def test_an_unregistered_key_is_refused(self, federation, registered, tmp_path):
        write_secrets(tmp_path / "others", 1)
        node = federation.node("unregistered", tmp_path / "others/nodes/0.key")
        assert node.handle.wait(LONG)

    def test_a_node_without_a_key_or_without_tls_is_refused(self, federation):
        assert federation.node("keyless", None).handle.wait(LONG)
        assert federation.node("plain", None, tls=False).handle.wait(LONG)

    def test_a_certificate_of_another_authority_is_refused(self, federation, tmp_path):
        write_secrets(tmp_path / "others", 1)
        key = federation.secrets / "nodes/1.key"
        assert federation.node("misled", key, str(tmp_path / "others/authority.crt")).handle.wait(LONG)

    def test_plain_http_is_refused(self, federation):
        for address in (federation.superlink, federation.proxy):
            try:
                status = httpx.get(f"http://{address}/health", trust_env=False).status_code
            except httpx.TransportError:
                continue
            assert status == 400

    @pytest.mark.parametrize(
        "path",
        [
            "/v1/control/start-run",
            "/v1/runtime/acquire-task",
            "/v1/fleet/../control/start-run",
            "/v1/fleet/%2e%2e/control/start-run",
            "//v1/control/start-run",
            "/docs",
            "/",
        ],
    )
    def test_nothing_but_fleet_and_health_passes_the_proxy(self, federation, path):
        assert federation.post(federation.proxy, path).status_code == 404

    def test_what_is_too_large_does_not_pass_the_proxy(self, federation):
        sent = federation.post(federation.proxy, "/v1/fleet/push-object", content=bytes(33 * 2**20))
        assert sent.status_code == 413

    def test_a_message_of_a_node_that_is_sent_again_later_is_refused(self, federation, registered):
        key = load_ssh_private_key((federation.secrets / "nodes/1.key").read_bytes(), None)
        now = dt.datetime.now(dt.UTC)
        headers, message = signed(key, now)
        assert federation.post(federation.proxy, "/v1/fleet/activate-node", message, headers).status_code == 200
        headers, message = signed(key, now - dt.timedelta(minutes=6))
        assert federation.post(federation.proxy, "/v1/fleet/activate-node", message, headers).status_code == 401
        headers, message = signed(ec.generate_private_key(ec.SECP384R1()), now)
        assert federation.post(federation.proxy, "/v1/fleet/activate-node", message, headers).status_code != 200

    def test_a_message_of_the_superexec_counts_once_and_needs_the_secret(self, federation):
        message = AcquireTaskRequest(supported_task_types=["flwr-serverapp"])
        method, path = "/flwr.proto.Runtime/AcquireTask", "/v1/runtime/acquire-task"
        secret = derive_auth_secret((federation.secrets / "superexec").read_bytes())
        headers = create_superexec_auth_metadata(auth_secret=secret, method=method, request=message)
        statuses = [federation.post(federation.superlink, path, message, headers).status_code for _ in range(2)]
        assert statuses == [200, 401]
        guessed = derive_auth_secret(b"another secret")
        headers = create_superexec_auth_metadata(auth_secret=guessed, method=method, request=message)
        assert federation.post(federation.superlink, path, message, headers).status_code == 401
        assert federation.post(federation.superlink, path, message).status_code == 401

    def nodes(self, federation):
        with federation.processes.flwr("supernode", "ls", "--format", "json") as command:
            return command.communicate()[0]
