"""Runs asyncpg's own test files against the server in PGHOST, PGPORT, ...; prints one line a test.

The current directory holds the `tests` package of asyncpg's source package; asyncpg itself is the installed one.
Each test has a time limit. Three things are changed, so that every test counts at its first run, on a busy machine too:
their upper bounds of time are longer, sockets hold back a client that writes without reading, and with shared backends
one that a test left a temporary table in is ended (it would shadow the next test's table).
"""

import os
import signal
import socket
import sys
import time
import unittest

import asyncpg
import psycopg

LIMIT = 25
# Makes a thousand tables.
SLOW = {"test_introspection_on_large_db": 240}
# How much longer than on their authors' machine things may take.
SLOWER = 20
# Else the kernel takes all of a test's 4 MB, and whether the server's error comes "early" is a race.
SEND_BUFFER = 64 * 1024
MODULES = """
    test_cancellation test_codecs test_connect test_copy test_cursor test_exceptions test_execute test_introspection
    test_listeners test_logging test_pool test_prepare test_record test_timeout test_transaction test_types test_utils
    test_cache_invalidation
""".split()
# Starts a cluster of its own, which no gate is before, and which root may not.
LEFT_OUT = {"TestConnectionAttributes"}
BACKENDS_WITH_TEMPORARY_TABLES = """
    select pg_stat_get_backend_pid(id) from pg_stat_get_backend_idset() id
    where exists(select from pg_class c join pg_namespace n on n.oid = c.relnamespace where nspname = 'pg_temp_' || id)
"""


class TooLong(Exception):
    pass


def too_long(*_):
    raise TooLong("hangs: not over within its limit")


class Socket(socket.socket):
    def __init__(self, *arguments, **named):
        super().__init__(*arguments, **named)
        if self.family in (socket.AF_INET, socket.AF_INET6):
            self.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)


socket.socket = Socket


def be_patient():
    """Upper bounds of theirs, none of which a test waits out."""
    from asyncpg import _testbase

    usual = _testbase.TestCase.assertRunUnder
    _testbase.TestCase.assertRunUnder = lambda self, seconds: usual(self, seconds * SLOWER)
    # One second or more is what must suffice; less is what must not.
    acquire = asyncpg.pool.Pool.acquire
    asyncpg.pool.Pool.acquire = lambda self, *, timeout=None: acquire(
        self, timeout=timeout * SLOWER if timeout and timeout >= 1 else timeout
    )
    create = _testbase.ClusterTestCase.create_pool

    def create_pool(self, *arguments, command_timeout=None, **named):
        # The one test that has it waits a second for what it ends.
        patient = command_timeout and command_timeout * 5
        return create(self, *arguments, command_timeout=patient, **named)

    _testbase.ClusterTestCase.create_pool = create_pool
    from tests import test_pool

    test_pool.POOL_NOMINAL_TIMEOUT *= SLOWER


class Around:
    """The way around the gate."""

    def __init__(self):
        self.connection = psycopg.connect(
            host=os.environ["AROUND"], user="postgres", dbname="postgres", port=5432, autocommit=True
        )

    def drop_temporary_tables(self):
        """Ends the backends that have some, and returns when their processes are gone: then the gate sees it too."""
        for (pid,) in self.connection.execute(BACKENDS_WITH_TEMPORARY_TABLES).fetchall():
            self.connection.execute("select pg_terminate_backend(%s)", [pid])
            deadline = time.monotonic() + LIMIT
            while os.path.exists(f"/proc/{pid}"):
                if time.monotonic() > deadline:
                    raise TooLong(f"backend {pid} does not end")
                time.sleep(0.005)


class Lines(unittest.TestResult):
    # Where every client has a backend of its own there is nothing to separate.
    around = Around() if os.environ["TARGET"] in ("transaction", "pgbouncer") else None

    def startTest(self, test):
        super().startTest(test)
        self.bad = None
        self.began = time.monotonic()
        signal.alarm(SLOW.get(test._testMethodName, LIMIT))

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
        if self.around:
            self.around.drop_temporary_tables()
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


def tests(suite):
    for one in suite:
        if isinstance(one, unittest.TestSuite):
            yield from tests(one)
        elif type(one).__name__ not in LEFT_OUT:
            yield one


signal.signal(signal.SIGALRM, too_long)
sys.path.insert(0, os.getcwd())
chosen = sys.argv[1:] or MODULES
be_patient()
loaded = unittest.defaultTestLoader.loadTestsFromNames([f"tests.{name}" for name in chosen])
unittest.TestSuite(tests(loaded)).run(Lines())
# Whatever threads or loops are left shall not hold it up.
os._exit(0)
