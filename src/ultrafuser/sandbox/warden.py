"""The first process inside a sandbox: it shuts the doors, starts the program, watches it, and says how it ended.

A script of the standard library alone, started by `runner.py` as

    python -I -S warden.py DESCRIPTOR

with JSON to be read from that descriptor, and written, with how the program ended, to the one named in it. It is
process 1 of a namespace of its own, so that everything the program leaves behind ends with it.
"""

import contextlib
import ctypes
import errno
import functools
import json
import os
import platform
import resource
import signal
import stat
import struct
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

POLL_S = 0.02
MAX_FILES = 4096
SOCKET_BYTES = 2**18  # that the kernel lets one hold, TCP's aside
TCP_BYTES = (
    2**22,
    6 * 2**20,
)  # sent and received, unless the kernel says otherwise; even for a single byte each
OLD_ROOT = "/.old"
STACK_BYTES = 2**22
"""Of each thread, the first included: sixty are then a quarter of 1 GiB of addresses, and recursion through C still
goes several thousand calls deep."""

# From Linux' headers.
CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS, CLONE_NEWIPC = 0x20000, 0x2000000, 0x4000000, 0x8000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 24, 38
SECCOMP_MODE_FILTER = 2
SECCOMP_RET_ALLOW, SECCOMP_RET_ERRNO, SECCOMP_RET_KILL = 0x7FFF0000, 0x00050000, 0x80000000
SECCOMP_RET_EPERM = SECCOMP_RET_ERRNO | errno.EPERM
BPF_LOAD, BPF_AND, BPF_JUMP, BPF_EQUAL, BPF_AT_LEAST, BPF_ANY_BIT = 0x20, 0x54, 0x05, 0x15, 0x35, 0x45
BPF_RETURN = 0x06
AF_UNIX, AF_INET, AF_INET6 = 1, 2, 10
SOCK_DGRAM, SIOCSIFFLAGS, IFF_UP = 2, 0x8914, 1
MAP_SHARED, MAP_ANONYMOUS, MAP_HUGETLB, MADV_PAGEOUT = 1, 0x20, 0x40000, 21
SOL_SOCKET, SO_SNDBUF, SO_RCVBUF, PRIO_USER = 1, 7, 8, 2

# What no program that computes something needs: memory that belongs to no process (shared memory without a file, pages
# given to a pipe or from it to a socket, attributes of files, rules), what watches the host's files, other processes'
# memory and priority, keys, mounts, namespaces, modules of the kernel, and its youngest interfaces. Numbers on x86-64
# and on 64-bit ARM.
FORBIDDEN = {
    "shmget": (29, 194), "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180),
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "userfaultfd": (323, 282), "vmsplice": (278, 75),
    "splice": (275, 76), "tee": (276, 77), "sendfile": (40, 71),
    "landlock_create_ruleset": (444, 444), "landlock_add_rule": (445, 445), "landlock_restrict_self": (446, 446),
    "inotify_init": (253, 26), "inotify_init1": (294, 26),
    "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7), "setxattrat": (463, 463),
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "pidfd_getfd": (438, 438), "kcmp": (312, 272), "perf_event_open": (298, 241), "bpf": (321, 280),
    "process_madvise": (440, 440), "io_setup": (206, 0), "process_mrelease": (448, 448), "move_pages": (279, 239),
    "migrate_pages": (256, 238), "ioprio_set": (251, 30), "fanotify_init": (300, 262),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "fsopen": (430, 430),
    "open_tree": (428, 428), "move_mount": (429, 429), "unshare": (272, 97), "setns": (308, 268),
    "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442),
    "open_tree_attr": (467, 467), "quotactl_fd": (443, 443), "kexec_file_load": (320, 294),
    "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106), "kexec_load": (246, 104),
    "io_uring_setup": (425, 425), "acct": (163, 89), "quotactl": (179, 60), "syslog": (103, 116),
    "reboot": (169, 142), "swapon": (167, 224), "swapoff": (168, 225), "settimeofday": (164, 170),
    "open_by_handle_at": (304, 265), "name_to_handle_at": (303, 264),
}  # fmt: skip
# What depends on an argument: numbers as above, which argument, tests of its lower half (all that the kernel looks at
# here), the answer if one of them holds, and the answer if none does; None is for the next entry to say.
NAMESPACES = (BPF_ANY_BIT, CLONE_NEWNS | CLONE_NEWCGROUP | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWUSER | CLONE_NEWPID
              | CLONE_NEWNET)  # fmt: skip
