//! PostgreSQL's own programs: pgbench in its query modes, pg_dump and pg_restore, psql. What it is NOT: no measurement.

use crate::suite::{Case, Target, case};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;

const BIN: &str = "/usr/lib/postgresql/15/bin";
/// A database with some of everything that a dump has to carry.
const CONTENTS: &str = "
create schema shop;
create type shop.state as enum ('new', 'paid', 'sent');
create domain shop.price as numeric(10, 2) check (value >= 0);
create table shop.customer(id int generated always as identity primary key, name text not null unique, born date);
create table shop.sale(
    id bigserial primary key, customer int references shop.customer on delete cascade, state shop.state default 'new',
    price shop.price, notes jsonb, blob bytea, tags text[], at timestamptz default now()
) partition by range (id);
create table shop.sale_1 partition of shop.sale for values from (0) to (5000);
create table shop.sale_2 partition of shop.sale for values from (5000) to (maxvalue);
create index on shop.sale(customer, at);
insert into shop.customer(name, born)
    select 'Kundin Nr. ' || n || E' \\u00e4\\u4e2d\\t\\n\\\\', date '1950-01-01' + n from generate_series(1, 500) n;
insert into shop.sale(customer, state, price, notes, blob, tags)
    select 1 + n % 500, (array['new', 'paid', 'sent'])[1 + n % 3]::shop.state, n / 7.0,
           jsonb_build_object('n', n, 'text', repeat('j', n % 300)), decode(repeat(to_hex(n), 2), 'hex'),
           array[n::text, null, '{\"}'] from generate_series(4096, 12000) n;
create view shop.turnover as select customer, sum(price) from shop.sale group by customer;
create materialized view shop.best as select * from shop.turnover order by 2 desc limit 10;
create function shop.double(n int) returns int language sql immutable as $$ select n * 2 $$;
create function shop.touch() returns trigger language plpgsql as $$ begin new.at = now(); return new; end $$;
create trigger touched before update on shop.customer for each row when (false) execute function shop.touch();
create rule nothing as on delete to shop.customer do instead nothing;
comment on table shop.sale is 'it''s a \"sale\"';
grant select on shop.sale to app;
alter table shop.customer enable row level security;
create policy own on shop.customer to app using (name = current_user);
create sequence shop.odd increment 2 start 7;
select nextval('shop.odd');
select lo_from_bytea(0, decode(repeat('00ff', 5000), 'hex'));
create publication everything for all tables;
";

pub fn cases() -> Vec<Case> {
    vec![
        case!(pgbench_simple, 180),
        case!(pgbench_extended, 180),
        case!(pgbench_prepared, 180),
        case!(pgbench_pipelined, 180),
        case!(pgbench_connecting_each_time, 180),
        case!(dump_and_restore, 360),
        case!(dump_and_restore_in_parallel, 360),
        case!(psql_as_people_use_it, 180),
        case!(psql_watching),
        case!(psql_with_large_objects),
        case!(the_small_programs, 120),
    ]
}

/// Runs one of PostgreSQL's programs against the target; it must succeed.
async fn tool(target: &Arc<Target>, name: &str, arguments: &[&str]) -> Output {
    let mut command = Command::new(format!("{BIN}/{name}"));
    target.environment(&mut command);
    command.args(arguments).stdin(Stdio::null());
    finish(command).await
}

/// Within the case's limit, or killed.
async fn finish(command: Command) -> Output {
    let mut command = tokio::process::Command::from(command);
    let out = command.kill_on_drop(true).output().await.unwrap();
    let (error, command) = (String::from_utf8_lossy(&out.stderr), command.as_std());
    let arguments: Vec<_> = command.get_args().collect();
    assert!(out.status.success(), "{:?} {arguments:?}: {error}", command.get_program());
    out
}

