// node-postgres (pg) as people use it: queries, prepared statements, many at once, cursors, COPY, cancels, LISTEN.
'use strict'

const { assert, test, main, until, rejects, package: load } = require('./lines.js')
const { Client, Pool } = load('pg')
const Cursor = load('pg-cursor')
const copy = load('pg-copy-streams')
const { Readable } = require('stream')
const { pipeline } = require('stream/promises')

const using = async (run, config = {}) => {
  const client = new Client(config)
  client.on('error', () => {})
  await client.connect()
  try {
    return await run(client)
  } finally {
    await client.end()
  }
}

const one = async (client, text, values) => Object.values((await client.query(text, values)).rows[0])[0]

// Runs `inside` while another client has this backend, else this client's former one, if it can.
const taken = async (client, inside, former) => {
  const wanted = former ?? await one(client, 'select pg_backend_pid()')
  const thieves = []
  for (let n = 0; n < 20; n++) {
    const thief = new Client()
    await thief.connect()
    thieves.push(thief)
    await thief.query('begin')
    if ((await one(thief, 'select pg_backend_pid()')) === wanted) break
  }
  try {
    return await inside()
  } finally {
    for (const thief of thieves) await thief.end()
  }
}

const lines = async function * (count, line) {
  for (let n = 0; n < count; n++) yield line(n)
}

test('scram_login', () =>
  using(async (client) => assert.strictEqual(await one(client, 'select current_user'), 'app'),
    { user: 'app', password: process.env.APP_PASSWORD, database: 'app' }))

test('scram_login_with_a_wrong_password', () =>
  rejects(using(async () => {}, { user: 'app', password: 'wrong', database: 'app' }), '28P01'))

test('no_such_database', () => rejects(using(async () => {}, { database: 'nowhere' }), '3D000'))

test('simple_query', () => using(async (client) => {
  const results = await client.query("select 1 as a; select 'two' as b")
  assert.deepStrictEqual(results.map((result) => result.rows), [[{ a: 1 }], [{ b: 'two' }]])
}))

test('parameters', () => using(async (client) => {
  const { rows } = await client.query('select $1::int + 1 as n, $2::text as t, $3::jsonb as j, $4::bytea as b',
    [41, 'text', { deep: [1, 2] }, Buffer.from([0, 255])])
  assert.deepStrictEqual(rows, [{ n: 42, t: 'text', j: { deep: [1, 2] }, b: Buffer.from([0, 255]) }])
}))

test('prepared', () => using(async (client) => {
  for (let n = 0; n < 20; n++) {
    const { rows } = await client.query({ name: 'add-one', text: 'select $1::int + 1 as n', values: [n] })
    assert.strictEqual(rows[0].n, n + 1)
  }
}))

test('prepared_while_another_has_the_backend', () => using(async (client) => {
  const ask = async () => (await client.query({ name: 'again', text: 'select $1::int + 5 as n', values: [1] })).rows[0].n
  assert.strictEqual(await ask(), 6)
  await taken(client, async () => assert.strictEqual(await ask(), 6))
  assert.strictEqual(await ask(), 6)
}))

test('prepared_by_two_under_one_name', () => using((one) => using(async (two) => {
  for (let n = 0; n < 5; n++) {
    const first = await one.query({ name: 'same', text: 'select $1::int as n', values: [n] })
    const second = await two.query({ name: 'same', text: 'select $1::text as n', values: ['x' + n] })
    assert.deepStrictEqual([first.rows[0].n, second.rows[0].n], [n, 'x' + n])
  }
})))

test('prepared_with_an_error', () => using(async (client) => {
  await rejects(client.query({ name: 'bad', text: 'select nonsense', values: [] }), '42703')
  await rejects(client.query({ name: 'zero', text: 'select 1/$1::int', values: [0] }), '22012')
  const { rows } = await client.query({ name: 'zero', text: 'select 1/$1::int as n', values: [1] }).catch(() =>
    client.query({ name: 'zero2', text: 'select 1/$1::int as n', values: [1] }))
  assert.strictEqual(Object.values(rows[0])[0], 1)
}))

test('many_at_once', () => using(async (client) => {
  const all = await Promise.all(Array.from({ length: 500 }, (_, n) => one(client, 'select $1::int', [n])))
  assert.deepStrictEqual(all, Array.from({ length: 500 }, (_, n) => n))
}))

