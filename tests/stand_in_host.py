"""A host in a process of its own that speaks as an NDIF server does and has never heard of patchkit.

    python tests/stand_in_host.py MODEL_DIR[=DTYPE] ...

It prints its port. Jobs run one after the other, on frozen weights, as NDIF's model actor runs them. POST /fault with
`{"kind": ..., "times": N, "after": M}` makes the next N jobs or calls go wrong, but for M before them; see `FAULTS`. The
kind "go-on" runs the jobs that were stalled. The real server is tested by
`make test-remote`; this one is for what needs no Ray: that everything travels, and what is said when something fails.
"""

from __future__ import annotations

import io
import json
import sys
import threading
import time
import traceback
import uuid
from collections import Counter
from email.parser import BytesParser
from email.policy import HTTP
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.abc import MetaPathFinder
from importlib.metadata import version
from typing import Any

FAULTS = ("unavailable", "refuse-key", "lose", "out-of-memory", "time-limit", "cancel", "break", "stall")


class _Hidden(MetaPathFinder):
    """Nothing of the client's packages is installed here."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.split(".")[0] in {"patchkit", "jaxtyping", "beartype", "typer", "tests"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


class Jobs:
    """The models, the jobs, and what is to go wrong."""

    def __init__(self, models: dict[str, Any]) -> None:
        self.models = models
        self.responses: dict[str, dict[str, Any]] = {}
        self.results: dict[str, bytes] = {}
        self.faults: Counter[str] = Counter()
        # How often all goes well before the fault; jobs that wait to be let go on with.
        self.well: Counter[str] = Counter()
        self.stalled: list[tuple[str, dict[str, Any], bytes, str]] = []
        self.seen: Counter[str] = Counter()
        self.lock = threading.Lock()

    def fails(self, kind: str) -> bool:
        if self.faults[kind] <= 0:
            return False
        if self.well[kind] > 0:
            self.well[kind] -= 1
            return False
        self.faults[kind] -= 1
        return True

    def start(self, job: str, *given: Any) -> None:
        # Known at once, however long the job before it takes.
        self.responses[job] = {"id": job, "status": "QUEUED", "description": "", "data": None}
        threading.Thread(target=self.run, args=(job, *given), daemon=True).start()

    def go_on(self) -> None:
        while self.stalled:
            self.start(*self.stalled.pop())

    def run(self, job: str, envelope: dict[str, Any], blob: bytes, url: str) -> None:
        if self.fails("stall"):
            self.responses[job] = {"id": job, "status": "RUNNING", "description": "", "data": None}
            self.stalled.append((job, envelope, blob, url))
            return
        with self.lock:
            status, said, data = "COMPLETED", "Your job has been completed.", f"{url}/result/{job}"
            try:
                self.results[job] = self.execute(envelope, blob)
            except Exception:
                status, said, data = "ERROR", traceback.format_exc(), None
            if self.fails("out-of-memory"):
                status, said, data = (
                    "ERROR",
                    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate",
                    None,
                )
            elif self.fails("time-limit"):
                status, said, data = "ERROR", "Your job exceeded the execution timeout of 5.0s.", None
            elif self.fails("cancel"):
                status, said, data = "ERROR", "Your job was cancelled or preempted by the server.", None
            elif self.fails("break"):
                status, said, data = "ERROR", "Traceback ...\nRuntimeError: the hosted module broke", None
            self.responses[job] = {"id": job, "status": status, "description": said, "data": data}

    def execute(self, envelope: dict[str, Any], blob: bytes) -> bytes:
        import torch
        import zstandard
        from nnsight.schema.request import RequestModel
        from nnsight.tracing.tracer import _saves, dec, inc

        if envelope["model_key"] not in self.models:
            raise LookupError(f"Could not deploy this model: {envelope['model_key']}")
        lm = self.models[envelope["model_key"]]
        lm._remoteable_set_env(envelope["env"])
        tracer = RequestModel.deserialize(
            blob, lm._remoteable_persistent_objects(), compress=envelope["compress"]
        )
        inc()
        try:
            tracer.execute(tracer.info.code)
            saves = _saves()
            saved = {name: value for name, value in tracer.info.frame.f_locals.items() if id(value) in saves}
        finally:
            dec()
        buffer = io.BytesIO()
        torch.save(saved, buffer)
        return zstandard.ZstdCompressor().compress(buffer.getvalue())


class Handler(BaseHTTPRequestHandler):
    jobs: Jobs

    def do_GET(self) -> None:
        what, _, which = self.path.strip("/").partition("/")
        jobs = self.jobs
        jobs.seen[what] += 1
        if jobs.fails("unavailable"):
            return self.reply(503, {"detail": "Service temporarily unavailable"})
        if what == "response":
            found = jobs.responses.get(which)
            return self.reply(404, {"detail": "none"}) if found is None else self.reply(200, found)
        if what == "result":
            return self.reply(200, jobs.results[which])
        if what == "seen":
            return self.reply(200, dict(jobs.seen))
        if what == "env":
            packages = {name: version(name) for name in ("nnsight", "torch", "transformers")}
            return self.reply(200, {"python_version": sys.version, "packages": packages})
        if what == "status":
            up = {"application_state": "RUNNING", "deployment_level": "HOT"}
            return self.reply(
                200, {"deployments": {key: up | {"repo_id": _path(key)} for key in jobs.models}}
            )
        if what in ("ping", "connected", "whoami"):
            return self.reply(200, {"email": None, "tags": []} if what == "whoami" else "pong")
        return self.reply(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        jobs = self.jobs
        if self.path == "/fault":
            asked = json.loads(body)
            if asked["kind"] == "go-on":
                jobs.go_on()
            else:
                jobs.faults[asked["kind"]] += asked["times"]
                jobs.well[asked["kind"]] = asked.get("after", 0)
            return self.reply(200, {})
        jobs.seen["request"] += 1
        jobs.seen["bytes"] += len(body)
        if jobs.fails("unavailable"):
            return self.reply(503, {"detail": "Service temporarily unavailable"})
        if jobs.fails("refuse-key"):
            key = self.headers.get("ndif-api-key", "")
            return self.reply(400, {"detail": f"Invalid API key format: '{key}'."})
        head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
        parts = {
            part.get_param("name", header="content-disposition"): part.get_payload(decode=True)
            for part in BytesParser(policy=HTTP).parsebytes(head + body).iter_parts()
        }
        job = uuid.uuid4().hex
        url = f"http://{self.headers['Host']}"
        if not jobs.fails("lose"):
            jobs.start(job, json.loads(parts["data"]), parts["blob"], url)
        return self.reply(200, {"id": job, "status": "RECEIVED", "description": "", "data": None})

    def reply(self, code: int, body: Any) -> None:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *args: Any) -> None:
        pass


def _path(key: str) -> str:
    return json.loads(key.partition(":")[2])["repo_id"]


def main(given: list[str]) -> None:
    sys.meta_path.insert(0, _Hidden())
    import torch
    from nnsight.modeling import huggingface
    from nnsight.modeling.huggingface import HuggingFaceModel

    torch.set_num_threads(1)
    models = {}
    for each in given:
        path, _, dtype = each.partition("=")
        huggingface._ID_CACHE[path] = path
        where = json.dumps({"repo_id": path, "revision": None, "task": "text-generation"})
        key = f"nnsight.modeling.transformers.TransformersModel:{where}"
        lm: Any = HuggingFaceModel.from_model_key(key, dispatch=True, dtype=dtype or "float32", device="cpu")
        lm._module.requires_grad_(False)
        models[key] = lm
    Handler.jobs = Jobs(models)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_address[1], flush=True)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    server.serve_forever()


def _end_with_parent() -> None:
    # The pipe ends when whoever started this does.
    sys.stdin.read()
    time.sleep(0.1)
    import os

    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