/// Its own tables; other cases have their own runs of it.
async fn bench(target: Arc<Target>, arguments: &[&str]) {
    tool(&target, "pgbench", &["-i", "-q", "-s", "1"]).await;
    let out = tool(&target, "pgbench", &[&["-n", "-c", "8", "-j", "2"], arguments].concat()).await;
    let said = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
    assert!(said.contains("number of failed transactions: 0 (0.000%)"), "{said}");
    // TPC-B's own check, and that nothing was lost.
    let sums = "select (select sum(abalance) from pgbench_accounts), (select sum(bbalance) from pgbench_branches), \
                (select sum(tbalance) from pgbench_tellers), (select coalesce(sum(delta), 0) from pgbench_history)";
    let out = tool(&target, "psql", &["-XAtc", sums]).await;
    let line = String::from_utf8(out.stdout).unwrap();
    let sums: Vec<&str> = line.trim().split('|').collect();
    assert!(sums.iter().all(|sum| *sum == sums[0]), "{line}");
}

async fn pgbench_simple(target: Arc<Target>) {
    bench(target, &["-M", "simple", "-t", "100"]).await;
}

async fn pgbench_extended(target: Arc<Target>) {
    bench(target, &["-M", "extended", "-t", "100"]).await;
}

async fn pgbench_prepared(target: Arc<Target>) {
    bench(target, &["-M", "prepared", "-t", "100"]).await;
}

async fn pgbench_pipelined(target: Arc<Target>) {
    let dir = tempfile::tempdir().unwrap();
    let script = dir.path().join("script");
    let text =
        "\\startpipeline\nselect 1;\nbegin;\nselect generate_series(1, 100);\nselect 2;\ncommit;\n\\endpipeline\n";
    std::fs::write(&script, text).unwrap();
    let file = script.to_str().unwrap();
    bench(Arc::clone(&target), &["-M", "extended", "-t", "50", "-f", file]).await;
    bench(target, &["-M", "prepared", "-t", "50", "-f", file]).await;
}

async fn pgbench_connecting_each_time(target: Arc<Target>) {
    bench(target, &["-C", "-S", "-M", "extended", "-t", "30"]).await;
}

/// A database of this target's own beside its first.
fn beside(target: &Target, suffix: &str) -> String {
    let name = format!("{}_{suffix}", target.database);
    target.pg.admin(&format!("drop database if exists {name}")).unwrap();
    target.pg.admin(&format!("create database {name}")).unwrap();
    name
}

/// As PostgreSQL itself shows it, around the gate; made in the database `from` and restored into another.
async fn plain(target: &Arc<Target>, database: &str) -> String {
    let mut command = Command::new(format!("{BIN}/pg_dump"));
    command.args(["-U", "postgres", "-p", &crate::pg::PORT.to_string(), "-h"]).arg(target.pg.socket_dir());
    command.arg(database).stdin(Stdio::null());
    let text = String::from_utf8(finish(command).await.stdout).unwrap();
    // \restrict and its key differ with each dump.
    text.lines()
        .filter(|line| !line.starts_with("\\restrict") && !line.starts_with("\\unrestrict"))
        .collect::<Vec<_>>()
        .join("\n")
}

async fn fill(target: &Arc<Target>, database: &str) {
    let (pg, sql) = (Arc::clone(&target.pg), format!("\\connect {database}\n{CONTENTS}"));
    tokio::task::spawn_blocking(move || pg.admin(&sql).unwrap()).await.unwrap();
}

async fn dump_and_restore(target: Arc<Target>) {
    let (from, into) = (beside(&target, "from"), beside(&target, "into"));
    fill(&target, &from).await;
    // As people type it: one into the other.
    let mut command = Command::new("bash");
    target.environment(&mut command);
    let line = format!("set -o pipefail; {BIN}/pg_dump -Fc {from} | {BIN}/pg_restore --exit-on-error -d {into}");
    command.args(["-c", &line]).stdin(Stdio::null());
    finish(command).await;
    let (was, is) = (plain(&target, &from).await, plain(&target, &into).await);
    assert!(was.len() > 1_000_000, "{} bytes", was.len());
    assert!(was == is, "what was restored differs");
}

async fn dump_and_restore_in_parallel(target: Arc<Target>) {
    let (from, into) = (beside(&target, "from4"), beside(&target, "into4"));
    fill(&target, &from).await;
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("dump");
    let folder = folder.to_str().unwrap();
    tool(&target, "pg_dump", &["-Fd", "-j4", "-f", folder, &from]).await;
    tool(&target, "pg_restore", &["--exit-on-error", "-j4", "-d", &into, folder]).await;
    assert!(plain(&target, &from).await == plain(&target, &into).await, "what was restored differs");
}

