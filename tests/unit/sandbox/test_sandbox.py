"""Programs that nobody has read: what they may do, and that whatever else they try comes to nothing."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import ultrafuser
from ultrafuser.errors import UltrafuserError
from ultrafuser.sandbox import Limits, Sandbox
from ultrafuser.sandbox.runner import _Exchange

LIMITS = Limits(wall_s=5, cpu_s=2, memory_bytes=2**28, disk_bytes=2**20, processes=8, output_bytes=10_000)


@pytest.fixture(params=["bubblewrap", "namespaces"])
def sandbox(request, monkeypatch):
    if request.param == "namespaces":
        monkeypatch.setattr(shutil, "which", lambda name: None)
    elif shutil.which("bwrap") is None:
        pytest.skip("bubblewrap is not installed")
    sandbox = Sandbox(LIMITS)
    assert sandbox.kind == request.param
    return sandbox


def processes_with(mark):
    """Processes of the machine that have a text in their command line or program."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/cmdline", "rb") as file:
                if mark.encode() in file.read():
                    found.append(int(name))
        except OSError:
            continue
    return found


def test_what_a_program_may(sandbox):
    result = sandbox.run(
        "import json, math, sys\n"
        "name = input()\n"
        "open('/tmp/note', 'w').write(name)\n"
        "print(open('/tmp/note').read(), math.factorial(20))\n"
        "print('warning', file=sys.stderr)\n",
        stdin="Ada\n",
    )
    assert result.passed
    assert result.stdout == "Ada 2432902008176640000\n"
    assert result.stderr == "warning\n"
    assert result.seconds < 5


def test_it_may_have_children_and_threads(sandbox):
    result = sandbox.run(
        "import subprocess, sys, threading\n"
        "out = []\n"
        "thread = threading.Thread(target=lambda: out.append(1))\n"
        "thread.start(); thread.join()\n"
        "print(out, subprocess.run([sys.executable, '-c', 'print(2)'], capture_output=True, text=True).stdout)\n"
    )
    assert result.stdout == "[1] 2\n\n", result.stderr


