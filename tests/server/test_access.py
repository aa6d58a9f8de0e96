"""TLS, client certificates and tokens of a real observer; and what it tells those who may not come in."""

import datetime as dt
import ipaddress
import re
from dataclasses import replace

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from typer.testing import CliRunner

from fedbasin.proto import fedbasin_pb2 as pb
from fedbasin.proto.observer_service import SERVICE, RemoteObserver
from fedbasin.server.cli import app
from fedbasin.server.observe.access import AccessError, Guard, Pass, read_token
from fedbasin.server.observe.push import connect
from fedbasin.server.run.settings import SettingsError
from tests import running, tiny
from tests.observing import observer, push, report
from tests.waiting import LONG

TOKEN = "a" * 20 + "-right"


class Authority:
    """Signs certificates for 127.0.0.1 and writes them into a folder."""

    def __init__(self, folder, name):
        self.folder, self.name = folder, name
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.ca = folder / f"{name}.pem"
        self.ca.write_bytes(pem(self._sign(name, self.key.public_key(), ca=True)))

    def issue(self, name):
        """The files of a certificate and its key."""
        key = ec.generate_private_key(ec.SECP256R1())
        cert_file, key_file = self.folder / f"{name}.crt", self.folder / f"{name}.key"
        cert_file.write_bytes(pem(self._sign(name, key.public_key(), ca=False)))
        key_file.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return cert_file, key_file

    def _sign(self, name, public_key, ca):
        now = dt.datetime.now(dt.UTC)
        local = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
        # Python 3.13 asks for the last three.
        uses = {"digital_signature": not ca, "key_cert_sign": ca, "crl_sign": ca}
        others = ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement")
        usage = x509.KeyUsage(**uses, **dict.fromkeys((*others, "encipher_only", "decipher_only"), False))
        return (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, self.name)]))
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(minutes=5))
            .not_valid_after(now + dt.timedelta(days=1))
            .add_extension(x509.SubjectAlternativeName([local]), critical=False)
            .add_extension(x509.BasicConstraints(ca, None), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), critical=False)
            .sign(self.key, hashes.SHA256())
        )


def pem(certificate):
    return certificate.public_bytes(serialization.Encoding.PEM)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("access")


@pytest.fixture(scope="module")
def ours(folder):
    return Authority(folder, "ours")


@pytest.fixture(scope="module")
def token_file(folder):
    (folder / "token").write_text(f"{TOKEN}\n")
    return folder / "token"


@pytest.fixture(scope="module")
def wrong_file(folder):
    (folder / "wrong").write_text("b" * 20)
    return folder / "wrong"


@pytest.fixture(scope="module")
def plain(token_file):
    with observer(guard=Guard(token_file=token_file)) as addresses:
        yield addresses.observer


@pytest.fixture(scope="module")
def mutual(folder, ours, token_file):
    cert, key = ours.issue("server")
    guard = Guard(cert, key, client_ca=ours.ca, token_file=token_file)
    with observer(guard=guard) as addresses:
        yield addresses.observer


@pytest.fixture(scope="module")
def full_pass(ours, token_file):
    cert, key = ours.issue("client")
    return Pass(ours.ca, token_file, cert, key)


def refusal(address, own, call):
    with connect(address, own) as channel, pytest.raises(grpc.RpcError) as caught:
        call(RemoteObserver(channel))
    return caught.value.code(), caught.value.details()


CALLS = {
    "push": lambda stub: stub.push_round(report(1), timeout=LONG),
    "list": lambda stub: stub.list_runs(timeout=LONG),
    "get": lambda stub: stub.get_rounds(timeout=LONG),
    "watch": lambda stub: list(stub.watch_rounds(timeout=LONG)),
    "model": lambda stub: list(stub.get_model("run", timeout=LONG)),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_without_a_token_nothing_is_read_or_pushed(plain, call):
    code, details = refusal(plain, Pass(), call)
    assert code == grpc.StatusCode.UNAUTHENTICATED
    assert "authorization: Bearer" in details


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_with_a_wrong_token_nothing_is_read_or_pushed(plain, wrong_file, call):
    code, details = refusal(plain, Pass(token_file=wrong_file), call)
    assert code == grpc.StatusCode.UNAUTHENTICATED
    assert "not this observer's" in details
    assert TOKEN not in details


def test_with_the_token_reports_go_in_and_come_out(plain, token_file):
    own = Pass(token_file=token_file)
    assert push(plain, report(1, "told", last=True), credentials=own)
    with connect(plain, own) as channel:
        stub = RemoteObserver(channel)
        assert [one.round for one in stub.get_rounds("told")] == [1]
        assert [one.round for one in stub.watch_rounds("told", timeout=LONG)] == [1]


def test_health_needs_no_token_and_reflection_does(plain, token_file):
    with grpc.insecure_channel(plain) as channel:
        status = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=SERVICE), timeout=LONG)
        assert status.status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError) as caught:
            services(channel)
        assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED


def services(channel):
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    (answer,) = stub.ServerReflectionInfo(iter([request]), timeout=LONG)
    return {service.name for service in answer.list_services_response.service}


def test_reflection_names_the_services_and_describes_ours():
    with observer() as addresses, grpc.insecure_channel(addresses.observer) as channel:
        assert {SERVICE, "grpc.health.v1.Health"} <= services(channel)
        request = reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE)
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        (answer,) = stub.ServerReflectionInfo(iter([request]), timeout=LONG)
        described = b"".join(answer.file_descriptor_response.file_descriptor_proto)
        assert pb.DESCRIPTOR.serialized_pb in described


def test_over_tls_with_a_certificate_and_the_token_a_push_arrives(mutual, full_pass):
    assert push(mutual, report(1, "sealed"), credentials=full_pass)