async fn psql_as_people_use_it(target: Arc<Target>) {
    let script = "\\set ON_ERROR_STOP on\n\\timing on\ncreate table typed(a int, b text);\n\
                  \\copy typed from program 'seq 1 1000 | sed s/$/,x/' csv\n\\d typed\n\\dt\n\\l\n\\du\n\\df\n\
                  begin;\nupdate typed set b = 'y';\nrollback;\nselect count(*) from typed where b = 'x' \\gset\n\
                  \\echo :count\nselect 1 as one \\gdesc\n\\copy (select * from typed) to '/dev/null'\n\
                  \\set FETCH_COUNT 100\nselect * from typed;\n";
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("script");
    std::fs::write(&file, script).unwrap();
    let out = tool(&target, "psql", &["-X", "-P", "pager=off", "-f", file.to_str().unwrap()]).await;
    assert!(String::from_utf8_lossy(&out.stdout).lines().any(|line| line == "1000"));
}

/// psql has no end to \\watch in this version but an error; `timeout` says ^C to it, as a person does.
async fn psql_watching(target: Arc<Target>) {
    let text = "create table watched(n int); insert into watched select generate_series(1, 3)";
    tool(&target, "psql", &["-Xc", text]).await;
    let mut command = Command::new(format!("{BIN}/psql"));
    target.environment(&mut command);
    // The rows become fewer with each look, and the last look fails.
    let watch = "with gone as (delete from watched where n = (select max(n) from watched) returning n) \
                 select 'seen ' || 6 / coalesce(max(n) - 1, 0) from gone \\watch 0.1\n";
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("script");
    std::fs::write(&file, watch).unwrap();
    command.args(["-XAt", "-f"]).arg(&file).stdin(Stdio::null());
    let mut command = tokio::process::Command::from(command);
    let out = command.kill_on_drop(true).output().await.unwrap();
    let (said, error) = (String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    let seen: Vec<&str> = said.lines().filter(|line| line.starts_with("seen")).collect();
    assert_eq!(seen, ["seen 3", "seen 6"], "{error}");
    assert!(error.contains("division by zero"), "{error}");
}

async fn psql_with_large_objects(target: Arc<Target>) {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (from, into) = (path("from"), path("into"));
    let bytes: Vec<u8> = (0..600_000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 13).to_le_bytes()[0]).collect();
    std::fs::write(&from, &bytes).unwrap();
    let script = format!(
        "\\set ON_ERROR_STOP on\n\\lo_import {from} 'a picture'\n\\lo_list\n\
         \\lo_export :LASTOID {into}\n\\lo_unlink :LASTOID\n"
    );
    let file = path("script");
    std::fs::write(&file, script).unwrap();
    let out = tool(&target, "psql", &["-X", "-f", &file]).await;
    assert!(String::from_utf8_lossy(&out.stdout).contains("a picture"));
    assert!(std::fs::read(&into).unwrap() == bytes, "other bytes");
}

/// Each of them once; some connect to several databases, or several times at once.
async fn the_small_programs(target: Arc<Target>) {
    let (role, database) = (format!("{}_role", target.database), format!("{}_more", target.database));
    tool(&target, "pg_isready", &[]).await;
    tool(&target, "createuser", &["--createdb", &role]).await;
    tool(&target, "createdb", &["-O", &role, &database]).await;
    tool(&target, "pgbench", &["-i", "-q", "--partitions=3", &database]).await;
    tool(&target, "vacuumdb", &["-q", "-z", "-j3", &database]).await;
    tool(&target, "reindexdb", &["-q", "-j2", "-t", "pgbench_tellers", "-t", "pgbench_branches", &database]).await;
    tool(&target, "clusterdb", &["-q", &database]).await;
    let globals = tool(&target, "pg_dumpall", &["--globals-only"]).await;
    assert!(String::from_utf8_lossy(&globals.stdout).contains(&format!("CREATE ROLE {role};")));
    tool(&target, "dropdb", &[&database]).await;
    tool(&target, "dropuser", &[&role]).await;
}