@pytest.mark.parametrize(
    ("code", "stdout"),
    [
        (
            "import concurrent.futures as futures\n"
            "with futures.ThreadPoolExecutor(4) as pool: print(list(pool.map(abs, (-1, -2))))",
            "[1, 2]\n",
        ),
        (
            "import multiprocessing\n"
            "ours, other = multiprocessing.Pipe()\n"
            "child = multiprocessing.Process(target=other.send, args=(3,))\n"
            "child.start(); print(ours.recv()); child.join()",
            "3\n",
        ),
        (
            "import asyncio, sys\n"
            "async def main():\n"
            "    child = await asyncio.create_subprocess_exec(sys.executable, '-c', 'print(4)', stdout=-1)\n"
            "    return await asyncio.gather(child.communicate(), asyncio.to_thread(abs, -5))\n"
            "print(asyncio.run(main()))",
            "[(b'4\\n', None), 5]\n",
        ),
        (
            "import socket\n"
            "for family in (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6): socket.socket(family).close()\n"
            "print(socket.getaddrinfo('127.0.0.1', 80)[0][4])",
            "('127.0.0.1', 80)\n",
        ),
        (
            "import os, resource\n"
            "resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32)); os.sched_setaffinity(0, os.sched_getaffinity(0))\n"
            "print(resource.getrlimit(resource.RLIMIT_NOFILE))",
            "(32, 32)\n",
        ),
        (
            "import multiprocessing\nwith multiprocessing.Pool() as pool: print(pool.map(abs, (-1, -2)))",
            "[1, 2]\n",
        ),
        (
            "from concurrent.futures import ProcessPoolExecutor\n"
            "with ProcessPoolExecutor(4) as pool: print(list(pool.map(abs, (-1, -2))))",
            "[1, 2]\n",
        ),
        (
            "import multiprocessing\n"
            "queue, lock, array = multiprocessing.Queue(), multiprocessing.Lock(), multiprocessing.Array('i', 9)\n"
            "def work():\n"
            "    with lock: array[3] = 7\n"
            "    queue.put(8)\n"
            "child = multiprocessing.Process(target=work); child.start(); print(queue.get(), array[3]); child.join()",
            "8 7\n",
        ),
        (
            "from multiprocessing.shared_memory import SharedMemory\n"
            "ours = SharedMemory(create=True, size=9); other = SharedMemory(ours.name); ours.buf[3] = 7\n"
            "print(other.buf[3]); other.close(); ours.close(); ours.unlink()",
            "7\n",
        ),
        (
            "import mmap\n"
            "file = open('/tmp/shared', 'w+b'); file.truncate(9); ours = mmap.mmap(file.fileno(), 9); ours[3] = 7\n"
            "print(mmap.mmap(file.fileno(), 9)[3], len(mmap.mmap(-1, 9, flags=mmap.MAP_PRIVATE)))",
            "7 9\n",
        ),
        (
            "import getpass, grp, os, pathlib\n"
            "print(getpass.getuser(), os.path.expanduser('~program'), pathlib.Path('/tmp/main.py').exists(),\n"
            "      grp.getgrgid(os.getgid()).gr_name)",
            "program /tmp True program\n",
        ),
        (
            "import socket\n"
            "print(socket.gethostname(), socket.gethostbyname('localhost'))\n"
            "for family, host in (socket.AF_INET, '127.0.0.1'), (socket.AF_INET6, '::1'):\n"
            "    server = socket.create_server((host, 0), family=family)\n"
            "    client = socket.create_connection(server.getsockname()[:2])\n"
            "    client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096); client.send(b'hello')\n"
            "    print(server.accept()[0].recv(9))",
            "localhost 127.0.0.1\nb'hello'\nb'hello'\n",
        ),
        (
            "import os\n"
            "before = os.nice(0); print(os.nice(3) - before)\n"
            "os.setpriority(os.PRIO_PROCESS, os.getpid(), 19); os.setpriority(os.PRIO_PGRP, 0, 19)\n"
            "print(os.nice(0))",
            "3\n19\n",
        ),
        ("print(set(open('/dev/zero', 'rb').read(9)))", "{0}\n"),
        (
            "import shutil, socket\n"
            "open('a', 'wb').write(b'copied'); shutil.copy('a', 'b')\n"
            "ours, other = socket.socketpair(); ours.sendfile(open('b', 'rb')); print(other.recv(9))",
            "b'copied'\n",
        ),
        ("open('helper.py', 'w').write('x = 5')\nimport helper\nprint(helper.x)", "5\n"),
        (
            "import asyncio\n"
            "async def main():\n"
            "    server = await asyncio.start_server(lambda reader, writer: writer.close(), '127.0.0.1', 0)\n"
            "    port = server.sockets[0].getsockname()[1]\n"
            "    clients = [await asyncio.open_connection('127.0.0.1', port) for _ in range(50)]\n"
            "    return sum([await reader.read() == b'' for reader, _ in clients])\n"
            "print(asyncio.run(main()))",
            "50\n",
        ),
    ],
)
def test_what_forbidden_calls_leave_working(sandbox, code, stdout):
    result = sandbox.run(code)
    assert (result.outcome, result.stdout) == ("ended", stdout), result.stderr


def test_hashes_are_the_same_in_every_run(sandbox):
    """So that a verdict does not depend on the order of a set."""
    code = "print(hash('a'), list({'apple', 'pear', 'fig', 'kiwi'}))"
    assert len({sandbox.run(code).stdout for _ in range(3)}) == 1


def test_a_tcp_socket_counts_for_all_that_it_may_hold(sandbox):
    """A byte a buffer: the kernel keeps a thousand times of what is queued."""
    result = sandbox.run(
        "import socket, time\n"
        "server = socket.create_server(('127.0.0.1', 0)); server.setblocking(False); kept = []\n"
        "for _ in range(28):\n"
        "    kept.append(client := socket.create_connection(server.getsockname()))\n"
        "    kept.append(server.accept()[0]); client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)\n"
        "    client.setblocking(False)\n"
        "    try:\n"
        "        while client.send(b'x', socket.MSG_EOR): pass\n"
        "    except BlockingIOError: pass\n"
        "time.sleep(1); print('done')"
    )
    assert (result.outcome, result.stdout) == ("memory", ""), result


