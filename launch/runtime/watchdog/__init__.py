"""The watchdogs of a run: a small process beside each of its processes, which find out that one of them is lost.

A watchdog needs no lock of its process, so that one whose main thread holds Python's lock for minutes (compilation, a
large pickle) still counts as alive, and one that is stopped (SIGSTOP) is told from one that is busy. Each watches its
own process in the system's table, and beats over a connection to the watchdog of the main process (rank 0). A
connection that closes without a farewell, or on which nothing has come for the timeout, is that of a lost process. The
main process's watchdog says so, once, and has all others leave; where it is itself the lost one, that of the lowest
rank that still answers speaks.

`launch.runtime.heartbeat` starts them. They need the standard library alone, so that they start in milliseconds.
"""
