"""A bucket on the loopback, in a process of its own: gcp-storage-emulator (2026.7.19), and what it lacks of Google's.

    python tests/bucket_server.py        # prints its address; ends when its standard input does

Added: preconditions on generations, and their header, the bounds of listings, several requests at once.
For tests, every request is counted and may be made slow or be refused: GET /tests/counts, /tests/forget,
/tests/latency?ms=100, /tests/refuse?code=403 (0: no more), /tests/age?name=x&seconds=100 (as if an object had been written so
long ago).
"""

import collections
import datetime
import functools
import http.server
import json
import logging
import sys
import threading
import time
import typing
import urllib.parse

from gcp_storage_emulator import server
from gcp_storage_emulator.handlers import buckets
from gcp_storage_emulator.storage import Storage


class Bounded(Storage):
    """bounds: (first name, name after the last) of the listing that is made."""

    bounds = ("", "")

    def get_file_list(self, *args, **options):
        found, prefixes = super().get_file_list(*args, **options)
        first, end = self.bounds
        return [x for x in found if first <= x["name"] and not (end and x["name"] >= end)], prefixes


class Handler(server.RequestHandler):
    counts: typing.ClassVar[collections.Counter] = collections.Counter()
    seconds, code, generation = 0.0, 0, 0
    one_at_a_time = threading.Lock()

    def _serve(self, method: str) -> None:
        parts = urllib.parse.urlsplit(self.path)
        query = {key: values[0] for key, values in urllib.parse.parse_qs(parts.query).items()}
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if parts.path.startswith("/tests/"):
            return self._asked(parts.path.removeprefix("/tests/"), query)
        name = urllib.parse.unquote(parts.path.partition("/o/")[2]) or query.get("name") or query.get("prefix", "")
        if method == "POST" and query.get("uploadType") == "multipart":
            name = uploaded(self.body)
        self.counts[f"{method} {name}"] += 1
        time.sleep(self.seconds)
        if self.code:
            return self._answer({"error": {"code": self.code, "message": "not yours"}}, self.code)
        with self.one_at_a_time:
            known = self.storage.objects.get("bucket", {}).get(name, {"generation": 0})
            if query.get("ifGenerationMatch", str(known["generation"])) != str(known["generation"]):
                return self._answer({"error": {"code": 412, "message": "conditionNotMet"}}, 412)
            self.generation = known["generation"]
            self.storage.bounds = query.get("startOffset", ""), query.get("endOffset", "")
            server.Router(self).handle(method)

    def end_headers(self) -> None:
        self.send_header("X-Goog-Generation", str(self.generation))
        super().end_headers()

    do_GET = functools.partialmethod(_serve, "GET")
    do_POST = functools.partialmethod(_serve, "POST")
    do_PUT = functools.partialmethod(_serve, "PUT")
    do_PATCH = functools.partialmethod(_serve, "PATCH")
    do_DELETE = functools.partialmethod(_serve, "DELETE")

    def _asked(self, what: str, query: dict) -> None:
        if what == "latency":
            Handler.seconds = float(query["ms"]) / 1000
        elif what == "refuse":
            Handler.code = int(query["code"])
        elif what == "age":
            then = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=float(query["seconds"]))
            self.storage.objects["bucket"][query["name"]]["updated"] = then.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        self._answer(dict(self.counts), 200)
        if what == "forget":
            self.counts.clear()

    def _answer(self, value: dict, code: int) -> None:
        content = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def uploaded(body: bytes) -> str:
    """The name that the first part of an upload in two parts gives."""
    return json.JSONDecoder().raw_decode(body[body.index(b"{") :].decode("utf-8", "replace"))[0]["name"]


def main() -> None:
    logging.disable(logging.CRITICAL)
    server._read_raw_data = lambda handler: handler.body
    storage = Bounded(use_memory_fs=True)
    buckets.create_bucket("bucket", storage)
    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, storage))
    web.daemon_threads = True
    threading.Thread(target=web.serve_forever, daemon=True).start()
    print(f"http://127.0.0.1:{web.server_port}", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