test('pipelined', () => using(async (client) => {
  client.pipeline = true
  const all = await Promise.allSettled(Array.from({ length: 300 }, (_, n) =>
    one(client, n === 100 ? 'select 1/(100-$1::int)' : 'select $1::int', [n])))
  assert.strictEqual(all[100].reason.code, '22012')
  assert.strictEqual(all.filter((settled) => settled.status === 'fulfilled').length, 299)
}, { pipeline: true }))

test('errors_leave_the_session_usable', () => using(async (client) => {
  await rejects(client.query('selec'), '42601')
  await rejects(client.query('select * from nowhere'), '42P01')
  await rejects(client.query('select 1/$1::int', [0]), '22012')
  await rejects(client.query("do $$ begin raise exception 'mine' using errcode = 'PT001', detail = 'd'; end $$"), 'PT001')
  assert.strictEqual(await one(client, 'select 1'), 1)
}))

test('transaction', () => using(async (client) => {
  await client.query('drop table if exists tx; create table tx(a int)')
  await client.query('begin')
  await client.query('insert into tx values ($1)', [1])
  await client.query('rollback')
  await client.query('begin')
  await client.query('insert into tx values ($1)', [2])
  await client.query('savepoint s')
  await rejects(client.query('insert into tx values ($1)', ['no number']), '22P02')
  await rejects(client.query('select 1'), '25P02')
  await client.query('rollback to s')
  await client.query('commit')
  assert.deepStrictEqual((await client.query('select a from tx')).rows, [{ a: 2 }])
}))

test('large_result', () => using(async (client) => {
  const { rows } = await client.query("select n, repeat('r', 300) as r from generate_series(1, 50000) n")
  assert.strictEqual(rows.length, 50000)
  assert.strictEqual(rows[49999].n, 50000)
}))

test('big_parameter', () => using(async (client) => {
  const text = 'p'.repeat(20 << 20)
  assert.strictEqual(await one(client, 'select $1::text', [text]), text)
}))

test('cursor', () => using(async (client) => {
  const cursor = client.query(new Cursor('select n from generate_series(1, $1::int) n', [1000]))
  let seen = 0
  for (;;) {
    const rows = await cursor.read(90)
    if (rows.length === 0) break
    seen += rows.length
  }
  assert.strictEqual(seen, 1000)
  await cursor.close()
  assert.strictEqual(await one(client, 'select 1'), 1)
}))

test('cursor_left_half_way', () => using(async (client) => {
  const cursor = client.query(new Cursor('select n from generate_series(1, 1000000) n'))
  assert.strictEqual((await cursor.read(10)).length, 10)
  await cursor.close()
  assert.strictEqual(await one(client, 'select 1'), 1)
}))

test('cursor_with_an_error_in_the_middle', () => using(async (client) => {
  const cursor = client.query(new Cursor('select 1/(50-n) from generate_series(1, 100) n'))
  await cursor.read(10)
  await rejects(cursor.read(90), '22012')
  assert.strictEqual(await one(client, 'select 1'), 1)
}))

test('copy_in_and_out', () => using(async (client) => {
  await client.query('drop table if exists copied; create table copied(n int, t text)')
  await pipeline(Readable.from(lines(30000, (n) => `${n}\t${'t'.repeat(n % 60)}\n`)),
    client.query(copy.from('copy copied from stdin')))
  let text = ''
  for await (const chunk of client.query(copy.to('copy (select * from copied order by n) to stdout'))) text += chunk
  assert.strictEqual(text, Array.from({ length: 30000 }, (_, n) => `${n}\t${'t'.repeat(n % 60)}\n`).join(''))
  assert.strictEqual(await one(client, 'select count(*)::int from copied'), 30000)
}))

test('copy_in_with_an_error_in_the_middle', () => using(async (client) => {
  await client.query('drop table if exists copied_e; create table copied_e(n int)')
  await rejects(pipeline(Readable.from(lines(100000, (n) => n === 5000 ? 'oops\n' : `${n}\n`)),
    client.query(copy.from('copy copied_e from stdin'))), '22P02')
  assert.strictEqual(await one(client, 'select count(*)::int from copied_e'), 0)
}))

