"""Outside of a sandbox: who opens it, feeds it, reads what it says, and makes sure that it ends."""

import contextlib
import json
import os
import platform
import selectors
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, get_args

from ultrafuser.errors import UltrafuserError

Outcome = Literal["ended", "time", "memory", "processes", "output", "broken"]
"""The program ended by itself, was ended because it took more of something than it may, or breaks every sandbox."""
Kind = Literal["bubblewrap", "namespaces", "none"]

_WARDEN = Path(__file__).with_name("warden.py")
_GRACE_S = 5.0
"""Beyond the time of a program, for opening and closing its sandbox."""
_DEVICES = {f"/dev/{name}": f"/dev/{name}" for name in ("null", "full", "random", "urandom")}
_DEVICES["/dev/zero"] = "/dev/full"
"""Where programs find them, and which they are. The real /dev/zero, mapped, is memory that counts for nobody; /dev/full
reads the same and cannot be mapped."""
_WRITABLE = ("/tmp", "/dev/shm")
_HOST_NAME = "localhost"
_NOBODY = 65534
_UIDS = ((0x70000000, 1 << 27), (61184, 4336), (_NOBODY, 1))
"""First and number of the users that programs run as, best first: ids that no system hands out; where only 16 bits are
mapped, those that systemd makes up for services; nobody."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a program may use up.

    Attributes:
        wall_s: seconds.
        cpu_s: seconds of a processor, of one process.
        memory_bytes: of all its processes together (what they share after a fork counts for each), and of the
            addresses of each.
        disk_bytes: of its temporary folder, and again of memory that its processes share by name; both are in memory,
            but do not count for `memory_bytes`.
        processes: at once, itself included; their threads may be eight times as many.
        descriptors: of open files and sockets, of one process.
        output_bytes: of standard output and standard error together.
    """

    wall_s: int = 15
    cpu_s: int = 10
    memory_bytes: int = 2**30
    disk_bytes: int = 2**24
    processes: int = 20
    descriptors: int = 256
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

    A program has a process of its own, and sees no network, no other process and no file but programs and libraries
    of the system and of its Python (which it cannot change) and those of an empty folder, /tmp, which is where it
    starts and ends with it. Its processes may
    talk to each other by sockets and by shared memory that has a file or a name; without, as Python's `mmap(-1, ...)`
    has it, nobody could count it, and the kernel refuses it. Its environment holds nothing of ours. Bubblewrap opens
    the sandbox where it is installed, the kernel's namespaces do otherwise.

    Args:
        limits: what each program may use up.
        unsandboxed: run programs with limits of time and output alone where there is no sandbox to be had. They can
            then read, change and send whatever the user can; they still start in an empty folder that ends with them.

    Attributes:
        kind: what closes it: "bubblewrap", "namespaces" or "none".

    Raises:
        UltrafuserError: there is no sandbox to be had here, and `unsandboxed` does not allow to go without.
    """

    def __init__(self, limits: Limits | None = None, *, unsandboxed: bool = False) -> None:
        self._limits = Limits() if limits is None else limits
        found = shutil.which("bwrap")
        self._bwrap = None if found is None else os.path.abspath(found)
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
            code: Python, of any length that `Limits.disk_bytes` allows, as it is a file there; what is no Python, or
                not even text, fails as Python would have it fail.
            stdin: what it reads from standard input.

        Raises:
            UltrafuserError: the input is no text that UTF-8 can hold; or the sandbox itself broke, and would with any
                program.
        """
        start_s = time.monotonic()
        try:
            input_bytes = stdin.encode()
        except UnicodeEncodeError as error:
            raise UltrafuserError(
                f"sandbox: stdin must be text, got half a character at {error.start}."
            ) from None
        for _ in range(2):
            try:
                return self._run(self.kind, code, input_bytes)
            except _BrokenError as error:
                broken = error
        if self._reason_against(self.kind) is not None:
            raise broken
        return Result("broken", 1, "", str(broken), time.monotonic() - start_s)

    def _reason_against(self, kind: Kind) -> str | None:
        if platform.system() != "Linux" or platform.machine() not in ("x86_64", "aarch64"):
            return "needs Linux on x86-64 or 64-bit ARM"
        if kind == "bubblewrap" and self._bwrap is None:
            return "not installed"
        try:
            found = self._run(kind, "print(1 + 1)", b"")
        except (OSError, UltrafuserError) as error:
            return str(error)
        return None if found.passed and found.stdout == "2\n" else found.stderr.strip()[-300:]

    def _run(self, kind: Kind, code: str, stdin: bytes) -> Result:
        start_s = time.monotonic()
        if kind == "none":
            return self._run_unsandboxed(code, stdin, start_s)
        with contextlib.ExitStack() as opened:
            task_out, task_in = _pipe(opened)
            report_out, report_in = _pipe(opened)
            task = self._task(kind, code, report_in.fileno())
            inherited = [task_out, report_in]
            command = [sys.executable, "-I", "-S", str(_WARDEN)]
            if kind == "bubblewrap":
                files = {path: _pipe_of(opened, content) for path, content in task["files"].items()}
                inherited += files.values()
                command = [*self._bubblewrap(files), _python(), "-I", "-S", "/warden.py"]
            process = opened.enter_context(
                subprocess.Popen(
                    [*command, str(task_out.fileno())],
                    bufsize=0,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    env={"PATH": "/usr/bin:/bin"},
                    cwd="/",
                    pass_fds=[file.fileno() for file in inherited],
                    start_new_session=True,
                )
            )
            for file in inherited:
                file.close()
            feeding = {task_in: json.dumps(task).encode()}
            return _Exchange(process, self._limits, feeding, stdin, report_out).finish(start_s)

    def _task(self, kind: Kind, code: str, report: int) -> dict[str, Any]:
        """What the warden is to do."""
        # Pools make as many processes as they find processors, and may not make too many.
        num_cpus = max(1, min(len(os.sched_getaffinity(0)), self._limits.processes // 4))
        uid, gid = (_own_uid(), _NOBODY) if os.getuid() == 0 else (os.getuid(), os.getgid())
        return {
            "kind": kind,
            "code": code,
            "python": _python(),
            "options": ["-X", f"cpu_count={num_cpus}"],  # heard from Python 3.13 on; others read the file
            "program": "/tmp/main.py",
            "uid": uid,
            "gid": gid,
            "host_name": _HOST_NAME,
            "readable": _readable(),
            "writable": _WRITABLE,
            "devices": _DEVICES,
            "files": _files(uid, gid, num_cpus),
            "limits": asdict(self._limits),
            "report": report,
        }

    def _bubblewrap(self, files: dict[str, IO[bytes]]) -> list[str]:
        assert self._bwrap is not None
        command = [self._bwrap, "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts"]
        command += ["--hostname", _HOST_NAME, "--unshare-cgroup-try"]
        command += ["--die-with-parent", "--as-pid-1", "--clearenv"]
        if os.getuid() == 0:  # the warden becomes nobody in the program's place
            command += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID", "--cap-add", "CAP_DAC_OVERRIDE"]
        else:
            command.append("--unshare-user")
        for path in _readable():
            if os.path.islink(path):
                command += ["--symlink", os.readlink(path), path]
            elif os.path.isdir(path):
                command += [*_parents(path), "--ro-bind", path, path]
        for path, file in files.items():
            command += [*_parents(path), "--perms", "0444", "--file", str(file.fileno()), path]
        for path, device in _DEVICES.items():
            command += [*_parents(path), "--dev-bind", device, path]
        command += ["--proc", "/proc", "--ro-bind", str(_WARDEN), "/warden.py"]
        for path in _WRITABLE:
            command += ["--perms", "1777", "--size", str(self._limits.disk_bytes), "--tmpfs", path]
        return [*command, "--remount-ro", "/", "--chdir", "/tmp"]

    def _run_unsandboxed(self, code: str, stdin: bytes, start_s: float) -> Result:
        # What the program leaves running may still write there.
        with tempfile.TemporaryDirectory(prefix="ultrafuser-", ignore_cleanup_errors=True) as folder:
            program = Path(folder, "main.py")
            program.write_text(code, encoding="utf-8", errors="surrogatepass")
            with subprocess.Popen(
                [sys.executable, "-I", str(program)],
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=folder,
                start_new_session=True,
            ) as process:
                return _Exchange(process, self._limits, {}, stdin, None).finish(start_s)


@dataclass
class _Exchange:
    """What goes into a sandbox and comes out of it, without ever waiting for one of them alone."""

    process: "subprocess.Popen[bytes]"
    limits: Limits
    feeding: dict[IO[bytes], bytes]
    stdin: bytes
    report: IO[bytes] | None
    read: dict[str, bytearray] = field(default_factory=lambda: {"stdout": bytearray(), "stderr": bytearray()})

    def finish(self, start_s: float) -> Result:
        """Feed, read and wait until all is over."""
        end_s = time.monotonic() + self.limits.wall_s + (0 if self.report is None else _GRACE_S)
        outcome: Outcome | None = "time"
        try:
            talked = self._talk(end_s)
            if talked is None:  # it may have closed its outputs and go on
                self.process.wait(max(0.0, end_s - time.monotonic()))
            outcome = talked
        except subprocess.TimeoutExpired:
            pass
        finally:  # whatever went wrong here, nobody waits for it
            if outcome is not None:
                _kill(self.process.pid)
        return self._result(outcome, self.process.wait(), time.monotonic() - start_s)

    def _talk(self, end_s: float) -> Outcome | None:
        """Feed and read as long as the other side does; what it took too much of, if it did."""
        process = self.process
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        with selectors.DefaultSelector() as selector:
            for file, content in {**self.feeding, process.stdin: self.stdin}.items():
                os.set_blocking(file.fileno(), False)
                selector.register(file, selectors.EVENT_WRITE, memoryview(content))
            for name, file in (("stdout", process.stdout), ("stderr", process.stderr)):
                selector.register(file, selectors.EVENT_READ, name)
            while selector.get_map():
                left_s = end_s - time.monotonic()
                if left_s <= 0:
                    return "time"
                for key, _ in selector.select(left_s):
                    if isinstance(key.data, str):
                        self._receive(selector, key.fileobj, key.data)
                    else:
                        self._send(selector, key.fileobj, key.data)
                if sum(map(len, self.read.values())) > self.limits.output_bytes:
                    return "output"
        return None

    def _send(self, selector: selectors.BaseSelector, file: Any, rest: memoryview) -> None:
        try:
            sent = os.write(file.fileno(), rest[: 2**16]) if rest else 0
        except BrokenPipeError:  # the program does not read it
            sent = len(rest)
        if sent >= len(rest):
            selector.unregister(file)
            file.close()
        else:
            selector.modify(file, selectors.EVENT_WRITE, rest[sent:])

    def _receive(self, selector: selectors.BaseSelector, file: Any, name: str) -> None:
        content = os.read(file.fileno(), 2**16)
        self.read[name] += content
        if not content:
            selector.unregister(file)

    def _result(self, outcome: Outcome | None, exit_code: int, seconds: float) -> Result:
        room = self.limits.output_bytes
        stdout = bytes(self.read["stdout"][:room])
        stderr = bytes(self.read["stderr"][: room - len(stdout)])
        texts = stdout.decode(errors="replace"), stderr.decode(errors="replace")
        if outcome is not None or self.report is None:
            return Result("ended" if outcome is None else outcome, exit_code, *texts, seconds)
        said = os.read(self.report.fileno(), 2**16)
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


def _pipe(opened: contextlib.ExitStack) -> tuple[IO[bytes], IO[bytes]]:
    """Its end to read from and its end to write to, which are closed with everything else that is open."""
    out, into = os.pipe()
    return opened.enter_context(open(out, "rb", buffering=0)), opened.enter_context(
        open(into, "wb", buffering=0)
    )


def _pipe_of(opened: contextlib.ExitStack, content: str) -> IO[bytes]:
    """The end to read from, of a pipe that has room for all of a small file."""
    out, into = _pipe(opened)
    into.write(content.encode())
    into.close()
    return out


def _parents(path: str) -> list[str]:
    """Has Bubblewrap make the folders above a path so that every user can enter them."""
    return [
        word for each in reversed(Path(path).parents[:-1]) for word in ("--perms", "0755", "--dir", str(each))
    ]


def _files(uid: int, gid: int, num_cpus: int) -> dict[str, str]:
    """What the C library looks up: users, addresses, processors; by path."""
    return {
        "/etc/passwd": f"program:x:{uid}:{gid}::/tmp:/bin/sh\n",
        "/etc/group": f"program:x:{gid}:\n",
        "/etc/hosts": f"127.0.0.1 {_HOST_NAME}\n::1 {_HOST_NAME}\n",
        "/etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\n",
        "/sys/devices/system/cpu/online": f"0-{num_cpus - 1}\n",
    }


def _own_uid() -> int:
    """A user that in all likelihood nobody else is, for the kernel counts a user's processes, wherever they run."""
    with open("/proc/self/uid_map") as file:
        mapped = [(int(line.split()[0]), int(line.split()[2])) for line in file]
    for first, count in _UIDS:
        if any(start <= first and first + count <= start + length for start, length in mapped):
            return first + int.from_bytes(os.urandom(4), "little") % count
    return _NOBODY


def _python() -> str:
    """The interpreter itself, not a virtual environment's link to it."""
    return os.path.realpath(sys.executable)


def _readable() -> list[str]:
    """What Python needs: system libraries and its own."""
    paths = ["/usr", "/lib", "/lib64", "/bin"]
    if not sys.base_prefix.startswith("/usr"):
        paths.append(os.path.realpath(sys.base_prefix))
    return [path for path in paths if os.path.exists(path)]