ITSELF = ([(BPF_EQUAL, 0)], SECCOMP_RET_ALLOW, SECCOMP_RET_EPERM)
FAMILIES = (  # others may lead out of the network's namespace, as vsock does
    [(BPF_EQUAL, family) for family in (AF_UNIX, AF_INET, AF_INET6)],
    None,
    SECCOMP_RET_ERRNO | errno.EAFNOSUPPORT,
)
PROTOCOLS = (  # the usual one of a family, TCP, UDP; others load modules, and hold memory that is not seen here
    [(BPF_EQUAL, protocol) for protocol in (0, 6, 17)],
    SECCOMP_RET_ALLOW,
    SECCOMP_RET_ERRNO | errno.EPROTONOSUPPORT,
)
# Shared memory without a file keeps all its pages for as long as one of them is mapped, and counts for nobody; huge
# pages and those that were moved out are not counted either. A mask leaves what the tests after it look at.
UNCOUNTED = [
    (BPF_ANY_BIT, MAP_HUGETLB),
    (BPF_AND, MAP_SHARED | MAP_ANONYMOUS),
    (BPF_EQUAL, MAP_SHARED | MAP_ANONYMOUS),
]
DEPENDING: list[tuple[tuple[int, int], int, list[tuple[int, int]], int | None, int | None]] = [
    ((9, 222), 3, UNCOUNTED, SECCOMP_RET_EPERM, SECCOMP_RET_ALLOW),  # mmap
    ((28, 233), 2, [(BPF_EQUAL, MADV_PAGEOUT)], SECCOMP_RET_EPERM, SECCOMP_RET_ALLOW),  # madvise
    ((56, 220), 0, [NAMESPACES], SECCOMP_RET_EPERM, SECCOMP_RET_ALLOW),  # clone
    # clone3: its flags are in memory, where filters cannot look; without it, the C library takes clone.
    ((435, 435), 0, [], SECCOMP_RET_ALLOW, SECCOMP_RET_ERRNO | errno.ENOSYS),
    ((41, 198), 0, *FAMILIES),  # socket
    ((41, 198), 2, *PROTOCOLS),
    ((53, 199), 0, *FAMILIES),  # socketpair
    ((53, 199), 2, *PROTOCOLS),
    # Process 1 may belong to the same user, who could set its limits or have it wait for ever.
    ((302, 261), 0, *ITSELF),  # prlimit64
    ((142, 118), 0, *ITSELF),  # sched_setparam
    ((144, 119), 0, *ITSELF),  # sched_setscheduler
    ((203, 122), 0, *ITSELF),  # sched_setaffinity
    ((314, 274), 0, *ITSELF),  # sched_setattr
    # setsockopt: the size of buffers, which may be anything on some machines, is accepted and left as it is.
    ((54, 208), 1, [(BPF_EQUAL, SOL_SOCKET)], None, SECCOMP_RET_ALLOW),
    ((54, 208), 2, [(BPF_EQUAL, SO_SNDBUF), (BPF_EQUAL, SO_RCVBUF)], SECCOMP_RET_ERRNO, SECCOMP_RET_ALLOW),
    # setpriority: of all but process 1, alone or with everything else of its user.
    ((141, 140), 0, [(BPF_EQUAL, PRIO_USER)], SECCOMP_RET_EPERM, None),
    ((141, 140), 1, [(BPF_EQUAL, 1)], SECCOMP_RET_EPERM, SECCOMP_RET_ALLOW),
]
MACHINES = {"x86_64": (0, 0xC000003E, 0x40000000), "aarch64": (1, 0xC00000B7, None)}
"""Column of the numbers above, name of the architecture in filters, first number of calls in x86-64's other form."""

libc = ctypes.CDLL(None, use_errno=True)


