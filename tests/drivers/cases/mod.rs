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
    Raw { stream: TcpStream::connect(target.address).await.unwrap(), pid: 0 }
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
