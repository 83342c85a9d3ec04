"""Who may use the server: its own page and programs on this machine, and others only with the key.

- Host: a name that this server is known by. A foreign page whose name was made to point here (DNS rebinding) has its
  own.
- Origin and Sec-Fetch-Site: a page of another origin gets nothing, neither to read nor to send. No CORS, unless an
  origin was allowed by name.
- The key, where there is one: as a bearer token, or in the cookie that the page's login sets. The cookie holds a hash
  of the key, is not readable for scripts, and is not sent by other sites.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import re
import socket
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request, cookie_parser
from starlette.responses import HTMLResponse, RedirectResponse, Response

from conversation.answering.http_requests import read_body
from conversation.answering.refusals import OPENAI, Refused
from conversation.errors import UserError

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

COOKIE = "conversation_key"
LOOPBACK_NAMES = frozenset(("localhost", "127.0.0.1", "::1"))
MIN_KEY = 16
WRONG_KEY_SECONDS = 0.5
DEFAULT_PORTS = {"http": 80, "https": 443}
OPEN_PATHS = ("/health", "/login")
_HOST = re.compile(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+)(?::([0-9]{1,5}))?", re.ASCII)
HEADERS = {
    "content-security-policy": "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
    "object-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "same-origin",  # with no-referrer a form sends "Origin: null", and the login is a form
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}


@dataclass(frozen=True)
class Access:
    """Who may use a server that listens at `host`, an address. Raises UserError for a key that is easy to guess, when
    others than this machine could use it without one, and for an allowed host or origin that no browser sends."""

    host: str = "127.0.0.1"
    key: str = ""
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        hint = "make one: python3 -c 'import secrets; print(secrets.token_urlsafe(24))'"
        if not self.key and not self.is_loopback:
            raise UserError(f"{self.host} can be reached from other machines: an API key is needed", hint)
        if self.key and (len(self.key) < MIN_KEY or not re.fullmatch(r"[!-~]+", self.key)):
            raise UserError(
                f"the API key must have at least {MIN_KEY} printable ASCII characters, without spaces", hint
            )
        for host in self.allowed_hosts:
            if _name_in(host) is None:
                raise UserError(f"{host!r} is no name of a host", "a name is written like chat.example.org")
        for origin in self.allowed_origins:
            if origin != (written := _origin_of(origin)):
                raise UserError(f"{origin!r} is no origin", f"write {written or 'it like https://chat.example.org'}")

    @property
    def is_loopback(self) -> bool:
        return ipaddress.ip_address(self.host).is_loopback

    def knows_host(self, name: str) -> bool:
        """Whether a host name, lower case, without its port, is one of this server's."""
        if name in LOOPBACK_NAMES or name == self.host or name in map(_name_in, self.allowed_hosts):
            return True
        if self.is_loopback:
            return False
        return name == socket.gethostname().lower() or _is_address(name)  # no name was resolved to an address

    def accepts(self, headers: Headers) -> bool:
        """Whether a request has the key, or needs none."""
        if not self.key:
            return True
        scheme, _, token = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            return hmac.compare_digest(token.strip().encode(), self.key.encode())
        # The standard library's parser finds no cookie at all beside one that it dislikes, as of JSON.
        cookies = cookie_parser("; ".join(headers.getlist("cookie")))
        return hmac.compare_digest(cookies.get(COOKIE, "").encode(), self.cookie.encode())

    @property
    def cookie(self) -> str:
        return hmac.new(self.key.encode(), b"the page's cookie", hashlib.sha256).hexdigest()


