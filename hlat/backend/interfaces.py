"""Listening on the cluster's interface alone: a port open on every interface is open to more than the job."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import ipaddress
import socket
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hlat.errors import UserError

INTERFACES = "GLOO_SOCKET_IFNAME"  # a name, or several with commas, as gloo reads it
_SIOCGIFADDR = 0x8915  # linux/sockios.h
_BACKLOG = 4096  # a large job connects all at once


def listen(host: str, port: int, names: Sequence[str] = (), machines: int = 1) -> tuple[socket.socket, str]:
    """A listening socket on an address that `host` resolves to, and that address.

    With names of interfaces only their addresses count, and one of theirs is taken where `host` has none of
    them (behind address translation). A loopback `host` stays one.

    Args:
        host: MASTER_ADDR. port: MASTER_PORT. names: GLOO_SOCKET_IFNAME. machines: of the job.

    Raises:
        UserError: `host` is no address of this machine, or one the other machines cannot reach.
        OSError: the port cannot be listened on.
    """
    found = _resolve(host, port)
    if not all(_is_loopback(place) for place in found):
        if names:
            own = [place for name in names for place in addresses_of(name)]
            if not own:
                fix = f"write an interface that has one ({', '.join(n for _, n in socket.if_nameindex())})"
                raise UserError(f"{', '.join(names)} has no address", where=INTERFACES, fix=fix)
            numbers = {_number(place) for place in found}
            found = [place for place in own if _number(place) in numbers] or own
    elif machines > 1:
        fix = f"set MASTER_ADDR to its address in the cluster's network, or {INTERFACES} to that interface"
        what = f"{host} is {found[0][0]} here, which no other machine reaches"
        raise UserError(what, where="MASTER_ADDR", fix=fix)
    for place in found:
        try:
            return _bind((place[0], port, *place[2:])), place[0]
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL:
                raise
    fix = f"start rank 0 on that machine, or set {INTERFACES} to the interface that {host} leads to"
    raise UserError(f"{host} ({found[0][0]}) is no address of this machine", where="MASTER_ADDR", fix=fix)


def port_error(error: OSError | OverflowError, port: int) -> UserError:
    """Says that `listen` could not have the port, and why."""
    reason = getattr(error, "strerror", None) or str(error)
    fix = "another job may use the port: choose another MASTER_PORT"
    return UserError(f"rank 0 cannot listen: {reason}", where=f"MASTER_PORT {port}", fix=fix)


def addresses_of(name: str) -> list[tuple[Any, ...]]:
    """Socket addresses (without a port) of a network interface, IPv4 first, link-local ones last."""
    found: list[tuple[Any, ...]] = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        request = struct.pack("256s", name.encode()[:15])
        with contextlib.suppress(OSError):  # no such interface, or no IPv4
            found.append((socket.inet_ntoa(fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)[20:24]), 0))
    try:
        lines = Path("/proc/net/if_inet6").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    for words in map(str.split, lines):
        if words[5] == name:
            text = str(ipaddress.IPv6Address(int(words[0], 16)))
            local = text.startswith("fe80")
            found.append((f"{text}%{name}" if local else text, 0, 0, int(words[1], 16) if local else 0))
    return sorted(found, key=lambda place: str(place[0]).startswith("fe80"))


def _resolve(host: str, port: int) -> list[tuple[Any, ...]]:
    try:
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        fix = "write the name or address of rank 0's machine"
        raise UserError(f"{host} cannot be resolved ({reason})", where="MASTER_ADDR", fix=fix) from None
    found: list[tuple[Any, ...]] = []
    for info in infos:
        place: tuple[Any, ...] = info[4]
        if info[0] == socket.AF_INET6 and place[3]:  # link-local: Python leaves the interface out of the text
            place = (f"{_number(place)}%{socket.if_indextoname(place[3])}", *place[1:])
        found.append(place)
    if any(ipaddress.ip_address(_number(place)).is_unspecified for place in found):
        fix = "write the address of rank 0's machine in the cluster's network"
        raise UserError(f"{host} stands for every interface", where="MASTER_ADDR", fix=fix)
    return found


def _number(place: tuple[Any, ...]) -> str:
    return str(place[0]).partition("%")[0]


def _is_loopback(place: tuple[Any, ...]) -> bool:
    return ipaddress.ip_address(_number(place)).is_loopback


def _bind(place: tuple[Any, ...]) -> socket.socket:
    family = socket.AF_INET6 if ":" in place[0] else socket.AF_INET
    server = socket.socket(family, socket.SOCK_STREAM)
    try:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        server.bind(place)
        server.listen(_BACKLOG)
    except BaseException:
        server.close()
        raise
    return server
