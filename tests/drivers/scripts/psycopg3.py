"""psycopg 3 as people use it: its own cursors, pipelines, COPY, cancels, notifications.

Tests of session state make sure that another client has the backend in between, where there is a pool.
"""

import asyncio
import os
import threading
import time

import psycopg
from psycopg import errors, pq, sql
from psycopg.rows import dict_row
from lines import main, raises, test


def connect(**named):
    named.setdefault("autocommit", True)
    return psycopg.connect("", **named)


def pid(conn):
    return conn.execute("select pg_backend_pid()").fetchone()[0]


def leave(conn, statement):
    """Leaves something in a backend; which one is asked in the same transaction, since the next may have another."""
    with conn.transaction():
        conn.execute(statement)
        return pid(conn)


class taken:
    """Inside, this backend, else the one that this connection had last, serves another client, if it can."""

    def __init__(self, conn, wanted=None):
        self.wanted = wanted or pid(conn)
        self.thieves = []

    def __enter__(self):
        for _ in range(20):
            thief = connect(autocommit=False)
            self.thieves.append(thief)
            if pid(thief) == self.wanted:
                break

    def __exit__(self, *_):
        for thief in self.thieves:
            thief.close()


def until(what, condition):
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError(f"in vain: {what}")


def asleep(mark):
    with connect() as other:
        # Other suites are at work on the same server.
        query = ("select 1 from pg_stat_activity where wait_event = 'PgSleep' and query like %s "
                 "and datname = current_database()")
        until("it sleeps", lambda: other.execute(query, [f"%{mark}%"], prepare=False).fetchone())


# Logins


@test
def scram_login():
    with connect(user="app", password=os.environ["APP_PASSWORD"], dbname="app") as conn:
        assert conn.execute("select current_user, session_user").fetchone() == ("app", "app")


@test
def scram_login_with_a_wrong_password():
    error = raises(psycopg.OperationalError, connect, user="app", password="wrong", dbname="app")
    assert 'password authentication failed for user "app"' in str(error), error


@test
def no_such_database():
    error = raises(psycopg.OperationalError, connect, dbname="nowhere")
    assert 'database "nowhere" does not exist' in str(error), error


@test
def parameters_of_the_server():
    with connect() as conn:
        assert conn.info.server_version // 10000 == 15
        for name in "server_encoding client_encoding DateStyle TimeZone integer_datetimes is_superuser".split():
            assert conn.info.parameter_status(name), name
        assert conn.info.parameter_status("is_superuser") == "on"
        assert conn.info.transaction_status == pq.TransactionStatus.IDLE


@test
def start_up_settings():
    with connect(application_name="conformance", options="-c datestyle=German -c timezone=Asia/Tokyo") as conn:
        assert conn.execute("show application_name").fetchone()[0] == "conformance"
        assert conn.execute("show timezone").fetchone()[0] == "Asia/Tokyo"
        assert conn.execute("show datestyle").fetchone()[0].startswith("German")


@test
def start_up_setting_that_is_not_reported():
    with connect(options="-c statement_timeout=12345") as conn:
        with taken(conn):
            assert conn.execute("show statement_timeout").fetchone()[0] == "12345ms"
    with connect() as conn:
        assert conn.execute("show statement_timeout").fetchone()[0] == "0"


@test
def client_encoding():
    with connect(client_encoding="latin1") as conn:
        assert conn.execute("select '\u00e9'").fetchone()[0] == "\u00e9"
        with taken(conn):
            assert conn.execute("show client_encoding").fetchone()[0] == "LATIN1"


# Queries


@test
def simple_query():
    with connect() as conn:
        assert conn.execute("select 1; select 2").fetchone() == (1,)
        cur = conn.execute("select 1; select 'two'")
        cur.nextset()
        assert cur.fetchone() == ("two",)


@test
def empty_query():
    with connect() as conn:
        assert conn.execute("").statusmessage in ("", None)
        assert conn.execute("select 1").fetchone() == (1,)


@test
def parameters_as_text_and_binary():
    with connect() as conn:
        for placeholder in ("%s", "%b", "%t"):
            for binary in (False, True):
                cur = conn.cursor(binary=binary)
                cur.execute(f"select {placeholder}::int8 + 1, {placeholder}::text", [41, "x"])
                assert cur.fetchone() == (42, "x")


