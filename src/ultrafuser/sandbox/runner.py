"""Outside of a sandbox: who opens it, feeds it, reads what it says, and makes sure that it ends."""

import json
import os
import platform
import selectors
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from ultrafuser.errors import UltrafuserError

Outcome = Literal["ended", "time", "memory", "processes", "output", "broken"]
"""The program ended by itself, was ended because it took more of something than it may, or breaks every sandbox."""
Kind = Literal["bubblewrap", "namespaces", "none"]

_WARDEN = Path(__file__).with_name("warden.py")
_GRACE_S = 5.0
"""Beyond the time of a program, for opening and closing its sandbox."""
_DEVICES = ("null", "zero", "full", "random", "urandom")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a program may use up.

    Attributes:
        wall_s: seconds.
        cpu_s: seconds of a processor, of one process.
        memory_bytes: of all its processes together, and of the addresses of each.
        disk_bytes: of its temporary folder, which is in memory.
        processes: at once; their threads may be eight times as many.
        output_bytes: of standard output and standard error together.
    """

    wall_s: int = 15
    cpu_s: int = 10
    memory_bytes: int = 2**30
    disk_bytes: int = 2**24
    processes: int = 16
    output_bytes: int = 2**16

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 1:
                raise UltrafuserError(f"sandbox: {name} must be at least 1, got {value}.")


@dataclass(frozen=True)
class Result:
    """How a program ended.

    Attributes:
        outcome: by itself, or what it took too much of, or what it did.
        exit_code: of the program; minus the signal that ended it; 1 if it broke its sandbox.
        stdout: what it wrote, as far as `Limits.output_bytes` goes; broken characters read U+FFFD.
        stderr: likewise; how the sandbox broke, if it did.
        seconds: that it took, opening and closing included.
    """

    outcome: Outcome
    exit_code: int
    stdout: str
    stderr: str
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether it ended by itself, with exit code 0."""
        return self.outcome == "ended" and self.exit_code == 0


class _BrokenError(UltrafuserError):
    """A sandbox did not say how its program ended."""


class Sandbox:
    """Runs Python programs that nobody has read.

    A program has a process of its own, and sees no network, no other process and no file but those of its Python
    (which it cannot change) and of an empty folder, /tmp, which is where it starts and ends with it. Its environment
    holds nothing of ours. Bubblewrap opens the sandbox where it is installed, the kernel's namespaces do otherwise.

    Args:
        limits: what each program may use up.
        unsandboxed: run programs with limits of time and output alone where there is no sandbox to be had. They can
            then read, change and send whatever the user can.

    Attributes:
        kind: what closes it: "bubblewrap", "namespaces" or "none".

    Raises:
        UltrafuserError: there is no sandbox to be had here, and `unsandboxed` does not allow to go without.
    """

    def __init__(self, limits: Limits | None = None, *, unsandboxed: bool = False) -> None:
        self._limits = Limits() if limits is None else limits
        self.kind: Kind = "none"
        reasons = []
        for kind in get_args(Kind)[:-1]:
            reason = self._reason_against(kind)
            if reason is None:
                self.kind = kind
                return
            reasons.append(f"{kind}: {reason}")
        if not unsandboxed:
            raise UltrafuserError(
                f"programs cannot be kept in a sandbox here ({'; '.join(reasons)}). Install bubblewrap or allow "
                "namespaces of users; or let them run unsandboxed, if they may do whatever you may."
            )

    def run(self, code: str, stdin: str = "") -> Result:
        """Run a program; several may run at once, from several threads.

        Args:
            code: Python.
            stdin: what it reads from standard input.

        Raises:
            UltrafuserError: the sandbox itself broke, and would with any program.
        """
        start_s = time.monotonic()
        for _ in range(2):
            try:
                return self._run(self.kind, code, stdin)
            except _BrokenError as error:
                broken = error
        if self._reason_against(self.kind) is not None:
            raise broken
        return Result("broken", 1, "", str(broken), time.monotonic() - start_s)

    def _reason_against(self, kind: Kind) -> str | None:
        if platform.system() != "Linux" or platform.machine() not in ("x86_64", "aarch64"):
            return "needs Linux on x86-64 or 64-bit ARM"
        if kind == "bubblewrap" and shutil.which("bwrap") is None:
            return "not installed"
        try:
            found = self._run(kind, "print(1 + 1)", "")
        except (OSError, UltrafuserError) as error:
            return str(error)
        return None if found.passed and found.stdout == "2\n" else found.stderr.strip()[-300:]

    def _run(self, kind: Kind, code: str, stdin: str) -> Result:
        start_s = time.monotonic()
        if kind == "none":
            return self._run_unsandboxed(code, stdin, start_s)
        task_out, task_in = os.pipe()
        report_out, report_in = os.pipe()
        task = {
            "kind": kind,
            "code": code,
            "python": _python(),
            "program": "/tmp/main.py",
            "readable": _readable(),
            "limits": asdict(self._limits),
            "report": report_in,
        }
        command = [sys.executable, "-I", "-S", str(_WARDEN), str(task_out)]
        if kind == "bubblewrap":
            command = [*self._bubblewrap(), _python(), "-I", "-S", "/warden.py", str(task_out)]
        try:
            with subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={"PATH": "/usr/bin:/bin"},
                cwd="/",
                pass_fds=(task_out, report_in),
                start_new_session=True,
            ) as process:
                os.close(report_in)
                os.close(task_out)
                feeding = json.dumps(task).encode()
                exchange = _Exchange(process, self._limits, {task_in: feeding}, stdin.encode(), report_out)
                return exchange.finish(start_s)
        finally:
            os.close(report_out)

    def _bubblewrap(self) -> list[str]:
        command = ["bwrap", "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts"]
        command += ["--unshare-cgroup-try", "--die-with-parent", "--as-pid-1", "--clearenv"]
        if os.getuid() == 0:  # the warden becomes nobody in the program's place
            command += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID", "--cap-add", "CAP_DAC_OVERRIDE"]
        else:
            command.append("--unshare-user")
        for path in _readable():
            if os.path.islink(path):
                command += ["--symlink", os.readlink(path), path]
            elif os.path.isdir(path):
                for parent in reversed(Path(path).parents[:-1]):
                    command += ["--perms", "0755", "--dir", str(parent)]
                command += ["--ro-bind", path, path]
        for name in _DEVICES:
            command += ["--dev-bind", f"/dev/{name}", f"/dev/{name}"]
        command += ["--proc", "/proc", "--ro-bind", str(_WARDEN), "/warden.py"]
        return [*command, "--perms", "1777", "--size", str(self._limits.disk_bytes), "--tmpfs", "/tmp",
                "--remount-ro", "/", "--chdir", "/tmp"]  # fmt: skip

    def _run_unsandboxed(self, code: str, stdin: str, start_s: float) -> Result:
        command = [sys.executable, "-I", "-c", code]
        with subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        ) as process:
            return _Exchange(process, self._limits, {}, stdin.encode(), None).finish(start_s)


