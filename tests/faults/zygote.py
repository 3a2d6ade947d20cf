"""Runs synthfast commands in forked processes: torch is imported once for all of them, and kills hit the work.

Reads a JSON object a line and answers with a number a line, the first when it is ready. {"run": [words], "cwd", "out", "err",
"env", "limit"} starts a command in a session of its own, its output in files, and gives its process number; {"wait": number}
gives its exit status, negative for a signal.
"""

from __future__ import annotations

import json
import os
import resource
import sys


def run(request: dict) -> None:
    """In the child: the command line, as a shell would start it."""
    os.setsid()
    os.chdir(request["cwd"])
    os.environ.update(request["env"])
    for number, name in ((0, os.devnull), (1, request["out"]), (2, request["err"])):
        file = os.open(name, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        os.dup2(file, number)
        os.close(file)
    if request["limit"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["limit"], request["limit"]))
    from synthfast.cli.main import main

    try:
        main(request["run"])
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
        status = 70  # an exception that the command line let through
    else:
        status = 0
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def serve() -> None:
    import synthfast.cli.sample
    import synthfast.data
    import synthfast.report.figures
    import synthfast.sampling
    import synthfast.scoring.rank
    import synthfast.scoring.samples
    import synthfast.training.gan  # noqa: F401

    os.write(1, b"0\n")
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
        elif not (answer := os.fork()):
            run(request)
        os.write(1, b"%d\n" % answer)


if __name__ == "__main__":
    serve()
