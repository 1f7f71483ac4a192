//! Passwords: md5 and SCRAM by what PostgreSQL stores, and nothing told about roles to who does not know one.

use crate::front::{Front, Setup, free_port, open, open_with, output};
use crate::pg::{PASSWORD, Pg};
use crate::raw::*;
use portcullis::wire::pg::field;
use std::sync::Arc;

const MD5: &str = "host all all all md5";

#[tokio::test(flavor = "multi_thread")]
async fn md5_logs_in_whose_secret_is_md5_and_scram_everyone_else() {
    let front = open_with(Setup { hba: MD5, ..Setup::default() }).await;
    for user in ["old", "app"] {
        assert_eq!(front.query(user, "select current_user").await.unwrap(), user);
        let wrong = output(&mut front.psql(user, "wrong", "select 1")).await.unwrap_err();
        assert!(wrong.contains(&format!("FATAL:  password authentication failed for user \"{user}\"")), "{wrong}");
    }
    // The stored hash itself is no password.
    let stored = front.pg.admin("select rolpassword from pg_authid where rolname = 'old'").unwrap();
    assert!(output(&mut front.psql("old", &stored, "select 1")).await.is_err());
    // A salt is used once.
    let mut salts = Vec::new();
    for _ in 0..2 {
        let mut raw = Raw::connect(&front).await;
        raw.send(&startup(0, &[("user", "old"), ("database", "app")])).await;
        let (kind, body) = raw.receive().await.unwrap();
        assert_eq!((kind, &body[..4]), (b'R', &b"\0\0\0\x05"[..]));
        salts.push(body[4..].to_vec());
        raw.send(&message(b'p', b"\0")).await;
        let (code, text, _) = raw.error().await;
        assert_eq!((&*code, &*text), ("28P01", "empty password returned by client"));
    }
    assert_ne!(salts[0], salts[1]);
    // As PostgreSQL: scram-sha-256 takes no md5 secret, and says no more than of a wrong password.
    let strict = open().await;
    let refused = strict.query("old", "select 1").await.unwrap_err();
    assert!(refused.contains("FATAL:  password authentication failed for user \"old\""), "{refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn whom_the_right_password_does_not_help_hears_postgresqls_reason_and_nobody_else_does() {
    let front = open().await;
    let idle = front.query("idle", "select 1").await.unwrap_err();
    assert!(idle.contains("FATAL:  role \"idle\" is not permitted to log in"), "{idle}");
    let mut said = Vec::new();
    for (user, password) in [("idle", "wrong"), ("nobody", PASSWORD), ("bare", PASSWORD), ("expired", PASSWORD)] {
        let refused = output(&mut front.psql(user, password, "select 1")).await.unwrap_err();
        said.push(refused.replace(user, "ROLE"));
    }
    assert!(said.iter().all(|text| *text == said[0]), "{said:#?}");
    assert!(said[0].contains("FATAL:  password authentication failed for user \"ROLE\""), "{said:#?}");
    assert_eq!(front.gate.auth_failures(), 5);
}

/// What the gate says to a role with a wrong proof, with everything taken out that is random or named after the role.
async fn conversation(front: &Front, user: &str) -> Vec<String> {
    let mut raw = Raw::connect(front).await;
    raw.send(&startup(0, &[("user", user), ("database", "app")])).await;
    let mut heard = Vec::new();
    loop {
        let Some((kind, body)) = raw.receive().await else { return heard };
        let code = if kind == b'R' { body[3] } else { 0 };
        heard.push(match (kind, code) {
            (b'E', _) => format!("{:?} {:?}", field(&body, b'C'), field(&body, b'M')).replace(user, "ROLE"),
            (b'R', 11) => {
                let text = String::from_utf8(body[4..].to_vec()).unwrap();
                format!("continue {} {}", text.len(), text.rsplit_once(',').unwrap().1)
            }
            _ => format!("{} {code} {}", char::from(kind), body.len()),
        });
        match (kind, code) {
            (b'R', 5) => raw.send(&message(b'p', b"md500000000000000000000000000000000\0")).await,
            (b'R', 10) => {
                let first = b"n,,n=,r=abcdefghijklmnop";
                let length = u32::try_from(first.len()).unwrap().to_be_bytes();
                raw.send(&message(b'p', &[b"SCRAM-SHA-256\0", &length[..], first].concat())).await;
            }
            (b'R', 11) => {
                let nonce = String::from_utf8(body[4..].to_vec()).unwrap();
                let nonce = nonce.strip_prefix("r=").and_then(|rest| rest.split_once(',')).unwrap().0.to_owned();
                let proof = "A".repeat(43) + "=";
                raw.send(&message(b'p', format!("c=biws,r={nonce},p={proof}").as_bytes())).await;
            }
            _ => {}
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_conversation_tells_whether_a_role_exists() {
    let front = open().await;
    let known = conversation(&front, "app").await;
    assert_eq!(known.len(), 3, "{known:?}");
    for user in ["nobody", "bare", "expired", "idle", "old"] {
        assert_eq!(conversation(&front, user).await, known, "{user}");
    }
    let front = open_with(Setup { hba: MD5, ..Setup::default() }).await;
    assert_eq!(conversation(&front, "old").await[0], "R 5 8");
    for user in ["nobody", "bare", "expired", "idle", "app"] {
        assert_eq!(conversation(&front, user).await, known, "{user}: SCRAM is usual here");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn where_md5_is_usual_who_does_not_exist_has_md5_too() {
    let port = free_port();
    let pg = move || Pg::start_with(port, "password_encryption = md5\n", "local all all trust\n");
    let pg = Arc::new(tokio::task::spawn_blocking(pg).await.unwrap());
    pg.admin("create role app login password 'x'; create role bare login; create database app").unwrap();
    let front = open_with(Setup { hba: MD5, pg: Some(pg), ..Setup::default() }).await;
    let known = conversation(&front, "app").await;
    assert_eq!(known[0], "R 5 8");
    for user in ["nobody", "bare"] {
        assert_eq!(conversation(&front, user).await, known, "{user}");
    }
    assert_eq!(output(&mut front.psql("app", "x", "select current_user")).await.unwrap(), "app");
}
