//! tokio-postgres as people use it. What it is NOT: sqlx, which has a protocol stack of its own and a suite of its own.

use crate::suite::{Case, Target, case};
use ::tokio_postgres::{AsyncMessage, Client, Config, NoTls, error::SqlState};
use bytes::Bytes;
use futures_util::{SinkExt, StreamExt, TryStreamExt, future};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;

pub fn cases() -> Vec<Case> {
    vec![
        case!(scram_login),
        case!(typed_queries),
        case!(prepared),
        case!(prepared_while_another_has_the_backend),
        case!(pipelined),
        case!(pipelined_with_errors),
        case!(simple_queries),
        case!(errors_leave_the_session_usable),
        case!(transactions),
        case!(transaction_dropped),
        case!(portal),
        case!(large_result),
        case!(rows_left_half_way),
        case!(copy_in_and_out),
        case!(copy_in_with_an_error_in_the_middle),
        case!(copy_in_dropped),
        case!(cancelled),
        case!(listening),
        case!(many_clients),
    ]
}

fn config(target: &Target) -> Config {
    let mut config = Config::new();
    config.host("127.0.0.1").port(target.address.port()).user("trusty").dbname(&target.database);
    config
}

async fn client(target: &Target) -> Client {
    let (client, connection) = config(target).connect(NoTls).await.unwrap();
    tokio::spawn(connection);
    client
}

async fn pid(client: &Client) -> i32 {
    client.query_one("select pg_backend_pid()", &[]).await.unwrap().get(0)
}

/// Others that hold the backend this client had last, where there is a pool.
async fn thieves(target: &Target, victim: &Client) -> Vec<Client> {
    let wanted = pid(victim).await;
    let mut thieves = Vec::new();
    for _ in 0..20 {
        let thief = client(target).await;
        thief.batch_execute("begin").await.unwrap();
        let got = pid(&thief).await;
        thieves.push(thief);
        if got == wanted {
            break;
        }
    }
    thieves
}

async fn scram_login(target: Arc<Target>) {
    let mut config = config(&target);
    config.user("app").password(crate::pg::PASSWORD).dbname("app");
    let (client, connection) = config.connect(NoTls).await.unwrap();
    tokio::spawn(connection);
    let row = client.query_one("select current_user::text", &[]).await.unwrap();
    assert_eq!(row.get::<_, &str>(0), "app");
    let refused = config.password("wrong").connect(NoTls).await.err().unwrap();
    assert_eq!(refused.code(), Some(&SqlState::INVALID_PASSWORD));
}

async fn typed_queries(target: Arc<Target>) {
    let client = client(&target).await;
    let row = client
        .query_one(
            "select $1::int8 + 1, $2::text, $3::bytea, $4::int4[]",
            &[&41i64, &"x", &&b"\0\xff"[..], &vec![1, 2]],
        )
        .await
        .unwrap();
    assert_eq!((row.get::<_, i64>(0), row.get::<_, &str>(1)), (42, "x"));
    assert_eq!((row.get::<_, &[u8]>(2), row.get::<_, Vec<i32>>(3)), (&b"\0\xff"[..], vec![1, 2]));
}

async fn prepared(target: Arc<Target>) {
    let client = client(&target).await;
    let statement = client.prepare("select $1::int8 * 2").await.unwrap();
    for n in 0..100i64 {
        assert_eq!(client.query_one(&statement, &[&n]).await.unwrap().get::<_, i64>(0), n * 2);
    }
    drop(statement);
    for n in 0..50 {
        client.prepare(&format!("select {n}")).await.unwrap();
    }
}

async fn prepared_while_another_has_the_backend(target: Arc<Target>) {
    let client = client(&target).await;
    let statement = client.prepare("select $1::int8 * 7").await.unwrap();
    let others = thieves(&target, &client).await;
    assert_eq!(client.query_one(&statement, &[&1i64]).await.unwrap().get::<_, i64>(0), 7);
    drop(others);
    assert_eq!(client.query_one(&statement, &[&2i64]).await.unwrap().get::<_, i64>(0), 14);
}

