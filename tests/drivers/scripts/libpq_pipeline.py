"""libpq's pipeline mode, case by case as PostgreSQL's own module libpq_pipeline names them, through psycopg's wrapper.

Errors in the middle, and long stretches without Sync.
"""

import select

from psycopg import pq
from lines import main, test

S = pq.ExecStatus


def connect():
    conn = pq.PGconn.connect(b"")
    assert conn.status == pq.ConnStatus.OK, conn.error_message
    return conn


def params(conn, sql, *values):
    conn.send_query_params(sql.encode(), [str(value).encode() for value in values])


def run(conn, sql):
    result = conn.exec_(sql.encode())
    assert result.status in (S.COMMAND_OK, S.TUPLES_OK), result.error_message
    return result


def expect(conn, *statuses):
    """Each status is a result; None is the end of one query's results."""
    last = None
    for number, status in enumerate(statuses):
        result = conn.get_result()
        found = result.status if result else None
        text = result.error_message if result else b""
        assert found == status, f"result {number}: {found!r}, not {status!r}: {text}"
        last = result or last
    return last


def push(conn):
    """Sends what is queued, reading meanwhile."""
    while conn.flush():
        readable, _, _ = select.select([conn.socket], [conn.socket], [], 10)
        if readable:
            conn.consume_input()


class refused:
    """Inside, libpq itself must refuse."""

    def __enter__(self):
        pass

    def __exit__(self, kind, value, _):
        import psycopg

        assert kind is not None and issubclass(kind, psycopg.OperationalError), "libpq did not refuse"
        return True


@test
def simple_pipeline():
    conn = connect()
    conn.enter_pipeline_mode()
    params(conn, "select $1", 1)
    with refused():
        conn.exit_pipeline_mode()
    conn.pipeline_sync()
    result = expect(conn, S.TUPLES_OK)
    assert result.get_value(0, 0) == b"1"
    expect(conn, None, S.PIPELINE_SYNC, None)
    conn.exit_pipeline_mode()
    assert conn.pipeline_status == pq.PipelineStatus.OFF
    run(conn, "select 1")


@test
def disallowed_in_pipeline():
    conn = connect()
    conn.enter_pipeline_mode()
    with refused():
        conn.exec_(b"select 1")
    with refused():
        conn.send_query(b"select 1")
    conn.exit_pipeline_mode()
    run(conn, "select 1")


@test
def multi_pipelines():
    conn = connect()
    conn.enter_pipeline_mode()
    for number in range(3):
        params(conn, "select $1", number)
        conn.pipeline_sync()
    for number in range(3):
        result = expect(conn, S.TUPLES_OK)
        assert result.get_value(0, 0) == str(number).encode()
        expect(conn, None, S.PIPELINE_SYNC)
    conn.exit_pipeline_mode()


@test
def multi_pipelines_at_length():
    conn = connect()
    conn.nonblocking = 1
    conn.enter_pipeline_mode()
    for number in range(5000):
        params(conn, "select $1", number)
        conn.pipeline_sync()
    push(conn)
    for number in range(5000):
        assert expect(conn, S.TUPLES_OK).get_value(0, 0) == str(number).encode()
        expect(conn, None, S.PIPELINE_SYNC)


@test
def nosync():
    conn = connect()
    conn.nonblocking = 1
    conn.enter_pipeline_mode()
    for _ in range(10):
        params(conn, "select repeat('xyzxz', 12)")
        conn.flush()
        if select.select([conn.socket], [], [], 0)[0]:
            conn.consume_input()
    conn.send_flush_request()
    push(conn)
    for _ in range(10):
        expect(conn, S.TUPLES_OK, None)
    # Never a Sync.
    conn.finish()


@test
def nosync_for_long():
    conn = connect()
    conn.nonblocking = 1
    conn.enter_pipeline_mode()
    for batch in range(50):
        for number in range(200):
            params(conn, "select repeat('y', 300), $1", number)
        conn.send_flush_request()
        push(conn)
        for number in range(200):
            assert expect(conn, S.TUPLES_OK, None).get_value(0, 1) == str(number).encode()
    conn.pipeline_sync()
    push(conn)
    expect(conn, S.PIPELINE_SYNC)
    conn.exit_pipeline_mode()


