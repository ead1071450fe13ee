"""Fetch an image from an https address, as named by a data set.

Only hosts named by the configuration are asked. A name is resolved once, the address must be public, and the connection
uses exactly this address. So a name cannot lead into the cluster or to a metadata service. Each redirect passes the
same checks.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Collection
from urllib.parse import urljoin, urlsplit

from rlhf.errors import UserError

DEADLINE_S = 30.0  # of an image with all redirects
MAX_BYTES = 32 * 2**20  # of an encoded image
_MAX_REDIRECTS = 3
_CHUNK = 2**16
_REDIRECTS = (301, 302, 303, 307, 308)


def fetch_image(url: str, hosts: Collection[str]) -> bytes:
    """Return the bytes behind an https address. UserError: a refused address, a failure, or too many bytes."""
    deadline = time.monotonic() + DEADLINE_S
    target = url
    for _ in range(_MAX_REDIRECTS + 1):
        host, port = _checked(target, hosts, url)
        parts = urlsplit(target)
        address = _public_address(host, port, deadline)
        connection = _Pinned(host, port, address, _left(deadline, url))
        status, location, data = _answer(connection, parts.path or "/", parts.query, deadline, url)
        if status not in _REDIRECTS:
            if status != 200:
                raise UserError(f"{_shown(url)} answers with status {status}. Correct the address.")
            return data
        target = urljoin(target, location)
    raise UserError(f"{_shown(url)} redirects more than {_MAX_REDIRECTS} times. Name the last address.")


class _Pinned(http.client.HTTPSConnection):
    """A connection to a checked address. The certificate must be the host's."""

    def __init__(self, host: str, port: int, address: str, timeout: float) -> None:
        self._context_of_tls = ssl.create_default_context()
        super().__init__(host, port, timeout=timeout, context=self._context_of_tls)
        self._address = address

    def connect(self) -> None:
        self.sock = socket.create_connection((self._address, self.port), self.timeout)
        self.sock = self._context_of_tls.wrap_socket(self.sock, server_hostname=self.host)


def _checked(target: str, hosts: Collection[str], url: str) -> tuple[str, int]:
    """Return host and port of an address. UserError unless it is https and the configuration names the host."""
    try:
        parts = urlsplit(target)
        host, port = (parts.hostname or "").rstrip(".").lower(), parts.port or 443
    except ValueError as error:
        raise UserError(f"{_shown(url)} is no valid address: {error}.") from error
    leads = "" if target == url else f"{_shown(url)} redirects to "
    if parts.scheme != "https" or not host or parts.username is not None:
        raise UserError(f"{leads}{_shown(target)} is not fetched: only https addresses without a user name are.")
    if host not in {name.lower() for name in hosts}:
        raise UserError(
            f"{leads}{_shown(target)} is not fetched: the host is not in data.image_hosts (--image-hosts of `rlhf "
            f"serve`). Add {host}, or give the image itself."
        )
    return host, port


def _public_address(host: str, port: int, deadline: float) -> str:
    """Return an address of the host. UserError: the host is unknown, or any address is not of the public internet."""
    found: list[str] = []
    reasons: list[OSError] = []

    def resolve() -> None:
        try:
            found.extend(str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except OSError as error:
            reasons.append(error)

    thread = threading.Thread(target=resolve, daemon=True)  # the resolver takes no time limit
    thread.start()
    thread.join(_left(deadline, host))
    if reasons or not found:
        reason = reasons[0].strerror if reasons else f"no answer in {DEADLINE_S:g} s"
        raise UserError(f"The name {host} cannot be resolved: {reason}. Check the name and the network.")
    for address in found:
        if not _is_public(address):
            raise UserError(
                f"{host} has the address {address}, which is not of the public internet, so the image is not fetched. "
                "Copy the image into a file."
            )
    return found[0]


def _is_public(address: str) -> bool:
    """Return whether an address is of the public internet. Forms of IPv6 with an IPv4 address inside are not."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(parsed, ipaddress.IPv6Address):
        holds_ipv4 = (parsed.ipv4_mapped, parsed.sixtofour, parsed.teredo)
        if any(inner is not None for inner in holds_ipv4) or parsed not in ipaddress.ip_network("2000::/3"):
            return False
    return parsed.is_global and not parsed.is_multicast and not parsed.is_reserved


def _answer(
    connection: http.client.HTTPConnection, path: str, query: str, deadline: float, url: str
) -> tuple[int, str, bytes]:
    """Return status, the address of a redirect, and the body of an answer."""

    def give_up() -> None:  # a server that sends a byte now and then never reaches the time limit of a socket
        if (sock := connection.sock or connected) is not None:
            with contextlib.suppress(OSError):  # the server has closed the connection
                sock.shutdown(socket.SHUT_RDWR)

    connected: socket.socket | None = None
    timer = threading.Timer(_left(deadline, url), give_up)
    timer.daemon = True
    timer.start()
    try:
        connection.connect()
        connected = connection.sock  # the connection forgets the socket once the answer begins
        connection.request("GET", f"{path}?{query}" if query else path, headers={"User-Agent": "rlhf"})
        response = connection.getresponse()
        if response.status in _REDIRECTS:
            return response.status, response.headers.get("Location", ""), b""
        data = bytearray()
        while chunk := response.read(_CHUNK):
            data += chunk
            if len(data) > MAX_BYTES:
                raise UserError(f"{_shown(url)} sends more than {MAX_BYTES // 2**20} MiB. Use a smaller image.")
        expected = response.headers.get("Content-Length")
        if response.status == 200 and expected is not None and len(data) < int(expected):
            raise OSError("the connection ended early")
        _left(deadline, url)
        return response.status, "", bytes(data)
    except (OSError, http.client.HTTPException, ValueError) as error:
        _left(deadline, url)
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{_shown(url)} cannot be fetched: {reason}. Check the address and the network.") from error
    finally:
        timer.cancel()
        connection.close()


def _left(deadline: float, url: str) -> float:
    """Return the seconds until a deadline. UserError: there are none."""
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise UserError(f"{_shown(url)} gives no whole answer in {DEADLINE_S:g} s. Copy the image into a file.")
    return seconds


def _shown(url: str) -> str:
    """Return an address for a message, without user and query: both may hold secrets."""
    scheme, colon, rest = url.partition("?")[0].partition("://")
    return repr(f"{scheme}{colon}{rest.rpartition('@')[2]}"[:200])