def check(result: int, what: str) -> None:
    """Raise for a call of the C library that failed."""
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    """Mount something."""
    kind_bytes = None if kind is None else kind.encode()
    check(
        libc.mount(source.encode(), target.encode(), kind_bytes, flags, options.encode()),
        f"mount on {target}",
    )


def end_with_parent() -> None:
    """Have this process killed when the one that started it is gone."""
    check(libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "end with parent")


def separate(user: bool) -> None:
    """Leave the namespaces of whoever started this; what is forked from now on is process 1 of its own.

    Args:
        user: through a namespace of users, too, which who is not root needs for all others.
    """
    uid, gid = os.getuid(), os.getgid()
    others = CLONE_NEWNS | CLONE_NEWCGROUP | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET
    check(libc.unshare(others | (CLONE_NEWUSER if user else 0)), "unshare")
    if user:
        for name, line in (
            ("setgroups", "deny"),
            ("uid_map", f"{uid} {uid} 1"),
            ("gid_map", f"{gid} {gid} 1"),
        ):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(line)


def raise_loopback() -> None:
    """Let programs inside talk to each other through addresses of this machine, as Bubblewrap does."""
    request = struct.pack("16sh22x", b"lo", IFF_UP)
    descriptor = libc.socket(AF_INET, SOCK_DGRAM, 0)
    try:
        check(libc.ioctl(descriptor, ctypes.c_ulong(SIOCSIFFLAGS), request), "loopback")
    finally:
        os.close(descriptor)


def build_root(task: dict[str, Any]) -> None:
    """A new root: what can be read, /proc, a few devices and files, and the few folders that can be written to."""
    mount("none", "/", None, MS_REC | MS_PRIVATE)
    root = "/tmp"
    mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, "mode=755,size=1m")
    for path in task["readable"]:
        target = root + path
        if os.path.islink(path):
            os.makedirs(os.path.dirname(target), exist_ok=True)
            os.symlink(os.readlink(path), target)
        elif os.path.isdir(path):
            os.makedirs(target, exist_ok=True)
            mount(path, target, None, MS_BIND)
            mount("none", target, None, MS_BIND | MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NODEV)
    for path, content in {**task["files"], **dict.fromkeys(task["devices"], "")}.items():
        os.makedirs(os.path.dirname(root + path), exist_ok=True)
        with open(root + path, "w") as file:
            file.write(content)
    for path, device in task["devices"].items():
        mount(device, root + path, None, MS_BIND)
    for path in ("/proc", *task["writable"], OLD_ROOT):
        os.mkdir(root + path)
    mount("proc", f"{root}/proc", "proc", MS_NOSUID | MS_NODEV | MS_RDONLY)
    size = task["limits"]["disk_bytes"]
    for path in task["writable"]:
        mount("tmpfs", root + path, "tmpfs", MS_NOSUID | MS_NODEV, f"mode=1777,size={size}")
    number = {"x86_64": 155, "aarch64": 41}[platform.machine()]
    check(libc.syscall(number, root.encode(), f"{root}{OLD_ROOT}".encode()), "pivot_root")
    os.chdir("/")
    check(libc.umount2(OLD_ROOT.encode(), MNT_DETACH), "umount")
    os.rmdir(OLD_ROOT)
    mount("none", "/", None, MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NODEV)


