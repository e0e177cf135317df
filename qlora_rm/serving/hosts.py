"""Check the Host and Origin of a request.

A foreign web page can make its own name resolve to this machine's address (DNS rebinding), and so reach a server on loopback
through the user's browser. Such requests name the page's host, so Host and Origin are checked.
"""

import ipaddress
import socket
from collections.abc import Collection
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

ANY = "*"
LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


@dataclass(frozen=True)
class AllowedHosts:
    """Names and addresses allowed in Host and Origin, with any port.

    Attributes:
        addresses: whether every IP address is allowed. DNS rebinding needs a name.
    """

    names: frozenset[str]
    addresses: bool = False

    @classmethod
    def of(cls, host: str, named: Collection[str], has_token: bool) -> "AllowedHosts | None":
        """Return what a server listening on `host` allows, or None if Host and Origin are not checked.

        With a token, which foreign pages do not have, they are checked only if hosts are `named`. Without one, the server's own
        names are allowed too: those of loopback or, elsewhere, also every IP address and this machine's names.
        """
        if ANY in named or (has_token and not named):
            return None
        names = {name.lower() for name in named} | LOOPBACK | {host.lower()}
        if has_token or is_loopback(host):
            return cls(frozenset(names))
        return cls(frozenset(names | {socket.gethostname().lower(), socket.getfqdn().lower()}), addresses=True)

    def allows(self, host: str) -> bool:
        """Return whether a host, with or without a port, is allowed."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
            port = urlsplit(f"//{host}").port
        except ValueError:
            return False
        bare = f"[{name}]" if ":" in name else name
        if host.lower() not in (bare, f"{bare}:{'' if port is None else port}"):
            return False  # more than host and port
        return name in self.names or (self.addresses and _is_address(name))

    def allows_origin(self, origin: str) -> bool:
        """Return whether the origin `scheme://host[:port]` is a web page from an allowed host."""
        scheme, separator, host = origin.partition("://")
        return scheme.lower() in ("http", "https") and bool(separator) and self.allows(host)

    def guard(self, app: ASGIApp) -> ASGIApp:
        """Wrap `app` to answer 403 to other hosts and origins."""

        async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "http" and (reason := self._refusal(scope)):
                return await JSONResponse({"error": reason}, 403)(scope, receive, send)
            return await app(scope, receive, send)

        return guarded

    def _refusal(self, scope: Scope) -> str | None:
        for header, allows in ((b"host", self.allows), (b"origin", self.allows_origin)):
            for name, value in scope["headers"]:
                if name == header and not allows(text := value.decode("latin-1")):
                    return f"{header.decode().title()} {text!r} is not allowed here; name its host with --allowed_hosts"
        return None


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach a listening address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