@test
def prepared_by_hand():
    with connect() as conn:
        for number in range(10):
            assert conn.execute("select %s::int + 1", [number], prepare=True).fetchone() == (number + 1,)


@test
def prepared_automatically():
    with connect() as conn:
        for number in range(20):
            assert conn.execute("select %s::int + 2", [number]).fetchone() == (number + 2,)


@test
def prepared_while_another_has_the_backend():
    with connect() as conn:
        for number in range(10):
            conn.execute("select %s::int + 3", [number], prepare=True)
        with taken(conn):
            assert conn.execute("select %s::int + 3", [1], prepare=True).fetchone() == (4,)
        assert conn.execute("select %s::int + 3", [1], prepare=True).fetchone() == (4,)


@test
def prepared_by_two_under_one_name():
    # Both call theirs _pg3_0.
    with connect() as one, connect() as two:
        for number in range(6):
            assert one.execute("select %s::int, 'one'", [number], prepare=True).fetchone() == (number, "one")
            assert two.execute("select %s::text, 2", [str(number)], prepare=True).fetchone() == (str(number), 2)


@test
def prepared_and_evicted():
    with connect() as conn:
        conn.prepared_max = 3
        for turn in range(3):
            for number in range(8):
                got = conn.execute(f"select %s::int + {number}", [turn], prepare=True).fetchone()
                assert got == (turn + number,)


@test
def prepared_over_a_changed_table():
    with connect() as conn:
        conn.execute("drop table if exists changing; create table changing(a int)")
        conn.execute("insert into changing values (1)")
        for _ in range(3):
            assert conn.execute("select * from changing", prepare=True).fetchall() == [(1,)]
        with connect() as other:
            other.execute("alter table changing add b int default 2")
        raises(errors.FeatureNotSupported, conn.execute, "select * from changing", prepare=True)
        conn.execute("deallocate all")
        conn.prepare_threshold = None
        assert conn.execute("select * from changing").fetchall() == [(1, 2)]


@test
def large_result():
    with connect() as conn:
        total = 0
        for row in conn.execute("select n, repeat('r', 200) from generate_series(1, 100000) n"):
            total += row[0]
        assert total == 100000 * 100001 // 2


@test
def streamed_rows():
    with connect() as conn:
        cur = conn.cursor()
        assert sum(1 for _ in cur.stream("select n from generate_series(1, 20000) n")) == 20000


@test
def stream_left_half_way():
    with connect() as conn:
        cur = conn.cursor()
        for row in cur.stream("select n from generate_series(1, 1000000) n"):
            if row[0] == 10:
                break
        assert conn.execute("select 1").fetchone() == (1,)


@test
def big_parameter():
    text = "p" * (20 << 20)
    with connect() as conn:
        assert conn.execute("select length(%s::text), %s::text", [text, text]).fetchone() == (len(text), text)


@test
def many_columns_and_dicts():
    with connect(row_factory=dict_row) as conn:
        columns = ", ".join(f"{n} as c{n}" for n in range(1600))
        assert conn.execute(f"select {columns}").fetchone()["c1599"] == 1599


@test
def executemany():
    with connect() as conn:
        conn.execute("drop table if exists many; create table many(a int)")
        cur = conn.cursor()
        cur.executemany("insert into many values (%s) returning a", [(n,) for n in range(2000)], returning=True)
        assert sum(1 for _ in cur.results()) == 2000
        assert conn.execute("select count(*) from many").fetchone() == (2000,)


@test
def notices():
    with connect() as conn:
        seen = []
        conn.add_notice_handler(lambda diagnostic: seen.append(diagnostic.message_primary))
        conn.execute("do $$ begin raise notice 'hear %', 1; end $$")
        assert seen == ["hear 1"]


# Errors and transactions


@test
def errors_leave_the_session_usable():
    with connect() as conn:
        for statement, kind in (
            ("select 1/0", errors.DivisionByZero),
            ("selec", errors.SyntaxError),
            ("select * from nowhere", errors.UndefinedTable),
            ("select 1/%s", errors.DivisionByZero),
        ):
            raises(kind, conn.execute, statement, [0] if "%s" in statement else None)
            assert conn.execute("select 1").fetchone() == (1,)


