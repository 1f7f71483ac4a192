//! hba_file against PostgreSQL itself: the same lines are taken, the same login is decided by the same rule; and
//! replication goes by its rules.

use crate::front::{Front, Setup, eventually, open_with, output};
use crate::pg::{PASSWORD, Pg, as_postgres};
use crate::raw::*;
use portcullis::wire::hba::HbaFile;
use std::process::{Command, Stdio};
use std::sync::Arc;

/// Lines that both must take, or both refuse. One a line.
const LINES: &str = r#"
local all all peer
local all all md5
local all all trust
local   all   +staff   scram-sha-256
local all all pear
local all
host all all 127.0.0.1/32 trust
host all all 127.0.0.1 255.255.255.255 trust
host all all 127.0.0.1 255.0.255.0 trust
host all all ::1/128 md5
host all all fe80::/10 scram-sha-256
host all all ::1 ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff reject
host all all samehost trust
host all all samenet trust
host all all all trust
host all all db.example.org trust
host all all .example.org trust
host all all 127.0.0.1/33 trust
host all all ::1/129 trust
host all all 10.0.0.0/x trust
host all all 10.0.0.1 trust
host all all 10.0.0.1
host all all 10.0.0.1 255.255.255.0
host all all 10.0.0.1 ffff:: trust
host all all db.example.org/24 trust
host all all all
host all all
host all
host
host a, b, c x,y all trust
host a ,b all trust
host a , b all trust
host ,a b all trust
host a,,b c all trust
host a b c d e
host "a b" "c d" all trust
host "a""b" c"d" all trust
host "all" "+x" all trust
"host" all all all trust
host all all "all" trust
host all all "samehost" trust
host all all all "trust"
host sameuser,samerole,samegroup,replication all all trust
hostssl all all all cert
hostssl all all all cert clientcert=verify-full
hostssl all all all cert clientcert=verify-ca
hostssl all all all cert clientname=CN
hostssl all all all cert clientname=DN
hostssl all all all cert clientname=XX
hostssl all all all cert map=x
hostssl all all all cert map=
hostssl all all all cert map=x clientname=DN
hostssl all all all scram-sha-256 clientcert=verify-full map=x
hostssl all all all scram-sha-256 clientcert=verify-ca
hostssl all all all scram-sha-256 clientcert=verify-full clientname=DN
hostssl all all all trust clientcert=1
hostssl all all all trust clientcert=no-verify
host all all all trust clientcert=verify-full
host all all all trust clientname=CN
hostnossl all all all cert
host all all all cert
host all all all peer
host all all all trust map=x
host all all all trust something
host all all all trust a=b
hostgssenc all all all trust
hostnogssenc all all all reject
hostnossl all all all trust
hosts all all all trust
HOST all all all trust
host all all all TRUST
host all all all trust,md5
host all all 10.0.0.0/8,11.0.0.0/8 trust
host,hostssl all all all trust
host all all all trust # comment
host all all all#comment
host all all all trust#comment
host # all all all trust
# host nothing
host @/nowhere/file all all trust
host all @/nowhere/file all trust
host @ @ all trust
"#;

