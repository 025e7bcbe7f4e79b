"""Limits of what a request may cost: sizes, times, and how many a client may send."""

import collections
import threading
import time

MAX_CAPTION = 1000  # characters of a caption
MAX_JSON_BYTES = 1 << 14  # of a body that is JSON
MAX_IMAGE_BYTES = 20 << 20  # of an image file; data/images.py limits its pixels as well
MAX_RESULTS = 100  # of one query
MAX_CONNECTIONS = 128  # open at once
MAX_QUEUED = 64  # queries that wait for the model
MAX_UPLOADS = 4  # image files that are held in memory at once
MAX_DECODED = 2  # pictures for the page that are decoded at once
RECEIVE_SECONDS = 10.0  # from the first byte that the server waits for to the last one of a request
SEND_SECONDS = 30.0  # for an answer
QUERY_SECONDS = 120.0  # that a query may wait and compute
REQUESTS_PER_SECOND, BURST = 100.0, 300.0  # of a client; each page of results asks for its pictures as well
MAX_CLIENTS = 1024  # whose rates are remembered


class RateLimiter:
    """Counts the requests of each client in a token bucket: `burst` at once, `per_second` in the long run."""

    def __init__(self, per_second: float = REQUESTS_PER_SECOND, burst: float = BURST):
        self.per_second, self.burst = per_second, burst
        self._buckets, self._lock = collections.OrderedDict(), threading.Lock()

    def allow(self, client: str, now: float | None = None) -> bool:
        """Returns whether a client may send a request now, and counts it if so. Of clients, those that came last are
        remembered."""
        now = time.monotonic() if now is None else now
        with self._lock:
            tokens, last = self._buckets.pop(client, (self.burst, now))
            tokens = min(self.burst, tokens + (now - last) * self.per_second)
            is_allowed = tokens >= 1
            self._buckets[client] = tokens - is_allowed, now
            if len(self._buckets) > MAX_CLIENTS:
                self._buckets.popitem(last=False)
            return is_allowed


class Deadlines:
    """Closes connections that take too long to send a request or to read an answer.

    A time limit for each read alone would not end a client that sends a byte now and then.
    """

    def __init__(self, interval: float = 0.25):
        self._times, self._lock, self._stopped = {}, threading.Lock(), threading.Event()
        self._interval = interval
        self._thread = threading.Thread(target=self._watch, name="deadlines", daemon=True)
        self._thread.start()

    def set(self, connection, seconds: float | None) -> None:
        """Gives a connection so many seconds from now on; None for no limit."""
        with self._lock:
            self._times.pop(connection, None)
            if seconds is not None:
                self._times[connection] = time.monotonic() + seconds

    def close(self) -> None:
        """Ends the thread that watches."""
        self._stopped.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stopped.wait(self._interval):
            now = time.monotonic()
            with self._lock:
                late = [connection for connection, end in self._times.items() if end < now]
                for connection in late:
                    del self._times[connection]
            for connection in late:
                shut_down(connection)


def shut_down(connection) -> None:
    """Ends a connection; a thread that reads from it or writes to it goes on with an error."""
    try:
        connection.shutdown(2)
    except OSError:  # closed already
        return