def forbid_calls() -> None:
    """Have the kernel refuse what `FORBIDDEN` and `DEPENDING` say to this process and all that come from it."""
    column, architecture, other_form = MACHINES[platform.machine()]
    numbers = sorted(pair[column] for pair in FORBIDDEN.values())
    # (code, jump if true, jump if false, value); what a filter reads: number at 0, architecture at 4, arguments from
    # 16, eight bytes each, on both machines with the lower half first.
    program = [(BPF_LOAD, 0, 0, 4), (BPF_EQUAL, 1, 0, architecture), (BPF_RETURN, 0, 0, SECCOMP_RET_KILL)]
    program.append((BPF_LOAD, 0, 0, 0))
    if other_form is not None:
        program += [(BPF_AT_LEAST, 0, 1, other_form), (BPF_RETURN, 0, 0, SECCOMP_RET_KILL)]
    for number in numbers:
        program += [(BPF_EQUAL, 0, 1, number), (BPF_RETURN, 0, 0, SECCOMP_RET_EPERM)]
    for pair, argument, tests, held, failed in DEPENDING:
        block = [(BPF_LOAD, 0, 0, 16 + 8 * argument)]
        block += [(test, len(tests) - place, 0, value) for place, (test, value) in enumerate(tests)]
        block += [
            (BPF_JUMP, 0, 0, rest) if answer is None else (BPF_RETURN, 0, 0, answer)
            for rest, answer in ((1, failed), (0, held))
        ]
        block.append((BPF_LOAD, 0, 0, 0))  # for the next entry
        program += [(BPF_EQUAL, 0, len(block), pair[column]), *block]
    program.append((BPF_RETURN, 0, 0, SECCOMP_RET_ALLOW))
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in program))

    class Filter(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_void_p)]

    filled = Filter(len(program), ctypes.addressof(code))
    check(libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(filled), 0, 0), "seccomp")