@dataclass
class _Exchange:
    """What goes into a sandbox and comes out of it, without ever waiting for one of them alone."""

    process: "subprocess.Popen[bytes]"
    limits: Limits
    feeding: dict[int, bytes]
    stdin: bytes
    report: int | None
    read: dict[str, bytearray] = field(default_factory=lambda: {"stdout": bytearray(), "stderr": bytearray()})

    def finish(self, start_s: float) -> Result:
        """Feed, read and wait until all is over."""
        process = self.process
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        stdin = os.dup(process.stdin.fileno())
        process.stdin.close()
        end_s = time.monotonic() + self.limits.wall_s + (0 if self.report is None else _GRACE_S)
        outcome: Outcome | None = None
        with selectors.DefaultSelector() as selector:
            for descriptor, content in {**self.feeding, stdin: self.stdin}.items():
                os.set_blocking(descriptor, False)
                selector.register(descriptor, selectors.EVENT_WRITE, memoryview(content))
            for name, stream in (("stdout", process.stdout), ("stderr", process.stderr)):
                selector.register(stream.fileno(), selectors.EVENT_READ, name)
            while outcome is None and selector.get_map():
                left_s = end_s - time.monotonic()
                if left_s <= 0:
                    outcome = "time"
                    break
                for key, _ in selector.select(left_s):
                    if isinstance(key.data, str):
                        self._receive(selector, key.fd, key.data)
                    else:
                        self._send(selector, key.fd, key.data)
                if sum(map(len, self.read.values())) > self.limits.output_bytes:
                    outcome = "output"
            for key in list(selector.get_map().values()):
                if not isinstance(key.data, str):
                    os.close(key.fd)
        if outcome is not None:
            _kill(process.pid)
        exit_code = process.wait()
        return self._result(outcome, exit_code, time.monotonic() - start_s)

    def _send(self, selector: selectors.BaseSelector, descriptor: int, rest: memoryview) -> None:
        try:
            sent = os.write(descriptor, rest[: 2**16]) if rest else 0
        except BrokenPipeError:  # the program does not read it
            sent = len(rest)
        if sent >= len(rest):
            selector.unregister(descriptor)
            os.close(descriptor)
        else:
            selector.modify(descriptor, selectors.EVENT_WRITE, rest[sent:])

    def _receive(self, selector: selectors.BaseSelector, descriptor: int, name: str) -> None:
        content = os.read(descriptor, 2**16)
        self.read[name] += content
        if not content:
            selector.unregister(descriptor)

    def _result(self, outcome: Outcome | None, exit_code: int, seconds: float) -> Result:
        room = self.limits.output_bytes
        stdout = bytes(self.read["stdout"][:room])
        stderr = bytes(self.read["stderr"][: room - len(stdout)])
        texts = stdout.decode(errors="replace"), stderr.decode(errors="replace")
        if outcome is not None or self.report is None:
            return Result("ended" if outcome is None else outcome, exit_code, *texts, seconds)
        said = os.read(self.report, 2**16)
        report: Any = json.loads(said) if said else {"outcome": "broken", "message": texts[1].strip()[-300:]}
        if report["outcome"] == "broken":
            raise _BrokenError(f"the sandbox broke: {report['message']}")
        return Result(report["outcome"], report["exit_code"], *texts, seconds)


def _kill(pid: int) -> None:
    """End a session of processes."""
    try:
        os.killpg(pid, 9)
    except ProcessLookupError:
        return


def _python() -> str:
    """The interpreter itself, not a virtual environment's link to it."""
    return os.path.realpath(sys.executable)


def _readable() -> list[str]:
    """What Python needs: system libraries and its own."""
    paths = ["/usr", "/lib", "/lib64", "/bin"]
    if not sys.base_prefix.startswith("/usr"):
        paths.append(os.path.realpath(sys.base_prefix))
    return [path for path in paths if os.path.exists(path)]
