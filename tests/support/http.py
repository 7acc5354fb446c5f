"""One HTTP request at a time, with the standard library alone."""

from __future__ import annotations

from dataclasses import dataclass
from http.client import HTTPConnection
from json import dumps, loads
from typing import Any


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    data: bytes

    @property
    def json(self) -> Any:
        return loads(self.data)

    @property
    def error(self) -> dict[str, Any]:
        """The error's object, which has what the official clients read."""
        error: dict[str, Any] = self.json["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["message"]
        return error

    @property
    def events(self) -> list[Any]:
        """What a stream said, without its end."""
        lines = self.data.decode().split("\n\n")
        assert lines[-2:] == ["data: [DONE]", ""]
        return [loads(line.removeprefix("data: ")) for line in lines[:-2]]


def ask(
    port: int, method: str, path: str, body: Any = None, key: str | None = None, **headers: str
) -> Answer:
    """One request on a connection of its own."""
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    if key is not None:
        headers["Authorization"] = f"Bearer {key}"
    data = body if body is None or isinstance(body, bytes) else dumps(body).encode()
    try:
        connection.request(method, path, data, headers)
        answer = connection.getresponse()
        found = {name.lower(): value for name, value in answer.getheaders()}
        return Answer(answer.status, found, answer.read())
    finally:
        connection.close()
