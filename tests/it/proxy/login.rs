//! Who gets in, and how: rules, SCRAM, TLS, the opening packets.

use crate::front::{Setup, eventually, open, open_with, output};
use crate::pg::PASSWORD;
use crate::raw::*;
use portcullis::serve::tls;
use tokio::io::AsyncReadExt;

#[tokio::test(flavor = "multi_thread")]
async fn scram_lets_in_whom_postgresql_would() {
    let front = open().await;
    assert_eq!(
        front.query("app", "select current_user, session_user, current_database()").await.unwrap(),
        "app|app|app"
    );
    // From the backend's side too it is that very role, by SCRAM.
    assert_eq!(
        front.query("app", "select usename from pg_stat_activity where pid = pg_backend_pid()").await.unwrap(),
        "app"
    );
    let wrong = output(&mut front.psql("app", "wrong", "select 1")).await.unwrap_err();
    assert!(wrong.contains("FATAL:  password authentication failed for user \"app\""), "{wrong}");
    let mut failures = 1;
    for user in ["nobody", "expired", "old"] {
        let refused = front.query(user, "select 1").await.unwrap_err();
        let expected = wrong.replace("\"app\"", &format!("\"{user}\""));
        assert_eq!(refused, expected, "{user}: no difference may be seen");
        failures += 1;
    }
    assert_eq!(front.gate.auth_failures(), failures);
    assert_eq!(front.gate.sessions_total(), 2);
    eventually("sessions end", async || front.gate.sessions() == 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_role_looks_like_a_known_one_until_the_proof() {
    let front = open().await;
    let mut iterations = Vec::new();
    for user in ["app", "nobody"] {
        let mut raw = Raw::connect(&front).await;
        raw.send(&startup(0, &[("user", user)])).await;
        let (kind, body) = raw.receive().await.unwrap();
        assert_eq!((kind, &body[..]), (b'R', &b"\0\0\0\x0aSCRAM-SHA-256\0\0"[..]));
        let first = b"n,,n=,r=abcdefghijklmnop";
        let length = u32::try_from(first.len()).unwrap().to_be_bytes();
        raw.send(&message(b'p', &[b"SCRAM-SHA-256\0", &length[..], first].concat())).await;
        let (_, body) = raw.receive().await.unwrap();
        let text = String::from_utf8(body[4..].to_vec()).unwrap();
        assert!(text.starts_with("r=abcdefghijklmnop"), "{text}");
        iterations.push((text.len(), text.rsplit_once(',').unwrap().1.to_owned()));
    }
    assert_eq!(iterations[0], iterations[1]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_changed_password_counts_at_once() {
    let front = open().await;
    front.pg.admin("create role fickle login password 'one'").unwrap();
    assert_eq!(output(&mut front.psql("fickle", "one", "select 1")).await.unwrap(), "1");
    front.pg.admin("alter role fickle password 'two'").unwrap();
    assert!(output(&mut front.psql("fickle", "one", "select 1")).await.is_err());
    assert_eq!(output(&mut front.psql("fickle", "two", "select 1")).await.unwrap(), "1");
    // The admin connection is lost, and made again.
    front
        .pg
        .admin("select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'portcullis roles'")
        .unwrap();
    assert_eq!(output(&mut front.psql("fickle", "two", "select 1")).await.unwrap(), "1");
}

#[tokio::test(flavor = "multi_thread")]
async fn rules_decide_in_order_and_refuse_in_postgresqls_words() {
    let hba =
        "host all app all reject\nhost all trusty,app all trust\nhost app idle all trust\nhost postgres all all trust";
    let front = open_with(Setup { hba, ..Setup::default() }).await;
    assert_eq!(front.query("trusty", "select current_user").await.unwrap(), "trusty");
    let rejected = front.query("app", "select 1").await.unwrap_err();
    assert!(
        rejected.contains(
            "FATAL:  pg_hba.conf rejects connection for host \"127.0.0.1\", user \"app\", \
             database \"app\", no encryption"
        ),
        "{rejected}"
    );
    let no_entry = front.query("old", "select 1").await.unwrap_err();
    assert!(
        no_entry.contains(
            "FATAL:  no pg_hba.conf entry for host \"127.0.0.1\", user \"old\", database \"app\", no encryption"
        ),
        "{no_entry}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn trust_still_needs_postgresqls_consent_and_says_which_line() {
    let front = open_with(Setup { hba: "host all all all trust", ..Setup::default() }).await;
    let refused = front.query("app", "select 1").await.unwrap_err();
    assert!(refused.contains("does not let the gate in as role \"app\""), "{refused}");
    assert!(refused.contains("local all app peer map=portcullis"), "{refused}");
    // What is about the role itself stays PostgreSQL's to say.
    let nologin = front.query("lame", "select 1").await.unwrap_err();
    assert!(nologin.contains("role \"lame\" is not permitted to log in"), "{nologin}");
    let missing = output(front.psql("trusty", "", "select 1").env("PGDATABASE", "nowhere")).await.unwrap_err();
    assert!(missing.contains("database \"nowhere\" does not exist"), "{missing}");
}

#[tokio::test(flavor = "multi_thread")]
async fn start_up_parameters_and_the_real_key_reach_both_sides() {
    let front = open().await;
    let mut psql = front.psql("app", PASSWORD, "show application_name; show work_mem; reset work_mem; show work_mem");
    psql.env("PGAPPNAME", "tester").env("PGOPTIONS", "-c work_mem=7MB");
    assert_eq!(output(&mut psql).await.unwrap(), "tester\n7MB\n7MB");
    let raw = Raw::trusty(&front).await;
    let found = front.pg.admin(&format!("select usename from pg_stat_activity where pid = {}", raw.pid)).unwrap();
    assert_eq!(found, "trusty");
}

#[tokio::test(flavor = "multi_thread")]
async fn newer_protocols_are_negotiated_down_and_older_refused() {
    let front = open().await;
    let mut raw = Raw::connect(&front).await;
    raw.send(&startup(2, &[("user", "trusty"), ("database", "app"), ("_pq_.news", "1")])).await;
    let (kind, body) = raw.receive().await.unwrap();
    assert_eq!((kind, &body[..]), (b'v', &b"\0\x03\0\0\0\0\0\x01_pq_.news\0"[..]));
    assert!(raw.until_ready().await.ends_with("Ki"));
    let mut raw = Raw::connect(&front).await;
    raw.send(b"\0\0\0\x10\0\x02\0\0user\0app\0\0\0\0\0\0").await;
    assert_eq!(raw.error().await.0, "0A000");
    let mut raw = Raw::connect(&front).await;
    raw.send(b"\0\x10\0\0GET / HTTP/1.1\r\n").await;
    assert_eq!(raw.error().await.0, "08P01");
}

#[tokio::test(flavor = "multi_thread")]
async fn too_many_clients_are_told_so() {
    let front = open_with(Setup { max_clients: 2, ..Setup::default() }).await;
    let (_a, _b) = (Raw::trusty(&front).await, Raw::trusty(&front).await);
    let mut third = Raw::connect(&front).await;
    third.send(&startup(0, &[("user", "trusty"), ("database", "app")])).await;
    assert_eq!(third.error().await.0, "53300");
    drop(_a);
    eventually("a place is free", async || front.query("trusty", "select 1").await.is_ok()).await;
}

fn certificate() -> (tempfile::TempDir, tls::TlsAcceptor) {
    let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let (cert, key) = (dir.path().join("cert.pem"), dir.path().join("key.pem"));
    std::fs::write(&cert, made.cert.pem()).unwrap();
    std::fs::write(&key, made.signing_key.serialize_pem()).unwrap();
    let set_mode = |mode| {
        std::fs::set_permissions(&key, std::os::unix::fs::PermissionsExt::from_mode(mode)).unwrap();
    };
    set_mode(0o644);
    assert!(tls::load(&cert, &key, None).err().unwrap().text.contains("chmod o-rwx"));
    set_mode(0o600);
    let acceptor = tls::load(&cert, &key, None).unwrap();
    (dir, acceptor)
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_serves_with_scram_large_results_and_its_own_rules() {
    let (_dir, acceptor) = certificate();
    let hba = "hostnossl all all all reject\nhostssl all all all scram-sha-256";
    let front = open_with(Setup { tls: Some(acceptor), hba, ..Setup::default() }).await;
    let mut psql = front.psql(
        "app",
        PASSWORD,
        "select 'in'; select sum(length(x)) from (select repeat('x', 1000) x from generate_series(1, 100)) y",
    );
    psql.env("PGSSLMODE", "require");
    assert_eq!(output(&mut psql).await.unwrap(), "in\n100000");
    let mut psql = front.psql("app", PASSWORD, "select repeat('y', 99) from generate_series(1, 50000)");
    psql.env("PGSSLMODE", "require");
    assert_eq!(output(&mut psql).await.unwrap().len(), 50_000 * 100 - 1);
    for version in ["TLSv1.2", "TLSv1.3"] {
        let mut psql = front.psql("app", PASSWORD, "select 1");
        psql.env("PGSSLMODE", "require")
            .env("PGSSLMINPROTOCOLVERSION", version)
            .env("PGSSLMAXPROTOCOLVERSION", version);
        assert_eq!(output(&mut psql).await.unwrap(), "1", "{version}");
    }
    let plain = front.query("app", "select 1").await.unwrap_err();
    assert!(plain.contains("pg_hba.conf rejects connection") && plain.contains("no encryption"), "{plain}");
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_said_before_the_handshake_counts_after_it() {
    let (_dir, acceptor) = certificate();
    let front = open_with(Setup { tls: Some(acceptor), ..Setup::default() }).await;
    let mut raw = Raw::connect(&front).await;
    raw.send(&[&SSL_REQUEST[..], &startup(0, &[("user", "trusty"), ("database", "app")])].concat()).await;
    let (code, text, before) = raw.error().await;
    assert_eq!((&*code, &*text, &*before), ("08P01", "received unencrypted data after SSL request", ""));
    assert!(raw.is_closed().await);
}

#[tokio::test(flavor = "multi_thread")]
async fn encryption_we_have_not_is_declined_and_the_client_goes_on() {
    let front = open().await;
    let mut raw = Raw::connect(&front).await;
    for request in [GSSENC_REQUEST, SSL_REQUEST] {
        raw.send(&request).await;
        assert_eq!(raw.stream.read_u8().await.unwrap(), b'N');
    }
    raw.send(&startup(0, &[("user", "trusty"), ("database", "app")])).await;
    assert!(raw.until_ready().await.ends_with("Ki"));
    let mut twice = Raw::connect(&front).await;
    twice.send(&SSL_REQUEST).await;
    assert_eq!(twice.stream.read_u8().await.unwrap(), b'N');
    twice.send(&SSL_REQUEST).await;
    assert_eq!(twice.error().await.0, "08P01");
    let required = output(front.psql("app", PASSWORD, "select 1").env("PGSSLMODE", "require")).await.unwrap_err();
    assert!(required.contains("server does not support SSL"), "{required}");
}