def test_recursion_through_c_reaches_its_limit(sandbox):
    result = sandbox.run(
        "import functools, sys\n"
        "class Deep:\n    def __getattr__(self, name): return getattr(self, name + 'x')\n"
        "try: Deep().a\n"
        "except RecursionError: print('limit')\n"
        "sys.setrecursionlimit(10_000)\n"
        "@functools.lru_cache(None)\n"
        "def count(number): return number and 1 + count(number - 1)\n"
        "print(count(4000))\n"
    )
    assert result.stdout == "limit\n4000\n", result


def test_many_threads_have_room(sandbox):
    code = (
        "import threading\n"
        "gate = threading.Barrier(60)\n"
        "threads = [threading.Thread(target=gate.wait) for _ in range(60)]\n"
        "for thread in threads: thread.start()\n"
        "for thread in threads: thread.join()\n"
    )
    result = Sandbox(Limits(wall_s=10)).run(code)
    assert result.passed, result


def test_threads_of_one_program_do_not_count_for_another(sandbox):
    few = Sandbox(Limits(wall_s=10, processes=1))
    code = (
        "import threading, time\nfor _ in range(6): threading.Thread(target=time.sleep, args=(2,)).start()\n"
    )
    results = []
    threads = [threading.Thread(target=lambda: results.append(few.run(code))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [result.passed for result in results] == [True] * 4, results


@pytest.mark.parametrize(
    ("code", "exit_code", "stderr"),
    [
        ("assert 1 == 2, 'wrong'", 1, "AssertionError: wrong"),
        ("def f(:", 1, "SyntaxError"),
        ("raise SystemExit(7)", 7, ""),
        ("import os; os.abort()", -signal.SIGABRT, ""),
    ],
)
def test_how_it_failed(sandbox, code, exit_code, stderr):
    result = sandbox.run(code)
    assert (result.outcome, result.exit_code, result.passed) == ("ended", exit_code, False)
    assert stderr in result.stderr


def test_each_run_starts_with_nothing(sandbox):
    sandbox.run("open('/tmp/left', 'w').write('x')")
    assert sandbox.run("import os; print(os.listdir('/tmp'), os.getcwd())").stdout == "['main.py'] /tmp\n"


@pytest.mark.parametrize(
    ("code", "outcome"),
    [
        ("while True: pass", "time"),
        ("import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass", "time"),
        ("import time; time.sleep(60)", "time"),
        ("import os\nwhile True: os.fork()", "processes"),
        (
            "import threading, time\nfor _ in range(99): threading.Thread(target=time.sleep, args=(60,)).start()",
            "time",
        ),
        ("import os\nwhile os.fork() == 0: os.setsid()\nimport time; time.sleep(60)", "processes"),
        ("while True: print('x' * 1000)", "output"),
        ("import sys\nwhile True: sys.stderr.write('x' * 1000)", "output"),
        (  # each within what a process may have, together too much
            "import os, time\nfor _ in range(4):\n    if os.fork() == 0: break\n"
            "held = bytearray(os.urandom(1)) * (150 * 2**20)\ntime.sleep(60)",
            "memory",
        ),
        (  # the same, but the first threads have ended, whom the kernel knows a process' memory by
            "import ctypes, os, threading, time\n"
            "def hold():\n"
            "    held = bytearray(os.urandom(1)) * (150 * 2**20)\n    time.sleep(3); os._exit(0)\n"
            "for _ in range(4):\n    if os.fork() == 0: break\n"
            "threading.Thread(target=hold).start()\n"
            "ctypes.CDLL(None).pthread_exit(None)",
            "memory",
        ),
        (  # what is sent and never read
            "import os, socket, time\n"
            "for _ in range(6):\n    if os.fork() == 0: break\n"
            "server = socket.create_server(('127.0.0.1', 0))\n"
            "held = []\n"
            "for _ in range(28):\n"
            "    client = socket.create_connection(server.getsockname()); held += [client, server.accept()]\n"
            "    client.setblocking(False)\n"
            "    try:\n        while True: client.send(bytes(2**16))\n    except BlockingIOError: pass\n"
            "time.sleep(3)",
            "memory",
        ),
        (
            "import os\nfor i in range(10**6): os.link('main.py', f'{i}') if i else os.chdir('/dev/shm') or "
            "open('main.py', 'w').close()",
            "memory",
        ),
    ],
)
def test_who_takes_too_much_is_ended(sandbox, code, outcome):
    start = time.monotonic()
    result = sandbox.run(code)
    assert result.outcome == outcome, result
    assert not result.passed
    assert time.monotonic() - start < LIMITS.wall_s + 3
    assert len(result.stdout) + len(result.stderr) <= LIMITS.output_bytes


@pytest.mark.parametrize(
    "attempt",
    [
        "bytearray(2**30)",
        "open('/tmp/big', 'wb').write(bytes(2**22))",
        "[open(f'/tmp/{i}', 'w').close() for i in range(10**6)]",
        "import os; os.memfd_create('x')",
        "open('/usr/lib/x', 'w')",
        "open('/x', 'w')",
        "import mmap; mmap.mmap(-1, 4096)",
        "import mmap; mmap.mmap(open('/dev/zero', 'r+b').fileno(), 4096)",
        "import mmap; mmap.mmap(open('/dev/zero', 'rb').fileno(), 4096, mmap.MAP_PRIVATE, mmap.PROT_READ)",
        "open('/dev/shm/big', 'wb').write(bytes(2**22))",
        "[open(f'/dev/shm/{i}', 'wb').write(bytes(2**19)) for i in range(3)]",
        "[open(f'/dev/shm/{i}', 'w').close() for i in range(10**6)]",
        "import os; os.setxattr('/tmp', 'user.x', bytes(60_000))",
        "open('/etc/passwd', 'w')",
        "open('/sys/devices/system/cpu/online', 'w')",
        "open('/proc/sys/kernel/core_pattern', 'w')",
        "open('/proc/1/environ').read()",
        "open('/proc/1/mem', 'rb').read()",
        "open('/etc/shadow').read()",
        "open('/etc/resolv.conf').read()",
        "import os; os.listdir('/home')",
        "import os; os.listdir('/sys/class')",
        "import shutil; shutil.rmtree('/usr')",
        "import os; os.remove(os.__file__)",
        "import os; os.listdir('/proc/1/fd')",
        "open('/proc/1/oom_score_adj', 'w').write('1000')",
        "import resource; resource.prlimit(1, resource.RLIMIT_NOFILE, (0, 0))",
        "import os; os.setpriority(os.PRIO_PROCESS, 1, 19)",
        "import os; os.sched_setscheduler(1, os.SCHED_IDLE, os.sched_param(0))",
        "import os; os.sched_setaffinity(1, {0})",
        "import os; os.setuid(0)",
        "import os; os.chroot('/tmp')",
        "import socket; socket.create_connection(('127.0.0.1', PORT), 2)",
        "import socket; socket.create_connection(('1.1.1.1', 53), 2)",
    ],
)
def test_what_it_may_not(sandbox, attempt):
    with socket.create_server(("127.0.0.1", 0)) as server:
        attempt = attempt.replace("PORT", str(server.getsockname()[1]))
        result = sandbox.run(f"{attempt}\nprint('done')")
    assert result.outcome in ("ended", "memory"), result
    assert not result.passed, result
    assert "done" not in result.stdout


# Numbers on x86-64 and on 64-bit ARM, arguments, answer; written out again, so that one wrong there is found here.
CALLS = [
    *(
        ((56, 220), (flag | 17, 0, 0, 0, 0), "EPERM")
        for flag in (1 << 17, *(1 << bit for bit in range(25, 31)))
    ),
    ((435, 435), (0, 0), "ENOSYS"),  # clone3
    ((165, 40), (b"x", b"/tmp", b"tmpfs", 0, b""), "EPERM"),  # mount
    ((272, 97), (1 << 28,), "EPERM"),  # unshare
    ((308, 268), (0, 0), "EPERM"),  # setns
    ((101, 117), (16, 1, 0, 0), "EPERM"),  # ptrace
    ((311, 271), (1, 0, 0, 0, 0, 0), "EPERM"),  # process_vm_writev
    ((438, 438), (0, 0, 0), "EPERM"),  # pidfd_getfd
    *(
        ((number, number), (0, 0, 0, 0, 0), "EPERM")
        for number in (428, 429, 430, 431, 432, 433, 442, 443, 467)
    ),
    *(((41, 198), (family, 1, 0), "EAFNOSUPPORT") for family in (16, 17, 38, 40, (1 << 32) + 40)),  # socket
    *(((53, 199), (family, 1, 0, 0), "EAFNOSUPPORT") for family in (16, 40)),  # socketpair
    *(((41, 198), (2, 1, protocol), "EPROTONOSUPPORT") for protocol in (132, 262)),  # SCTP, MPTCP
    ((206, 0), (1, 0), "EPERM"),  # io_setup
    ((302, 261), (1, 7, 0, 0), "EPERM"),  # prlimit64
    # mmap: shared and anonymous, validated or not, whatever else; huge pages
    *(
        ((9, 222), (0, 4096, 3, flags, -1, 0), "EPERM")
        for flags in (0x21, 0x23, 0x8021, (1 << 32) + 0x21, 0x40022)
    ),
    ((28, 233), (0, 4096, 21), "EPERM"),  # madvise
    *(((number, number), (0, 0, 0, 0, 0, 0), "EPERM") for number in (447, 463)),  # memfd_secret, setxattrat
    ((319, 279), (b"x", 0), "EPERM"),  # memfd_create
    ((29, 194), (0, 4096, 0o1600), "EPERM"),  # shmget
    ((278, 75), (0, 0, 0, 0), "EPERM"),  # vmsplice
    ((275, 76), (0, 0, 0, 0, 1, 0), "EPERM"),  # splice
    ((276, 77), (0, 0, 1, 0), "EPERM"),  # tee
    ((40, 71), (0, 0, 0, 1), "EPERM"),  # sendfile
    *(((number, number), (0, 0, 0, 0), "EPERM") for number in (444, 445, 446)),  # landlock
    ((294, 26), (0,), "EPERM"),  # inotify_init1
    *(
        (numbers, (b"/tmp", b"user.x", b"x", 1, 0), "EPERM") for numbers in ((188, 5), (189, 6), (190, 7))
    ),  # setxattr
    *(
        ((141, 140), (which, who, 19), "EPERM") for which, who in ((0, 1), (1, 1), (2, 0), (2, 1))
    ),  # setpriority
]


def test_calls_that_are_refused(sandbox):
    result = sandbox.run(
        "import ctypes, errno, platform\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "column = ('x86_64', 'aarch64').index(platform.machine())\n"
        f"for numbers, arguments, answer in {CALLS}:\n"
        "    arguments = [ctypes.c_long(each) if isinstance(each, int) else each for each in arguments]\n"
        "    done = libc.syscall(ctypes.c_long(numbers[column]), *arguments)\n"
        "    found = errno.errorcode.get(ctypes.get_errno()) if done == -1 else 'done'\n"
        "    if found != answer: print(numbers, arguments, found)\n"
        "print('end')"
    )
    assert result.stdout == "end\n", result


def test_it_has_no_descriptor_of_ours(sandbox):
    result = sandbox.run(
        "import os\nopen_ones = []\n"
        "for number in range(3, 5000):\n"
        "    try: os.fstat(number); open_ones.append(number)\n"
        "    except OSError: pass\n"
        "print(open_ones)"
    )
    assert result.stdout == "[]\n", result


SIGNALS = (
    "import os, signal, time\n"
    "for number in sorted(signal.valid_signals()):\n"
    "    try: os.kill(1, number)\n"
    "    except PermissionError: pass\n"
    "time.sleep(0.2); print('alive')"
)


def test_signals_do_not_reach_process_one(sandbox):
    assert sandbox.run(SIGNALS).stdout == "alive\n"


# Not as root, a program belongs to the same user as process 1. Python and the package may lie where others cannot look.
AS_ANOTHER = """
set -e
mount -t tmpfs -o mode=755 none /mnt
mkdir /mnt/python /mnt/package
mount --bind "$1" /mnt/python
mount --bind "$2" /mnt/package
exec setpriv --reuid=12345 --regid=12345 --clear-groups "/mnt/python/$3" -I -S -c "$4" "$5" /mnt/package "$6"
"""
INSIDE = """
import json, shutil, sys, types
kind, folder, codes = sys.argv[1:]
package = sys.modules["ultrafuser"] = types.ModuleType("ultrafuser")  # without its libraries
package.__path__ = [folder]
if kind == "namespaces":
    shutil.which = lambda name: None
from ultrafuser.errors import UltrafuserError
from ultrafuser.sandbox import Limits, Sandbox
try:
    sandbox = Sandbox(Limits(wall_s=5, processes=8))
except UltrafuserError as error:
    print(json.dumps(str(error)))
else:
    assert sandbox.kind == kind, sandbox.kind
    print(json.dumps([vars(sandbox.run(code)) for code in json.loads(codes)]))
"""


def run_as_another(kind, codes):
    """Results of programs that a user who is not root runs."""
    base, package = os.path.realpath(sys.base_prefix), str(Path(ultrafuser.__file__).parent)
    python = os.path.realpath(sys.executable)
    command = [python, "-I", "-S", "-c", INSIDE, kind, package, json.dumps(codes)]
    if os.getuid() == 0:
        script = ["sh", "-c", AS_ANOTHER, "sh", base, package, os.path.relpath(python, base), INSIDE, kind]
        command = ["unshare", "--mount", *script, json.dumps(codes)]
        if any(shutil.which(name) is None for name in ("unshare", "setpriv")):
            pytest.skip("needs util-linux")
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd="/", check=False)
    if "mount:" in done.stderr or "unshare:" in done.stderr:
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    if isinstance(found, str):
        pytest.skip(found)
    return found


@pytest.mark.parametrize("kind", ["bubblewrap", "namespaces"])
def test_not_as_root_either(kind):
    results = run_as_another(
        kind,
        [
            "import os; print(os.getuid() != 0)",
            SIGNALS,
            "import os\nwhile True: os.fork()",
            "import resource; resource.prlimit(1, resource.RLIMIT_CPU, (0, 0))",
            "import os; os.setpriority(os.PRIO_USER, 0, 19)",
            "import os; os.sched_setscheduler(1, os.SCHED_IDLE, os.sched_param(0))",
            "open('/proc/1/mem', 'rb')",
            "import os; os.listdir('/proc/1/fd')",
            "import os; os.setpriority(os.PRIO_PROCESS, 1, 19)",
            "import mmap; mmap.mmap(-1, 4096)",
        ],
    )
    assert [result["stdout"] for result in results[:2]] == ["True\n", "alive\n"], results
    assert results[2]["outcome"] == "processes"
    assert results[2]["seconds"] < 4
    for result in results[3:]:
        assert result["outcome"] == "ended", result
        assert "PermissionError" in result["stderr"], result


@pytest.mark.parametrize("kind", ["bubblewrap", "namespaces"])
def test_what_works_not_as_root_either(kind):
    results = run_as_another(
        kind,
        [
            "import multiprocessing\nwith multiprocessing.Pool(2) as pool: print(pool.map(abs, (-1, -2)))",
            "import getpass, os, socket\n"
            "server = socket.create_server(('localhost', 0)); socket.create_connection(server.getsockname())\n"
            "print(getpass.getuser(), os.nice(3) - os.nice(0))",
            "open('/dev/shm/x', 'wb').write(bytes(2**25))",
        ],
    )
    assert [result["stdout"] for result in results[:2]] == ["[1, 2]\n", "program 0\n"], results
    assert "File too large" in results[2]["stderr"] or "No space left" in results[2]["stderr"], results


def test_pools_find_as_many_processors_as_they_may_have_processes(sandbox):
    result = sandbox.run("import os; print(os.cpu_count())")
    assert result.stdout == f"{min(len(os.sched_getaffinity(0)), LIMITS.processes // 4)}\n"


def test_a_strict_umask_of_ours_does_not_matter(sandbox):
    before = os.umask(0o077)
    try:
        result = sandbox.run("import getpass, os; print(getpass.getuser(), oct(os.umask(0)))")
    finally:
        os.umask(before)
    assert result.stdout == "program 0o22\n", result


def test_bubblewrap_is_the_one_on_our_path(tmp_path, monkeypatch):
    found = shutil.which("bwrap")
    if found is None:
        pytest.skip("bubblewrap is not installed")
    ours = tmp_path / "bwrap"
    ours.write_text(f'#!/bin/sh\necho used > {tmp_path}/mark\nexec {found} "$@"\n')
    ours.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f".:{os.environ['PATH']}")
    assert Sandbox(LIMITS).kind == "bubblewrap"
    assert (tmp_path / "mark").exists()