class Guard:
    """ASGI middleware: refuses what `Access` does not allow, and puts the security headers on every response."""

    def __init__(self, app: ASGIApp, access: Access):
        self._app, self._access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, path = Headers(scope=scope), scope["path"]
        origin = headers.get("origin")
        allowed_origin = origin if origin in self._access.allowed_origins else None

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                added = MutableHeaders(scope=message)
                added.update(HEADERS)
                if allowed_origin:
                    added["access-control-allow-origin"] = allowed_origin
                    added["access-control-expose-headers"] = "retry-after"
                    added["cross-origin-resource-policy"] = "cross-origin"
                    added.add_vary_header("Origin")
            await send(message)

        try:
            self._check_host(headers)
            self._check_origin(scope, headers)
            response: Response | None = None
            if allowed_origin and scope["method"] == "OPTIONS":
                response = _preflight(headers)
            elif path == "/login" and self._access.key:
                response = await self._login(Request(scope, receive))
            elif path not in OPEN_PATHS and not self._access.accepts(headers):
                response = await self._refuse_key(scope, headers)
        except Refused as refused:
            response = Response(refused.body(path), refused.status, refused.headers, "application/json")
        await (response or self._app)(scope, receive, send_guarded)

    def _check_host(self, headers: Headers) -> None:
        name = _name_in(headers.get("host", ""))
        if name is None or not self._access.knows_host(name):
            message = f"this server is not known as {headers.get('host', '')[:100]!r}"
            raise Refused(421, message, "allow that name: --allowed_host NAME", code="unknown_host")

    def _check_origin(self, scope: Scope, headers: Headers) -> None:
        origin = headers.get("origin")
        if origin in self._access.allowed_origins:
            return
        if origin is not None:
            own = _without_default_port(headers.get("host", ""))
            if _without_default_port(origin.partition("://")[2]) == own and origin.startswith(("http://", "https://")):
                return
        elif headers.get("sec-fetch-site", "none") in ("none", "same-origin"):
            return
        elif _opens_the_page(scope, headers):
            return
        raise Refused(
            403,
            "a page of another origin may not use this server",
            "if it is yours, allow it: --allowed_origin ORIGIN",
            code="foreign_origin",
        )

    async def _refuse_key(self, scope: Scope, headers: Headers) -> Response:
        given = "authorization" in headers
        if given:
            await asyncio.sleep(WRONG_KEY_SECONDS)
        if scope["path"] == "/" and scope["method"] in ("GET", "HEAD") and "text/html" in headers.get("accept", ""):
            return _login_page(401)
        if scope["path"].startswith(OPENAI) and given:
            raise Refused(401, "the API key is wrong")
        raise Refused(401, "the API key is wrong or missing", "send it as Authorization: Bearer KEY, or log in at /")

    async def _login(self, request: Request) -> Response:
        if request.method != "POST":
            return _login_page(200)
        form = parse_qs((await read_body(request, 4096)).decode("utf-8", "replace"))
        if not hmac.compare_digest("".join(form.get("key", [])).strip().encode(), self._access.key.encode()):
            await asyncio.sleep(WRONG_KEY_SECONDS)
            return _login_page(401, "That is not the key.")
        response = RedirectResponse("/", 303, {"cache-control": "no-store"})
        secure = request.url.scheme == "https"
        response.set_cookie(COOKIE, self._access.cookie, httponly=True, samesite="strict", secure=secure)
        return response


def _opens_the_page(scope: Scope, headers: Headers) -> bool:
    """Whether somebody follows a link to the page: that shows it in a window of its own."""
    navigates = headers.get("sec-fetch-mode") == "navigate" and headers.get("sec-fetch-dest") == "document"
    return navigates and scope["method"] == "GET" and scope["path"] in ("/", "/login")


def _preflight(asked: Headers) -> Response:
    """Allows what headers a page of an allowed origin asks for: OpenAI's client sends half a dozen of its own."""
    headers = {
        "access-control-allow-methods": "GET, POST, PUT, DELETE",
        "access-control-allow-headers": asked.get("access-control-request-headers", "authorization, content-type"),
        "access-control-max-age": "600",
    }
    return Response(status_code=204, headers=headers)


def _login_page(status: int, sentence: str = "") -> Response:
    remark = f"<p role=alert>{escape(sentence)}</p>" if sentence else ""
    return HTMLResponse(
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Log in</title>'
        '<meta name="viewport" content="width=device-width"><meta name="color-scheme" content="light dark">'
        '<main style="font-family: sans-serif; max-width: 24em; margin: 4em auto"><h1>Conversation</h1>'
        f'{remark}<form method="post" action="/login"><label>API key <input name="key" type="password" required '
        'autocomplete="current-password" autofocus></label> <button>Log in</button></form></main></html>',
        status,
        {"cache-control": "no-store"},
    )


def _name_in(host: str) -> str | None:
    """The name in a Host header, lower case, without port and brackets; None where there is none."""
    found = _HOST.fullmatch(host)
    return found[1].strip("[]").lower() if found else None


def _origin_of(url: str) -> str:
    """The origin of an address as a browser sends it: lower case, without the default port. Empty where it has none."""
    try:
        parts = urlsplit(url)
        port = "" if parts.port in (None, DEFAULT_PORTS.get(parts.scheme)) else f":{parts.port}"
    except ValueError:
        return ""
    host = parts.hostname or ""
    host = f"[{host}]" if ":" in host else host
    if parts.scheme not in DEFAULT_PORTS or not _HOST.fullmatch(f"{host}{port}"):
        return ""
    return f"{parts.scheme}://{host}{port}"


def _without_default_port(host: str) -> str:
    return re.sub(r":(80|443)\Z", "", host.lower())


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