@test
def commit_and_rollback():
    with connect(autocommit=False) as conn:
        conn.execute("drop table if exists tx; create table tx(a int)")
        conn.commit()
        conn.execute("insert into tx values (1)")
        conn.rollback()
        conn.execute("insert into tx values (2)")
        conn.commit()
        assert conn.execute("select * from tx").fetchall() == [(2,)]


@test
def savepoints():
    with connect() as conn:
        conn.execute("drop table if exists sp; create table sp(a int)")
        with conn.transaction():
            conn.execute("insert into sp values (1)")
            try:
                with conn.transaction():
                    conn.execute("insert into sp values (2)")
                    conn.execute("select 1/0")
            except errors.DivisionByZero:
                pass
            conn.execute("insert into sp values (3)")
        assert conn.execute("select array_agg(a order by a) from sp").fetchone()[0] == [1, 3]


@test
def failed_transaction():
    with connect(autocommit=False) as conn:
        raises(errors.DivisionByZero, conn.execute, "select 1/0")
        raises(errors.InFailedSqlTransaction, conn.execute, "select 1")
        assert conn.info.transaction_status == pq.TransactionStatus.INERROR
        conn.rollback()
        assert conn.execute("select 1").fetchone() == (1,)


@test
def transaction_keeps_its_backend():
    with connect(autocommit=False) as conn:
        first = pid(conn)
        others = [connect() for _ in range(5)]
        for other in others:
            other.execute("select 1")
        assert pid(conn) == first
        for other in others:
            other.close()


@test
def transaction_left_open_is_rolled_back():
    with connect() as other:
        other.execute("drop table if exists left_open; create table left_open(a int)")
        conn = connect(autocommit=False)
        conn.execute("insert into left_open values (1)")
        conn.close()
        until("its lock is gone", lambda: not other.execute(
            "select 1 from pg_locks where relation = 'left_open'::regclass and mode = 'RowExclusiveLock'").fetchone())
        assert other.execute("select count(*) from left_open").fetchone() == (0,)


@test
def serializable_conflict():
    with connect(autocommit=False) as one, connect(autocommit=False) as two:
        one.execute("drop table if exists ser; create table ser(a int); insert into ser values (1)")
        one.commit()
        for conn in (one, two):
            conn.isolation_level = psycopg.IsolationLevel.SERIALIZABLE
            conn.execute("select sum(a) from ser")
            conn.execute("insert into ser select sum(a) from ser")
        one.commit()
        raises(errors.SerializationFailure, two.commit)


# Cursors on the server


@test
def server_side_cursor():
    with connect(autocommit=False) as conn:
        with conn.cursor("walker") as cur:
            cur.itersize = 100
            cur.execute("select n from generate_series(1, 5000) n")
            assert sum(row[0] for row in cur) == 12502500


@test
def cursor_with_hold():
    with connect() as conn:
        cur = conn.cursor("holder", withhold=True)
        with conn.transaction():
            cur.execute("select n from generate_series(1, 1000) n")
            former = pid(conn)
        with taken(conn, former):
            assert len(cur.fetchall()) == 1000
        cur.close()


# COPY


@test
def copy_in_and_out():
    with connect() as conn:
        conn.execute("drop table if exists copied; create table copied(n int, t text)")
        cur = conn.cursor()
        with cur.copy("copy copied from stdin") as copy:
            for number in range(20000):
                copy.write_row((number, "t" * (number % 50)))
        assert cur.rowcount == 20000
        with cur.copy("copy (select * from copied order by n) to stdout") as copy:
            copy.set_types(["int4", "text"])
            assert [row for row in copy.rows()] == [(n, "t" * (n % 50)) for n in range(20000)]


