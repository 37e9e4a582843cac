"""One node of Ceph on the loopback, in memory: a monitor, an OSD and the S3 gateway (radosgw), with cephx.

Needs Debian's `radosgw ceph-mon ceph-osd`; `make test-s3` installs them.
"""

from __future__ import annotations

import shutil
import subprocess
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.certificates import Certificate
from tests.support.s3_servers import S3Server, answers, free_ports, process
from tests.support.waiting import until

_CONF = """
[global]
fsid = {fsid}
keyring = {folder}/keyring
mon host = [v2:127.0.0.1:{mon},v1:127.0.0.1:{mon_v1}]
public addr = 127.0.0.1
cluster addr = 127.0.0.1
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd crush chooseleaf type = 0
osd objectstore = memstore
memstore device bytes = 1073741824
mon allow pool size one = true
mon max pg per osd = 1000
mon data avail crit = 1
mon data = {folder}/mon
osd data = {folder}/osd
rgw data = {folder}/rgw
run dir = {folder}
log file = {folder}/$name.log
admin socket = {folder}/$name.asok
pid file = {folder}/$name.pid
rgw frontends = beast endpoint=127.0.0.1:{http} ssl_endpoint=127.0.0.1:{https} ssl_certificate={pem}
"""
_CAPS = {
    "client.admin": ("mon", "allow *", "osd", "allow *", "mgr", "allow *"),
    "client.rgw": ("mon", "allow rwx", "osd", "allow rwx"),
    "osd.0": ("mon", "allow profile osd", "osd", "allow *"),
}


@contextmanager
def ceph(folder: Path, certificate: Certificate) -> Iterator[tuple[S3Server, S3Server]]:
    """(over HTTP, over HTTPS): two doors of one gateway."""
    if missing := [name for name in ("ceph-mon", "ceph-osd", "radosgw") if shutil.which(name) is None]:
        raise FileNotFoundError(f"{', '.join(missing)}: not installed; `make test-s3` installs them")
    mon, mon_v1, http, https = free_ports(4)
    fsid, osd = str(uuid.uuid4()), str(uuid.uuid4())
    config = folder / "ceph.conf"
    config.write_text(
        _CONF.format(fsid=fsid, folder=folder, mon=mon, mon_v1=mon_v1, http=http, https=https, pem=certificate.both)
    )
    for name in ("mon", "osd", "rgw"):
        (folder / name).mkdir()

    def run(*command: str, stdin: str | None = None) -> str:
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=120, cwd=folder)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr}")
        return done.stdout.strip()

    def daemon(*command: str) -> list[str]:
        return [command[0], "-c", str(config), *command[1:], "-f"]

    c = ("-c", str(config))
    _make_keys(run)
    run(
        "monmaptool", "--create", "--fsid", fsid, "--addv", "a", f"[v2:127.0.0.1:{mon},v1:127.0.0.1:{mon_v1}]", "monmap"
    )
    run("ceph-mon", *c, "--mkfs", "-i", "a", "--monmap", "monmap", "--keyring", "keyring")
    log = folder / "output.log"
    with process(daemon("ceph-mon", "-i", "a"), log):  # stopped last: without it the others linger
        run("ceph", *c, "osd", "new", osd, "0")
        run("ceph-osd", *c, "-i", "0", "--mkfs", "--osd-uuid", osd)
        key = run("ceph-authtool", "-p", "-n", "osd.0", "keyring")
        run(
            "ceph", *c, "auth", "import", "-i", "-",
            stdin=f'[osd.0]\nkey = {key}\ncaps mon = "allow profile osd"\ncaps osd = "allow *"\n',
        )  # fmt: skip
        with process(daemon("ceph-osd", "-i", "0"), log), process(daemon("radosgw", "-n", "client.rgw"), log):
            until(lambda: answers(http) and answers(https), "an answer of radosgw", 90)
            user = ("--uid", "test", "--display-name", "test", "--access-key", "key", "--secret-key", "secret")
            run("radosgw-admin", *c, "-n", "client.rgw", "user", "create", *user)
            keys = {"kind": "ceph", "access_key": "key", "secret_key": "secret"}
            yield (
                S3Server(endpoint=f"http://127.0.0.1:{http}", **keys),
                S3Server(endpoint=f"https://127.0.0.1:{https}", ca_bundle=str(certificate.bundle), **keys),
            )


def _make_keys(run: Callable[..., str]) -> None:
    run("ceph-authtool", "--create-keyring", "keyring", "--gen-key", "-n", "mon.", "--cap", "mon", "allow *")
    for name, caps in _CAPS.items():
        pairs = zip(caps[::2], caps[1::2], strict=True)
        run("ceph-authtool", "keyring", "--gen-key", "-n", name, *(x for pair in pairs for x in ("--cap", *pair)))