@test
def pipeline_abort():
    conn = connect()
    run(conn, "drop table if exists demo")
    run(conn, "create table demo(id serial primary key, item int4)")
    conn.enter_pipeline_mode()
    params(conn, "insert into demo(item) values($1)", 1)
    params(conn, "select no_such_function($1)", 1)
    params(conn, "insert into demo(item) values($1)", 2)
    conn.pipeline_sync()
    params(conn, "insert into demo(item) values($1)", 3)
    conn.pipeline_sync()
    expect(conn, S.COMMAND_OK, None, S.FATAL_ERROR, None)
    assert conn.pipeline_status == pq.PipelineStatus.ABORTED
    expect(conn, S.PIPELINE_ABORTED, None, S.PIPELINE_SYNC)
    assert conn.pipeline_status == pq.PipelineStatus.ON
    expect(conn, S.COMMAND_OK, None, S.PIPELINE_SYNC, None)
    # More than one command in one message.
    params(conn, "select 1; select 2")
    conn.pipeline_sync()
    result = expect(conn, S.FATAL_ERROR)
    assert b"cannot insert multiple commands" in result.error_message
    expect(conn, None, S.PIPELINE_SYNC, None)
    # An error after the first rows.
    params(conn, "select 1.0/g from generate_series(3, -1, -1) g")
    conn.pipeline_sync()
    conn.set_single_row_mode()
    rows = 0
    while (result := conn.get_result()) is not None:
        if result.status == S.SINGLE_TUPLE:
            rows += 1
        else:
            assert result.status == S.FATAL_ERROR and b"division by zero" in result.error_message
    assert rows == 3, rows
    expect(conn, S.PIPELINE_SYNC, None)
    conn.exit_pipeline_mode()
    result = run(conn, "select item from demo")
    assert (result.ntuples, result.get_value(0, 0)) == (1, b"3")


@test
def pipelined_insert():
    rows = 10000
    conn = connect()
    conn.nonblocking = 1
    conn.enter_pipeline_mode()
    for sql in ("begin", "drop table if exists inserted", "create table inserted(id serial, item int4, more int8)"):
        params(conn, sql)
    conn.send_prepare(b"insertion", b"insert into inserted(item, more) values($1, $2)", [23, 20])
    expected = [S.COMMAND_OK] * 4
    received = 0

    def take():
        nonlocal received
        while received < len(expected) and not conn.is_busy():
            result = conn.get_result()
            if result is None:
                continue
            assert result.status == expected[received], (received, result.status, result.error_message)
            received += 1

    sent = 0
    while received < len(expected) or sent <= rows:
        readable, writable, _ = select.select([conn.socket], [conn.socket] if sent <= rows + 1 else [], [], 10)
        assert readable or writable, f"stalled at {sent} sent, {received} received"
        if readable:
            conn.consume_input()
            take()
        if writable and not conn.flush():
            if sent < rows:
                conn.send_query_prepared(b"insertion", [str(sent).encode(), str(1 << 62).encode()])
                expected.append(S.COMMAND_OK)
            elif sent == rows:
                params(conn, "commit")
                conn.pipeline_sync()
                conn.flush()
                expected += [S.COMMAND_OK, S.PIPELINE_SYNC]
            sent += 1
    conn.exit_pipeline_mode()
    conn.nonblocking = 0
    assert run(conn, "select count(*) from inserted").get_value(0, 0) == b"10000"


