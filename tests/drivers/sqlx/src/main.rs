//! sqlx as people use it, against the server in PGHOST, PGPORT, ...; prints one line a test.

use futures_util::future::LocalBoxFuture;
use futures_util::{FutureExt, StreamExt, TryStreamExt};
use sqlx::postgres::{PgConnectOptions, PgConnection, PgListener, PgPool, PgPoolOptions, PgSslMode};
use sqlx::{Connection, Executor, Row};
use std::panic::AssertUnwindSafe;
use std::time::Duration;

type Test = Result<(), Box<dyn std::error::Error + Send + Sync>>;

fn options() -> PgConnectOptions {
    // The rest is read from the environment.
    PgConnectOptions::new().ssl_mode(PgSslMode::Disable)
}

async fn connect() -> Result<PgConnection, sqlx::Error> {
    PgConnection::connect_with(&options()).await
}

fn code<T>(result: Result<T, sqlx::Error>) -> String {
    match result {
        Ok(_) => "success".to_owned(),
        Err(sqlx::Error::Database(error)) => error.code().unwrap_or_default().into_owned(),
        Err(error) => error.to_string(),
    }
}

async fn pid(conn: &mut PgConnection) -> Result<i32, sqlx::Error> {
    sqlx::query_scalar("select pg_backend_pid()").fetch_one(conn).await
}

/// Others that hold the backend this connection had last, where there is a pool.
async fn thieves(conn: &mut PgConnection) -> Result<Vec<PgConnection>, sqlx::Error> {
    let wanted = pid(conn).await?;
    let mut thieves = Vec::new();
    for _ in 0..20 {
        let mut thief = connect().await?;
        thief.execute("begin").await?;
        let got = pid(&mut thief).await?;
        thieves.push(thief);
        if got == wanted {
            break;
        }
    }
    Ok(thieves)
}

async fn scram_login() -> Test {
    let password = std::env::var("APP_PASSWORD")?;
    let mut conn =
        PgConnection::connect_with(&options().username("app").password(&password).database("app")).await?;
    let name: String = sqlx::query_scalar("select current_user::text").fetch_one(&mut conn).await?;
    assert_eq!(name, "app");
    let wrong = PgConnection::connect_with(&options().username("app").password("wrong").database("app")).await;
    assert_eq!(code(wrong), "28P01");
    Ok(())
}

async fn prepared() -> Test {
    let mut conn = connect().await?;
    for n in 0..50i64 {
        let row = sqlx::query("select $1::int8 + 1, $2::text").bind(n).bind("x").fetch_one(&mut conn).await?;
        assert_eq!((row.get::<i64, _>(0), row.get::<&str, _>(1)), (n + 1, "x"));
    }
    Ok(())
}

async fn prepared_while_another_has_the_backend() -> Test {
    let mut conn = connect().await?;
    let ask = "select $1::int8 * 5";
    assert_eq!(sqlx::query_scalar::<_, i64>(ask).bind(1i64).fetch_one(&mut conn).await?, 5);
    let others = thieves(&mut conn).await?;
    assert_eq!(sqlx::query_scalar::<_, i64>(ask).bind(2i64).fetch_one(&mut conn).await?, 10);
    drop(others);
    assert_eq!(sqlx::query_scalar::<_, i64>(ask).bind(3i64).fetch_one(&mut conn).await?, 15);
    Ok(())
}

async fn statements_evicted() -> Test {
    let mut conn = PgConnection::connect_with(&options().statement_cache_capacity(5)).await?;
    for turn in 0..3i64 {
        for n in 0..20i64 {
            let sql = format!("select $1::int8 + {n}");
            assert_eq!(sqlx::query_scalar::<_, i64>(&sql).bind(turn).fetch_one(&mut conn).await?, turn + n);
        }
    }
    Ok(())
}

async fn not_persistent() -> Test {
    let mut conn = connect().await?;
    for n in 0..20i64 {
        let got: i64 = sqlx::query_scalar("select $1::int8").bind(n).persistent(false).fetch_one(&mut conn).await?;
        assert_eq!(got, n);
    }
    Ok(())
}

