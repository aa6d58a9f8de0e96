"""The committed code is what the .proto file says."""

import pytest

from fedbasin.proto import generate

NAMES = ["fedbasin_pb2.py", "fedbasin_pb2.pyi", "fedbasin_pb2_grpc.py", "fedbasin_pb2_grpc.pyi"]


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    return {file.name: file for file in generate.generate(tmp_path_factory.mktemp("generated"))}


def test_every_module_has_its_stub(fresh):
    assert sorted(fresh) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_the_committed_code_is_generated_from_the_committed_proto(fresh, name):
    assert fresh[name].read_bytes() == (generate.ROOM / name).read_bytes(), "run `make proto`"


def test_the_service_module_imports_its_messages_from_the_package(fresh):
    assert "from fedbasin.proto import fedbasin_pb2" in fresh["fedbasin_pb2_grpc.py"].read_text()
