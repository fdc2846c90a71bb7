"""A place for results too large for Redis: as much of S3 as boto3 asks of it here, in memory, on loopback.

python objects.py PORT
"""

from __future__ import annotations

import hashlib
import sys
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

XML = '<?xml version="1.0" encoding="UTF-8"?>'

buckets: set[str] = set()
objects: dict[str, bytes] = {}
uploads: dict[str, dict[int, bytes]] = {}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def asked(self) -> tuple[str, dict[str, str]]:
        """`bucket/key`, and the query."""
        parts = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
        return unquote(parts.path).strip("/"), query

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def answer(self, status: int, content: bytes | str = b"", **headers: str) -> None:
        content = content.encode() if isinstance(content, str) else content
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def missing(self) -> None:
        self.answer(404, f"{XML}<Error><Code>NoSuchKey</Code><Message>No such key.</Message></Error>")

    def do_HEAD(self) -> None:
        path, _ = self.asked()
        if path in objects:
            self.answer(200, objects[path])
        elif path in buckets:
            self.answer(200)
        else:
            self.missing()

    def do_GET(self) -> None:
        path, _ = self.asked()
        if not path:
            self.answer(200, f"{XML}<ListAllMyBucketsResult><Buckets/></ListAllMyBucketsResult>")
        elif path in objects:
            self.answer(200, objects[path], **{"Content-Type": "application/octet-stream"})
        else:
            self.missing()

    def do_PUT(self) -> None:
        path, query = self.asked()
        content = self.body()
        if "/" not in path:
            buckets.add(path)
        elif "uploadId" in query:
            uploads[query["uploadId"]][int(query["partNumber"])] = content
        else:
            objects[path] = content
        self.answer(200, ETag=f'"{hashlib.md5(content).hexdigest()}"')

    def do_POST(self) -> None:
        """A large object comes in parts: a number for it first, the parts by PUT, and then the word that it is whole."""
        path, query = self.asked()
        self.body()
        bucket, _, key = path.partition("/")
        if "uploads" in query:
            name = uuid.uuid4().hex
            uploads[name] = {}
            result = "InitiateMultipartUploadResult"
            inner = f"<UploadId>{name}</UploadId>"
        else:
            parts = uploads.pop(query["uploadId"])
            objects[path] = b"".join(parts[number] for number in sorted(parts))
            result = "CompleteMultipartUploadResult"
            inner = f"<ETag>&quot;{uuid.uuid4().hex}&quot;</ETag>"
        self.answer(200, f"{XML}<{result}><Bucket>{bucket}</Bucket><Key>{key}</Key>{inner}</{result}>")

    def do_DELETE(self) -> None:
        path, _ = self.asked()
        objects.pop(path, None)
        self.answer(204)


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