ODD_PROGRAMS = {
    "nul": ("print(1)\n\0\n", "SyntaxError: source code cannot contain null bytes"),
    "half a character": ("print('\ud800')", "SyntaxError: "),
    "long": ("#" * 300_000 + "\nraise ValueError('end')", "ValueError: end"),
}


@pytest.fixture
def unsandboxed(monkeypatch):
    monkeypatch.setattr(Sandbox, "_reason_against", lambda self, kind: "not today")
    return Sandbox(LIMITS, unsandboxed=True)


@pytest.mark.parametrize("code", ODD_PROGRAMS.values(), ids=list(ODD_PROGRAMS))
@pytest.mark.parametrize("how", ["sandbox", "unsandboxed"])
def test_odd_programs_fail_as_python_has_it(how, code, request):
    if how == "sandbox" and shutil.which("bwrap") is None:
        pytest.skip("bubblewrap is not installed")
    sandbox = Sandbox(LIMITS) if how == "sandbox" else request.getfixturevalue("unsandboxed")
    result = sandbox.run(code[0])
    assert (result.outcome, result.exit_code, result.passed) == ("ended", 1, False)
    assert code[1] in result.stderr, result


def test_half_a_character_cannot_be_read_from_stdin(sandbox):
    with pytest.raises(UltrafuserError, match="stdin must be text, got half a character at 2"):
        sandbox.run("print(input())", "ab\ud800")


