"""Faults at the N-th file operation of real runs, and power cuts. By hand: python -m tests.injector --help

faulty_files.c  the library that makes the C library's calls fail
library.py      compiles it, and starts
server.py       which runs scripts in forked processes, as torchrun does
scenarios.py    the commands that are run
world.py        base folders in which scenarios begin and end
cases.py        a fault, then the same command again
power.py        what a disk holds after a power cut
power_cases.py  a power cut, then the same command again
judge.py        what counts as a finding
outcome.py      what a run has written
"""
