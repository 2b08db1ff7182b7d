"""Signals that ask a process to end: Ctrl-C, a closed terminal, launchers and schedulers.

A script ends at once, with one line. A training loop saves first: `stop_signals`.

Python runs a signal handler between two instructions of the main thread. That thread may be inside one matrix
product, one collective or one compilation for minutes. So a second thread, the listener, reads the same
signals from a pipe. It ends the process if the main thread does not, or if the user presses Ctrl-C again.
"""

import contextlib
import os
import select
import signal
import threading
import time

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
REQUEUE = 75  # exit code of a process that was asked to end and can start again: EX_TEMPFAIL of sysexits.h
CLEANUP_SECONDS = 5  # how long the main thread may clean up
ECHO_SECONDS = 0.1  # a wrapper may repeat the terminal's Ctrl-C so soon; the two count as one


class Stopped(KeyboardInterrupt):
    """A signal asks this process to end. As with Ctrl-C, `except Exception` does not catch it."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


class StopRequest(threading.Event):
    """Set once this process, or another one of its group, is asked to stop."""

    number: int = signal.SIGTERM

    def hear(self, number: int):
        if not self.is_set():
            self.number = number
            self.set()


NEVER = StopRequest()  # for callers that nobody can ask to stop: nothing sets it


def signal_name(number: int) -> str:
    return signal.Signals(number).name


def exit_code(number: int) -> int:
    """130 after Ctrl-C, as in shells; else REQUEUE."""
    return 130 if number == signal.SIGINT else REQUEUE


def signal_number(e: KeyboardInterrupt) -> int:
    return getattr(e, "number", signal.SIGINT)


def under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def say(line: str):
    """Print a line on standard error, in the first process only. Unlike print it waits for no lock."""
    if os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(OSError):
            os.write(2, f"{line}\n".encode())


def leave(number: int, line: str = ""):
    """End this process now, whatever its threads are doing."""
    say(line or f"stopped by {signal_name(number)}")
    os._exit(exit_code(number))


# ---- the listener ------------------------------------------------------------------------------------------


class Listener(threading.Thread):
    """Reads the numbers of signals while the main thread works."""

    def __init__(self):
        super().__init__(daemon=True, name="signals")
        self.request = None  # the StopRequest that a signal sets; None: a signal ends the process
        self.stop_raised = False  # whether Stopped was raised in the main thread
        self.main_ended = False  # whether only Python's own shutdown is left
        self.first_number = None  # of the first signal
        self.orphaned = False  # whether the launcher is gone: see launcher_gone
        self.last_interrupt = 0.0
        self.interrupts = 0
        self.pipe, write_end = os.pipe()
        os.set_blocking(write_end, False)
        signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))  # a child's signals are its own

    def run(self):
        deadline = None
        while True:
            wait = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not select.select([self.pipe], [], [], wait)[0]:
                leave(self.first_number)
            for number in os.read(self.pipe, 64):
                if signal.getsignal(number) is not on_signal:
                    continue
                if self.must_leave(number):
                    manner = "without saving" if self.request else "at once"
                    leave(signal.SIGINT, f"SIGINT again: left {manner}")
                if self.request:
                    self.announce(number)
                    self.request.hear(number)
                elif deadline is None:
                    deadline = time.monotonic() + CLEANUP_SECONDS

    def must_leave(self, number: int) -> bool:
        """Whether this is a second Ctrl-C. After one, torchrun sends SIGTERM to its processes."""
        self.first_number = self.first_number or number
        if number == signal.SIGTERM:
            return self.first_number == signal.SIGINT and under_torchrun() and not self.orphaned
        if number == signal.SIGINT and time.monotonic() - self.last_interrupt > ECHO_SECONDS:
            self.last_interrupt = time.monotonic()
            self.interrupts += 1
        return self.interrupts > 1

    def announce(self, number: int):
        if self.first_number == number:
            hint = "; once more leaves at once" if number == signal.SIGINT else ""
            say(f"{signal_name(number)}: the run saves its state and ends{hint}")


listener = None


def on_signal(number, _frame):
    """Runs in the main thread, as soon as that is back in Python."""
    if listener.request:
        listener.request.hear(number)
    elif listener.main_ended:
        os._exit(exit_code(number))
    elif not listener.stop_raised:
        listener.stop_raised = True
        raise Stopped(number)


def listen():
    """Let the signals in ENDING end this process from now on.

    Stopped is raised in the main thread, and CLEANUP_SECONDS later the process ends in any case. A signal
    that is ignored, as under nohup, stays ignored. But not under torchrun: after a signal that it passes
    on, it sends SIGKILL.
    """
    global listener
    if threading.current_thread() is not threading.main_thread():
        return
    if listener is None or not listener.is_alive():
        listener = Listener()
        listener.start()
    listener.stop_raised = False
    listener.main_ended = False
    for number in ENDING:
        if signal.getsignal(number) != signal.SIG_IGN or under_torchrun():
            signal.signal(number, on_signal)


def is_asked_to_stop() -> bool:
    """Whether a signal has asked a training loop of this process to save and end: see stop_signals."""
    return bool(listener and listener.request and listener.request.is_set())


def launcher_gone():
    """Ask this process to end because the one that started it has ended. This is no second Ctrl-C."""
    if listener:
        listener.orphaned = True
    os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def default_handlers():
    """In this block signals end the process at once, as they would without Python.

    For a library's call that lets no other Python thread run and writes no files.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    own_signals = [number for number in ENDING if signal.getsignal(number) is on_signal]
    for number in own_signals:
        signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        for number in own_signals:
            signal.signal(number, on_signal)


def main_ended():
    """The script's own work is done: from now on a signal ends the process without a line."""
    if listener:
        listener.main_ended = True


@contextlib.contextmanager
def stop_signals():
    """Yields a StopRequest, a threading.Event, which the signals in ENDING set.

    A second Ctrl-C ends the process at once.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    handlers = {number: signal.getsignal(number) for number in ENDING}
    listen()
    outer = listener.request
    listener.request = request
    listener.first_number = None
    listener.interrupts = 0
    try:
        yield request
    finally:
        listener.request = outer
        for number, handler in handlers.items():
            signal.signal(number, handler)