def test_no_descriptor_is_left_open_when_nothing_starts(sandbox, monkeypatch):
    def no_popen(*arguments, **options):
        raise OSError("no more processes")

    monkeypatch.setattr(subprocess, "Popen", no_popen)
    before = sorted(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="no more processes"):
        sandbox.run("print(1)")
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_an_interruption_of_ours_waits_for_nobody(sandbox, monkeypatch):
    def interrupted(self, end_s):
        raise KeyboardInterrupt

    monkeypatch.setattr(_Exchange, "_talk", interrupted)
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        sandbox.run("import time; time.sleep(60)")
    assert time.monotonic() - start < 3


def test_unsandboxed_programs_end_though_they_closed_their_outputs(unsandboxed):
    result = unsandboxed.run("import os, time\nos.close(1); os.close(2)\ntime.sleep(60)")
    assert result.outcome == "time"
    assert result.seconds < LIMITS.wall_s + 2
    quiet = unsandboxed.run(
        "import os, time\nos.close(0); os.close(1); os.close(2)\ntime.sleep(0.3); os._exit(3)"
    )
    assert (quiet.outcome, quiet.exit_code) == ("ended", 3)


def test_unsandboxed_programs_start_in_an_empty_folder(unsandboxed):
    result = unsandboxed.run("import os; open('note', 'w'); print(sorted(os.listdir())); print(os.getcwd())")
    names, folder = result.stdout.splitlines()
    assert names == "['main.py', 'note']"
    assert not os.path.exists(folder)


