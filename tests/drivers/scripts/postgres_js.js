// postgres.js as people use it; it pipelines and prepares by itself. Left out, since it fails directly too: an error in
// the middle of COPY in (3.4.9 hangs), and a query cut off by pg_terminate_backend (3.4.9 throws outside of any promise).
'use strict'

const { assert, test, main, until, rejects, package: load } = require('./lines.js')
const postgres = load('postgres')
const { Readable } = require('stream')
const { pipeline } = require('stream/promises')

const using = async (run, options = {}) => {
  const sql = postgres({ max: 1, onnotice: () => {}, ...options })
  try {
    return await run(sql)
  } finally {
    await sql.end({ timeout: 1 })
  }
}

// Runs `inside` while another client has this backend, else this client's former one, if it can.
const taken = async (sql, inside, former) => {
  const pid = former ?? (await sql`select pg_backend_pid() as pid`)[0].pid
  const thieves = []
  try {
    for (let n = 0; n < 20; n++) {
      const thief = postgres({ max: 1 })
      const held = await thief.reserve()
      thieves.push([thief, held])
      await held`begin`
      if ((await held`select pg_backend_pid() as pid`)[0].pid === pid) break
    }
    return await inside()
  } finally {
    for (const [thief, held] of thieves) {
      await held`rollback`
      held.release()
      await thief.end({ timeout: 1 })
    }
  }
}

test('scram_login', () =>
  using(async (sql) => assert.strictEqual((await sql`select current_user as u`)[0].u, 'app'),
    { user: 'app', password: process.env.APP_PASSWORD, database: 'app' }))

test('scram_login_with_a_wrong_password', () =>
  rejects(using((sql) => sql`select 1`, { user: 'app', password: 'wrong', database: 'app' }), '28P01'))

test('no_such_database', () => rejects(using((sql) => sql`select 1`, { database: 'nowhere' }), '3D000'))

test('parameters', () => using(async (sql) => {
  const [row] = await sql`select ${41}::int + 1 as n, ${'text'} as t, ${sql.json({ deep: [1] })}::jsonb as j,
    ${Buffer.from([0, 255])}::bytea as b, ${[1, 2, 3]}::int[] as a`
  assert.deepStrictEqual({ ...row }, { n: 42, t: 'text', j: { deep: [1] }, b: Buffer.from([0, 255]), a: [1, 2, 3] })
}))

test('simple_query', () => using(async (sql) => {
  const results = await sql.unsafe("select 1 as a; select 'two' as b").simple()
  assert.deepStrictEqual(results.map((rows) => ({ ...rows[0] })), [{ a: 1 }, { b: 'two' }])
}))

test('prepared_again_and_again', () => using(async (sql) => {
  for (let n = 0; n < 50; n++) assert.strictEqual((await sql`select ${n}::int as n`)[0].n, n)
}))

test('prepared_while_another_has_the_backend', () => using(async (sql) => {
  const ask = async (n) => assert.strictEqual((await sql`select ${n}::int * 3 as n`)[0].n, n * 3)
  await ask(1)
  await taken(sql, () => ask(2))
  await ask(3)
}))

test('not_prepared', () => using(async (sql) => {
  for (let n = 0; n < 20; n++) assert.strictEqual((await sql`select ${n}::int as n`)[0].n, n)
}, { prepare: false }))

test('described', () => using(async (sql) => {
  const { types, columns } = await sql`select ${1}::int as n, ${'x'}::text as t`.describe()
  assert.deepStrictEqual(types, [23, 25])
  assert.deepStrictEqual(columns.map((column) => column.name), ['n', 't'])
}))

test('pipelined', () => using(async (sql) => {
  const all = await Promise.all(Array.from({ length: 1000 }, (_, n) => sql`select ${n}::int as n`))
  assert.deepStrictEqual(all.map(([row]) => row.n), Array.from({ length: 1000 }, (_, n) => n))
}))

test('pipelined_with_errors', () => using(async (sql) => {
  const all = await Promise.allSettled(Array.from({ length: 300 }, (_, n) => sql`select 1/(${n}::int % 100) as n`))
  const bad = all.filter((settled) => settled.status === 'rejected')
  assert.deepStrictEqual(bad.map((settled) => settled.reason.code), ['22012', '22012', '22012'])
}))

test('many_connections', () => using(async (sql) => {
  const all = await Promise.all(Array.from({ length: 2000 }, (_, n) => sql`select ${n}::int as n`))
  assert.strictEqual(all.reduce((sum, [row]) => sum + row.n, 0), 1999000)
}, { max: 20 }))

test('errors_leave_the_session_usable', () => using(async (sql) => {
  await rejects(sql`selec`, '42601')
  await rejects(sql`select * from nowhere`, '42P01')
  await rejects(sql`select 1/${0}::int`, '22012')
  assert.strictEqual((await sql`select 1 as n`)[0].n, 1)
}))