@test
def copy_binary():
    with connect() as conn:
        conn.execute("drop table if exists copied_b; create table copied_b(n int, b bytea)")
        cur = conn.cursor()
        with cur.copy("copy copied_b from stdin (format binary)") as copy:
            copy.set_types(["int4", "bytea"])
            for number in range(2000):
                copy.write_row((number, os.urandom(100)))
        with cur.copy("copy copied_b to stdout (format binary)") as copy:
            data = b"".join(bytes(block) for block in copy)
        with cur.copy("copy copied_b from stdin (format binary)") as copy:
            copy.write(data)
        assert conn.execute("select count(*), count(distinct b) from copied_b").fetchone() == (4000, 2000)


@test
def copy_in_with_an_error_in_the_middle():
    with connect() as conn:
        conn.execute("drop table if exists copied_e; create table copied_e(n int)")
        cur = conn.cursor()

        def copy():
            with cur.copy("copy copied_e from stdin") as copy:
                for number in range(200000):
                    copy.write(f"{number if number != 5000 else 'oops'}\n")

        raises(errors.InvalidTextRepresentation, copy)
        assert conn.execute("select count(*) from copied_e").fetchone() == (0,)


@test
def copy_in_given_up_by_the_client():
    with connect() as conn:
        conn.execute("drop table if exists copied_f; create table copied_f(n int)")

        def copy():
            with conn.cursor().copy("copy copied_f from stdin") as copy:
                copy.write("1\n" * 1000)
                raise RuntimeError("enough")

        raises(RuntimeError, copy)
        assert conn.execute("select count(*) from copied_f").fetchone() == (0,)


@test
def copy_out_with_an_error_in_the_middle():
    with connect() as conn:

        def copy():
            with conn.cursor().copy("copy (select 1/(50000-n) from generate_series(1, 100000) n) to stdout") as copy:
                for _ in copy:
                    pass

        raises(errors.DivisionByZero, copy)
        assert conn.execute("select 1").fetchone() == (1,)


@test
def copy_out_left_half_way():
    with connect() as other:
        conn = connect()
        cur = conn.cursor()
        with cur.copy("copy (select n from generate_series(1, 10000000) n) to stdout") as copy:
            copy.read()
            conn.pgconn.finish()
        until("it is gone", lambda: not other.execute(
            "select 1 from pg_stat_activity where state = 'active' and query like 'copy (%' "
            "and datname = current_database()").fetchone())


@test
def copy_in_a_transaction():
    with connect(autocommit=False) as conn:
        conn.execute("drop table if exists copied_t; create table copied_t(n int)")
        with conn.cursor().copy("copy copied_t from stdin") as copy:
            copy.write("1\n2\n")
        conn.rollback()
        assert conn.execute("select to_regclass('copied_t')").fetchone() == (None,)


# Pipelines


@test
def pipeline():
    with connect() as conn, conn.pipeline():
        cursors = [conn.execute("select %s::int", [n]) for n in range(1000)]
        assert [cur.fetchone()[0] for cur in cursors] == list(range(1000))


@test
def pipeline_with_an_error_in_the_middle():
    with connect() as conn:
        with conn.pipeline() as pipe:
            good = conn.execute("select 1")
            pipe.sync()

            # Where it comes up depends on how soon the answer is there.
            seen = []
            for step in (lambda: conn.execute("select 1/0"), lambda: conn.execute("select 2"), pipe.sync, pipe.sync):
                try:
                    step()
                except psycopg.Error as error:
                    seen.append(type(error))
            assert errors.DivisionByZero in seen, seen
            later = conn.execute("select 3")
            pipe.sync()
            assert good.fetchone() == (1,)
            assert later.fetchone() == (3,)
        assert conn.execute("select 4").fetchone() == (4,)


@test
def pipeline_with_transactions():
    with connect() as conn:
        conn.execute("drop table if exists piped; create table piped(a int)")
        with conn.pipeline():
            for number in range(50):
                with conn.transaction():
                    conn.execute("insert into piped values (%s)", [number])
            try:
                with conn.transaction():
                    conn.execute("insert into piped values (1000)")
                    conn.execute("select 1/0")
            except errors.DivisionByZero:
                pass
        assert conn.execute("select count(*), max(a) from piped").fetchone() == (50, 49)


@test
def pipeline_prepared():
    with connect() as conn:
        for _ in range(3):
            with conn.pipeline():
                cursors = [conn.execute("select %s::int * 2", [n], prepare=True) for n in range(300)]
            assert [cur.fetchone()[0] for cur in cursors] == [n * 2 for n in range(300)]


