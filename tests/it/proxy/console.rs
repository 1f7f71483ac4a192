//! The admin console (database `portcullis`), and `SHOW pool_...` on any session.

use crate::front::{Front, Setup, eventually, open, open_with, output};
use crate::pg::PASSWORD;
use crate::raw::*;
use portcullis::base::config::{Pool, PoolMode};
use portcullis::wire::pg::field;
use std::time::Duration;

const DATABASE: &str = "portcullis";

/// A console, as raw bytes.
async fn console(front: &Front, user: &str) -> Raw {
    let mut raw = Raw::connect(front).await;
    raw.log_in(&[("user", user), ("database", DATABASE)]).await;
    raw
}

async fn typed(front: &Front, user: &str) -> tokio_postgres::Client {
    let mut config = tokio_postgres::Config::new();
    config.host("127.0.0.1").port(front.address.port()).user(user).password(PASSWORD).dbname(DATABASE);
    let (client, connection) = config.connect(tokio_postgres::NoTls).await.unwrap();
    tokio::spawn(connection);
    client
}

async fn in_app(front: &Front) -> Raw {
    Raw::trusty(front).await
}

/// Columns and rows of an answer in text, and the notices before it; null is `-`.
async fn table(raw: &mut Raw, sql: &str) -> (Vec<String>, Vec<Vec<String>>) {
    raw.send(&query(sql)).await;
    let (mut columns, mut rows) = (Vec::new(), Vec::new());
    loop {
        let (kind, body) = raw.receive().await.expect("an answer");
        match kind {
            b'T' => {
                let mut rest = &body[2..];
                while let Some(end) = rest.iter().position(|b| *b == 0) {
                    columns.push(String::from_utf8(rest[..end].to_vec()).unwrap());
                    rest = &rest[end + 19..];
                }
            }
            b'D' => {
                let (mut cells, mut at) = (Vec::new(), 2);
                while at < body.len() {
                    let length = i32::from_be_bytes(body[at..at + 4].try_into().unwrap());
                    at += 4;
                    let Ok(length) = usize::try_from(length) else {
                        cells.push("-".to_owned());
                        continue;
                    };
                    cells.push(String::from_utf8(body[at..at + length].to_vec()).unwrap());
                    at += length;
                }
                rows.push(cells);
            }
            b'E' => panic!("{sql}: {:?}", field(&body, b'M')),
            b'Z' => return (columns, rows),
            _ => {}
        }
    }
}

async fn rows(raw: &mut Raw, sql: &str) -> Vec<Vec<String>> {
    table(raw, sql).await.1
}

/// SQLSTATE, message and hint of a query that fails; the session goes on.
async fn refused(raw: &mut Raw, sql: &str) -> (String, String, String) {
    raw.send(&query(sql)).await;
    let (kind, body) = raw.receive().await.expect("an answer");
    assert_eq!(kind, b'E', "{sql}");
    assert!(raw.until_ready().await.len() == 1, "{sql}: nothing else");
    (field(&body, b'C').unwrap(), field(&body, b'M').unwrap(), field(&body, b'H').unwrap_or_default())
}

/// pgpool-II 4.3's, word for word (reference-pgpool.md 1.9).
const PGPOOL: [(&str, &str); 7] = [
    (
        "pool_nodes",
        "node_id, hostname, port, status, pg_status, lb_weight, role, pg_role, select_cnt, load_balance_node, \
         replication_delay, replication_state, replication_sync_state, last_status_change",
    ),
    ("pool_status", "item, value, description"),
    (
        "pool_pools",
        "pool_pid, start_time, client_connection_count, pool_id, backend_id, database, username, \
         backend_connection_time, client_connection_time, client_disconnection_time, client_idle_duration, \
         majorversion, minorversion, pool_counter, pool_backendpid, pool_connected, status",
    ),
    (
        "pool_processes",
        "pool_pid, start_time, client_connection_count, database, username, backend_connection_time, pool_counter, \
         status",
    ),
    ("pool_version", "pool_version"),
    (
        "pool_health_check_stats",
        "node_id, hostname, port, status, role, last_status_change, total_count, success_count, fail_count, \
         skip_count, retry_count, average_retry_count, max_retry_count, max_duration, min_duration, \
         average_duration, last_health_check, last_successful_health_check, last_skip_health_check, \
         last_failed_health_check",
    ),
    (
        "pool_backend_stats",
        "node_id, hostname, port, status, role, select_cnt, insert_cnt, update_cnt, delete_cnt, ddl_cnt, other_cnt, \
         panic_cnt, fatal_cnt, error_cnt",
    ),
];