@test
def prepared():
    conn = connect()
    conn.enter_pipeline_mode()
    conn.send_prepare(b"select_one", b"select $1, '42', $1::numeric, interval '1 sec'", [23])
    conn.send_describe_prepared(b"select_one")
    conn.pipeline_sync()
    result = expect(conn, S.COMMAND_OK, None, S.COMMAND_OK)
    assert [result.ftype(column) for column in range(4)] == [23, 25, 1700, 1186]
    assert result.param_type(0) == 23
    expect(conn, None, S.PIPELINE_SYNC)
    conn.send_query_prepared(b"select_one", [b"7"])
    conn.pipeline_sync()
    assert expect(conn, S.TUPLES_OK).get_value(0, 0) == b"7"
    expect(conn, None, S.PIPELINE_SYNC)
    # A name that is taken, and one that is not.
    conn.send_prepare(b"select_one", b"select 2")
    conn.pipeline_sync()
    result = expect(conn, S.FATAL_ERROR)
    assert result.error_field(pq.DiagnosticField.SQLSTATE) == b"42P05"
    expect(conn, None, S.PIPELINE_SYNC)
    conn.send_describe_prepared(b"nobody")
    conn.pipeline_sync()
    result = expect(conn, S.FATAL_ERROR)
    assert result.error_field(pq.DiagnosticField.SQLSTATE) == b"26000"
    expect(conn, None, S.PIPELINE_SYNC)
    conn.exit_pipeline_mode()
    run(conn, "begin")
    run(conn, "declare cursor_one cursor for select 1")
    conn.enter_pipeline_mode()
    conn.send_describe_portal(b"cursor_one")
    conn.pipeline_sync()
    assert expect(conn, S.COMMAND_OK).ftype(0) == 23
    expect(conn, None, S.PIPELINE_SYNC)
    conn.exit_pipeline_mode()
    run(conn, "commit")


@test
def closed():
    conn = connect()
    conn.enter_pipeline_mode()
    conn.send_prepare(b"brief", b"select 1")
    conn.send_close_prepared(b"brief")
    conn.send_close_prepared(b"never there")
    conn.send_prepare(b"brief", b"select 2")
    conn.send_query_prepared(b"brief", [])
    conn.pipeline_sync()
    expect(conn, S.COMMAND_OK, None, S.COMMAND_OK, None, S.COMMAND_OK, None, S.COMMAND_OK, None)
    assert expect(conn, S.TUPLES_OK).get_value(0, 0) == b"2"
    expect(conn, None, S.PIPELINE_SYNC)


@test
def singlerow():
    conn = connect()
    conn.enter_pipeline_mode()
    for number in range(3):
        params(conn, "select generate_series(42, $1)", 44 + number)
    conn.pipeline_sync()
    for number in range(3):
        # Of three queries, the second comes whole.
        single = number != 1
        if single:
            conn.set_single_row_mode()
        rows = 0
        while (result := conn.get_result()) is not None:
            if result.status == S.SINGLE_TUPLE:
                assert single
                rows += 1
            else:
                assert result.status == S.TUPLES_OK
                rows += result.ntuples
        assert rows == 3 + number, (number, rows)
    expect(conn, S.PIPELINE_SYNC, None)
    conn.exit_pipeline_mode()


@test
def transaction():
    conn = connect()
    run(conn, "drop table if exists tx_demo")
    run(conn, "create table tx_demo(a int)")
    conn.enter_pipeline_mode()
    conn.send_prepare(b"rollback", b"rollback")
    params(conn, "begin")
    params(conn, "select 0/0")
    conn.send_query_prepared(b"rollback", [])
    params(conn, "insert into tx_demo values(1)")
    conn.pipeline_sync()
    # In the failed transaction: only the rollback is let through.
    conn.send_query_prepared(b"rollback", [])
    params(conn, "insert into tx_demo values(2)")
    conn.pipeline_sync()
    conn.send_query_prepared(b"rollback", [])
    params(conn, "insert into tx_demo values(3)")
    conn.pipeline_sync()
    expect(conn, S.COMMAND_OK, None, S.COMMAND_OK, None, S.FATAL_ERROR, None)
    expect(conn, S.PIPELINE_ABORTED, None, S.PIPELINE_ABORTED, None, S.PIPELINE_SYNC)
    expect(conn, S.COMMAND_OK, None, S.COMMAND_OK, None, S.PIPELINE_SYNC)
    expect(conn, S.COMMAND_OK, None, S.COMMAND_OK, None, S.PIPELINE_SYNC)
    conn.exit_pipeline_mode()
    result = run(conn, "select string_agg(a::text, ',' order by a) from tx_demo")
    assert result.get_value(0, 0) == b"2,3"


