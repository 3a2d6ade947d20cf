"""Runs synthfast commands in forked processes: torch is imported once for all of them, and kills hit the work.

Reads a JSON object a line and answers with a number a line, the first when it is ready. {"run": [words], "cwd", "out", "err",
"env", ...} starts a command in a session of its own, its output in files, and gives its process number; {"wait": number} gives
its exit status, negative for a signal. Further keys of a run, null for none: "limit", of the size of files in bytes; "fail",
[name of a function of os, errno, how many calls succeed before]; "audit", a file for the paths that Python opens for writing,
makes, renames and removes; "memory", bytes that it may take beyond what is in use already.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import traceback

UNEXPECTED = 70  # exit status of an exception that the command line let through


def run(request: dict) -> None:
    """In the child: the command line, as a shell would start it."""
    os.setsid()
    os.chdir(request["cwd"])
    os.environ.update(request["env"])
    for number, name in ((0, os.devnull), (1, request["out"]), (2, request["err"])):
        file = os.open(name, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        os.dup2(file, number)
        os.close(file)
    seen = watch() if request["audit"] else None
    if request["fail"]:
        fail(*request["fail"])
    if request["memory"] is not None:
        used = int(open("/proc/self/statm").read().split()[5]) * os.sysconf("SC_PAGE_SIZE")  # noqa: SIM115
        resource.setrlimit(resource.RLIMIT_DATA, (used + request["memory"],) * 2)
    if request["limit"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["limit"], request["limit"]))
    from synthfast.cli.main import main

    status = 0
    try:
        main(request["run"])
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        traceback.print_exc()
        status = UNEXPECTED
    sys.stdout.flush()
    sys.stderr.flush()
    if seen is not None:
        told = json.dumps(sorted(seen))
        with open(request["audit"], "w") as file:
            file.write(told)
    os._exit(status)


def fail(name: str, number: int, before: int) -> None:
    """Make a function of os raise an error from its call number ``before`` (from 0) on."""
    real, calls = getattr(os, name), 0

    def wrapped(*arguments, **options):
        nonlocal calls
        calls += 1
        if calls > before:
            raise OSError(number, os.strerror(number))
        return real(*arguments, **options)

    setattr(os, name, wrapped)


def watch() -> set[str]:
    """The absolute paths of all that is opened for writing, made, renamed or removed from now on."""
    seen: set[str] = set()
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    changes = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod"}

    def hook(event: str, arguments: tuple) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, (str, bytes, os.PathLike)) and isinstance(flags, int) and flags & writing:
                seen.add(os.path.abspath(os.fsdecode(path)))
        elif (
            event in changes
        ):  # paths, then numbers, the last of which may be that of the folder that they are relative to
            folder = (
                os.readlink(f"/proc/self/fd/{arguments[-1]}") if event.startswith("os.r") and arguments[-1] > 2 else ""
            )
            paths = (each for each in arguments if isinstance(each, (str, bytes, os.PathLike)))
            seen.update(os.path.abspath(os.path.join(folder, os.fsdecode(path))) for path in paths)

    sys.addaudithook(hook)
    return seen


def serve() -> None:
    import matplotlib.backends.backend_agg
    import matplotlib.font_manager  # noqa: F401
    import synthfast.cli.sample
    import synthfast.cli.shards_transfer
    import torch

    import synthfast.data
    import synthfast.data.transfer.exporting
    import synthfast.data.transfer.importing
    import synthfast.data.transfer.merging
    import synthfast.report.figures
    import synthfast.sampling
    import synthfast.scoring.rank
    import synthfast.scoring.samples
    import synthfast.training.gan  # noqa: F401

    torch.optim.AdamW([torch.zeros(1, requires_grad=True)])  # imports torch's compiler, which takes a second
    os.write(1, b"0\n")
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
        elif not (answer := os.fork()):
            run(request)
        os.write(1, b"%d\n" % answer)
    os._exit(0)  # taking the interpreter apart may take longer than anybody waits


if __name__ == "__main__":
    serve()