async fn simple_queries() -> Test {
    let mut conn = connect().await?;
    let rows = sqlx::raw_sql("select 1; select 2; select 3").fetch_all(&mut conn).await?;
    assert_eq!(rows.len(), 3);
    Ok(())
}

async fn described() -> Test {
    let mut conn = connect().await?;
    let description = conn.describe("select $1::int4 as n, 'x'::text as t").await?;
    assert_eq!(description.columns.len(), 2);
    Ok(())
}

async fn errors_leave_the_session_usable() -> Test {
    let mut conn = connect().await?;
    assert_eq!(code(sqlx::query("selec").execute(&mut conn).await), "42601");
    assert_eq!(code(sqlx::query("select 1/$1::int4").bind(0).execute(&mut conn).await), "22012");
    assert_eq!(code(sqlx::raw_sql("select 1; select 1/0; select 2").fetch_all(&mut conn).await), "22012");
    conn.ping().await?;
    Ok(())
}

async fn transactions() -> Test {
    let mut conn = connect().await?;
    conn.execute("drop table if exists tx; create table tx(a int8)").await?;
    let mut tx = conn.begin().await?;
    sqlx::query("insert into tx values ($1)").bind(1i64).execute(&mut *tx).await?;
    {
        let mut inner = tx.begin().await?;
        sqlx::query("insert into tx values ($1)").bind(2i64).execute(&mut *inner).await?;
        assert_eq!(code(sqlx::query("select 1/0").execute(&mut *inner).await), "22012");
        inner.rollback().await?;
    }
    tx.commit().await?;
    // Rolled back when dropped, with the next use.
    let mut dropped = conn.begin().await?;
    dropped.execute("insert into tx values (3)").await?;
    drop(dropped);
    let all: Vec<i64> = sqlx::query_scalar("select a from tx").fetch_all(&mut conn).await?;
    assert_eq!(all, [1]);
    Ok(())
}

async fn large_result() -> Test {
    let mut conn = connect().await?;
    let mut rows = sqlx::query("select n::int8, repeat('r', 200) from generate_series(1, 50000) n").fetch(&mut conn);
    let mut sum = 0;
    while let Some(row) = rows.try_next().await? {
        sum += row.get::<i64, _>(0);
    }
    assert_eq!(sum, 50_000 * 50_001 / 2);
    Ok(())
}

async fn stream_left_half_way() -> Test {
    let mut conn = connect().await?;
    let mut rows = sqlx::query("select n from generate_series(1, 300000) n").fetch(&mut conn);
    assert!(rows.next().await.is_some());
    drop(rows);
    assert_eq!(sqlx::query_scalar::<_, i32>("select 1").fetch_one(&mut conn).await?, 1);
    Ok(())
}

async fn big_parameter() -> Test {
    let mut conn = connect().await?;
    let text = "p".repeat(20 << 20);
    let got: String = sqlx::query_scalar("select $1::text").bind(&text).fetch_one(&mut conn).await?;
    assert!(got == text);
    Ok(())
}

async fn copy_in_and_out() -> Test {
    let mut conn = connect().await?;
    conn.execute("drop table if exists copied; create table copied(n int, t text)").await?;
    let mut copy = conn.copy_in_raw("copy copied from stdin").await?;
    let mut text = String::new();
    for n in 0..20_000 {
        text += &format!("{n}\t{}\n", "t".repeat(n % 50));
    }
    copy.send(text.as_bytes()).await?;
    assert_eq!(copy.finish().await?, 20_000);
    let mut out = conn.copy_out_raw("copy (select * from copied order by n) to stdout").await?;
    let mut back = Vec::new();
    while let Some(chunk) = out.try_next().await? {
        back.extend_from_slice(&chunk);
    }
    drop(out);
    assert!(back == text.as_bytes());
    Ok(())
}

