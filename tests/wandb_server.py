"""A substitute for the W&B server on 127.0.0.1, complete enough for real W&B clients and their sweeps."""

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

ENTITY = {"id": "e", "name": "tester", "isTeam": False}
VIEWER = {"id": "v", "entity": "tester", "username": "tester", "flags": "{}", "teams": {"edges": []}}


class WandbServer:
    """Stores what W&B clients send; ``with WandbServer(key) as server: …``.

    Attributes
    ----------
    runs : dict
        Run id → what the run sent. As on the real server, a history line replaces the line at the same offset.
    artifacts, artifact_files : list
        The description of each artifact; the content of their files.
    received : list of bytes
        The bodies of all requests.
    sweeps : dict
        Sweep id → {"config", "project", "trials", "warnings"}; W&B's own search engine suggests the trials.
    failure, fails_after : callable, float
        After so many POST requests, `failure` is called: `fail` (status 500), `hang` (no response) or `stop` (gone).
    has_no_viewer : bool
        How a wrong key is refused: with status 200 and ``viewer: null`` instead of status 401.
    """

    def __init__(self, key: str) -> None:
        self.key = key
        self.status = 200
        self.hanging = False
        self.has_no_viewer = False
        self.posts = 0
        self.fails_after = math.inf
        self.failure: Callable[[WandbServer], None] = WandbServer.fail
        self.received: list[bytes] = []
        self.artifacts: list[dict[str, Any]] = []
        self.artifact_files: list[bytes] = []
        self.runs: dict[str, dict[str, Any]] = {}
        self.sweeps: dict[str, dict[str, Any]] = {}
        self._stopped_runs: set[str] = set()
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
                pass  # clients may disconnect at any time

        self._http = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> "WandbServer":
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self.stop()

    def fail(self) -> None:
        """Respond to every request with status 500."""
        self.status = 500

    def hang(self) -> None:
        """Respond to no request."""
        self.hanging = True

    def stop(self) -> None:
        """Accept no more connections, and fail on those that are open."""
        self.status, self.hanging = 503, False
        self._http.shutdown()
        self._http.server_close()

    def repair(self) -> None:
        """End `fail` or `hang`."""
        self.status, self.hanging, self.fails_after = 200, False, math.inf

    def stop_run(self, run_id: str) -> None:
        """Do what the stop button on W&B's page does: tell the run and its agent to stop."""
        self._stopped_runs.add(run_id)

    def _run(self, run_id: str) -> dict[str, Any]:
        return self.runs.setdefault(run_id, {"history": [], "summary": {}, "files": {}, "config": {}})

    def _post(self, request: BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers.get("Content-Length", 0)))
        self.received.append(body)
        self.posts += 1
        if self.posts > self.fails_after:
            self.failure(self)
        while self.hanging:
            time.sleep(0.1)
        if self.status != 200:
            return _respond(request, self.status, {"error": "broken"})
        user = base64.b64decode(request.headers.get("Authorization", "Basic ").split()[-1]).decode()
        if user.partition(":")[2] != self.key:
            if self.has_no_viewer:
                return _respond(request, 200, {"data": {"viewer": None}})
            return _respond(request, 401, {"error": "unauthorized"})
        message = json.loads(body)
        stream = re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", request.path)
        if stream:
            self._receive_stream(self._run(stream[1]), message)
            return _respond(request, 200, {"stopped": stream[1] in self._stopped_runs})
        _respond(request, 200, {"data": self._graphql(message["query"], message.get("variables") or {})})

    def _put(self, request: BaseHTTPRequestHandler) -> None:
        content = request.rfile.read(int(request.headers.get("Content-Length", 0)))
        self.received.append(content)
        _, _, run_id, path = request.path.split("/", 3)
        if run_id == "artifacts":
            self.artifact_files.append(content)
        else:
            self._run(run_id)["files"][path] = content
        _respond(request, 200, {})

    def _receive_stream(self, run: dict[str, Any], message: dict[str, Any]) -> None:
        for name, part in (message.get("files") or {}).items():
            lines = [json.loads(line) for line in part["content"]] if name.endswith(("json", "jsonl")) else []
            if name == "wandb-history.jsonl":
                run["history"][part["offset"] : part["offset"] + len(lines)] = lines
            elif name == "wandb-summary.json" and lines:
                run["summary"] = lines[-1]
        if message.get("complete"):
            run["exit_code"] = message.get("exitcode")

    def _graphql(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        """Respond to the queries of W&B 0.31's client, recognised by the field that each asks for."""
        responses: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
            "upsertBucket": self._upsert_run,
            "RunResumeStatus": self._resume_status,
            "createRunFiles": self._create_run_files,
            "upsertSweep": self._upsert_sweep,
            "SweepWithRuns": self._find_sweep,
            "createAgent": lambda variables: {"createAgent": {"agent": {"id": variables["sweep"]}}},
            "agentHeartbeat": self._heartbeat,
            "commitArtifact": lambda _: {"commitArtifact": {"artifact": {"id": "a", "digest": "d"}}},
            "ArtifactManifest": self._create_manifest,
            "createArtifactFiles": self._create_artifact_files,
            "createArtifact(": self._create_artifact,
        }
        for field, respond in responses.items():
            if field in query:
                return respond(variables)
        return {
            "viewer": VIEWER | {"defaultEntity": ENTITY},
            "serverInfo": {"features": [], "cliVersionInfo": {}, "latestLocalVersionInfo": None},
            "model": None,
            "project": None,
        }

    def _upsert_run(self, variables: dict[str, Any]) -> dict[str, Any]:
        run_id = variables["name"]
        run = self._run(run_id)
        config = json.loads(variables.get("config") or "{}")
        run["config"] |= {name: entry["value"] for name, entry in config.items() if name != "_wandb"}
        sent_names = {"project": "project", "name": "displayName", "group": "groupName", "job_type": "jobType"}
        for name, sent_name in (sent_names | {"sweep": "sweep"}).items():
            run[name] = variables.get(sent_name) or run.get(name)
        bucket = {
            "name": run_id,
            "displayName": run["name"],
            "project": {"name": run["project"], "entity": ENTITY},
            "historyLineCount": len(run["history"]),
            "sweepName": run["sweep"],
        }
        return {"upsertBucket": {"bucket": bucket, "inserted": True}}

    def _resume_status(self, variables: dict[str, Any]) -> dict[str, Any]:
        run_id = variables["name"]
        model = {"id": "p", "name": "p", "entity": ENTITY, "bucket": None}
        if run_id in self.runs:
            run = self.runs[run_id]
            model["bucket"] = {
                "name": run_id,
                "displayName": run["name"],
                "summaryMetrics": json.dumps(run["summary"]),
                "logLineCount": 0,
                "historyLineCount": len(run["history"]),
                "eventsLineCount": 0,
                "historyTail": json.dumps([json.dumps(row) for row in run["history"][-1:]]),
                "eventsTail": "[]",
                "config": json.dumps({name: {"value": value} for name, value in run["config"].items()}),
                "wandbConfig": json.dumps({"t": 1}),
            }
        return {"model": model}

    def _create_run_files(self, variables: dict[str, Any]) -> dict[str, Any]:
        run_id = variables.get("run") or variables.get("runName")
        files = [{"name": name, "uploadUrl": f"{self.url}/upload/{run_id}/{name}"} for name in variables["files"]]
        return {"createRunFiles": {"runID": run_id, "uploadHeaders": [], "files": files}}

    def _create_artifact(self, variables: dict[str, Any]) -> dict[str, Any]:
        self.artifacts.append(variables.get("input") or variables)
        artifact = {"id": "a", "state": "PENDING", "artifactSequence": {"id": "s"}}
        return {"createArtifact": {"artifact": artifact}}

    def _create_manifest(self, variables: dict[str, Any]) -> dict[str, Any]:
        url = f"{self.url}/upload/artifacts/manifest"
        manifest = {"artifactManifest": {"id": "m", "file": {"uploadUrl": url, "uploadHeaders": []}}}
        return {"createArtifactManifest": manifest, "updateArtifactManifest": manifest}

    def _create_artifact_files(self, variables: dict[str, Any]) -> dict[str, Any]:
        edges = []
        for file in variables.get("input", {}).get("artifactFiles") or variables.get("artifactFiles") or []:
            node = {"name": file["name"], "uploadUrl": f"{self.url}/upload/artifacts/{file['name']}"}
            edges.append({"node": node | {"uploadHeaders": [], "artifact": {"id": "a"}}})
        return {"createArtifactFiles": {"files": {"edges": edges}}}

    def _upsert_sweep(self, variables: dict[str, Any]) -> dict[str, Any]:
        sweep_id, project = uuid.uuid4().hex[:8], variables["projectName"]
        config = yaml.safe_load(variables["config"])
        warnings = sweeps.schema_violations_from_proposed_config(config)
        self.sweeps[sweep_id] = {"config": config, "project": project, "trials": {}, "warnings": warnings}
        sweep = {"name": sweep_id, "project": {"id": "p", "name": project, "entity": ENTITY}}
        return {"upsertSweep": {"sweep": sweep, "configValidationWarnings": warnings}}

    def _find_sweep(self, variables: dict[str, Any]) -> dict[str, Any]:
        sweep = self.sweeps.get(variables["sweep"])
        found = sweep and {"config": yaml.dump(sweep["config"]), "runs": {"edges": []}}
        return {"project": {"sweep": found}}

    def _heartbeat(self, variables: dict[str, Any]) -> dict[str, Any]:
        agent_id = variables["id"]  # which createAgent set to the sweep's id
        commands = self._next_commands(agent_id, json.loads(variables["runState"]))
        return {"agentHeartbeat": {"agent": {"id": agent_id}, "commands": json.dumps(commands)}}

    def _next_commands(self, sweep_id: str, running: dict[str, bool]) -> list[dict[str, Any]]:
        """Return which of its runs an agent must stop; if it has none, which run it must start."""
        if running:
            return [{"type": "stop", "run_id": run_id} for run_id in running if run_id in self._stopped_runs]
        sweep, run_id = self.sweeps[sweep_id], uuid.uuid4().hex[:8]
        done = [self._describe_trial(sweep_id, *trial) for trial in sweep["trials"].items()]
        sweep["trials"][run_id] = trial = sweeps.next_run(sweep["config"], done, validate=True)
        return [{"type": "run", "run_id": run_id, "program": sweep["config"]["program"], "args": trial.config}]

    def _describe_trial(self, sweep_id: str, run_id: str, trial: sweeps.SweepRun) -> sweeps.SweepRun:
        """Return a trial with its results, as the search engine reads it."""
        run = self.runs.get(run_id, {})
        if run.get("sweep") != sweep_id:  # it was never sent, or not as a part of the sweep
            return trial.model_copy(update={"state": "crashed"})
        return sweeps.SweepRun(
            state={None: "crashed", 0: "finished"}.get(run.get("exit_code"), "failed"),
            config={name: {"value": value} for name, value in run["config"].items()},
            summaryMetrics=run["summary"],
            sampledHistory=run["history"],
        )


def _respond(request: BaseHTTPRequestHandler, status: int, content: dict[str, Any]) -> None:
    payload = json.dumps(content).encode()
    request.send_response(status)
    request.send_header("Content-Type", "application/json")
    request.send_header("Content-Length", str(len(payload)))
    request.end_headers()
    request.wfile.write(payload)
