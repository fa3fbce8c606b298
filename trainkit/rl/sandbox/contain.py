"""Restricts the process that runs it, before it runs untrusted code. Linux only.

A bare interpreter runs this file's code, so it imports no other file of trainkit. Layers, each of which a machine may lack:
namespaces (user, process, network, IPC and mount; namespaces(7)), Landlock (landlock(7)), another user, a system call filter
(seccomp(2)), and resource limits, which are always there.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import struct
from itertools import chain
from typing import Any

NOBODY = 65534
"""User and group that a root process becomes: only for other users than root does the kernel limit the number of processes."""
NEW_NAMESPACES = 0x10000000 | 0x20000000 | 0x40000000 | 0x08000000 | 0x00020000  # user, process, network, IPC, mount
PDEATHSIG, KEEPCAPS, DUMPABLE, NO_NEW_PRIVS, SECCOMP = 1, 8, 4, 38, 22  # of prctl
MAY_READ_ALL = 1 << 2  # CAP_DAC_READ_SEARCH
READ, WRITE, READ_WRITE_FILE = 0b1100, 0b111_0111_1011_1110, 0b110
"""Rights of Landlock: to read files and folders; all but to execute, make devices or control them; to read and write a file."""
DENIED = {  # numbers of system calls by machine
    "x86_64": {
        "processes, programs": [57, 58, 59, 322],  # fork, vfork, execve, execveat; clone is below
        "sockets, signals, groups": [
            41,
            62,
            200,
            234,
            129,
            297,
            109,
            112,
        ],  # socket, kill, tkill, tgkill, sigqueue x2, setpgid, setsid
        "others' memory": [101, 310, 311, 298, 321, 323],  # ptrace, process_vm x2, perf_event_open, bpf, userfaultfd
        "namespaces": [272, 308, 165],  # unshare, setns, mount
        "what outlives a process": [248, 249, 250, 29, 64, 68, 240],  # keys x3, shmget, semget, msgget, mq_open
    },
    "aarch64": {
        "processes, programs": [221, 281],
        "sockets, signals, groups": [198, 129, 130, 131, 138, 240, 154, 157],
        "others' memory": [117, 270, 271, 241, 280, 282],
        "namespaces": [97, 268, 40],
        "what outlives a process": [217, 218, 219, 194, 190, 186, 180],
    },
}
DENIED_EVERYWHERE = [424, 425, 428, 430, 434, 438, 442]  # pidfd_*, io_uring, mounts: one number on all machines
CLONE = {"x86_64": (56, 0xC000003E), "aarch64": (220, 0xC00000B7)}  # number of clone, code of the architecture
CLONE3, CLONE_THREAD, EPERM, ENOSYS = 435, 0x00010000, 1, 38

LIBC = ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments: Any) -> int:
    """Calls a function of the C library; raises OSError if it returns a negative number."""
    result = getattr(LIBC, name)(*(ctypes.c_long(a) if isinstance(a, int) else a for a in arguments))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), name)
    return result


def landlock_abi() -> int:
    """Version of Landlock in this kernel, 0 if there is none."""
    return max(0, LIBC.syscall(444, None, 0, 1))


def has_filter() -> bool:
    """Whether `filter_calls` knows this machine."""
    return os.uname().machine in DENIED


def filter_calls() -> None:
    """Denies, for good, new processes, programs, sockets, signals and what else `DENIED` lists; threads are allowed."""
    clone, architecture = CLONE[os.uname().machine]
    load, equal, at_least, any_bit, ret = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, deny, kill = 0x7FFF0000, 0x00050000, 0x80000000
    program = [(load, 0, 0, 4), (equal, 1, 0, architecture), (ret, 0, 0, kill), (load, 0, 0, 0)]
    program += [(at_least, 0, 1, 0x40000000), (ret, 0, 0, deny | ENOSYS)]  # x86's second table of calls
    for number in [*chain.from_iterable(DENIED[os.uname().machine].values()), *DENIED_EVERYWHERE]:
        program += [(equal, 0, 1, number), (ret, 0, 0, deny | EPERM)]
    program += [(equal, 0, 1, CLONE3), (ret, 0, 0, deny | ENOSYS)]  # its flags are in memory; the C library then uses clone
    program += [(equal, 0, 3, clone), (load, 0, 0, 16), (any_bit, 1, 0, CLONE_THREAD), (ret, 0, 0, deny | EPERM)]
    program += [(ret, 0, 0, allow)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *row) for row in program))
    call("prctl", SECCOMP, 2, struct.pack("HP", len(program), ctypes.addressof(code)), 0, 0)


def die_with_parent(parent: int) -> None:
    """Ends this process when process `parent`, which started it, ends."""
    call("prctl", PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it has ended already
        os._exit(1)


def enter_namespaces(root: bool) -> None:
    """New namespaces; as root with all ids of the old one, else with this process's own ids alone.

    A helper process that stays in the old namespace writes the map of ids: only there root may map more than itself.
    """
    ids = {"uid_map": os.geteuid(), "gid_map": os.getegid()}
    owner, (wake, entered) = os.getpid(), os.pipe()
    helper = os.fork()
    if not helper:
        code = 1
        try:
            os.close(entered)
            if os.read(wake, 1):
                if not root:
                    _write(f"/proc/{owner}/setgroups", "deny")
                for name, own in ids.items():
                    rows = [line.split() for line in open(f"/proc/self/{name}")]  # noqa: SIM115
                    _write(f"/proc/{owner}/{name}", "".join(f"{a} {a} {n}\n" for a, _, n in rows) if root else f"{own} {own} 1")
                code = 0
        finally:
            os._exit(code)
    try:
        call("unshare", NEW_NAMESPACES)
        os.write(entered, b"1")
    finally:
        os.close(entered)
        _, status = os.waitpid(helper, 0)
    if status:
        raise PermissionError("the map of user ids was refused")
    os.close(wake)


def _write(path: str, text: str) -> None:
    file = os.open(path, os.O_WRONLY)
    os.write(file, text.encode())  # maps must come in one write
    os.close(file)


def mount_memory(folder: str, size: int) -> None:
    """An empty folder in memory of `size` bytes in place of `folder`, seen by this mount namespace alone."""
    private, plain = 0x4000 | 0x40000, 2 | 4 | 8  # MS_REC | MS_PRIVATE; MS_NOSUID | MS_NODEV | MS_NOEXEC
    call("mount", b"none", b"/", None, private, None)
    call("mount", b"tmpfs", folder.encode(), b"tmpfs", plain, f"mode=0777,size={size},nr_inodes=1024".encode())


def drop_rights(nobody: bool) -> None:
    """Gives up all capabilities; if `nobody` becomes that user, who may still read what root may, as the interpreter must."""
    keep = 0
    if nobody:
        os.setgroups([])
        call("prctl", KEEPCAPS, 1, 0, 0, 0)
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        keep = MAY_READ_ALL
    header = struct.pack("Ii", 0x20080522, 0)
    try:
        call("capset", header, struct.pack("6I", keep, keep, 0, 0, 0, 0))
    except PermissionError:  # a container may have taken this capability from root
        call("capset", header, bytes(24))
    call("prctl", NO_NEW_PRIVS, 1, 0, 0, 0)


def restrict_files(abi: int, readable: list[str], writable: str) -> None:
    """Landlock: read below `readable`, also write below `writable`; no TCP (version 4), no signals to others (version 6)."""
    handled = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(abi, 16)) - 1
    size = 8 if abi < 4 else 16 if abi < 6 else 24
    rules = call("syscall", 444, struct.pack("QQQ", handled, 3, 3)[:size], size, 0)
    rights = [(path, READ) for path in readable] + [(writable, WRITE), ("/dev/null", READ_WRITE_FILE)]
    for path, access in rights:
        try:
            file = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        call("syscall", 445, rules, 1, struct.pack("=Qi", access & handled, file), 0)
        os.close(file)
    call("syscall", 446, rules, 0)
    os.close(rules)


def limit_resources(limits: dict[str, int]) -> None:
    """Limits by their names in the module `resource`, without RLIMIT_."""
    for name, value in limits.items():
        kind = getattr(resource, f"RLIMIT_{name}")
        ceiling = resource.getrlimit(kind)[1]
        value = value if ceiling == resource.RLIM_INFINITY else min(value, ceiling)
        resource.setrlimit(kind, (value, value + (name == "CPU") if ceiling == resource.RLIM_INFINITY else value))


def contain(options: dict[str, Any]) -> None:
    """Applies all layers in `options`, in the one order that works, and returns in the process that is contained.

    With namespaces this is a child, the first process of the new process namespace: when it ends, the kernel ends all others in
    it. The process that was called waits for it, and never returns.
    """
    die_with_parent(options["parent"])
    os.environ["TMPDIR"] = options["folder"]
    if options["namespaces"]:
        enter_namespaces(os.geteuid() == 0)
        if options["tmpfs"]:
            mount_memory(options["folder"], options["limits"]["FSIZE"])
        child = os.fork()
        if child:
            os.closerange(0, 64)
            os._exit(min(255, abs(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))))
    parent = os.getppid()
    os.chdir(options["folder"])
    drop_rights(options["nobody"])
    call("prctl", PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # a change of user undoes it
    if os.getppid() != parent:
        os._exit(1)
    if options["landlock"]:
        restrict_files(options["landlock"], options["readable"], options["folder"])
    limit_resources(options["limits"])
    call("prctl", DUMPABLE, 0, 0, 0, 0)  # this process's memory and files are closed to its children
