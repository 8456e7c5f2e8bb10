"""Threads that wait for the network, which nobody has to wait for.

Python joins the threads of its own pools when it ends, so that one that hears nothing of its
server would hold up Ctrl-C for as long as its time-out; these are left behind instead.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from quantcli.sources.patience import StoppedError

T = TypeVar("T")


class Connections:
    """At most ``count`` threads, started when there is work."""

    def __init__(self, count: int, name: str) -> None:
        self._count, self._name = count, name
        self._tasks: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None]
        self._tasks = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._idle = 0
        self._lock = threading.Lock()
        self._closed = False

    def submit(self, task: Callable[[], T]) -> Future[T]:
        """Do the task as soon as a thread is free; StoppedError after `close`."""
        future: Future[T] = Future()
        with self._lock:
            if self._closed:
                raise StoppedError("reading was stopped")
            self._tasks.put((future, task))
            if self._idle < self._tasks.qsize() and len(self._threads) < self._count:
                thread = threading.Thread(target=self._work, name=self._name, daemon=True)
                self._threads.append(thread)
                thread.start()
        return future

    def close(self) -> None:
        """Begin nothing more; what runs is not waited for."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            while not self._tasks.empty():
                task = self._tasks.get()
                if task is not None:
                    task[0].set_exception(StoppedError("reading was stopped"))
            for _ in self._threads:
                self._tasks.put(None)

    @property
    def busy(self) -> bool:
        """Whether threads are still at work."""
        return any(thread.is_alive() for thread in self._threads)

    def _work(self) -> None:
        while True:
            with self._lock:
                self._idle += 1
            task = self._tasks.get()
            with self._lock:
                self._idle -= 1
            if task is None:
                return
            future, work = task
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)