/// Taken by PostgreSQL 15 and not by us, with a word of our reason.
const STRICTER: &str = r#"
host all all all password | built
host all all all ident | built
host all all all gss | built
host all all all gss map=x | built
host all all all pam | built
local all all pam | built
host all all all ldap ldapserver=x ldapprefix=p | built
host all all all "trust | not closed
host all all 127.1 255.255.255.255 trust | in full
host /(a all all trust | not understood
include other.conf
host all "/^[" all trust | not understood
"#;

fn refused_by_us(text: &str) -> Vec<(usize, String)> {
    let errors = HbaFile::parse("hba.conf", text).err().unwrap_or_default();
    errors.into_iter().map(|error| (error.line, error.problem)).collect()
}

fn refused_by_postgresql(pg: &Pg, text: &str) -> Vec<usize> {
    // Not reloaded: the view reads the file, the rules in force stay.
    let file = pg.scratch("data/pg_hba.conf");
    let before = std::fs::read(&file).unwrap();
    std::fs::write(&file, text).unwrap();
    let asked = pg.admin(
        "select line_number from pg_hba_file_rules \
         where (error is not null and error not like 'hostssl record cannot match%') or type is null order by 1",
    );
    std::fs::write(&file, before).unwrap();
    asked.unwrap().lines().map(|line| line.parse().unwrap()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn postgresql_takes_and_refuses_the_same_lines() {
    let pg = tokio::task::spawn_blocking(Pg::start).await.unwrap();
    let ours: Vec<usize> = refused_by_us(LINES).iter().map(|(line, _)| *line).collect();
    let theirs = refused_by_postgresql(&pg, LINES);
    let line = |number: &usize| LINES.lines().nth(number - 1).unwrap_or_default();
    let only = |a: &[usize], b: &[usize]| a.iter().filter(|n| !b.contains(n)).map(line).collect::<Vec<_>>().join("\n");
    assert_eq!(only(&ours, &theirs), "", "refused by us alone");
    assert_eq!(only(&theirs, &ours), "", "refused by PostgreSQL alone");
    assert!(theirs.len() > 20, "{theirs:?}");
    for line in STRICTER.lines().filter(|line| line.contains('|')) {
        let (line, word) = line.split_once(" | ").unwrap();
        assert_eq!(refused_by_postgresql(&pg, line), [0; 0], "{line}");
        let ours = refused_by_us(line);
        assert!(ours.len() == 1 && ours[0].1.contains(word), "{line}: {ours:?}");
    }
}

/// Each rule has its own verdict by method and line, and none lets anybody in.
const DECISIONS: &str = "
host  first            all            127.0.0.1/32  reject
host  sameuser         all            all           scram-sha-256
host  samerole         all            all           reject
host  \"all\"          all            all           scram-sha-256
host  all              \"+staff\"     all           reject
host  second           +staff         all           scram-sha-256
host  second           all            all           reject
host  \"two words\",x  a,\"b c\"      all           scram-sha-256
hostssl net            all            all           scram-sha-256
hostgssenc net         all            all           scram-sha-256
host  net              boss           samehost      scram-sha-256
host  net              worker         samenet       scram-sha-256
host  net              ann            10.0.0.0/8    scram-sha-256
host  net              ann            ::/0          scram-sha-256
host  named            boss           localhost     scram-sha-256
host  named            worker         .nowhere      scram-sha-256
host  named            all            LOCALHOST     reject
host  replication      worker         all           scram-sha-256
host  replication      boss           all           reject
host  app,postgres     all            127.0.0.0 255.255.0.0 scram-sha-256
";
const PEOPLE: &str = "
create role staff; create role inner_staff in role staff; create role second_staff in role inner_staff;
create role boss login superuser; create role worker login in role second_staff; create role ann login;
create role \"b c\" login; create role \"+staff\" login;
";

#[tokio::test(flavor = "multi_thread")]
async fn the_same_login_is_decided_alike() {
    let port = crate::front::free_port();
    let pg = tokio::task::spawn_blocking(move || {
        let conf = format!("listen_addresses = '127.0.0.1'\nport = {port}\n");
        Pg::start_with(port, &conf, &format!("local all postgres trust\n{DECISIONS}"))
    });
    let pg = Arc::new(pg.await.unwrap());
    pg.admin(PEOPLE).unwrap();
    let front = open_with(Setup { hba: DECISIONS, pg: Some(Arc::clone(&pg)), ..Setup::default() }).await;
    let databases =
        ["first", "ann", "boss", "staff", "inner_staff", "all", "second", "two words", "net", "named", "app", "none"];
    let users = ["boss", "worker", "ann", "b c", "+staff", "staff", "nobody"];
    let ask = async |port: u16, user: &str, database: &str, replication: &str| {
        let mut psql = front.psql(user, "", "select 1");
        psql.env_remove("PGPASSWORD").env("PGPORT", port.to_string());
        psql.args(["-d", &format!("dbname='{database}' replication={replication}")]);
        let said = output(&mut psql).await.expect_err("no rule lets anybody in");
        said.split_once("failed: ").map_or(said.clone(), |(_, reason)| reason.to_owned())
    };
    let mut seen = std::collections::BTreeMap::new();
    front.extend(std::time::Duration::from_secs(600));
    for (replication, count) in [("false", databases.len()), ("true", 1), ("database", 3)] {
        for database in &databases[..count] {
            for user in users {
                let theirs = ask(port, user, database, replication).await;
                let ours = ask(front.address.port(), user, database, replication).await;
                assert_eq!(ours, theirs, "{user} {database} replication={replication}");
                let kind: String = theirs.split_whitespace().take(5).collect::<Vec<_>>().join(" ");
                *seen.entry(kind).or_insert(0) += 1;
            }
        }
    }
    // All of them: no entry, rejected, asked for a password; and the same for replication.
    assert!(seen.len() >= 4, "{seen:#?}");
}

fn through(front: &Front, program: &str, user: &str) -> tokio::process::Command {
    let mut command: tokio::process::Command = as_postgres(program).into();
    command.args(["-h", "127.0.0.1", "-p", &front.address.port().to_string(), "-U", user, "-w"]);
    command.env("PGPASSWORD", PASSWORD).env("PGSSLMODE", "disable").env("PGCONNECT_TIMEOUT", "10").kill_on_drop(true);
    command
}

#[tokio::test(flavor = "multi_thread")]
async fn replication_goes_by_its_keyword_and_through_the_gate() {
    let hba = "host replication streamer all scram-sha-256\nhost all all all scram-sha-256";
    let front = open_with(Setup { hba, ..Setup::default() }).await;
    let dir = front.pg.scratch("through-the-gate");
    let mut backup = through(&front, "pg_basebackup", "streamer");
    output(backup.args(["-X", "stream", "-c", "fast", "-D"]).arg(&dir)).await.unwrap();
    assert!(dir.join("backup_label").exists() && dir.join("pg_wal").is_dir());
    let wal = front.pg.scratch("received");
    std::fs::create_dir(&wal).unwrap();
    std::os::unix::fs::chown(&wal, Some(std::os::unix::fs::MetadataExt::uid(&dir.metadata().unwrap())), None).unwrap();
    let mut receiver = through(&front, "pg_receivewal", "streamer");
    let mut receiver = receiver.arg("-D").arg(&wal).arg("--no-loop").stderr(Stdio::null()).spawn().unwrap();
    let received = || std::fs::read_dir(&wal).unwrap().count() > 0;
    eventually("WAL is received", async || {
        front.pg.admin("select pg_logical_emit_message(true, 'a', 'word')").unwrap();
        received()
    })
    .await;
    receiver.kill().await.unwrap();
    // Who has no rule with the keyword is told so, in PostgreSQL's words.
    let refused =
        output(through(&front, "pg_receivewal", "app").arg("-D").arg(&wal).arg("--no-loop")).await.unwrap_err();
    assert!(
        refused.contains(
            "no pg_hba.conf entry for replication connection from host \"127.0.0.1\", user \"app\", no encryption"
        ),
        "{refused}"
    );
    let mut raw = Raw::connect(&front).await;
    raw.send(&startup(0, &[("user", "app"), ("replication", "perhaps")])).await;
    assert_eq!(raw.error().await.0, "22023");
    // A walsender of a database is an ordinary login.
    let mut psql = front.psql("streamer", PASSWORD, "IDENTIFY_SYSTEM");
    psql.args(["-d", "dbname=app replication=database"]);
    assert!(output(&mut psql).await.unwrap().contains("app"));
}

/// For the tests that look at processes: nothing of a login is computed that only a password needs.
#[test]
fn no_login_derives_a_key_from_a_password() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src/serve");
    let out = Command::new("grep").args(["-rnE", "pbkdf2|Keys::derive|Verifier::derive"]).arg(&root).output().unwrap();
    assert!(out.stdout.is_empty(), "{}", String::from_utf8_lossy(&out.stdout));
}