#[tokio::test(flavor = "multi_thread")]
async fn show_pool_has_the_columns_of_pgpool_on_any_session_and_on_the_console() {
    let pool = Pool { mode: PoolMode::Transaction, size: 3, threads: 2, ..Pool::default() };
    let front = open_with(Setup { pool, ..Setup::default() }).await;
    let (mut a, mut console) = (in_app(&front).await, console(&front, "trusty").await);
    assert_eq!(a.ask(&query("begin")).await, "Ct");
    let client = front.client("app").await;
    for (name, columns) in PGPOOL {
        let wanted: Vec<&str> = columns.split(", ").collect();
        for raw in [&mut a, &mut console] {
            let (found, rows) = table(raw, &format!("SHOW {name};")).await;
            assert_eq!(found, wanted, "{name}");
            assert!(!rows.is_empty() && rows.iter().all(|row| row.len() == wanted.len()), "{name}: {rows:?}");
        }
        let found = client.query(&format!("show {name}"), &[]).await.unwrap();
        let names: Vec<&str> = found[0].columns().iter().map(tokio_postgres::Column::name).collect();
        assert_eq!(names, wanted, "{name}, prepared");
        assert!(found[0].columns().iter().all(|column| column.type_().name() == "text"));
    }
    let found = rows(&mut a, "show pool_pools").await;
    let own = found.iter().find(|row| row[6] == "trusty").expect("a row");
    assert_eq!(own[0], a.pid.to_string());
    assert_eq!((&*own[5], &*own[15], &*own[16]), ("app", "1", "Idle in transaction"));
    assert_eq!(own[14], value(&mut a, "select pg_backend_pid()").await);
    assert!(own[1].parse::<jiff::civil::DateTime>().is_ok(), "{own:?}");
    let other = found.iter().find(|row| row[6] == "app").expect("a row");
    assert_eq!((&*other[14], &*other[16]), ("0", "Idle"), "it has no backend now");
    let nodes = rows(&mut a, "show pool_nodes").await;
    assert_eq!(nodes[1][..9].join(","), "1,192.0.2.12,5432,up,up,0.500000,standby,standby,0");
    assert_eq!(nodes[1][10..].join(","), "120,streaming,sync,2026-11-20 15:21:12");
    assert_eq!(rows(&mut a, "Show Pool_Version").await, [["test (portcullis)"]]);
    assert_eq!(a.ask(&query("commit")).await, "Ci");
    assert_eq!(a.ask(&query("show pool_nothing")).await, "Ei", "all else is PostgreSQL's");
    assert_eq!(a.ask(&query("show pools")).await, "Ei", "the console's own views too");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_console_shows_what_there_is() {
    let front = open().await;
    let mut a = in_app(&front).await;
    a.ask(&query("begin")).await;
    let mut admin = console(&front, "trusty").await;
    let clients = rows(&mut admin, "show clients").await;
    assert_eq!(clients.len(), 1, "no console among them");
    let port = a.stream.local_addr().unwrap().port().to_string();
    assert_eq!(clients[0][..7].join(" "), format!("{} trusty app idle in transaction 127.0.0.1 {port} f", a.pid));
    let servers = rows(&mut admin, "show servers").await;
    assert_eq!(servers[0][1..].join(" "), format!("trusty app idle in transaction {}", a.pid));
    let pools = rows(&mut admin, "show pools").await;
    assert_eq!(pools[0].join(" "), "app trusty 1 0 1 0 40 session f");
    let stats = rows(&mut admin, "show stats").await;
    assert_eq!(stats[0][..3].join(" "), "app trusty 1");
    assert!(stats[0][4].parse::<u64>().unwrap() > 0 && stats[0][5].parse::<u64>().unwrap() > 0);
    let nodes = rows(&mut admin, "show nodes").await;
    assert_eq!(nodes[1][..8].join(" "), "1 midna 192.0.2.12 5432 up standby 0.5 t");
    assert_eq!(nodes[0][9], "-", "null where there is nothing");
    let lease = rows(&mut admin, "show lease").await;
    assert_eq!(lease[0][..3].join(" "), "alp open t");
    assert!(lease[0][3].parse::<u64>().unwrap() > 3_000_000, "the gate's own: {lease:?}");
    let status = rows(&mut admin, "show status").await;
    assert!(status.contains(&vec!["summary".to_owned(), "alp is active: its gate is open".to_owned()]), "{status:?}");
    let config = rows(&mut admin, "show config").await;
    assert!(config.contains(&["console.admins", "trusty", "t"].map(str::to_owned).to_vec()), "{config:?}");
    assert!(rows(&mut admin, "show lists").await.contains(&vec!["consoles".to_owned(), "1".to_owned()]));
    assert_eq!(rows(&mut admin, "show databases").await[0].join(" "), "app f 1 1");
    assert_eq!(rows(&mut admin, "show version").await, [["portcullis test"]]);
    assert!(rows(&mut admin, "show events").await.is_empty());
    let help = rows(&mut admin, "help").await;
    for row in help.iter().filter_map(|row| row[0].strip_prefix("SHOW ")).filter(|name| *name != "view") {
        let (columns, _) = table(&mut admin, &format!("SHOW {row}")).await;
        assert!(!columns.is_empty(), "{row}");
    }
    assert_eq!(rows(&mut admin, "pgpool show port").await, [[front.address.port().to_string()]]);
    assert_eq!(rows(&mut admin, "pgpool show all").await, rows(&mut admin, "show pool_status").await);
    assert_eq!(rows(&mut admin, "show server_version").await, [["15.0 (portcullis test)"]]);
    for (sql, code) in [
        ("select * from pg_class", "0A000"),
        ("show nothing", "42704"),
        ("pgpool show nothing", "42704"),
        ("kill", "42601"),
        ("kill client 1", "55000"),
        ("pause nowhere", "55000"),
        ("reload", "F0000"),
    ] {
        let (found, text, hint) = refused(&mut admin, sql).await;
        assert!(found == code && text.starts_with("portcullis: ") && !hint.is_empty(), "{sql}: {found} {text}: {hint}");
    }
    assert_eq!(a.ask(&query("commit")).await, "Ci");
}

#[tokio::test(flavor = "multi_thread")]
async fn only_who_is_named_has_a_console_and_who_may_look_commands_nothing() {
    let front = open().await;
    front.pg.admin("create role stranger login").unwrap();
    front.rules.replace(
        portcullis::wire::hba::HbaFile::parse("hba.conf", "host all all all trust").unwrap(),
        None,
        Duration::ZERO,
    );
    let mut stranger = Raw::connect(&front).await;
    stranger.send(&startup(0, &[("user", "stranger"), ("database", DATABASE)])).await;
    let (code, text, _) = stranger.error().await;
    assert!(code == "42501" && text.contains("\"stranger\" is not allowed on the console"), "{code} {text}");
    assert!(stranger.is_closed().await);
    let mut nobody = Raw::connect(&front).await;
    nobody.send(&startup(0, &[("user", "nobody-there"), ("database", DATABASE)])).await;
    assert_eq!(nobody.error().await.0, "28000", "the login comes first");
    let mut looker = console(&front, "app").await;
    assert!(rows(&mut looker, "show clients").await.is_empty());
    for sql in ["pause", "resume", "pause app", "reconnect", "kill app", "kill client 1", "reload"] {
        assert_eq!(refused(&mut looker, sql).await.0, "42501", "{sql}");
    }
    // The administrator of PostgreSQL needs no entry.
    let mut admin = console(&front, "postgres").await;
    assert_eq!(admin.ask(&query("resume")).await, "NCi");
    assert_eq!(front.audit.lock().unwrap().len(), 1, "what is refused reaches nobody");
    let address = admin.stream.local_addr().unwrap();
    assert_eq!(front.audit.lock().unwrap()[0], format!("role postgres from {address} (console): resume"));
    front.pg.admin("drop role stranger").unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_login_is_asked_of_a_console() {
    let front = open().await;
    let psql = |password: &str| {
        let mut psql = front.psql("app", password, "show version");
        psql.env("PGDATABASE", DATABASE);
        psql
    };
    assert_eq!(output(&mut psql(PASSWORD)).await.unwrap(), "portcullis test");
    let refused = output(&mut psql("wrong")).await.unwrap_err();
    assert!(refused.contains("password authentication failed"), "{refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn psql_works_as_people_use_it() {
    let front = open().await;
    let psql = |input: &str| {
        let mut psql = front.psql("trusty", "", input);
        psql.env("PGDATABASE", DATABASE);
        psql
    };
    assert_eq!(
        output(&mut psql("show pool_version; show version")).await.unwrap(),
        "test (portcullis)\nportcullis test"
    );
    let script = tempfile::NamedTempFile::new().unwrap();
    let text = "show lists \\gset\nshow version \\g /dev/null\nbegin;\nresume;\nrollback;\n\\echo :list\n\
                pause app;\n\\d\nshow nodes;\n\\x on\nshow lease;\n";
    std::fs::write(script.path(), text).unwrap();
    let mut file = tokio::process::Command::new("psql");
    file.args(["-X", "-w", "-h", "127.0.0.1", "-U", "trusty", "-d", DATABASE, "-p"]);
    file.arg(front.address.port().to_string()).arg("-f").arg(script.path()).kill_on_drop(true);
    let out = tokio::time::timeout(Duration::from_secs(60), file.output()).await.expect("psql hangs").unwrap();
    let (said, error) = (String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    // \\gset wants one row, nobody has logged in to app, and \\d asks the catalogue: errors, and psql goes on.
    assert!(error.contains("more than one row returned for \\gset"), "{error}");
    assert!(error.contains("no client has logged in to database app") && error.contains("HINT:"), "{error}");
    assert!(error.contains("runs no SQL"), "{error}");
    assert!(!error.contains("WARNING"), "no other version than psql's is told: {error}");
    assert!(said.contains("node_id") && said.contains("lease_remaining_ms"), "{said}");
    // \watch until the gate is cut.
    std::fs::write(script.path(), "show version \\watch 0.1\n").unwrap();
    let mut watch = tokio::process::Command::new("psql");
    watch.args(["-XAt", "-w", "-h", "127.0.0.1", "-U", "trusty", "-d", DATABASE, "-p"]);
    watch.arg(front.address.port().to_string()).arg("-f").arg(script.path()).kill_on_drop(true);
    watch.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
    let watching = watch.spawn().unwrap();
    let mut other = console(&front, "trusty").await;
    let mut seen = false;
    for _ in 0..300 {
        let lists = rows(&mut other, "show lists").await;
        seen |= lists.iter().any(|row| row[..] == ["consoles", "2"]);
        if seen {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(seen, "psql is there");
    tokio::time::sleep(Duration::from_millis(500)).await;
    front.gate.cut("portcullis: the end");
    let out = tokio::time::timeout(Duration::from_secs(60), watching.wait_with_output()).await.expect("ends").unwrap();
    let (said, error) = (String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    assert!(said.matches("portcullis test").count() >= 2 && error.contains("portcullis: the end"), "{said}{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn drivers_that_prepare_everything_get_types() {
    let front = open().await;
    let _app = in_app(&front).await;
    let mut client = typed(&front, "trusty").await;
    let row = client.query_one("SHOW CLIENTS", &[]).await.unwrap();
    assert_eq!((row.get::<_, &str>("user"), row.get::<_, bool>("tls")), ("trusty", false));
    assert!(row.get::<_, i64>("port") > 0 && row.get::<_, f64>("connected_seconds") >= 0.0);
    let nodes = client.query("show nodes", &[]).await.unwrap();
    assert_eq!(nodes[0].get::<_, Option<&str>>("replication_state"), None);
    assert_eq!(nodes[1].get::<_, f64>("weight"), 0.5);
    assert_eq!(client.execute("pause app", &[]).await.unwrap(), 0);
    assert_eq!(client.execute("resume app", &[]).await.unwrap(), 0);
    let kept = client.prepare("show lists").await.unwrap();
    for _ in 0..2 {
        assert!(client.query(&kept, &[]).await.unwrap().len() > 5);
    }
    // A transaction as drivers make one; portals in pieces.
    let transaction = client.transaction().await.unwrap();
    let portal = transaction.bind(&kept, &[]).await.unwrap();
    assert_eq!(transaction.query_portal(&portal, 3).await.unwrap().len(), 3);
    assert!(!transaction.query_portal(&portal, 0).await.unwrap().is_empty());
    assert_eq!(transaction.query_portal(&portal, 0).await.unwrap().len(), 0);
    assert!(transaction.execute("select 2", &[]).await.is_err());
    assert_eq!(transaction.query("show version", &[]).await.unwrap_err().code().unwrap().code(), "25P02");
    transaction.rollback().await.unwrap();
    let error = client.query("show nodes where $1", &[&1i32]).await.unwrap_err();
    assert_eq!(error.code().unwrap().code(), "42601");
    assert_eq!(client.query("show version", &[]).await.unwrap().len(), 1, "it goes on");

    let mut raw = console(&front, "trusty").await;
    let sync = SYNC.to_vec();
    let pipeline = [extended("show version"), extended("kill"), extended("show version"), sync.clone()].concat();
    assert_eq!(raw.ask(&pipeline).await, "12DCEi", "after an error all is skipped up to the Sync");
    assert_eq!(raw.ask(&[parse("n", "pause app"), describe("n"), sync.clone()].concat()).await, "1tni");
    assert_eq!(raw.ask(&[parse("n", "show lease"), sync.clone()].concat()).await, "Ei", "that name is taken");
    assert_eq!(raw.ask(&run("none")).await, "Ei");
    assert_eq!(raw.ask(&query("")).await, "Ii");
    assert_eq!(raw.ask(&query("begin; show version; commit")).await, "CTDCCi");
    for byte in [query("show version"), extended("show version"), sync].concat() {
        raw.send(&[byte]).await;
    }
    assert_eq!((raw.until_ready().await, raw.until_ready().await), ("TDCi".to_owned(), "12DCi".to_owned()));
    let mut long = console(&front, "trusty").await;
    long.send(&message(b'Q', &[b' '; 70_000])).await;
    assert_eq!(long.error().await.0, "54000");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pause_waits_for_transactions_and_holds_no_console() {
    let front = open().await;
    let (mut a, mut admin) = (in_app(&front).await, console(&front, "trusty").await);
    for pause in ["pause", "pause app"] {
        let resume = pause.replace("pause", "resume");
        a.ask(&query("begin")).await;
        admin.send(&query(pause)).await;
        assert!(admin.is_silent_for(Duration::from_millis(300)).await, "{pause}: one is in a transaction");
        assert_eq!(a.ask(&query("commit")).await, "Ci");
        assert_eq!(admin.until_ready().await, "NCi");
        a.send(&query("select 1")).await;
        assert!(a.is_silent_for(Duration::from_millis(200)).await, "held");
        // Neither this console nor a new one.
        let mut other = console(&front, "trusty").await;
        assert_eq!(other.ask(&query(&resume)).await, "NCi");
        assert_eq!(a.until_ready().await, "TDCi");
    }
    assert_eq!(admin.ask(&query("reconnect app; reconnect")).await, "NCNCi");
    let noted = front.audit.lock().unwrap().clone();
    let said: Vec<&str> = noted.iter().filter_map(|line| line.split(": ").nth(1)).collect();
    assert_eq!(said, ["pause", "resume", "pause app", "resume app", "reconnect app", "reconnect"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_is_killed_by_its_id_and_no_other() {
    for mode in [PoolMode::Session, PoolMode::Transaction] {
        let pool = Pool { mode, size: 3, threads: 2, ..Pool::default() };
        let front = open_with(Setup { pool, ..Setup::default() }).await;
        let (mut idle, mut busy, mut admin) =
            (in_app(&front).await, in_app(&front).await, console(&front, "trusty").await);
        busy.ask(&query("begin")).await;
        let backend: i32 = value(&mut busy, "select pg_backend_pid()").await.parse().unwrap();
        busy.send(&query("select pg_sleep(60)")).await;
        front.wait_until_asleep(backend).await;
        assert_eq!(admin.ask(&query(&format!("kill client {}", busy.pid))).await, "NCi", "{mode:?}");
        assert_eq!(busy.error().await.0, "57P01");
        let gone = format!("select count(*) from pg_stat_activity where pid = {backend}");
        eventually("its statement ends with it", async || front.pg.admin(&gone).unwrap() == "0").await;
        assert_eq!(idle.ask(&query("select 1")).await, "TDCi", "{mode:?}: another one goes on");
        assert_eq!(admin.ask(&query("kill app")).await, "NCi");
        assert_eq!(idle.error().await.0, "57P01");
        assert_eq!(admin.ask(&query("show version")).await, "TDCi", "no console is of a database");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_console_ends_with_the_gate_and_passes_nothing_while_it_is_shut() {
    let front = open().await;
    let mut admin = console(&front, "trusty").await;
    // PostgreSQL is away: nothing passes, and it waits.
    let until = portcullis::io::clock::now() + Duration::from_secs(600);
    front.gate.suspend(until, "away");
    admin.send(&query("reconnect")).await;
    assert!(admin.is_silent_for(Duration::from_millis(300)).await);
    assert!(front.audit.lock().unwrap().is_empty(), "nor is anything done");
    front.extend(Duration::from_secs(600));
    assert_eq!(admin.until_ready().await, "NCi");
    let mut late = console(&front, "trusty").await;
    front.gate.cut("portcullis: node alp was fenced");
    for raw in [&mut admin, &mut late] {
        let (code, text, before) = raw.error().await;
        assert_eq!((&*code, &*text, &*before), ("57P01", "portcullis: node alp was fenced", ""));
        assert!(raw.is_closed().await);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn there_is_room_for_a_console_where_there_is_none_for_clients() {
    let front = open_with(Setup { max_clients: 1, ..Setup::default() }).await;
    let app = startup(0, &[("user", "trusty"), ("database", "app")]);
    let mut a = Raw::connect(&front).await;
    a.send(&app).await;
    // Who found the door open may not have left yet.
    while a.receive().await.expect("an answer").0 == b'E' {
        a = Raw::connect(&front).await;
        a.send(&app).await;
    }
    a.until_ready().await;
    let mut b = Raw::connect(&front).await;
    b.send(&app).await;
    assert_eq!(b.error().await.0, "53300");
    let mut admin = console(&front, "trusty").await;
    assert_eq!(rows(&mut admin, "show clients").await.len(), 1);
    assert_eq!(a.ask(&query("select 1")).await, "TDCi");
    // A replication connection asks for no database of that name.
    let mut walsender = Raw::connect(&front).await;
    let parameters = [("user", "trusty"), ("database", DATABASE), ("replication", "true")];
    walsender.send(&startup(0, &parameters)).await;
    assert_eq!(walsender.error().await.0, "53300", "it is a client like others");
}
