"""The admin console as drivers of Python speak to it: psycopg 3 with and without autocommit, asyncpg, text and binary."""

import asyncio
import os

os.environ["PGDATABASE"] = "portcullis"

import asyncpg
import psycopg
from psycopg import errors
from lines import main, raises, test


@test
def psycopg_by_the_simple_protocol_and_by_the_extended():
    with psycopg.connect("", autocommit=True) as conn:
        for prepare in [None, True]:
            for _ in range(3):
                rows = conn.execute("SHOW NODES", prepare=prepare).fetchall()
                assert [row[1] for row in rows] == ["alp", "midna"], rows
        cursor = conn.cursor(binary=True)
        row = cursor.execute("SHOW LEASE").fetchone()
        names = [column.name for column in cursor.description]
        lease = dict(zip(names, row))
        assert lease["node"] == "alp" and lease["open"] is True and lease["lease_remaining_ms"] > 0, lease
        assert conn.info.server_version // 10000 == 15
        error = raises(errors.FeatureNotSupported, conn.execute, "select * from pg_class")
        assert "SHOW HELP" in error.diag.message_hint
        assert conn.execute("SHOW pool_version").fetchone()[0].endswith("(portcullis)")


@test
def psycopg_in_its_transactions():
    with psycopg.connect("") as conn:
        assert conn.execute("SHOW VERSION").fetchone()[0].startswith("portcullis ")
        assert conn.info.transaction_status.name == "INTRANS"
        raises(errors.SyntaxError, conn.execute, "KILL")
        assert conn.info.transaction_status.name == "INERROR"
        conn.rollback()
        assert conn.execute("RESUME").statusmessage == "RESUME"
        conn.commit()
        with conn.pipeline():
            both = [conn.execute("SHOW LISTS"), conn.execute("SHOW VERSION")]
        assert all(cursor.fetchall() for cursor in both)


@test
def asyncpg_prepares_and_asks():
    async def run():
        conn = await asyncpg.connect()
        try:
            for _ in range(2):
                clients = await conn.fetch("SHOW CLIENTS")
                nodes = await conn.fetch("SHOW NODES")
                assert nodes[1]["weight"] == 0.5 and nodes[1]["attached"] is True, nodes
                assert nodes[0]["sync_state"] is None
                assert all(isinstance(client["port"], int) for client in clients)
            assert await conn.execute("RECONNECT") == "RECONNECT"
            assert len(await conn.fetch("SHOW pool_nodes")) == 2
            statement = await conn.prepare("SHOW CONFIG")
            assert len(await statement.fetch()) > 50
            async with conn.transaction():
                assert len([row async for row in conn.cursor("SHOW LISTS", prefetch=2)]) > 5
            try:
                await conn.fetch("select $1::int", 1)
            except asyncpg.FeatureNotSupportedError:
                pass
            else:
                raise AssertionError("no error")
            assert await conn.fetchval("SHOW VERSION")
        finally:
            await conn.close()

    asyncio.run(run())


main()