test('copy_in_given_up', () => using(async (client) => {
  await client.query('drop table if exists copied_g; create table copied_g(n int)')
  const stream = client.query(copy.from('copy copied_g from stdin'))
  const source = async function * () {
    yield '1\n2\n'
    throw new Error('enough')
  }
  await assert.rejects(pipeline(Readable.from(source()), stream), /enough/)
  assert.strictEqual(await one(client, 'select count(*)::int from copied_g'), 0)
}))

test('copy_out_with_an_error_in_the_middle', () => using(async (client) => {
  const stream = client.query(copy.to('copy (select 1/(50000-n) from generate_series(1, 100000) n) to stdout'))
  await rejects((async () => { for await (const _ of stream); })(), '22012')
  assert.strictEqual(await one(client, 'select 1'), 1)
}))

test('cancel', () => using(async (client) => {
  const sleeping = rejects(client.query('select pg_sleep(600) /* node cancel */'), '57014')
  await using(async (other) => {
    await until('it sleeps', async () => (await other.query(
      "select 1 from pg_stat_activity where wait_event = 'PgSleep' and query like '%node cancel%' " +
      'and datname = current_database()')).rowCount)
    // As pg itself has it: a second connection with the key of the first.
    const { processID, secretKey } = client
    const net = require('net')
    const socket = net.connect(+process.env.PGPORT, process.env.PGHOST)
    const request = Buffer.alloc(16)
    request.writeInt32BE(16, 0)
    request.writeInt32BE(80877102, 4)
    request.writeInt32BE(processID, 8)
    request.writeInt32BE(secretKey, 12)
    socket.end(request)
    await sleeping
  })
  assert.strictEqual(await one(client, 'select 1'), 1)
}))

test('query_timeout_and_end', async () => {
  const client = new Client({ query_timeout: 100 })
  client.on('error', () => {})
  await client.connect()
  await assert.rejects(client.query('select pg_sleep(3)'), /timeout/)
  client.end()
  await using(async (other) => assert.strictEqual(await one(other, 'select 1'), 1))
})

test('statement_timeout_at_start_up', () => using(async (client) => {
  await taken(client, () => rejects(client.query('select pg_sleep(600)'), '57014'))
}, { statement_timeout: 200 }))

test('terminated_backend', () => using((other) => using(async (client) => {
  await client.query('begin')
  const pid = await one(client, 'select pg_backend_pid()')
  const sleeping = rejects(client.query('select pg_sleep(600)'), '57P01')
  await other.query('select pg_terminate_backend($1, 5000)', [pid])
  await sleeping
}).catch((error) => assert.match(error.message, /terminat/))))

test('notices', () => using(async (client) => {
  const seen = []
  client.on('notice', (notice) => seen.push(notice.message))
  await client.query("do $$ begin raise notice 'hear %', 1; end $$")
  assert.deepStrictEqual(seen, ['hear 1'])
}))

test('listen', () => using((speaker) => using(async (listener) => {
  const heard = new Promise((resolve) => listener.on('notification', resolve))
  await listener.query('listen news')
  await speaker.query("notify news, 'hear'")
  const late = new Promise((_, reject) => setTimeout(() => reject(new Error('not heard')), 1000 * process.env.PATIENCE))
  assert.strictEqual((await Promise.race([heard, late])).payload, 'hear')
})))

test('temporary_table', () => using(async (client) => {
  // In one transaction: the next may have another backend.
  await client.query('begin')
  await client.query('create temporary table fleeting(a int)')
  const former = await one(client, 'select pg_backend_pid()')
  await client.query('commit')
  await taken(client, () => client.query('insert into fleeting values (1)'), former)
}))

test('application_name', () => using(async (client) => {
  await taken(client, async () => assert.strictEqual(await one(client, 'show application_name'), 'node conformance'))
}, { application_name: 'node conformance' }))

test('set_timezone', () => using(async (client) => {
  await client.query("set timezone = 'Asia/Tokyo'")
  await taken(client, async () => assert.strictEqual(await one(client, 'show timezone'), 'Asia/Tokyo'))
}))

test('pool', async () => {
  const pool = new Pool({ max: 10 })
  const all = await Promise.all(Array.from({ length: 300 }, async (_, n) => {
    const client = await pool.connect()
    try {
      await client.query('begin')
      const got = await one(client, 'select $1::int', [n])
      await client.query('commit')
      return got
    } finally {
      client.release()
    }
  }))
  assert.deepStrictEqual(all, Array.from({ length: 300 }, (_, n) => n))
  await pool.end()
})

main()
