"""Runs asyncpg's own test files against the server in PGHOST, PGPORT, ...; prints one line a test.

The current directory holds the `tests` package of asyncpg's source package; asyncpg itself is the installed one.
Each test has a time limit.
"""

import os
import signal
import sys
import time
import unittest

LIMIT = 25
MODULES = """
    test_cancellation test_codecs test_connect test_copy test_cursor test_exceptions test_execute test_introspection
    test_listeners test_logging test_pool test_prepare test_record test_timeout test_transaction test_types test_utils
    test_cache_invalidation
""".split()


class TooLong(Exception):
    pass


def too_long(*_):
    raise TooLong(f"hangs: not over within {LIMIT} s")


class Lines(unittest.TestResult):
    def startTest(self, test):
        super().startTest(test)
        self.bad = None
        self.began = time.monotonic()
        signal.alarm(LIMIT)

    def stopTest(self, test):
        signal.alarm(0)
        if os.environ.get('TIMES'):
            print(f'time {time.monotonic() - self.began:.2f} {test.id()}')
        name = test.id().removeprefix("tests.")
        if self.bad is None:
            print("ok", name, flush=True)
        elif self.bad == "":
            print("skip", name, flush=True)
        else:
            print(f"not ok {name}: {self.bad}", flush=True)
        super().stopTest(test)

    def note(self, error):
        kind, value, _ = error
        self.bad = f"{kind.__name__} {value}".replace("\n", " ")[:300] or "failed"

    def addError(self, test, error):
        if isinstance(test, unittest.suite._ErrorHolder):
            print(f"not ok {test.id()}: {error[1]}".replace("\n", " "), flush=True)
        else:
            self.note(error)

    def addFailure(self, test, error):
        self.note(error)

    def addSubTest(self, test, subtest, error):
        if error is not None:
            self.note(error)

    def addSkip(self, test, reason):
        if isinstance(test, unittest.TestCase):
            self.bad = ""

    def addUnexpectedSuccess(self, test):
        self.bad = "unexpected success"


signal.signal(signal.SIGALRM, too_long)
sys.path.insert(0, os.getcwd())
chosen = sys.argv[1:] or MODULES
suite = unittest.defaultTestLoader.loadTestsFromNames([f"tests.{name}" for name in chosen])
suite.run(Lines())
# Whatever threads or loops are left shall not hold it up.
os._exit(0)
