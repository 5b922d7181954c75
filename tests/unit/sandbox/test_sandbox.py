"""Programs that nobody has read: what they may do, and that whatever else they try comes to nothing."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

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
        "open('/dev/shm/x', 'w')",
        "open('/proc/sys/kernel/core_pattern', 'w')",
        "open('/proc/1/environ').read()",
        "open('/proc/1/mem', 'rb').read()",
        "open('/etc/passwd').read()",
        "import os; os.listdir('/home')",
        "import os; os.listdir('/sys')",
        "import shutil; shutil.rmtree('/usr')",
        "import os; os.remove(os.__file__)",
        "import os; os.mount",
        "import ctypes; assert ctypes.CDLL(None).mount(b'x', b'/tmp', b'tmpfs', 0, b'') == 0",
        "import ctypes; assert ctypes.CDLL(None).unshare(0x10000000) == 0",
        "import ctypes; assert ctypes.CDLL(None).ptrace(16, 1, 0, 0) == 0",
        "import os; os.setuid(0)",
        "import os; os.chroot('/tmp')",
        "import os; os.kill(1, 0)",
        "import socket; socket.create_connection(('127.0.0.1', PORT), 2)",
        "import socket; socket.create_connection(('1.1.1.1', 53), 2)",
        "import os; os.write(3, b'x')",
        "import os; [os.readlink(f'/proc/self/fd/{i}') for i in range(3, 64)]",
    ],
)
def test_what_it_may_not(sandbox, attempt):
    with socket.create_server(("127.0.0.1", 0)) as server:
        attempt = attempt.replace("PORT", str(server.getsockname()[1]))
        result = sandbox.run(f"{attempt}\nprint('done')")
    assert result.outcome in ("ended", "memory"), result
    assert not result.passed, result
    assert "done" not in result.stdout


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


def test_limits_are_positive():
    with pytest.raises(UltrafuserError, match="wall_s must be at least 1, got 0"):
        Limits(wall_s=0)
