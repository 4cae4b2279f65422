"""Becomes a process of ``kbtrain launch``: a program that ``local_processes`` starts by its path.

The process asks the kernel to be killed when its parent, the launcher, dies in whatever way (on
Linux), gives its signals back to it, and is then replaced by the user's program. Doing this between
fork and exec in the launcher itself would not be safe, as that has threads.
"""

import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """``child.py PID-OF-THE-LAUNCHER PROGRAM [ARGUMENT ...]``."""
    launcher, *command = sys.argv[1:]
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL))
    if os.getppid() != int(launcher):  # it died before it could be watched
        sys.exit(1)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python ignores it, and exec would keep that
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
