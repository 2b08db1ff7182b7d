"""A stand-in for W&B's server: it keeps what the client of the installed wandb sends, and answers from that.

It knows the few GraphQL operations that `wandb.init`, `Run.log`, `wandb sync`, `wandb.Api().runs` and
`Run.scan_history` send. `runs` is its whole memory, plain JSON: {id: {"displayName", "group", "tags": [text],
"state", "config": text, "summaryMetrics": text, "history": [text, …]}}.
"""

import contextlib
import gzip
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class WandbServer(ThreadingHTTPServer):
    """One project, lab/proj. It serves trouble too.

    `status` is the HTTP status of all answers, `stream_status` that of the answers to lines of a history.
    With `answering` false it takes requests and never answers.
    """

    daemon_threads = True
    request_queue_size = 50

    def __init__(self, runs=None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.runs = runs or {}
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.closing = threading.Event()
        self.behave()

    def behave(self, status=200, stream_status=200, answering=True):
        self.status = status
        self.stream_status = stream_status
        self.answering = answering

    def handle_error(self, *_):
        """A client that was killed while it asked."""

    # ---- what wandb-core sends while a run trains ----

    def upsert(self, given: dict) -> dict:
        """A run is registered, or its configuration changes."""
        new = {
            "displayName": given["name"],
            "group": None,
            "tags": [],
            "state": "running",
            "config": "{}",
            "summaryMetrics": "{}",
            "history": [],
        }
        run = self.runs.setdefault(given["name"], new)
        run |= {key: given[key] for key in ("displayName", "config", "summaryMetrics") if given.get(key)}
        run["group"] = given.get("groupName") or run["group"]
        run["tags"] = given.get("tags") or run.get("tags", [])
        if given.get("state"):
            run["state"] = given["state"]
        project = {"id": "p", "name": "proj", "entity": {"id": "e", "name": "lab"}}
        bucket = {
            "id": given["name"],
            "name": given["name"],
            "displayName": run["displayName"],
            "config": run["config"],
            "project": project,
            "description": None,
            "sweepName": None,
            "historyLineCount": len(run["history"]),
        }
        return {"upsertBucket": {"inserted": True, "bucket": bucket}}

    def resumed(self, run_id: str) -> dict:
        """What the client asks of a run that it is to resume."""
        project = {"id": "p", "name": "proj", "entity": {"id": "e", "name": "lab"}, "bucket": None}
        if run := self.runs.get(run_id):
            project["bucket"] = {
                "id": run_id,
                "name": run_id,
                "tags": run.get("tags", []),
                "notes": None,
                **{key: run[key] for key in ("displayName", "summaryMetrics", "config")},
                "historyLineCount": len(run["history"]),
                "historyTail": json.dumps(run["history"][-1:]),
                "eventsLineCount": 0,
                "eventsTail": "[]",
                "logLineCount": 0,
                "wandbConfig": '{"t": 1}',
            }
        return {"model": project}

    def stream(self, run_id: str, sent: dict):
        """Lines of the history, the summary, the end."""
        run = self.runs[run_id]
        if sent.get("preempting"):
            run["preempting"] = True
        for name, chunk in (sent.get("files") or {}).items():
            if name == "wandb-history.jsonl":
                run["history"][chunk["offset"] :] = chunk["content"]
            elif name == "wandb-summary.json":
                run["summaryMetrics"] = chunk["content"][-1]
        if sent.get("complete"):
            run["state"] = "finished" if sent.get("exitcode") == 0 else "failed"

    # ---- what wandb.Api asks ----

    def node(self, run_id: str) -> dict:
        run = self.runs[run_id]
        steps = [json.loads(line)["_step"] for line in run["history"]]
        return {
            "id": run_id,
            "name": run_id,
            "projectId": "1",
            "tags": [],
            "readOnly": False,
            "createdAt": "2026-01-01T00:00:00",
            "systemMetrics": "{}",
            "user": {"name": "lab", "username": "lab"},
            "historyLineCount": len(steps),
            "historyKeys": {"lastStep": max(steps, default=-1), "keys": {}},
            **dict.fromkeys(("sweepName", "jobType", "commit", "heartbeatAt", "description", "notes")),
            **{key: run[key] for key in ("displayName", "group", "state", "config", "summaryMetrics")},
        }

    def page(self, given: dict) -> dict | None:
        """One page of the project's runs that match the filters, here always {} or {"group": name}."""
        if (given["entity"], given["project"]) != ("lab", "proj"):
            return None
        group = json.loads(given["filters"]).get("group")
        matching = [run_id for run_id, run in self.runs.items() if group in (None, run["group"])]
        first = int(given["cursor"] or 0)
        page = matching[first : first + given["perPage"]]
        edges = [{"node": self.node(run_id), "cursor": str(first + i + 1)} for i, run_id in enumerate(page)]
        more = first + len(page) < len(matching)
        return {
            "internalId": "1",
            "runCount": len(matching),
            "readOnly": False,
            "runs": {"edges": edges, "pageInfo": {"endCursor": str(first + len(page)), "hasNextPage": more}},
        }

    def answer(self, operation: str, query: str, given: dict) -> dict:
        """The `data` of a GraphQL answer."""
        if "viewer {" in query:
            return {
                "viewer": {
                    "id": "u",
                    "entity": "lab",
                    "username": "lab",
                    "email": "a@b.c",
                    "flags": "{}",
                    "teams": {"edges": []},
                }
            }
        if operation == "UpsertBucket":
            return self.upsert(given)
        if operation == "RunResumeStatus":
            return self.resumed(given["name"])
        if operation == "CreateRunFiles":
            files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in given["files"]]
            return {"createRunFiles": {"runID": given["run"], "uploadHeaders": [], "files": files}}
        if "historyKeys }" in query:
            return {"project": {"run": {"historyKeys": self.node(given["name"])["historyKeys"]}}}
        if operation == "RunParquetHistory":
            live = [{"_step": json.loads(line)["_step"]} for line in self.runs[given["runName"]]["history"]]
            return {"project": {"run": {"parquetHistory": {"parquetUrls": [], "liveData": live}}}}
        if operation == "HistoryPage":
            # NaN goes out as "NaN"
            rows = [json.loads(line, parse_constant=str) for line in self.runs[given["run"]]["history"]]
            rows = [json.dumps(row) for row in rows if given["minStep"] <= row["_step"] < given["maxStep"]]
            return {"project": {"run": {"history": rows}}}
        if "runs(filters" in query:
            return {"project": self.page(given)}
        return {}


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        answer = {}
        status = self.server.status
        if not self.server.answering:
            self.server.closing.wait()
            return
        if self.path == "/graphql":
            sent = json.loads(body)
            variables = sent.get("variables") or {}
            answer = {"data": self.server.answer(sent.get("operationName"), sent["query"], variables)}
        elif self.path.endswith("/file_stream"):
            if status == 200:
                status = self.server.stream_status
            if status == 200:
                self.server.stream(self.path.split("/")[-2], json.loads(body))
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_PUT = do_GET = do_POST

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serving(runs=None):
    """A WandbServer on a free port while the block runs."""
    with WandbServer(runs) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.closing.set()
            server.shutdown()
            thread.join()