@pytest.mark.parametrize(
    "less",
    [{"cert": None, "key": None}, {"token_file": None}, {"ca": None, "cert": None, "key": None}],
    ids=["no certificate", "no token", "no TLS"],
)
def test_whoever_lacks_one_of_them_stays_outside_and_the_run_goes_on(mutual, full_pass, less, caplog):
    assert not push(mutual, report(2), timeout_seconds=2, credentials=replace(full_pass, **less))
    assert "round 2 was not pushed" in caplog.text


def test_an_observer_with_a_foreign_certificate_gets_no_token(folder, token_file):
    cert, key = Authority(folder, "theirs").issue("impostor")
    ours = Authority(folder, "expected")
    with observer(guard=Guard(cert, key)) as addresses:
        own = Pass(ours.ca, token_file)
        assert not push(addresses.observer, report(1), timeout_seconds=2, credentials=own)


def test_a_certificate_of_another_authority_is_not_let_in(folder, mutual, full_pass):
    cert, key = Authority(folder, "stranger").issue("guest")
    own = replace(full_pass, cert=cert, key=key)
    assert not push(mutual, report(1), timeout_seconds=2, credentials=own)


def test_a_token_file_that_is_gone_ends_no_run(folder, caplog):
    assert not push("127.0.0.1:1", report(3), credentials=Pass(token_file=folder / "gone"))
    assert "gone cannot be read" in caplog.text


@pytest.mark.parametrize("text", ["", "\n", "short", "two words are no token at all", "ä" * 20])
def test_what_can_be_guessed_or_sent_wrongly_is_no_token(tmp_path, text):
    (tmp_path / "token").write_text(text, encoding="utf-8")
    with pytest.raises(AccessError, match="openssl rand"):
        read_token(tmp_path / "token")


@pytest.mark.parametrize(
    ("guard", "host", "advice"),
    [
        ({"cert": "c"}, "127.0.0.1", "--tls-key"),
        ({"key": "k"}, "127.0.0.1", "--tls-cert"),
        ({"client_ca": "a"}, "127.0.0.1", "--tls-cert"),
        ({"token_file": "t"}, "0.0.0.0", "listen on 127.0.0.1"),
        ({"token_file": "t"}, "::", "listen on 127.0.0.1"),
        ({"token_file": "t"}, "observer", "listen on 127.0.0.1"),
    ],
)
def test_a_guard_that_only_looks_like_one_is_refused(tmp_path, guard, host, advice):
    with pytest.raises(AccessError, match=advice):
        Guard(**{name: tmp_path / file for name, file in guard.items()}).check(host)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_a_token_without_tls_is_fine_where_nobody_is_on_the_way(token_file, host):
    Guard(token_file=token_file).check(host)


def test_a_token_is_not_sent_in_plain_text_to_another_machine(token_file):
    with pytest.raises(AccessError, match="plain text"):
        connect("observer.example:9470", Pass(token_file=token_file))


@pytest.mark.parametrize(
    ("file", "name"),
    [(file, name) for file in ("cert", "key", "client_ca", "token_file") for name in ("gone", "junk")]
    + [("cert", "other.crt"), ("key", "other.key")],
)
def test_an_observer_whose_files_cannot_be_used_says_which(folder, ours, token_file, file, name):
    cert, key = ours.issue("good")
    ours.issue("other")
    (folder / "junk").write_text("no PEM")
    guard = replace(Guard(cert, key, ours.ca, token_file), **{file: folder / name})
    with pytest.raises(AccessError, match=re.escape(str(folder / name))), observer(guard=guard):
        pass


NO_ADDRESSES = ["", " ", "localhost", "localhost:", ":9470", "127.0.0.1:x", "127.0.0.1:0", "127.0.0.1:65536", "h:1:2",
                "http://127.0.0.1:9470", "unix:/run/observer", "a b:1", "[::1]", "::1:9470", "dns:///h:1", "h:²", "h:01",
                "\x1b[2J:1"]  # fmt: skip


@pytest.mark.parametrize("address", NO_ADDRESSES)
def test_what_is_no_host_and_port_is_refused_by_every_caller(address, tmp_path):
    with pytest.raises(AccessError, match=r"is no HOST:PORT, such as 127\.0\.0\.1:9470"):
        connect(address)
    for command in (["rounds", address], ["watch", address], ["download", "run", address, "-o", str(tmp_path / "m")]):
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 1
        assert "HOST:PORT" in done.stderr
        assert "\x1b" not in done.stderr
    if address:
        with pytest.raises(SettingsError, match=r"observer = .*HOST:PORT"):
            running.run(tiny.federation(observer=address, folder=str(tmp_path)), tiny.net())


@pytest.mark.parametrize("address", ["127.0.0.1:9470", "[::1]:1", "observer.example:65535", "observer_1:9470"])
def test_hosts_and_ports_are_addresses(address):
    connect(address).close()


@pytest.mark.parametrize("file", ["ca", "cert", "key"])
def test_a_pass_whose_files_are_none_says_which(folder, ours, file):
    cert, key = ours.issue("caller")
    (folder / "none").write_text("no PEM")
    with pytest.raises(AccessError, match="none"):
        connect("127.0.0.1:1", replace(Pass(ours.ca, cert=cert, key=key), **{file: folder / "none"}))


def test_a_host_that_is_not_there_is_named(tmp_path):
    command = ["observe", "--host", "no.such.host.invalid", "--port", "0", "--metrics-port", "0", "--insecure"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 1
    assert "no.such.host.invalid" in done.stderr
    assert "Unknown error" not in done.stderr


def test_half_a_pair_of_files_is_no_pass(ours):
    cert, _ = ours.issue("half")
    with pytest.raises(AccessError, match="key"):
        connect("127.0.0.1:1", Pass(ours.ca, cert=cert))