async fn pipelined(target: Arc<Target>) {
    let client = client(&target).await;
    let statement = client.prepare("select $1::int8").await.unwrap();
    let all = (0..2000i64).map(|n| {
        let (client, statement) = (&client, &statement);
        async move { client.query_one(statement, &[&n]).await.unwrap().get::<_, i64>(0) }
    });
    assert_eq!(future::join_all(all).await, (0..2000).collect::<Vec<_>>());
}

async fn pipelined_with_errors(target: Arc<Target>) {
    let client = client(&target).await;
    let statement = client.prepare("select 1 / ($1::int8 % 10)").await.unwrap();
    let all = (0..200i64).map(|n| {
        let (client, statement) = (&client, &statement);
        async move { client.query_one(statement, &[&n]).await.is_err() }
    });
    let wrong = future::join_all(all).await;
    assert!(wrong.iter().enumerate().all(|(n, wrong)| *wrong == (n % 10 == 0)));
}

async fn simple_queries(target: Arc<Target>) {
    let client = client(&target).await;
    assert_eq!(client.simple_query("select 1; select 2; select 3").await.unwrap().len(), 9);
    client.batch_execute("").await.unwrap();
    client.batch_execute("do $$ begin perform 1; end $$; select 1").await.unwrap();
}

async fn errors_leave_the_session_usable(target: Arc<Target>) {
    let client = client(&target).await;
    let error = client.query("select 1/0", &[]).await.unwrap_err();
    assert_eq!(error.code(), Some(&SqlState::DIVISION_BY_ZERO));
    let error = client.simple_query("selec").await.unwrap_err();
    assert_eq!(error.code(), Some(&SqlState::SYNTAX_ERROR));
    let error = client.prepare("select * from nowhere").await.err().unwrap();
    assert_eq!(error.code(), Some(&SqlState::UNDEFINED_TABLE));
    client.simple_query("select 1").await.unwrap();
}

async fn transactions(target: Arc<Target>) {
    let mut client = client(&target).await;
    client.batch_execute("drop table if exists tx; create table tx(a int8)").await.unwrap();
    let mut tx = client.transaction().await.unwrap();
    tx.execute("insert into tx values (1)", &[]).await.unwrap();
    let inner = tx.savepoint("s").await.unwrap();
    inner.execute("insert into tx values (2)", &[]).await.unwrap();
    inner.query("select 1/0", &[]).await.unwrap_err();
    inner.rollback().await.unwrap();
    tx.commit().await.unwrap();
    let tx = client.build_transaction().read_only(true).deferrable(true).start().await.unwrap();
    assert_eq!(tx.query("select a from tx", &[]).await.unwrap().len(), 1);
    let error = tx.execute("insert into tx values (3)", &[]).await.unwrap_err();
    assert_eq!(error.code(), Some(&SqlState::READ_ONLY_SQL_TRANSACTION));
    tx.rollback().await.unwrap();
}

async fn transaction_dropped(target: Arc<Target>) {
    let mut client = client(&target).await;
    client.batch_execute("drop table if exists dropped; create table dropped(a int)").await.unwrap();
    let tx = client.transaction().await.unwrap();
    tx.execute("insert into dropped values (1)", &[]).await.unwrap();
    drop(tx);
    assert!(client.query("select * from dropped", &[]).await.unwrap().is_empty());
}

async fn portal(target: Arc<Target>) {
    let mut client = client(&target).await;
    let tx = client.transaction().await.unwrap();
    let portal = tx.bind("select n from generate_series(1, 250) n", &[]).await.unwrap();
    let mut seen = 0;
    loop {
        let rows = tx.query_portal(&portal, 100).await.unwrap();
        if rows.is_empty() {
            break;
        }
        seen += rows.len();
    }
    assert_eq!(seen, 250);
    tx.commit().await.unwrap();
}

async fn large_result(target: Arc<Target>) {
    let client = client(&target).await;
    let none: [i32; 0] = [];
    let rows =
        client.query_raw("select n::int8, repeat('r', 300) from generate_series(1, 50000) n", none).await.unwrap();
    let sum = rows.try_fold(0, |sum, row| async move { Ok(sum + row.get::<_, i64>(0)) }).await.unwrap();
    assert_eq!(sum, 50_000 * 50_001 / 2);
}