@test
def uniqviol():
    conn = connect()
    run(conn, "drop table if exists viol")
    run(conn, "create table viol(id int8 primary key, filler text)")
    conn.nonblocking = 1
    conn.enter_pipeline_mode()
    conn.send_prepare(b"insertion", b"insert into viol values(mod($1, 5000), repeat('f', 100)) returning id", [20])
    sent = received = 0
    failed = False
    # Without Sync until the error comes back: what waits for one never sends anything.
    while not failed:
        readable, writable, _ = select.select([conn.socket], [conn.socket], [], 10)
        assert readable or writable, f"stalled after {sent}"
        if readable:
            conn.consume_input()
            while not conn.is_busy() and (result := conn.get_result()) is not None:
                assert conn.get_result() is None
                if result.status == S.FATAL_ERROR:
                    assert result.error_field(pq.DiagnosticField.SQLSTATE) == b"23505"
                    failed = True
                    break
                received += 1
        if writable and not conn.flush():
            conn.send_query_prepared(b"insertion", [str(sent).encode()])
            # The answers are asked for now and then, as libpq has it; the server would keep them otherwise.
            if sent % 100 == 0:
                conn.send_flush_request()
            sent += 1
            assert sent < 2_000_000
    assert received == 5001, received
    conn.pipeline_sync()
    push(conn)
    aborted = 0
    while True:
        result = conn.get_result()
        if result is None:
            continue
        if result.status == S.PIPELINE_SYNC:
            break
        assert result.status == S.PIPELINE_ABORTED, result.status
        aborted += 1
    assert aborted == sent - 5001, (aborted, sent)
    conn.exit_pipeline_mode()
    conn.nonblocking = 0
    # One implicit transaction: nothing stays.
    assert run(conn, "select count(*) from viol").get_value(0, 0) == b"0"


@test
def uniqviol_without_flush():
    """The server's own buffer brings the error, not a Flush."""
    conn = connect()
    run(conn, "drop table if exists viol2")
    run(conn, "create table viol2(id int8 primary key)")
    conn.nonblocking = 1
    conn.enter_pipeline_mode()
    conn.send_prepare(b"insertion", b"insert into viol2 values(mod($1, 2000)) returning repeat('g', 100)", [20])
    sent = 0
    failed = False
    while not failed:
        readable, writable, _ = select.select([conn.socket], [conn.socket], [], 10)
        assert readable or writable, f"stalled after {sent}"
        if readable:
            conn.consume_input()
            while not conn.is_busy() and (result := conn.get_result()) is not None:
                assert conn.get_result() is None
                failed |= result.status == S.FATAL_ERROR
                if failed:
                    break
        if writable and not conn.flush():
            if sent < 100_000:
                conn.send_query_prepared(b"insertion", [str(sent).encode()])
                sent += 1
            else:
                conn.send_flush_request()
    conn.pipeline_sync()
    push(conn)
    while (result := conn.get_result()) is None or result.status != S.PIPELINE_SYNC:
        pass


@test
def pipeline_idle():
    conn = connect()
    notices = []
    conn.notice_handler = lambda result: notices.append(result.error_message)
    conn.enter_pipeline_mode()
    params(conn, "select 1")
    conn.send_flush_request()
    expect(conn, S.TUPLES_OK, None)
    conn.exit_pipeline_mode()
    conn.enter_pipeline_mode()
    params(conn, "select 2")
    conn.send_flush_request()
    expect(conn, S.TUPLES_OK, None)
    conn.exit_pipeline_mode()
    # The implicit transaction of the pipeline is still open; a simple query ends it.
    run(conn, "select 3")
    assert not notices, notices


@test
def cancelled():
    conn = connect()
    cancel = conn.get_cancel()
    conn.nonblocking = 1
    conn.enter_pipeline_mode()
    params(conn, "select 1")
    conn.send_flush_request()
    params(conn, "select pg_sleep(600) as sleeper")
    params(conn, "select 2")
    conn.pipeline_sync()
    push(conn)
    expect(conn, S.TUPLES_OK, None)
    other = connect()
    asleep = "select 1 from pg_stat_activity where wait_event = 'PgSleep' and datname = current_database()"
    while run(other, asleep).ntuples == 0:
        pass
    cancel.cancel()
    result = expect(conn, S.FATAL_ERROR)
    assert result.error_field(pq.DiagnosticField.SQLSTATE) == b"57014"
    expect(conn, None, S.PIPELINE_ABORTED, None, S.PIPELINE_SYNC)


if __name__ == "__main__":
    main()
