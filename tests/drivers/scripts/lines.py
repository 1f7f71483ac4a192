"""A test is a function with @test; main() runs all, prints one line each, and lets none run for long."""

import os
import signal
import sys
import traceback

# Of a hang, not of a busy machine.
LIMIT = 60
_tests = []


class TooLong(Exception):
    pass


def test(function):
    _tests.append(function)
    return function


def _too_long(*_):
    raise TooLong(f"hangs: not over within {LIMIT} s")


def main():
    signal.signal(signal.SIGALRM, _too_long)
    chosen = sys.argv[1:]
    for function in _tests:
        if chosen and function.__name__ not in chosen:
            continue
        signal.alarm(LIMIT)
        try:
            function()
            signal.alarm(0)
            print("ok", function.__name__, flush=True)
        except BaseException as error:
            signal.alarm(0)
            where = traceback.extract_tb(error.__traceback__)
            lines = ",".join(str(f.lineno) for f in where if f.filename.endswith(os.path.basename(sys.argv[0])))
            text = f"{type(error).__name__} {error} (lines {lines})".replace("\n", " ")[:400]
            print(f"not ok {function.__name__}: {text}", flush=True)
    sys.stdout.flush()
    os._exit(0)


def raises(kind, function, *arguments, **named):
    try:
        function(*arguments, **named)
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__}")
