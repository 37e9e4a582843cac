"""Who can reach a server that listens at a loopback address: nobody from elsewhere, at any of its ports."""

from __future__ import annotations

import os
import socket
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

import httpx

from tests.e2e.server import Server

LISTEN = "0A"


def listening() -> dict[str, tuple[str, int]]:
    """By inode: the address and port of each TCP socket of this machine that listens."""
    found = {}
    for family in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{family}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTEN:
                address, _, port = fields[1].partition(":")
                found[fields[9]] = (_address(address), int(port, 16))
    return found


def _address(words: str) -> str:
    """The kernel writes addresses as 32-bit words in the machine's order."""
    raw = b"".join(bytes.fromhex(words[i : i + 8])[::-1] for i in range(0, len(words), 8))
    if len(raw) == 4:
        return str(IPv4Address(raw))
    address = IPv6Address(raw)
    return str(address.ipv4_mapped or address)


def sockets_of(pid: int) -> list[str]:
    """Inodes of its open sockets; none if it has ended."""
    folder, found = Path(f"/proc/{pid}/fd"), []
    try:
        names = os.listdir(folder)
    except OSError:
        return []
    for name in names:
        try:
            target = os.readlink(folder / name)
        except OSError:
            continue  # closed meanwhile
        if target.startswith("socket:["):
            found.append(target[8:-1])
    return found


def ports_of(server: Server) -> set[int]:
    """All at which a process of it listens."""
    addresses = listening()
    inodes = (inode for pid in server.processes() for inode in sockets_of(pid))
    return {addresses[inode][1] for inode in inodes if inode in addresses}


def test_the_kernel_s_words_are_read_as_addresses() -> None:
    with socket.socket() as here, socket.socket(socket.AF_INET6) as everywhere:
        here.bind(("127.0.0.1", 0))
        everywhere.bind(("::", 0))
        here.listen()
        everywhere.listen()
        ours = {address for inode, address in listening().items() if inode in sockets_of(os.getpid())}
        assert {("127.0.0.1", here.getsockname()[1]), ("::", everywhere.getsockname()[1])} <= ours


def test_no_process_of_a_server_at_a_loopback_address_listens_elsewhere(server: Server) -> None:
    """HAProxy and its pages, routers, calls between deployments, and all of Ray."""
    addresses, seen, open_to_others = listening(), set(), []
    for pid, command in server.processes().items():
        for inode in sockets_of(pid):
            if inode in addresses:
                host, port = addresses[inode]
                seen.add(port)
                if host not in ("127.0.0.1", "::1"):
                    open_to_others.append((host, port, command[:80]))
    assert server.port in seen
    assert len(seen) > 10, "processes of Ray listen too"
    assert not open_to_others


def test_a_router_s_own_port_asks_for_the_same_keys(server: Server) -> None:
    """HAProxy sends requests straight to it; on a machine of others so could they."""
    addresses = listening()
    routers = [pid for pid, command in server.processes().items() if "ServeReplica:chorus:Router" in command]
    ports = {addresses[inode][1] for pid in routers for inode in sockets_of(pid) if inode in addresses}
    answers = []
    for port in ports:
        try:
            answers.append(httpx.get(f"http://127.0.0.1:{port}/v1/models", timeout=5, trust_env=False).status_code)
        except httpx.HTTPError:
            continue  # a port of Ray's, which speaks gRPC
    assert answers == [401]
