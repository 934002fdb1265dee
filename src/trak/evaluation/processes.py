"""Hands jobs to worker processes, each the next one when it is free."""

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Generator
from typing import Any

from trak.evaluation.plan import Job
from trak.evaluation.worker import IN_WORKER

Outcome = tuple[Job, str | None]
"""A job, and why it failed if it did."""


def run_jobs(jobs: list[Job], workers: int, setup: dict[str, Any]) -> Generator[Outcome]:
    """Runs jobs in processes.

    After a failure no further job begins, and those that run are waited for.

    Args:
        jobs: the models to train.
        workers: processes.
        setup: what `trak.evaluation.worker` is to know.

    Yields:
        Each job that ended, as it ends.
    """
    todo: queue.SimpleQueue[Job] = queue.SimpleQueue()
    for job in jobs:
        todo.put(job)
    ended: queue.SimpleQueue[Outcome | None] = queue.SimpleQueue()
    stop = threading.Event()
    crew = [_Worker(setup) for _ in range(min(workers, len(jobs)))]
    threads = [
        threading.Thread(target=worker.serve, args=(todo, ended, stop)) for worker in crew
    ]
    try:
        for thread in threads:
            thread.start()
        working = len(threads)
        while working:
            outcome = ended.get()
            if outcome is None:
                working -= 1
                continue
            if outcome[1] is not None:
                stop.set()
            yield outcome
    finally:  # also where the caller is interrupted
        stop.set()
        for worker in crew:
            worker.end()
        for thread in threads:
            if thread.ident is not None:
                thread.join()


class _Worker:
    def __init__(self, setup: dict[str, Any]) -> None:
        self._setup = {**setup, "path": sys.path, "argv": sys.argv}
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            IN_WORKER: "1",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from trak.evaluation.worker import main; main()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
            encoding="utf-8",
        )

    def serve(
        self,
        todo: "queue.SimpleQueue[Job]",
        ended: "queue.SimpleQueue[Outcome | None]",
        stop: threading.Event,
    ) -> None:
        """Hands on jobs, until there are none or one failed."""
        try:
            problem = self._ask(self._setup)
            while not stop.is_set():
                try:
                    job = todo.get_nowait()
                except queue.Empty:
                    break
                problem = problem or self._ask(job)
                ended.put((job, problem))
                if problem:
                    break
        finally:
            ended.put(None)

    def end(self) -> None:
        """Ends the process, and waits for its end."""
        self._process.terminate()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def _ask(self, message: Any) -> str | None:
        to, back = self._process.stdin, self._process.stdout
        answer = ""
        if to is not None and back is not None:
            try:
                to.write(json.dumps(message) + "\n")
                to.flush()
                answer = back.readline()
            except (BrokenPipeError, ValueError):  # it ended, or was ended
                answer = ""
        if not answer:
            code = self._process.wait()
            return (
                f"The worker process ended with exit code {code}. A negative one is a "
                "signal: -9 as a rule means that memory ran out; use fewer workers."
            )
        return json.loads(answer)["error"]
