"""System calls that the kernel refuses to a process, as it does on file systems that lack them."""

import ctypes
import os
import struct

#: numbers of link, linkat and of renameat2, by machine
LINKS = {"x86_64": (86, 265), "aarch64": (37,)}
RENAMEAT2 = {"x86_64": (316,), "aarch64": (276,)}


def refuse(*numbers):
    """Have the kernel answer EPERM to these system calls, in this process and its children, for good (seccomp)."""

    def op(code, jt, jf, k):
        return struct.pack("HBBI", code, jt, jf, k)

    program = op(0x20, 0, 0, 0)  # load the number of the call
    for index, number in enumerate(numbers):
        program += op(0x15, len(numbers) - index, 0, number)  # equal: jump to the refusal
    program += op(0x06, 0, 0, 0x7FFF0000) + op(0x06, 0, 0, 0x00050001)  # allow; EPERM
    buffer = ctypes.create_string_buffer(program)

    class Filter(ctypes.Structure):
        _fields_ = [("len", ctypes.c_ushort), ("filter", ctypes.c_void_p)]

    prog = Filter(len(program) // 8, ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
    assert libc.prctl(22, 2, ctypes.byref(prog), 0, 0) == 0, os.strerror(ctypes.get_errno())  # PR_SET_SECCOMP
