"""A stand-in for the W&B server on 127.0.0.1: enough GraphQL and file stream for real W&B clients and their sweeps."""

import base64
import json
import math
import re
import threading
import time
import uuid
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import sweeps
import yaml


class WandbServer:
    """Takes what W&B clients send and keeps it for tests to read; ``with WandbServer(key) as server: …``.

    ``runs`` maps run id → {"name", "project", "group", "job_type", "sweep", "config", "history", "summary", "files"}. A
    line of history that is sent to an offset replaces what was there, as on the real server. ``artifacts`` holds what
    was said of each artifact. ``fail()`` has it answer 500, ``hang()`` never, and ``stop()`` has it gone; ``breaks`` is
    the one of these that is called after ``breaks_after`` requests. Who comes with another key gets status 401 or, with
    ``knows_no_viewer``, 200 and ``viewer: null``.

    ``sweeps`` maps sweep id → {"config", "project", "trials", "warnings"}. The trials, run id → what W&B's own search
    engine suggested, are made from what came here of the runs that said they belong to the sweep. ``stop_run()`` is the
    button on W&B's page.
    """

    def __init__(self, key: str, status: int = 200) -> None:
        self.key, self.status = key, status
        self.hanging = False
        self.knows_no_viewer = False
        self.posts, self.breaks_after = 0, math.inf
        self.breaks: Callable[[WandbServer], None] = WandbServer.fail
        self.artifacts: list[dict[str, Any]] = []
        self.artifact_files: list[bytes] = []
        self.runs: dict[str, dict[str, Any]] = {}
        self.sweeps: dict[str, dict[str, Any]] = {}
        self.stopped: set[str] = set()
        self.queries: list[str] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                server._post(self)

            def do_PUT(self) -> None:
                server._put(self)

            def log_message(self, *_arguments: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_arguments: Any) -> None:
                pass  # clients may hang up as they like

        self._http = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> "WandbServer":
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self.stop()

    def fail(self) -> None:
        """Answer every request with status 500."""
        self.status = 500

    def hang(self) -> None:
        """Answer no request."""
        self.hanging = True

    def mend(self) -> None:
        """Answer again as a server should."""
        self.status, self.hanging, self.breaks_after = 200, False, math.inf

    def stop(self) -> None:
        """Take no more connections; those that are open fail too."""
        self.status, self.hanging = 503, False
        self._http.shutdown()
        self._http.server_close()

    def run(self, run_id: str) -> dict[str, Any]:
        """Return what is kept of a run, made at first mention."""
        return self.runs.setdefault(run_id, {"history": [], "summary": {}, "files": {}, "config": {}})

    def stop_run(self, run_id: str) -> None:
        """Tell the run to stop, and the agent that started it."""
        self.stopped.add(run_id)

    def _post(self, request: BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers.get("Content-Length", 0)))
        self.posts += 1
        if self.posts > self.breaks_after:
            self.breaks(self)
        while self.hanging:
            time.sleep(0.1)
        user = base64.b64decode(request.headers.get("Authorization", "Basic ").split()[-1]).decode()
        if self.status != 200:
            return _answer(request, self.status, {"error": "broken"})
        if user.partition(":")[2] != self.key:
            if self.knows_no_viewer:
                return _answer(request, 200, {"data": {"viewer": None}})
            return _answer(request, 401, {"error": "unauthorized"})
        if match := re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", request.path):
            self._stream(self.run(match[1]), json.loads(body))
            return _answer(request, 200, {"stopped": match[1] in self.stopped})
        asked = json.loads(body)
        self.queries.append(asked["query"])
        _answer(request, 200, {"data": self._graphql(asked["query"], asked.get("variables") or {})})

    def _put(self, request: BaseHTTPRequestHandler) -> None:
        content = request.rfile.read(int(request.headers.get("Content-Length", 0)))
        _, _, run_id, path = request.path.split("/", 3)
        if run_id == "artifacts":
            self.artifact_files.append(content)
        else:
            self.run(run_id)["files"][path] = content
        _answer(request, 200, {})

    def _stream(self, run: dict[str, Any], message: dict[str, Any]) -> None:
        for name, part in (message.get("files") or {}).items():
            lines = [json.loads(line) for line in part["content"]] if name.endswith(("json", "jsonl")) else []
            if name == "wandb-history.jsonl":
                run["history"][part["offset"] : part["offset"] + len(lines)] = lines
            elif name == "wandb-summary.json" and lines:
                run["summary"] = lines[-1]
        if message.get("complete"):
            run["exit_code"] = message.get("exitcode")

    def _graphql(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        """Answer the queries of W&B 0.31's client, recognised by the field that they ask for."""
        if "upsertBucket" in query:
            run = self.run(variables["name"])
            config = json.loads(variables.get("config") or "{}")
            run["config"] |= {key: value["value"] for key, value in config.items() if key != "_wandb"}
            names = {"project": "project", "name": "displayName", "group": "groupName", "job_type": "jobType"}
            names["sweep"] = "sweep"
            run |= {key: variables.get(sent) or run.get(key) for key, sent in names.items()}
            project = {"id": "p", "name": run["project"], "entity": {"id": "e", "name": "tester"}}
            run_id = variables["name"]
            bucket = {"id": run_id, "name": run_id, "displayName": run["name"], "project": project}
            return {
                "upsertBucket": {
                    "bucket": bucket
                    | {"historyLineCount": len(self.run(run_id)["history"]), "config": "{}", "sweepName": run["sweep"]},
                    "inserted": True,
                }
            }
        if "upsertSweep" in query:
            sweep_id, config, name = uuid.uuid4().hex[:8], yaml.safe_load(variables["config"]), variables["projectName"]
            warnings = sweeps.schema_violations_from_proposed_config(config)
            self.sweeps[sweep_id] = {"config": config, "project": name, "trials": {}, "warnings": warnings}
            project = {"id": "p", "name": name, "entity": {"id": "e", "name": "tester"}}
            sweep = {"name": sweep_id, "project": project}
            return {"upsertSweep": {"sweep": sweep, "configValidationWarnings": warnings}}
        if "SweepWithRuns" in query:
            known = self.sweeps.get(variables["sweep"])
            found = known and {"config": yaml.dump(known["config"]), "runs": {"edges": []}}
            return {"project": {"sweep": found}}
        if "createAgent" in query:
            return {"createAgent": {"agent": {"id": variables["sweep"]}}}  # so that its heartbeats name the sweep
        if "agentHeartbeat" in query:
            commands = self._commands(variables["id"], json.loads(variables["runState"]))
            return {"agentHeartbeat": {"agent": {"id": variables["id"]}, "commands": json.dumps(commands)}}
        if "createRunFiles" in query:
            run_id = variables.get("run") or variables.get("runName")
            files = [{"name": name, "uploadUrl": f"{self.url}/upload/{run_id}/{name}"} for name in variables["files"]]
            return {"createRunFiles": {"runID": run_id, "uploadHeaders": [], "files": files}}
        if "commitArtifact" in query:
            return {"commitArtifact": {"artifact": {"id": "a", "digest": "d", "state": "COMMITTED"}}}
        if "createArtifactManifest" in query or "updateArtifactManifest" in query:
            file = {"id": "f", "name": "m", "displayName": "m", "uploadHeaders": []}
            file["uploadUrl"] = f"{self.url}/upload/artifacts/{uuid.uuid4()}"
            manifest = {"artifactManifest": {"id": "m", "file": file}}
            return {"createArtifactManifest": manifest, "updateArtifactManifest": manifest}
        if "createArtifactFiles" in query:
            nodes = [
                {
                    "id": "f",
                    "name": spec["name"],
                    "displayName": spec["name"],
                    "uploadUrl": f"{self.url}/upload/artifacts/{spec['name']}",
                    "uploadHeaders": [],
                    "artifact": {"id": "a"},
                    "storagePath": None,
                    "uploadMultipartUrls": None,
                }
                for spec in variables.get("input", {}).get("artifactFiles") or variables.get("artifactFiles") or []
            ]
            return {"createArtifactFiles": {"files": {"edges": [{"node": node} for node in nodes]}}}
        if "createArtifact(" in query:
            self.artifacts.append(variables.get("input") or variables)
            sequence = {"id": "s", "latestArtifact": None}
            artifact = {"id": "a", "digest": "d", "state": "PENDING", "aliases": [], "artifactSequence": sequence}
            return {"createArtifact": {"artifact": artifact}}
        if "RunResumeStatus" in query:
            return {
                "model": {"id": "p", "name": "p", "entity": {"id": "e", "name": "tester"}} | self._bucket(variables)
            }
        entity = {"id": "e", "name": "tester", "isTeam": False}
        viewer = {"id": "v", "entity": "tester", "username": "tester", "flags": "{}", "teams": {"edges": []}}
        return {
            "viewer": viewer | {"defaultEntity": entity},
            "serverInfo": {"features": [], "cliVersionInfo": {}, "latestLocalVersionInfo": None},
            "model": None,
            "project": None,
        }

    def _commands(self, sweep_id: str, running: dict[str, bool]) -> list[dict[str, Any]]:
        """Tell an agent which of its runs to stop; where it has none, what to run next."""
        if running:
            return [{"type": "stop", "run_id": run_id} for run_id in running if run_id in self.stopped]
        sweep, run_id = self.sweeps[sweep_id], uuid.uuid4().hex[:8]
        done = [self._as_the_engine_sees_it(sweep_id, *trial) for trial in sweep["trials"].items()]
        sweep["trials"][run_id] = trial = sweeps.next_run(sweep["config"], done, validate=True)
        return [{"type": "run", "run_id": run_id, "program": sweep["config"]["program"], "args": trial.config}]

    def _as_the_engine_sees_it(self, sweep_id: str, run_id: str, trial: sweeps.SweepRun) -> sweeps.SweepRun:
        run = self.runs.get(run_id, {})
        if run.get("sweep") != sweep_id:  # it never came, or as no part of the sweep
            return trial.model_copy(update={"state": "crashed"})
        return sweeps.SweepRun(
            state={None: "crashed", 0: "finished"}.get(run.get("exit_code"), "failed"),
            config={name: {"value": value} for name, value in run["config"].items()},
            summaryMetrics=run["summary"],
            sampledHistory=run["history"],
        )

    def _bucket(self, variables: dict[str, Any]) -> dict[str, Any]:
        run = self.runs.get(variables["name"])
        if run is None:
            return {"bucket": None}
        config = {key: {"value": value} for key, value in run["config"].items()}
        return {
            "bucket": {
                "id": variables["name"],
                "name": variables["name"],
                "displayName": run["name"],
                "summaryMetrics": json.dumps(run["summary"]),
                "logLineCount": 0,
                "historyLineCount": len(run["history"]),
                "eventsLineCount": 0,
                "historyTail": json.dumps([json.dumps(row) for row in run["history"][-1:]]),
                "eventsTail": "[]",
                "config": json.dumps(config),
                "tags": [],
                "notes": None,
                "wandbConfig": json.dumps({"t": 1}),
            }
        }


def _answer(request: BaseHTTPRequestHandler, status: int, content: dict[str, Any]) -> None:
    payload = json.dumps(content).encode()
    request.send_response(status)
    request.send_header("Content-Type", "application/json")
    request.send_header("Content-Length", str(len(payload)))
    request.end_headers()
    request.wfile.write(payload)