def test_it_sees_no_process_but_its_own(sandbox):
    result = sandbox.run("import os; print(sorted(filter(str.isdigit, os.listdir('/proc'))), os.getppid())")
    assert result.stdout == f"['1', '{2}'] 1\n"


def test_it_can_signal_nobody_outside(sandbox):
    with subprocess.Popen(["sleep", "60"]) as bystander:
        sandbox.run(
            f"import os\nfor pid in ({bystander.pid}, {os.getpid()}, -1):\n"
            "    try: os.kill(pid, 9)\n    except OSError: pass"
        )
        assert bystander.poll() is None
        bystander.kill()


def test_secrets_of_the_environment_stay_outside(sandbox, monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "secret-of-mine")
    result = sandbox.run(
        "import glob, os\n"
        "print(os.environ)\n"
        "for path in glob.glob('/proc/*/environ'):\n"
        "    try: print(open(path, 'rb').read())\n"
        "    except OSError as error: print(error)\n"
    )
    assert result.passed
    assert "secret-of-mine" not in result.stdout


@pytest.mark.parametrize("daemon", ["", "os.setsid(); signal.signal(signal.SIGHUP, signal.SIG_IGN); "])
def test_what_it_leaves_running_ends_with_it(sandbox, daemon):
    mark = f"left-behind-{os.getpid()}-{len(daemon)}-{sandbox.kind}"
    result = sandbox.run(
        "import os, signal, sys\n"
        "sleep = [sys.executable, '-c', 'import time; time.sleep(60)', MARK]\n".replace("MARK", repr(mark))
        + f"if os.fork() == 0:\n    {daemon}os.execv(sys.executable, sleep)\n"
        "import time; time.sleep(0.3); print('started')\n"
    )
    assert result.passed, result
    assert result.seconds < 4
    assert processes_with(mark) == []


