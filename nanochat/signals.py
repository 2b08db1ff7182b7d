"""How a process is asked to end: Ctrl-C, a closed terminal, the signals that launchers and schedulers send.

A script ends at once, with one line. A training loop saves first: `stop_signals`.

Python runs a signal handler between two instructions of the main thread. That thread may be inside one
product, one collective or one compilation for minutes. So a second thread, the listener, reads the same
signals from a pipe. It ends the process when the main thread does not, and when the user insists.
"""

import contextlib
import os
import select
import signal
import threading
import time

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
REQUEUE = 75  # exit code of a process that was asked to end and can start again: EX_TEMPFAIL of sysexits.h
GRACE = 5  # seconds in which the main thread cleans up
ECHO = 0.1  # seconds: a wrapper may repeat the Ctrl-C that the terminal has sent; these two are one


class Stopped(KeyboardInterrupt):
    """A signal asks this process to end. As Ctrl-C does, it passes what catches every Exception."""

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


NEVER = StopRequest()  # for callers that cannot be asked: nothing sets it


def name_of(number: int) -> str:
    return signal.Signals(number).name


def exit_code(number: int) -> int:
    """130 after Ctrl-C, as shells have it; else REQUEUE."""
    return 130 if number == signal.SIGINT else REQUEUE


def number_of(e: KeyboardInterrupt) -> int:
    return getattr(e, "number", signal.SIGINT)


def under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def say(line: str):
    """One line on standard error, of the first process only. Unlike print it waits for no lock."""
    if os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(OSError):
            os.write(2, f"{line}\n".encode())


def leave(number: int, line: str = ""):
    """End this process now, whatever its threads do."""
    say(line or f"stopped by {name_of(number)}")
    os._exit(exit_code(number))


# ---- the listener ------------------------------------------------------------------------------------------


class Listener(threading.Thread):
    """Reads the numbers of the signals that come, while the main thread works."""

    def __init__(self):
        super().__init__(daemon=True, name="signals")
        self.request = None  # the StopRequest that a signal sets; None: a signal ends the process
        self.raised = False  # whether the main thread was told to end
        self.main_ended = False  # only Python's own shutdown is left to do
        self.first = None  # number of the first signal that came
        self.orphaned = False  # whether the launcher is gone: see launcher_gone
        self.last_interrupt = 0.0
        self.interrupts = 0
        self.pipe, write_end = os.pipe()
        os.set_blocking(write_end, False)
        signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))  # its signals are not ours

    def run(self):
        deadline = None
        while True:
            wait = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not select.select([self.pipe], [], [], wait)[0]:
                leave(self.first)
            for number in os.read(self.pipe, 64):
                if signal.getsignal(number) is not on_signal:
                    continue
                if self.insists(number):
                    manner = "without saving" if self.request else "at once"
                    leave(signal.SIGINT, f"SIGINT again: left {manner}")
                if self.request:
                    self.announce(number)
                    self.request.hear(number)
                elif deadline is None:
                    deadline = time.monotonic() + GRACE

    def insists(self, number: int) -> bool:
        """Whether this is the second Ctrl-C. At a second one torchrun sends a SIGTERM to its processes."""
        self.first = self.first or number
        if number == signal.SIGTERM:
            return self.first == signal.SIGINT and under_torchrun() and not self.orphaned
        if number == signal.SIGINT and time.monotonic() - self.last_interrupt > ECHO:
            self.last_interrupt = time.monotonic()
            self.interrupts += 1
        return self.interrupts > 1

    def announce(self, number: int):
        if self.first == number:
            hint = "; once more leaves at once" if number == signal.SIGINT else ""
            say(f"{name_of(number)}: the run saves its state and ends{hint}")


listener = None


def on_signal(number, _frame):
    """In the main thread, as soon as it is back in Python."""
    if listener.request:
        listener.request.hear(number)
    elif listener.main_ended:
        os._exit(exit_code(number))
    elif not listener.raised:
        listener.raised = True
        raise Stopped(number)


def listen():
    """From now on the signals in ENDING end this process. The main thread gets Stopped, and GRACE seconds
    later the process is gone.

    A signal that is ignored, as under nohup, stays so. Not under torchrun: after each signal that it passes
    on it sends a SIGKILL.
    """
    global listener
    if threading.current_thread() is not threading.main_thread():
        return
    if listener is None or not listener.is_alive():
        listener = Listener()
        listener.start()
    listener.raised = listener.main_ended = False
    for number in ENDING:
        if signal.getsignal(number) != signal.SIG_IGN or under_torchrun():
            signal.signal(number, on_signal)


def launcher_gone():
    """The process that started this one is no more: this one is asked to end. That is no second Ctrl-C."""
    if listener:
        listener.orphaned = True
    os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def left_to_the_system():
    """For a library's call that lets no other thread of Python run, and during which nothing is written:
    signals end the process as they would without Python.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ours = [number for number in ENDING if signal.getsignal(number) is on_signal]
    for number in ours:
        signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, on_signal)


def main_ended():
    """The script's own work is done: from now on a signal ends the process with no word."""
    if listener:
        listener.main_ended = True


@contextlib.contextmanager
def stop_signals():
    """A StopRequest, a threading.Event, that the signals in ENDING set from now on.

    A second Ctrl-C leaves at once.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.getsignal(number) for number in ENDING}
    listen()
    outer = listener.request
    listener.request = request
    listener.first = None
    listener.interrupts = 0
    try:
        yield request
    finally:
        listener.request = outer
        for number, handler in before.items():
            signal.signal(number, handler)