async fn copy_in_with_errors() -> Test {
    let mut conn = connect().await?;
    conn.execute("drop table if exists copied_e; create table copied_e(n int)").await?;
    let mut copy = conn.copy_in_raw("copy copied_e from stdin").await?;
    copy.send(&b"1\n2\noops\n"[..]).await?;
    assert_eq!(code(copy.finish().await), "22P02");
    let mut copy = conn.copy_in_raw("copy copied_e from stdin").await?;
    copy.send(&b"1\n2\n"[..]).await?;
    copy.abort("enough").await?;
    let count: i64 = sqlx::query_scalar("select count(*) from copied_e").fetch_one(&mut conn).await?;
    assert_eq!(count, 0);
    Ok(())
}

async fn pooled() -> Test {
    let pool = PgPoolOptions::new().max_connections(10).connect_with(options()).await?;
    async fn one(pool: PgPool, n: i64) -> Result<i64, sqlx::Error> {
        let mut tx = pool.begin().await?;
        let got = sqlx::query_scalar("select $1::int8").bind(n).fetch_one(&mut *tx).await?;
        tx.commit().await?;
        Ok(got)
    }
    let tasks: Vec<_> = (0..400i64).map(|n| tokio::spawn(one(pool.clone(), n))).collect();
    let mut all = Vec::new();
    for task in tasks {
        all.push(task.await??);
    }
    assert_eq!(all, (0..400).collect::<Vec<_>>());
    pool.close().await;
    Ok(())
}

async fn listening() -> Test {
    let pool = PgPoolOptions::new().max_connections(2).connect_with(options()).await?;
    let mut listener = PgListener::connect_with(&pool).await?;
    listener.listen("news").await?;
    sqlx::query("select pg_notify('news', $1)").bind("hear").execute(&pool).await?;
    let heard = tokio::time::timeout(Duration::from_secs(10), listener.recv()).await??;
    assert_eq!(heard.payload(), "hear");
    Ok(())
}

async fn temporary_table() -> Test {
    let mut conn = connect().await?;
    conn.execute("create temporary table fleeting(a int)").await?;
    let others = thieves(&mut conn).await?;
    conn.execute("insert into fleeting values (1)").await?;
    drop(others);
    Ok(())
}

async fn start_up_settings() -> Test {
    let mut conn = PgConnection::connect_with(&options().application_name("sqlx conformance")).await?;
    let others = thieves(&mut conn).await?;
    let row = sqlx::query("select current_setting('application_name'), current_setting('timezone')")
        .fetch_one(&mut conn)
        .await?;
    // sqlx asks for UTC when it connects.
    assert_eq!((row.get::<&str, _>(0), row.get::<&str, _>(1)), ("sqlx conformance", "UTC"));
    drop(others);
    Ok(())
}

async fn dropped_while_waiting() -> Test {
    let pool = PgPoolOptions::new().max_connections(2).connect_with(options()).await?;
    let slow = sqlx::query("select pg_sleep(3)").execute(&pool);
    assert!(tokio::time::timeout(Duration::from_millis(100), slow).await.is_err());
    let got: i32 = sqlx::query_scalar("select 1").fetch_one(&pool).await?;
    assert_eq!(got, 1);
    Ok(())
}

macro_rules! tests {
    ($($name:ident)*) => { [$((stringify!($name), || Box::pin($name()) as LocalBoxFuture<'static, Test>)),*] };
}

fn main() {
    let all: &[(&str, fn() -> LocalBoxFuture<'static, Test>)] = &tests!(
        scram_login prepared prepared_while_another_has_the_backend statements_evicted not_persistent simple_queries
        described errors_leave_the_session_usable transactions large_result stream_left_half_way big_parameter
        copy_in_and_out copy_in_with_errors pooled listening temporary_table start_up_settings dropped_while_waiting
    );
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");
    for (name, test) in all {
        let caught = AssertUnwindSafe(test()).catch_unwind();
        match runtime.block_on(async { tokio::time::timeout(Duration::from_secs(60), caught).await }) {
            Ok(Ok(Ok(()))) => println!("ok {name}"),
            Ok(Ok(Err(error))) => println!("not ok {name}: {}", error.to_string().replace('\n', " ")),
            Ok(Err(_)) => println!("not ok {name}: panicked, as standard error says"),
            Err(_) => println!("not ok {name}: hangs: not over within 20 s"),
        }
    }
    runtime.shutdown_background();
}
