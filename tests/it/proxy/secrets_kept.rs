//! What the gate remembers of roles, and for how long: nothing of a secret unless `auth.cache` says so, and whether a
//! role may log in for a second where nobody proves a password.

use crate::front::{Front, Setup, eventually, free_port, open_with, output};
use crate::pg::{PASSWORD, Pg};
use crate::raw::*;
use std::sync::Arc;
use std::time::Duration;

const LOGINS: usize = 30;

/// A PostgreSQL of its own that logs each statement, with role app (and old, by md5) and database app.
async fn logging() -> Arc<Pg> {
    let port = free_port();
    let start = move || Pg::start_with(port, "log_statement = all\n", "local all all trust\n");
    let pg = Arc::new(tokio::task::spawn_blocking(start).await.unwrap());
    pg.admin(&format!(
        "create role app login password '{PASSWORD}'; create role free login; create database app;
         set password_encryption = md5; create role old login password '{PASSWORD}'"
    ))
    .unwrap();
    pg
}

/// How often a role was asked for so far.
fn questions(pg: &Pg) -> usize {
    let log = std::fs::read_to_string(pg.scratch("log")).unwrap();
    log.lines().filter(|line| line.contains("execute") && line.contains("select r.rolcanlogin")).count()
}

async fn front(pg: &Arc<Pg>, cache: Duration) -> Front {
    let hba = "host all free all trust\nhost all old all md5\nhost all all all scram-sha-256";
    let front = open_with(Setup { hba, cache, pg: Some(Arc::clone(pg)), ..Setup::default() }).await;
    front.extend(Duration::from_secs(600));
    front
}

async fn log_in(front: &Front, user: &str, password: &str) -> Result<String, String> {
    output(&mut front.psql(user, password, "select 1")).await
}