@test
def pipeline_executemany():
    with connect() as conn, conn.pipeline():
        conn.execute("drop table if exists piped_many")
        conn.execute("create table piped_many(a int, b text)")
        conn.cursor().executemany("insert into piped_many values (%s, %s)", [(n, "b" * 100) for n in range(10000)])
        assert conn.execute("select count(*) from piped_many").fetchone() == (10000,)


# Cancels and time


@test
def cancel():
    with connect() as conn:
        timer = threading.Thread(target=lambda: (asleep("psy cancel"), conn.cancel()))
        timer.start()
        raises(errors.QueryCanceled, conn.execute, "select pg_sleep(600) -- psy cancel")
        timer.join()
        assert conn.execute("select 1").fetchone() == (1,)


@test
def cancel_safe():
    with connect() as conn:
        timer = threading.Thread(target=lambda: (asleep("psy safe"), conn.cancel_safe(timeout=10)))
        timer.start()
        raises(errors.QueryCanceled, conn.execute, "select pg_sleep(600) -- psy safe")
        timer.join()
        assert conn.execute("select 1").fetchone() == (1,)


@test
def cancel_when_idle():
    with connect() as conn, connect() as other:
        conn.execute("select 1")
        conn.cancel()
        assert other.execute("select count(*) from generate_series(1, 100000)").fetchone() == (100000,)
        assert conn.execute("select 1").fetchone() == (1,)


@test
def statement_timeout():
    with connect(autocommit=False) as conn:
        conn.execute("set local statement_timeout = 50")
        raises(errors.QueryCanceled, conn.execute, "select pg_sleep(600)")
        conn.rollback()
        assert conn.execute("select 1").fetchone() == (1,)


@test
def terminated_backend():
    with connect() as other:
        conn = connect(autocommit=False)
        other.execute("select pg_terminate_backend(%s, 5000)", [pid(conn)])
        raises(errors.AdminShutdown, conn.execute, "select 1")
        assert conn.broken
        conn.close()
        with connect() as conn:
            assert conn.execute("select 1").fetchone() == (1,)


# Session state


@test
def settings_that_are_reported():
    with connect() as conn:
        conn.execute("set timezone = 'Asia/Tokyo'; set datestyle = 'German'; set application_name = 'mine'")
        with taken(conn):
            assert conn.execute("show timezone").fetchone()[0] == "Asia/Tokyo"
            assert conn.execute("show application_name").fetchone()[0] == "mine"
            assert conn.execute("show datestyle").fetchone()[0].startswith("German")
    with connect() as conn:
        assert conn.execute("show timezone").fetchone()[0] != "Asia/Tokyo"


@test
def setting_that_is_not_reported():
    with connect() as conn:
        conn.execute("set work_mem = '7MB'")
        with taken(conn):
            assert conn.execute("show work_mem").fetchone()[0] == "7MB"


@test
def search_path():
    with connect() as conn:
        conn.execute("create schema if not exists elsewhere; set search_path = elsewhere")
        with taken(conn):
            assert conn.execute("show search_path").fetchone()[0] == "elsewhere"


@test
def setting_of_another_is_not_seen():
    with connect() as conn:
        conn.execute("set work_mem = '9MB'; set timezone = 'Asia/Tokyo'")
        others = [connect(autocommit=False) for _ in range(10)]
        for other in others:
            assert other.execute("show timezone").fetchone()[0] != "Asia/Tokyo"
            other.close()


@test
def temporary_table():
    with connect() as conn:
        former = leave(conn, "create temporary table fleeting(a int)")
        with taken(conn, former):
            conn.execute("insert into fleeting values (1)")
        assert conn.execute("select count(*) from fleeting").fetchone() == (1,)


@test
def temporary_table_in_a_transaction():
    with connect(autocommit=False) as conn:
        conn.execute("create temporary table fleeting2(a int) on commit drop")
        conn.execute("insert into fleeting2 values (1)")
        assert conn.execute("select count(*) from fleeting2").fetchone() == (1,)
        conn.commit()