async fn rows_left_half_way(target: Arc<Target>) {
    let client = client(&target).await;
    let none: [i32; 0] = [];
    let mut rows = Box::pin(client.query_raw("select n from generate_series(1, 300000) n", none).await.unwrap());
    assert!(rows.next().await.is_some());
    drop(rows);
    client.query_one("select 1", &[]).await.unwrap();
}

async fn copy_in_and_out(target: Arc<Target>) {
    let client = client(&target).await;
    client.batch_execute("drop table if exists copied; create table copied(n int, t text)").await.unwrap();
    let mut sink = pin!(client.copy_in("copy copied from stdin").await.unwrap());
    let mut text = Vec::new();
    for n in 0..20_000usize {
        let line = Bytes::from(format!("{n}\t{}\n", "t".repeat(n % 50)));
        text.extend_from_slice(&line);
        sink.feed(line).await.unwrap();
    }
    assert_eq!(sink.finish().await.unwrap(), 20_000);
    let out = client.copy_out("copy (select * from copied order by n) to stdout").await.unwrap();
    let back: Vec<Bytes> = out.try_collect().await.unwrap();
    assert!(back.concat() == text);
}

async fn copy_in_with_an_error_in_the_middle(target: Arc<Target>) {
    let client = client(&target).await;
    client.batch_execute("drop table if exists copied_e; create table copied_e(n int)").await.unwrap();
    let mut sink = pin!(client.copy_in("copy copied_e from stdin").await.unwrap());
    let sending = async {
        for n in 0..100_000 {
            let line = if n == 3000 { "oops\n".to_owned() } else { format!("{n}\n") };
            sink.feed(Bytes::from(line)).await?;
        }
        sink.finish().await
    };
    sending.await.unwrap_err();
    assert_eq!(client.query_one("select count(*) from copied_e", &[]).await.unwrap().get::<_, i64>(0), 0);
}

async fn copy_in_dropped(target: Arc<Target>) {
    let client = client(&target).await;
    client.batch_execute("drop table if exists copied_d; create table copied_d(n int)").await.unwrap();
    {
        let mut sink = pin!(client.copy_in("copy copied_d from stdin").await.unwrap());
        sink.send(Bytes::from_static(b"1\n")).await.unwrap();
    }
    assert_eq!(client.query_one("select count(*) from copied_d", &[]).await.unwrap().get::<_, i64>(0), 0);
}

async fn cancelled(target: Arc<Target>) {
    let client = client(&target).await;
    let token = client.cancel_token();
    let (error, ()) = tokio::join!(client.simple_query("select pg_sleep(15) -- rust cancel"), async {
        super::until_active(&target, "rust cancel").await;
        token.cancel_query(NoTls).await.unwrap();
    });
    assert_eq!(error.unwrap_err().code(), Some(&SqlState::QUERY_CANCELED));
    client.simple_query("select 1").await.unwrap();
}

async fn listening(target: Arc<Target>) {
    let (listener, mut connection) = config(&target).connect(NoTls).await.unwrap();
    let (sender, mut heard) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Some(Ok(message)) = future::poll_fn(|cx| connection.poll_message(cx)).await {
            if let AsyncMessage::Notification(notification) = message {
                let _ = sender.send(notification.payload().to_owned());
            }
        }
    });
    listener.batch_execute("listen rust_news").await.unwrap();
    client(&target).await.batch_execute("notify rust_news, 'hear'").await.unwrap();
    let payload = tokio::time::timeout(Duration::from_secs(10), heard.recv()).await.expect("not heard");
    assert_eq!(payload.unwrap(), "hear");
}

async fn many_clients(target: Arc<Target>) {
    let all = (0..80i64).map(|n| {
        let target = Arc::clone(&target);
        tokio::spawn(async move {
            let client = client(&target).await;
            for turn in 0..20i64 {
                let row = client.query_one("select $1::int8 + $2::int8", &[&n, &turn]).await.unwrap();
                assert_eq!(row.get::<_, i64>(0), n + turn);
            }
        })
    });
    for done in future::join_all(all).await {
        done.unwrap();
    }
}
