//! The suites written in Rust. What it is NOT: no driver of another language.

pub mod cancel;
pub mod fuzz;
pub mod stream;
pub mod tokio_postgres;
pub mod tools;

use crate::raw::{Raw, startup};
use crate::suite::Target;
use tokio::net::TcpStream;

/// A raw client, connected, nothing said.
pub async fn raw(target: &Target) -> Raw {
    Raw { stream: TcpStream::connect(target.address).await.unwrap(), pid: 0, key: Vec::new() }
}

/// A raw client, logged in as a superuser; with the key for cancel requests.
pub async fn logged_in(target: &Target) -> (Raw, Vec<u8>) {
    let mut raw = raw(target).await;
    raw.send(&startup(0, &[("user", "trusty"), ("database", &target.database)])).await;
    let mut key = Vec::new();
    loop {
        let (kind, body) = raw.receive().await.expect("a greeting");
        match kind {
            b'K' => {
                raw.pid = i32::from_be_bytes(body[..4].try_into().unwrap());
                key = body[4..].to_vec();
            }
            b'Z' => return (raw, key),
            b'E' => panic!("{:?}", portcullis::wire::pg::field(&body, b'M')),
            _ => {}
        }
    }
}

/// Waits until a statement with this mark in its text is running, in this target's database: others have the same.
pub async fn until_active(target: &Target, mark: &str) {
    let pg = std::sync::Arc::clone(&target.pg);
    let sql = format!(
        "select count(*) from pg_stat_activity where state = 'active' and query like '%{mark}%' \
         and pid <> pg_backend_pid() and datname = '{}'",
        target.database
    );
    let waiting = tokio::task::spawn_blocking(move || {
        for _ in 0..1500 {
            if pg.admin(&sql).unwrap() != "0" {
                return true;
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        false
    });
    assert!(waiting.await.unwrap(), "never active: {mark}");
}