@test
def advisory_lock():
    with connect() as conn:
        former = leave(conn, "select pg_advisory_lock(4711)")
        with taken(conn, former):
            assert conn.execute("select pg_advisory_unlock(4711)").fetchone() == (True,)


@test
def advisory_lock_of_a_transaction():
    with connect(autocommit=False) as conn:
        conn.execute("select pg_advisory_xact_lock(4712)")
        with connect() as other:
            assert other.execute("select pg_try_advisory_lock(4712)").fetchone() == (False,)
        conn.commit()


@test
def prepare_in_sql():
    with connect() as conn:
        former = leave(conn, "prepare by_sql(int) as select $1 + 1")
        with taken(conn, former):
            assert conn.execute("execute by_sql(1)").fetchone() == (2,)


def dirty(statement):
    """A session that leaves something behind, and one on the same backend, where there is a pool."""
    with connect() as conn:
        former = leave(conn, statement)
    others = []
    for _ in range(20):
        others.append(connect(autocommit=False))
        if pid(others[-1]) == former:
            break
    return others


@test
def setting_ends_with_the_session():
    for conn in dirty("set work_mem = '11MB'; set timezone = 'Asia/Tokyo'"):
        assert conn.execute("show work_mem").fetchone()[0] != "11MB"
        assert conn.execute("show timezone").fetchone()[0] != "Asia/Tokyo"
        conn.close()


@test
def temporary_table_ends_with_the_session():
    for conn in dirty("create temporary table dirty(a int)"):
        assert conn.execute("select to_regclass('pg_temp.dirty')").fetchone() == (None,)
        conn.close()


@test
def prepared_statement_ends_with_the_session():
    for conn in dirty("prepare dirty_statement as select 1"):
        count = "select count(*) from pg_prepared_statements where name = 'dirty_statement'"
        assert conn.execute(count).fetchone() == (0,)
        conn.close()


@test
def advisory_lock_ends_with_the_session():
    for conn in dirty("select pg_advisory_lock(4713)"):
        conn.close()
    with connect() as conn:
        until("it is free", lambda: conn.execute("select pg_try_advisory_xact_lock(4713)").fetchone()[0])


@test
def discard_all():
    with connect() as conn:
        conn.execute("select %s::int", [1], prepare=True)
        conn.execute("discard all")
        conn.prepare_threshold = None
        assert conn.execute("select %s::int", [1]).fetchone() == (1,)


@test
def real_backend_pid():
    with connect() as conn:
        assert pid(conn) == conn.info.backend_pid


@test
def listen_and_notify():
    with connect() as listener, connect() as speaker:
        listener.execute("listen news")
        speaker.execute("select pg_notify('news', 'hear')")
        heard = list(listener.notifies(timeout=float(os.environ["PATIENCE"]), stop_after=1))
        assert [(note.channel, note.payload) for note in heard] == [("news", "hear")]


# asyncio


@test
def concurrent_asyncio():
    async def one(number):
        conn = await psycopg.AsyncConnection.connect("", autocommit=True)
        async with conn:
            total = 0
            for turn in range(20):
                cur = await conn.execute("select %s::int", [number * turn])
                total += (await cur.fetchone())[0]
            return total

    async def all_of_them():
        return await asyncio.gather(*(one(number) for number in range(30)))

    assert asyncio.run(all_of_them()) == [number * 190 for number in range(30)]


@test
def cancelled_asyncio_task():
    async def go():
        conn = await psycopg.AsyncConnection.connect("", autocommit=True)
        async with conn:
            task = asyncio.create_task(conn.execute("select pg_sleep(600) -- psy task"))
            await asyncio.get_running_loop().run_in_executor(None, asleep, "psy task")
            task.cancel()
            try:
                await task
                raise AssertionError("not cancelled")
            except asyncio.CancelledError:
                pass
            cur = await conn.execute("select 1")
            assert await cur.fetchone() == (1,)

    asyncio.run(go())


@test
def identifiers_and_composition():
    with connect() as conn:
        conn.execute(sql.SQL("drop table if exists {0}; create table {0}(a int)").format(sql.Identifier('od"d na me')))
        assert conn.execute("select count(*) from \"od\"\"d na me\"").fetchone() == (0,)


if __name__ == "__main__":
    main()