test('transaction', () => using(async (sql) => {
  await sql`drop table if exists tx`
  await sql`create table tx(a int)`
  await assert.rejects(sql.begin(async (tx) => {
    await tx`insert into tx values (1)`
    throw new Error('no')
  }), /no/)
  await sql.begin(async (tx) => {
    await tx`insert into tx values (2)`
    await tx.savepoint((inner) => inner`insert into tx values (${'no number'}::int)`).catch(() => {})
    await tx`insert into tx values (3)`
  })
  assert.deepStrictEqual((await sql`select a from tx order by a`).map((row) => row.a), [2, 3])
}))

test('pipelined_transaction', () => using(async (sql) => {
  await sql`drop table if exists tx2`
  await sql`create table tx2(a int)`
  await sql.begin((tx) => Array.from({ length: 100 }, (_, n) => tx`insert into tx2 values (${n})`))
  await rejects(sql.begin((tx) => [tx`insert into tx2 values (1000)`, tx`select 1/0`]), '22012')
  assert.strictEqual((await sql`select count(*)::int as n from tx2`)[0].n, 100)
}))

test('transactions_at_once', () => using(async (sql) => {
  await sql`drop table if exists tx3`
  await sql`create table tx3(a int)`
  await Promise.all(Array.from({ length: 200 }, (_, n) => sql.begin(async (tx) => {
    await tx`insert into tx3 values (${n})`
    await tx`select count(*) from tx3`
  })))
  assert.strictEqual((await sql`select count(distinct a)::int as n from tx3`)[0].n, 200)
}, { max: 10 }))

test('large_result', () => using(async (sql) => {
  const rows = await sql`select n, repeat('r', 300) as r from generate_series(1, 50000) n`
  assert.strictEqual(rows.length, 50000)
}))

test('big_parameter', () => using(async (sql) => {
  const text = 'p'.repeat(20 << 20)
  assert.strictEqual((await sql`select ${text}::text as t`)[0].t, text)
}))

test('cursor', () => using(async (sql) => {
  let seen = 0
  await sql`select n from generate_series(1, 1000) n`.cursor(90, (rows) => { seen += rows.length })
  assert.strictEqual(seen, 1000)
}))

test('cursor_left_half_way', () => using(async (sql) => {
  for await (const rows of sql`select n from generate_series(1, 100000) n`.cursor(10)) {
    assert.strictEqual(rows.length, 10)
    break
  }
  assert.strictEqual((await sql`select 1 as n`)[0].n, 1)
}))

test('copy_in_and_out', () => using(async (sql) => {
  await sql`drop table if exists copied`
  await sql`create table copied(n int, t text)`
  const line = (n) => `${n}\t${'t'.repeat(n % 60)}\n`
  const source = function * () { for (let n = 0; n < 30000; n++) yield line(n) }
  await pipeline(Readable.from(source()), await sql`copy copied from stdin`.writable())
  let text = ''
  for await (const chunk of await sql`copy (select * from copied order by n) to stdout`.readable()) text += chunk
  assert.strictEqual(text, Array.from({ length: 30000 }, (_, n) => line(n)).join(''))
}))

test('cancel', () => using((other) => using(async (sql) => {
  const query = sql`select pg_sleep(600) /* js cancel */`
  const sleeping = rejects(query, '57014')
  await until('it sleeps', async () => (await other`select 1 from pg_stat_activity
    where wait_event = 'PgSleep' and query like '%js cancel%' and pid <> pg_backend_pid()
    and datname = current_database()`).count)
  query.cancel()
  await sleeping
  assert.strictEqual((await sql`select 1 as n`)[0].n, 1)
})))

test('listen', () => using(async (sql) => {
  let heard
  const hearing = new Promise((resolve) => { heard = resolve })
  await sql.listen('news', heard)
  await sql.notify('news', 'hear')
  const late = new Promise((_, reject) => setTimeout(() => reject(new Error('not heard')), 1000 * process.env.PATIENCE))
  assert.strictEqual(await Promise.race([hearing, late]), 'hear')
}))

test('temporary_table', () => using(async (sql) => {
  // In one transaction: the next may have another backend.
  const former = await sql.begin(async (sql) => {
    await sql`create temporary table fleeting(a int)`
    return (await sql`select pg_backend_pid() as pid`)[0].pid
  })
  await taken(sql, () => sql`insert into fleeting values (1)`, former)
}))

test('start_up_settings', () => using(async (sql) => {
  await taken(sql, async () => {
    assert.strictEqual((await sql`show timezone`)[0].TimeZone, 'Asia/Tokyo')
    assert.strictEqual((await sql`show application_name`)[0].application_name, 'js conformance')
  })
}, { connection: { application_name: 'js conformance', TimeZone: 'Asia/Tokyo' } }))

test('start_up_setting_that_is_not_reported', () => using(async (sql) => {
  await taken(sql, async () => assert.strictEqual((await sql`show statement_timeout`)[0].statement_timeout, '12345ms'))
}, { connection: { statement_timeout: 12345 } }))

main()