def become_program(task: dict[str, Any], said: int) -> NoReturn:
    """Give up everything that is not needed, and be the program.

    Args:
        task: what is to be done.
        said: descriptor to which a plus is written when only the program is left to start.
    """
    os.setsid()
    limits = task["limits"]
    for kind, value in (
        (resource.RLIMIT_AS, limits["memory_bytes"]),
        (resource.RLIMIT_FSIZE, limits["disk_bytes"]),
        (resource.RLIMIT_NPROC, 8 * limits["processes"]),  # of threads; the warden counts processes
        (resource.RLIMIT_NOFILE, limits["descriptors"]),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
        (resource.RLIMIT_MEMLOCK, 0),  # of what sockets send without copying it, too
    ):
        resource.setrlimit(kind, (value, value))
    resource.setrlimit(
        resource.RLIMIT_CPU, (limits["cpu_s"], limits["cpu_s"] + 1)
    )  # first a signal, then the end
    most = resource.getrlimit(resource.RLIMIT_STACK)[1]
    resource.setrlimit(
        resource.RLIMIT_STACK, (STACK_BYTES if most < 0 else min(STACK_BYTES, most), most)
    )  # the same wherever it runs
    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(task["gid"])
        os.setuid(task["uid"])
    else:
        for capability in range(64):  # of the namespace of users; those beyond the last one do not exist
            libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
    check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no new privileges")
    forbid_calls()
    os.chdir("/tmp")
    os.closerange(3, said)
    os.closerange(said + 1, 1 << 16)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE):
        signal.signal(number, signal.SIG_DFL)
    environment = {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "TMPDIR": "/tmp", "LANG": "C.UTF-8"}
    environment |= {"PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    environment["MALLOC_ARENA_MAX"] = "1"  # each thread's own would take 64 MiB of the addresses
    os.write(said, b"+")
    os.execve(task["python"], [task["python"], *task["options"], task["program"]], environment)


def num_files(folders: list[str]) -> int:
    """In folders; even an empty one takes memory."""
    found = [os.statvfs(folder) for folder in folders]
    return sum(each.f_files - each.f_ffree for each in found)


def pages(folder: str) -> int:
    """That a process, or a thread, holds in memory; none if it has ended meanwhile."""
    with contextlib.suppress(OSError), open(f"{folder}/statm", "rb", buffering=0) as file:
        return int(file.read().split()[1])
    return 0


def all_pages(folder: str) -> int:
    """The same of a process whose first thread may have ended; the others know then what they hold."""
    held = pages(folder)
    if held == 0:
        with contextlib.suppress(OSError):
            held = max((pages(f"{folder}/task/{name}") for name in os.listdir(f"{folder}/task")), default=0)
    return held


def socket_bytes() -> int:
    """That sockets hold at most, which is no process' memory; TCP alone has buffers that grow, once it has some."""
    held = 0
    with contextlib.suppress(FileNotFoundError):  # a kernel without that, or without IPv6
        with open("/proc/net/sockstat", "rb", buffering=0) as file:
            held = int(file.read().split()[2]) * SOCKET_BYTES
        for name in ("tcp", "tcp6") if held else ():
            with open(f"/proc/net/{name}") as lines:
                next(lines)
                for line in lines:
                    queues = line.split()[4].split(":")
                    held += sum(
                        most for most, queue in zip(tcp_bytes(), queues, strict=True) if int(queue, 16)
                    )
    return held


@functools.cache
def tcp_bytes() -> tuple[int, ...]:
    """That a TCP socket holds at most of what it sends, and of what it receives."""
    with contextlib.suppress(OSError):
        return tuple(int(Path(f"/proc/sys/net/ipv4/tcp_{name}mem").read_text().split()[2]) for name in "wr")
    return TCP_BYTES


def usage() -> tuple[int, int]:
    """Processes inside but this one, and the bytes that they hold in memory, their sockets' included."""
    folders = [f"/proc/{name}" for name in os.listdir("/proc") if name.isdigit() and name != "1"]
    held = sum(map(all_pages, folders)) * resource.getpagesize()
    return len(folders), held + socket_bytes()


def watch(child: int, task: dict[str, Any]) -> tuple[str, int]:
    """Wait for the program, and end it where it goes too far; how it ended, and its exit code."""
    limits = task["limits"]
    end_s = time.monotonic() + limits["wall_s"]
    while True:
        with contextlib.suppress(ChildProcessError):
            for _ in range(256):  # limits are looked at, however fast processes end
                ended = os.wait4(-1, os.WNOHANG)
                if not ended[0]:
                    break
                if ended[0] == child:
                    code, used = os.waitstatus_to_exitcode(ended[1]), ended[2]
                    # The limit goes by ticks of a clock, which may be far from what was really used.
                    much = used.ru_utime + used.ru_stime > limits["cpu_s"] / 2
                    late = code == -signal.SIGXCPU or (code == -signal.SIGKILL and much)
                    return ("time" if late else "ended"), code
        count, held = usage()
        if time.monotonic() > end_s:
            return "time", -signal.SIGKILL
        if count > limits["processes"]:
            return "processes", -signal.SIGKILL
        if held > limits["memory_bytes"] or num_files(task["writable"]) > MAX_FILES:
            return "memory", -signal.SIGKILL
        time.sleep(POLL_S)


def oversee(task: dict[str, Any]) -> NoReturn:
    """Be process 1: start the program, watch it, report; all that is left ends when this does."""
    check(libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0), "not dumpable")
    end_with_parent()
    program = task["program"]
    with open(program, "w", encoding="utf-8", errors="surrogatepass") as file:
        file.write(task["code"])
    os.chmod(program, stat.S_IRUSR | stat.S_IRGRP | stat.S_IROTH)
    heard, said = os.pipe()  # which ends when the program starts
    child = os.fork()
    if child == 0:
        try:
            become_program(task, said)
        except BaseException as error:
            os.write(said, f"{error!r}".encode(errors="replace"))
            os._exit(127)
    os.close(said)
    with open(heard, "rb") as file:
        words = file.read()
    if words != b"+":
        raise OSError(f"it could not be closed: {words.decode().lstrip('+') or 'killed meanwhile'}")
    outcome, code = watch(child, task)
    os.write(task["report"], json.dumps({"outcome": outcome, "exit_code": code}).encode())
    os._exit(0)


def main() -> None:
    """Read what is to be done, and do it."""
    # The kernel keeps from process 1 every signal of those inside, but for those that it handles; so it handles none.
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    os.umask(0o022)  # whatever ours is, the program reads what is made here, and finds the same
    with open(int(sys.argv[1]), encoding="utf-8") as file:
        task = json.load(file)
    try:
        if task["kind"] == "namespaces":
            end_with_parent()
            separate(user=os.getuid() != 0)
            name = task["host_name"].encode()
            check(libc.sethostname(name, len(name)), "host name")
            with contextlib.suppress(PermissionError):  # root in a container that lacks a right to it
                raise_loopback()
            inside = os.fork()
            if inside:
                os.close(task["report"])
                os.waitpid(inside, 0)
                return
            build_root(task)
        oversee(task)
    except Exception as error:
        os.write(task["report"], json.dumps({"outcome": "broken", "message": str(error)}).encode())
        os._exit(1)


if __name__ == "__main__":
    main()