def test_ours_ends_with_us(sandbox):
    """A killed process does not leave sandboxes behind."""
    mark = f"orphan-{os.getpid()}-{sandbox.kind}"
    which = "" if sandbox.kind == "bubblewrap" else "import shutil; shutil.which = lambda name: None; "
    sleep = f"[sys.executable, '-c', 'import time; time.sleep(60)', {mark!r}]"
    inside = f"import os, sys; os.execv(sys.executable, {sleep})"
    code = f"{which}from ultrafuser.sandbox import Sandbox; Sandbox().run({inside!r})"
    with subprocess.Popen([sys.executable, "-c", code]) as ours:
        end = time.monotonic() + 20
        found = []
        while len(found) < 2 and time.monotonic() < end:  # ours names the mark, too
            found = processes_with(mark)
            time.sleep(0.05)
        ours.kill()
    time.sleep(1)
    assert len(found) >= 2
    assert processes_with(mark) == []


def test_many_run_at_once(sandbox):
    results = {}

    def run(number):
        results[number] = sandbox.run(f"import time; time.sleep(0.3); print({number})")

    threads = [threading.Thread(target=run, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {number: result.stdout for number, result in results.items()} == {n: f"{n}\n" for n in range(6)}


def test_no_descriptor_is_left_open(sandbox):
    before = len(os.listdir("/proc/self/fd"))
    for code in ("print(1)", "while True: print('x' * 1000)", "import time; time.sleep(60)", "exit(3)"):
        sandbox.run(code, stdin="x" * 200_000)  # that nobody reads
    assert len(os.listdir("/proc/self/fd")) == before


def test_it_refuses_to_go_without_unless_told_to(monkeypatch):
    monkeypatch.setattr(Sandbox, "_reason_against", lambda self, kind: "not today")
    with pytest.raises(UltrafuserError, match=r"bubblewrap: not today; namespaces: not today.*unsandboxed"):
        Sandbox(LIMITS)
    sandbox = Sandbox(LIMITS, unsandboxed=True)
    assert sandbox.kind == "none"
    assert sandbox.run("print(input())", "x\n").stdout == "x\n"
    assert sandbox.run("import time; time.sleep(60)").outcome == "time"
    assert sandbox.run("while True: print('x' * 1000)").outcome == "output"


def test_a_sandbox_that_breaks_is_no_result(sandbox, monkeypatch):
    finish = _Exchange.finish

    def broken(self, start_s):
        os.killpg(
            self.process.pid, signal.SIGKILL
        )  # all of it: Bubblewrap alone leaves a warden that may go on
        return finish(self, start_s)

    monkeypatch.setattr(_Exchange, "finish", broken)
    with pytest.raises(UltrafuserError, match="the sandbox broke"):
        sandbox.run("print(1)")


@pytest.mark.parametrize(("times", "outcome"), [(1, "ended"), (2, "broken")])
def test_a_program_that_breaks_its_sandbox(sandbox, monkeypatch, times, outcome):
    """Once may be chance; if it breaks another, in which other programs run, that is its result."""
    finish = _Exchange.finish
    broken = []

    def breaking(self, start_s):
        if b"naughty" in b"".join(self.feeding.values()) and len(broken) < times:
            broken.append(True)
            os.killpg(self.process.pid, signal.SIGKILL)
        return finish(self, start_s)

    monkeypatch.setattr(_Exchange, "finish", breaking)
    result = sandbox.run("print('naughty')")
    assert result.outcome == outcome
    assert result.passed == (outcome == "ended")
    assert len(broken) == times


def test_a_sandbox_that_cannot_be_closed_is_no_result(sandbox):
    with pytest.raises(UltrafuserError, match="the sandbox broke: it could not be closed: OverflowError"):
        Sandbox(Limits(memory_bytes=2**64))


def test_limits_are_positive():
    with pytest.raises(UltrafuserError, match="wall_s must be at least 1, got 0"):
        Limits(wall_s=0)