/// As many logins, this many beside one another.
async fn many(front: &Front, user: &str, count: usize, beside: usize) {
    for _ in 0..count / beside {
        let all = (0..beside).map(|_| front.client(user));
        futures_util::future::join_all(all).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_password_is_asked_for_unless_it_may_be_remembered() {
    let pg = logging().await;
    for (cache, user, beside, least, most) in [
        (Duration::ZERO, "app", 1, LOGINS, LOGINS),
        (Duration::ZERO, "old", 1, LOGINS, LOGINS),
        // Who comes together shares questions that were asked after he came.
        (Duration::ZERO, "app", 10, LOGINS / 10, LOGINS - 1),
        (Duration::from_secs(60), "app", 1, 1, 1),
        (Duration::from_secs(60), "old", 1, 1, 1),
        (Duration::from_secs(60), "free", 1, 1, 1),
    ] {
        let front = front(&pg, cache).await;
        let before = questions(&pg);
        many(&front, user, LOGINS, beside).await;
        let asked = questions(&pg) - before;
        assert!((least..=most).contains(&asked), "{cache:?} {user} {beside}: {asked} questions for {LOGINS} logins");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_old_password_is_good_no_longer_than_it_may_be_remembered() {
    let pg = logging().await;
    let cache = Duration::from_secs(3);
    let front = front(&pg, cache).await;
    for user in ["app", "old"] {
        let md5 = if user == "old" { "set password_encryption = md5;" } else { "" };
        log_in(&front, user, PASSWORD).await.unwrap();
        let changed = std::time::SystemTime::now();
        pg.admin(&format!("{md5} alter role {user} password 'new'")).unwrap();
        loop {
            let began = changed.elapsed().unwrap();
            assert!(began < Duration::from_secs(60), "{user}: the old password is never refused");
            if log_in(&front, user, PASSWORD).await.is_err() {
                break;
            }
            assert!(began < cache, "{user}: the old password is good {began:?} after it was changed");
        }
        assert_eq!(log_in(&front, user, "new").await.as_deref(), Ok("1"));
        // The next one: by md5 at once; a SCRAM exchange is of one secret, and its failure makes the next one ask.
        pg.admin(&format!("{md5} alter role {user} password 'newer'")).unwrap();
        if user == "app" {
            let _ = log_in(&front, user, "newer").await;
        }
        assert_eq!(log_in(&front, user, "newer").await.as_deref(), Ok("1"));
    }
    // Neither a wrong password nor a lock is remembered.
    pg.admin("alter role app nologin").unwrap();
    front.commands.forget_roles();
    assert!(log_in(&front, "app", "newer").await.unwrap_err().contains("is not permitted to log in"));
    pg.admin("alter role app login").unwrap();
    assert_eq!(log_in(&front, "app", "newer").await.as_deref(), Ok("1"));
}

#[tokio::test(flavor = "multi_thread")]
async fn trust_lets_in_no_role_that_may_not_log_in_though_it_has_a_backend() {
    let pg = logging().await;
    let pool = portcullis::base::config::Pool {
        mode: portcullis::base::config::PoolMode::Transaction,
        threads: 1,
        ..portcullis::base::config::Pool::default()
    };
    let hba = "host all all all trust";
    let front = open_with(Setup { hba, pool, pg: Some(Arc::clone(&pg)), ..Setup::default() }).await;
    let refused = async |user: &str, why: &str| {
        let all = std::cell::RefCell::new(String::new());
        let told = eventually("the role is refused", async || match log_in(&front, user, "").await {
            Ok(_) => false,
            Err(said) => {
                *all.borrow_mut() = said;
                true
            }
        });
        told.await;
        assert!(all.borrow().contains(why), "{}", all.borrow());
    };
    // Its backend stays in the pool, and would do for the next client.
    assert_eq!(log_in(&front, "free", "").await.as_deref(), Ok("1"));
    pg.admin("alter role free nologin").unwrap();
    refused("free", "FATAL:  role \"free\" is not permitted to log in").await;
    pg.admin("alter role free login valid until '2001-01-01'").unwrap();
    // As PostgreSQL: it is the password that is no longer valid, and none is asked for.
    assert_eq!(log_in(&front, "free", "").await.as_deref(), Ok("1"));
    pg.admin("drop role free").unwrap();
    refused("free", "FATAL:  role \"free\" does not exist").await;
    // After reconnect at once.
    pg.admin("create role free login").unwrap();
    assert_eq!(log_in(&front, "free", "").await.as_deref(), Ok("1"));
    pg.admin("alter role free nologin").unwrap();
    front.commands.reconnect(None).unwrap();
    assert!(log_in(&front, "free", "").await.unwrap_err().contains("is not permitted to log in"));
    assert!(front.gate.auth_failures() >= 3);
}

/// The salt and iterations that a role is shown.
async fn shown(front: &Front, user: &str) -> String {
    let mut raw = Raw::connect(front).await;
    raw.send(&startup(0, &[("user", user), ("database", "app")])).await;
    raw.receive().await.unwrap();
    let first = b"n,,n=,r=abcdefghijklmnop";
    let length = u32::try_from(first.len()).unwrap().to_be_bytes();
    raw.send(&message(b'p', &[b"SCRAM-SHA-256\0", &length[..], first].concat())).await;
    let (_, body) = raw.receive().await.unwrap();
    String::from_utf8(body[4..].to_vec()).unwrap().split_once(",s=").unwrap().1.to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn who_does_not_exist_is_shown_the_same_salt_by_both_nodes_and_after_a_restart() {
    let first = open_with(Setup::default()).await;
    let _pg = Arc::clone(&first.pg);
    let (nobody, app) = (shown(&first, "nobody").await, shown(&first, "app").await);
    assert_eq!(shown(&first, "nobody").await, nobody);
    assert_ne!(shown(&first, "somebody").await, nobody);
    drop(first);
    let again = open_with(Setup::default()).await;
    assert_eq!((shown(&again, "nobody").await, shown(&again, "app").await), (nobody.clone(), app));
    // Another cluster's key: its own salts, which nobody can foretell who does not have the key.
    let other = open_with(Setup { cluster_key: [8; 32], ..Setup::default() }).await;
    assert_ne!(shown(&other, "nobody").await, nobody);
}
