"""Child processes that end with their parent, however that ends."""

import ctypes
import multiprocessing
import os
import signal
import subprocess
import sys
import threading

PR_SET_PDEATHSIG = 1  # of prctl(2): the signal that a process gets when its parent ends


def run_child(words: list, **options) -> int:
    """Runs a command and returns its exit status. If this process is interrupted, the command gets SIGTERM, so that it
    can save, and is waited for. On Linux, it is killed if this process is. `options` are those of `subprocess.Popen`.
    """
    linux = sys.platform == "linux"
    process = subprocess.Popen(words, preexec_fn=_bind_to_parent(os.getpid()) if linux else None, **options)
    try:
        return process.wait()
    except BaseException:
        process.send_signal(signal.SIGTERM)
        process.wait()
        raise


def _bind_to_parent(parent: int):
    """Returns a function that makes the process in which it is called end when `parent` ends."""
    libc = ctypes.CDLL(None)  # not in the child, where only few calls are safe

    def bind():
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it has ended already
            os._exit(1)

    return bind


def set_up_worker(_index: int, _count: int) -> None:
    """Sets up a worker process of the input pipeline: it ends with its parent, and leaves signals that are sent to the
    whole group (Ctrl-C, a job scheduler) to the parent, which needs its batches until it has saved."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
