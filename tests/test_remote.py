"""Prompts and exports behind URLs: a local folder as ``file://``, and a local S3 server where moto is installed."""

import contextlib
import os

import pyarrow.fs as pfs
import pytest

from latentrevise.cli.options import located
from latentrevise.data import remote
from latentrevise.data.storage import read_jsonl, write_jsonl
from latentrevise.data.tables import read_rows
from latentrevise.errors import InputError, RunError

ROWS = [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(3)]


@pytest.fixture
def bucket(monkeypatch):
    """A bucket of a server in this process: the URL of a name in it."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0, verbose=False)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "key")
    server.start()
    host, port = server.get_host_and_port()
    place = f"endpoint_override={host}:{port}&scheme=http&region=us-east-1"
    store = pfs.S3FileSystem(
        access_key="key", secret_key="key", endpoint_override=f"{host}:{port}", scheme="http", region="us-east-1",
        allow_bucket_creation=True,
    )  # fmt: skip
    store.create_dir("bucket")
    yield lambda name: f"s3://bucket/{name}?{place}"
    server.stop()


def round_trip(url):
    """Rows written to a URL and read again; a folder of shards; what is not there, or no rows."""
    with remote.sent(url("out/p.jsonl")) as local:
        write_jsonl(local, ROWS)
    assert [row for _, row in read_rows(url("out/p.jsonl"))] == ROWS
    with remote.fetched(url("out/p.jsonl")) as local:
        assert read_jsonl(local) == ROWS
    assert not local.exists(), "copies go"
    with remote.sent(url("out/q.jsonl")) as local:
        write_jsonl(local, ROWS[:1])
    assert [row for _, row in read_rows(url("out"))] == [*ROWS, *ROWS[:1]]
    with pytest.raises(InputError, match=r"absent\.jsonl.* does not exist; check the URL"):
        list(read_rows(url("absent.jsonl")))
    with remote.sent(url("bad.csv")) as local:
        local.write_bytes(b"prompt,answer\n\xff,1\n")
    with pytest.raises(InputError) as told:
        list(read_rows(url("bad.csv")))
    assert f"prompt file {url('bad.csv')} is not UTF-8 text" in str(told.value)
    with contextlib.suppress(ZeroDivisionError), remote.sent(url("half.jsonl")) as local:
        local.write_text(f"half {1 / 0}")
    with pytest.raises(InputError, match="does not exist"):
        list(read_rows(url("half.jsonl")))


def test_local_urls(tmp_path):
    round_trip(lambda name: f"file://{tmp_path}/{name}")
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot write file://"), remote.sent(f"file://{tmp_path}/file/x.jsonl") as local:
        local.write_text("")
    with pytest.raises(InputError, match="no URL of a file"):
        list(read_rows("nowhere://x/y.jsonl"))


def test_a_url_on_the_command_line_stays_as_it_is():
    assert located("s3://bucket/p.jsonl") == "s3://bucket/p.jsonl"
    assert located("~/p.jsonl") == os.path.expanduser("~/p.jsonl")


def test_s3_urls(bucket):
    round_trip(bucket)
    other = bucket("x.jsonl").replace("bucket", "none", 1)
    with pytest.raises(RunError, match="cannot write s3://none/"), remote.sent(other) as local:
        local.write_text("")
