"""A process that kills itself in the middle of its work with the disk. Needs no framework."""

import os
import signal

from kbtrain.checkpoint.storage import hdf5_files


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def count_calls(call=0):
    """Count this process's calls to the disk; at one of them it kills itself.

    Args:
        call: Number of the call, from 1; 0 for none. It dies just before it, or half-way in a
            write.

    Returns:
        A list with the number of calls that are left, negative if there was no such call.
    """
    left = [call]

    def watch(owner, name, half=None):
        original = getattr(owner, name)

        def deadly(*arguments, **options):
            left[0] -= 1
            if left[0] == 0:
                if half is not None:
                    half(original, *arguments)
                die()
            return original(*arguments, **options)

        setattr(owner, name, deadly)

    for name in ("fsync", "rename", "replace", "unlink", "rmdir", "mkdir"):
        watch(os, name)

    def half(write, file, data):
        view = memoryview(data).cast("B")
        write(file, view[: len(view) // 2])

    watch(hdf5_files.DeferredErrorFile, "write", half)
    return left
