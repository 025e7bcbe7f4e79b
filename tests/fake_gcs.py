"""A Google Cloud Storage server in memory: the part of its JSON API that gcsfs, TensorStore and Google's own client
use, without TLS or credentials."""

import contextlib
import itertools
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, quote, unquote, urlsplit

PAGE = 5  # names per page of a listing: few, so that every client has to ask for more


class FakeGcs:
    """Buckets `{bucket: {name: (bytes, generation)}}`, served at `url` inside a `with` block.

    `before(method, name)` is called before an object is read (GET), written (PUT) or deleted (DELETE). If it returns an
    HTTP status, the request fails with it.
    """

    def __init__(self, *buckets: str):
        self.buckets = {name: {} for name in buckets}
        self.before = lambda method, name: None
        self.lock = threading.RLock()
        self.generations = itertools.count(1)
        self.uploads = {}
        self.unknown = []  # requests that this server cannot answer
        methods = {f"do_{method}": _Handler.answer for method in ("GET", "POST", "PUT", "DELETE")}
        handler = type("Handler", (_Handler,), {"gcs": self} | methods)
        self._server = ThreadingHTTPServer(("localhost", 0), handler)
        self._server.handle_error = lambda *_: None  # killed clients close their connections
        self.url = f"http://localhost:{self._server.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def environment(self) -> dict:
        """Returns environment variables that make clients use this server, without credentials or metadata servers."""
        return {
            "STORAGE_EMULATOR_HOST": self.url,
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "nobody",
            "GOOGLE_CLOUD_PROJECT": "nothing",
            "NO_GCE_CHECK": "true",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # would ask by gRPC for the kind of bucket
        }

    def text(self, bucket: str, name: str) -> str:
        """Returns the text of an object."""
        return self.buckets[bucket][name][0].decode()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # sends headers and body together
    gcs: FakeGcs

    def log_message(self, *_):
        """Prints nothing for a request, unlike the base class."""

    def answer(self):
        split = urlsplit(self.path)
        self.query = {key: values[0] for key, values in parse_qs(split.query).items()}
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        for method, pattern, action in ROUTES:
            found = re.fullmatch(pattern, split.path)
            if found and self.command in method.split():
                parts = [unquote(part) for part in found.groups()]
                if parts and parts[0] not in self.gcs.buckets:
                    return self._error(404)
                return action(self, *parts)
        self.gcs.unknown.append(f"{self.command} {self.path}")
        return self._error(501)

    def bucket(self, bucket):
        self._json({"kind": "storage#bucket", "name": bucket, "locationType": "region"})

    def list(self, bucket):
        q = self.query
        prefix, delimiter = q.get("prefix", ""), q.get("delimiter")
        names, found = [], self.gcs.buckets[bucket]
        with self.gcs.lock:
            for name in sorted(found):
                if not name.startswith(prefix) or not q.get("startOffset", "") <= name:
                    continue
                if q.get("endOffset") and name >= q["endOffset"]:
                    continue
                end = name.find(delimiter, len(prefix)) if delimiter else -1
                names.append(name if end < 0 else name[: end + 1])
            names = list(dict.fromkeys(names))
            start = int(q.get("pageToken", 0))
            page = names[start : start + min(PAGE, int(q.get("maxResults", PAGE)))]
            answer = {"kind": "storage#objects", "items": [self._about(bucket, n) for n in page if n in found]}
            answer["prefixes"] = [n for n in page if n not in found]
            if start + len(page) < len(names):
                answer["nextPageToken"] = str(start + len(page))
        self._json(answer)

    def get(self, bucket, name):
        with self.gcs.lock:
            if name not in self.gcs.buckets[bucket]:
                return self._error(404)
            data, generation = self.gcs.buckets[bucket][name]
            refused = self._unmet(bucket, name) or self.gcs.before("GET", name)
            about = self._about(bucket, name)
        if refused:
            return self._error(refused)
        if self.query.get("alt") != "media":
            return self._json(about)
        status, headers = 200, {"x-goog-generation": str(generation), "Content-Type": "application/octet-stream"}
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if asked:
            first, last = asked.groups()
            start = int(first) if first else max(0, len(data) - int(last))
            stop = min(len(data), int(last) + 1) if first and last else len(data)
            if start >= max(1, len(data)):
                return self._error(416)
            status = 206
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
            data = data[start:stop]
        return self._send(status, data, headers)

    def delete(self, bucket, name):
        with self.gcs.lock:
            if name not in self.gcs.buckets[bucket]:
                return self._error(404)
            refused = self._unmet(bucket, name) or self.gcs.before("DELETE", name)
            if refused:
                return self._error(refused)
            del self.gcs.buckets[bucket][name]
        return self._send(204)

    def upload(self, bucket):
        kind = self.query.get("uploadType")
        if kind == "media":
            return self._store(bucket, self.query["name"], self.body)
        if kind == "multipart":
            boundary = b"--" + re.search('boundary="?([^";]+)', self.headers["Content-Type"])[1].encode()
            about, content = self.body.split(boundary, 2)[1], self.body.split(boundary, 2)[2]
            content = content.rsplit(boundary + b"--", 1)[0]
            about, content = (re.split(b"\r?\n\r?\n", part, maxsplit=1)[1] for part in (about, content))
            return self._store(bucket, json.loads(about)["name"], re.sub(rb"\r?\n\Z", b"", content))
        if kind == "resumable":
            token = str(next(self.gcs.generations))
            name = self.query.get("name") or json.loads(self.body)["name"]
            self.gcs.uploads[token] = (name, bytearray())
            here = f"{self.gcs.url}/upload/storage/v1/b/{quote(bucket, '')}/o?uploadType=more&upload_id={token}"
            return self._send(200, headers={"Location": here})
        name, received = self.gcs.uploads[self.query["upload_id"]]
        received += self.body
        total = self.headers.get("Content-Range", "").rpartition("/")[2]
        if total.isdigit() and int(total) == len(received):
            return self._store(bucket, name, bytes(received))
        return self._send(308, headers={"Range": f"bytes=0-{len(received) - 1}"} if received else {})

    def copy(self, bucket, name, target_bucket, target):
        with self.gcs.lock:
            if name not in self.gcs.buckets[bucket]:
                return self._error(404)
            data = self.gcs.buckets[bucket][name][0]
        if "/rewriteTo/" not in self.path:
            return self._store(target_bucket, target, data)
        size = str(len(data))
        answer = lambda about: {"done": True, "totalBytesRewritten": size, "objectSize": size, "resource": about}  # noqa: E731
        return self._store(target_bucket, target, data, answer)

    def _store(self, bucket, name, data, answer=lambda about: about):
        with self.gcs.lock:
            refused = self._unmet(bucket, name) or self.gcs.before("PUT", name)
            if refused:
                return self._error(refused)
            self.gcs.buckets[bucket][name] = (data, next(self.gcs.generations))
            about = self._about(bucket, name)
        return self._json(answer(about))

    def _unmet(self, bucket, name) -> int:
        """Returns the status of a failed condition on the generation, or 0. Generation 0 means no object."""
        generation = self.gcs.buckets[bucket].get(name, (b"", 0))[1]
        if int(self.query.get("ifGenerationMatch", generation)) != generation:
            return 412
        return 304 if self.query.get("ifGenerationNotMatch") == str(generation) else 0

    def _about(self, bucket, name) -> dict:
        data, generation = self.gcs.buckets[bucket][name]
        moment = "2026-01-01T00:00:00.000Z"
        return {
            "kind": "storage#object",
            "name": name,
            "bucket": bucket,
            "size": str(len(data)),
            "generation": str(generation),
            "metageneration": "1",
            "timeCreated": moment,
            "updated": moment,
        }

    def _json(self, answer):
        self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _error(self, status):
        error = {"error": {"code": status, "message": f"the fake says {status}"}}
        self._send(status, b"" if status == 304 else json.dumps(error).encode(), {"Content-Type": "application/json"})

    def _send(self, status, data=b"", headers=None):
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if status != 204:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # clients close the connection when they no longer need the answer
            self.wfile.write(data)
            self.wfile.flush()


ROUTES = (
    ("GET", "/storage/v1/b/([^/]+)", _Handler.bucket),
    ("GET", "/storage/v1/b/([^/]+)/o/?", _Handler.list),
    ("GET", "(?:/download)?/storage/v1/b/([^/]+)/o/([^/]+)", _Handler.get),
    ("DELETE", "/storage/v1/b/([^/]+)/o/([^/]+)", _Handler.delete),
    ("POST PUT", "/upload/storage/v1/b/([^/]+)/o", _Handler.upload),
    ("POST", "/storage/v1/b/([^/]+)/o/([^/]+)/(?:rewrite|copy)To/b/([^/]+)/o/([^/]+)", _Handler.copy),
)
