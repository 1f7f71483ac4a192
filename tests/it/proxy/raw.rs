//! A client that speaks the protocol byte by byte.

use crate::front::Front;
use portcullis::wire::pg::field;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

pub struct Raw {
    pub stream: TcpStream,
    /// From BackendKeyData.
    pub pid: i32,
    pub key: Vec<u8>,
}

/// A message of the frontend or the backend.
pub fn message(kind: u8, body: &[u8]) -> Vec<u8> {
    let mut out = vec![kind];
    out.extend_from_slice(&u32::try_from(body.len() + 4).unwrap().to_be_bytes());
    out.extend_from_slice(body);
    out
}

pub fn query(sql: &str) -> Vec<u8> {
    message(b'Q', &[sql.as_bytes(), b"\0"].concat())
}

/// Parse, Bind and Execute of an unnamed statement without parameters.
pub fn extended(sql: &str) -> Vec<u8> {
    let mut out = message(b'P', &[b"\0", sql.as_bytes(), b"\0\0\0"].concat());
    out.extend(message(b'B', b"\0\0\0\0\0\0\0\0"));
    out.extend(message(b'E', b"\0\0\0\0\0"));
    out
}

pub fn parse(name: &str, sql: &str) -> Vec<u8> {
    message(b'P', &[name.as_bytes(), b"\0", sql.as_bytes(), b"\0\0\0"].concat())
}

pub fn bind(name: &str) -> Vec<u8> {
    message(b'B', &[b"\0", name.as_bytes(), b"\0\0\0\0\0\0\0"].concat())
}

/// Describe and Close of a statement.
pub fn describe(name: &str) -> Vec<u8> {
    message(b'D', &[b"S", name.as_bytes(), b"\0"].concat())
}

pub fn close(name: &str) -> Vec<u8> {
    message(b'C', &[b"S", name.as_bytes(), b"\0"].concat())
}

/// Bind, Execute and Sync.
pub fn run(name: &str) -> Vec<u8> {
    [bind(name), EXECUTE.to_vec(), SYNC.to_vec()].concat()
}

pub const EXECUTE: [u8; 10] = [b'E', 0, 0, 0, 9, 0, 0, 0, 0, 0];
pub const SYNC: [u8; 5] = [b'S', 0, 0, 0, 4];
pub const SSL_REQUEST: [u8; 8] = [0, 0, 0, 8, 4, 210, 22, 47];
pub const GSSENC_REQUEST: [u8; 8] = [0, 0, 0, 8, 4, 210, 22, 48];

pub fn startup(minor: u8, parameters: &[(&str, &str)]) -> Vec<u8> {
    let mut out = vec![0, 0, 0, 0, 0, 3, 0, minor];
    for (name, value) in parameters {
        out.extend([name.as_bytes(), b"\0", value.as_bytes(), b"\0"].concat());
    }
    out.push(0);
    let length = u32::try_from(out.len()).unwrap();
    out[..4].copy_from_slice(&length.to_be_bytes());
    out
}

/// The one value of the one row, on a connection that stays.
pub async fn value(raw: &mut Raw, sql: &str) -> String {
    raw.send(&query(sql)).await;
    let (mut value, mut kinds) = (String::new(), String::new());
    loop {
        let (kind, body) = raw.receive().await.expect("an answer");
        kinds.push(char::from(kind));
        match kind {
            b'D' => value = String::from_utf8_lossy(&body[6..]).into_owned(),
            b'E' => panic!("{sql}: {:?}", field(&body, b'M')),
            b'Z' => return value,
            _ => {}
        }
    }
}

impl Raw {
    /// Connected, nothing said.
    pub async fn connect(front: &Front) -> Raw {
        Raw { stream: TcpStream::connect(front.address).await.unwrap(), pid: 0, key: Vec::new() }
    }

    /// Logged in as a role that needs no password.
    pub async fn trusty(front: &Front) -> Raw {
        let mut raw = Raw::connect(front).await;
        raw.log_in(&[("user", "trusty"), ("database", "app")]).await;
        raw
    }

    /// Cancels what this client is doing, over a connection of its own.
    pub async fn cancel(&self, front: &Front) {
        let mut other = Raw::connect(front).await;
        other.send(&portcullis::wire::pg::cancel_request(self.pid, &self.key)).await;
        assert!(other.is_closed().await);
    }

    /// From the start-up packet to the first ReadyForQuery.
    pub async fn log_in(&mut self, parameters: &[(&str, &str)]) {
        self.send(&startup(0, parameters)).await;
        loop {
            let (kind, body) = self.receive().await.expect("a greeting");
            match kind {
                b'K' => {
                    self.pid = i32::from_be_bytes(body[..4].try_into().unwrap());
                    self.key = body[4..].to_vec();
                }
                b'Z' => return,
                b'E' => panic!("{:?}", field(&body, b'M')),
                _ => {}
            }
        }
    }

    pub async fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).await.unwrap();
    }

    /// The next message; `None` at the end. A reset is an end.
    pub async fn receive(&mut self) -> Option<(u8, Vec<u8>)> {
        tokio::time::timeout(Duration::from_secs(60), async {
            let mut head = [0; 5];
            self.stream.read_exact(&mut head).await.ok()?;
            let length = u32::from_be_bytes(head[1..].try_into().unwrap());
            let mut body = vec![0; usize::try_from(length).unwrap() - 4];
            self.stream.read_exact(&mut body).await.ok()?;
            Some((head[0], body))
        })
        .await
        .expect("the gate is silent")
    }

    /// The next error, with SQLSTATE and message; whatever comes before it is returned too, as kinds.
    pub async fn error(&mut self) -> (String, String, String) {
        let mut before = String::new();
        loop {
            let Some((kind, body)) = self.receive().await else { panic!("closed without a word after {before:?}") };
            if kind == b'E' {
                return (field(&body, b'C').unwrap(), field(&body, b'M').unwrap(), before);
            }
            before.push(char::from(kind));
        }
    }

    /// Sends and reads up to the next ReadyForQuery; the kinds that came, the status in lower case at the end.
    pub async fn ask(&mut self, bytes: &[u8]) -> String {
        self.send(bytes).await;
        self.until_ready().await
    }

    pub async fn until_ready(&mut self) -> String {
        let (mut kinds, mut said) = (String::new(), String::new());
        loop {
            let Some((kind, body)) = self.receive().await else { panic!("closed after {kinds:?} {said:?}") };
            if kind == b'E' {
                said = field(&body, b'M').unwrap_or_default();
            }
            if kind == b'Z' {
                kinds.push(char::from(body[0].to_ascii_lowercase()));
                return kinds;
            }
            kinds.push(char::from(kind));
        }
    }

    /// Nothing comes within this time.
    pub async fn is_silent_for(&mut self, time: Duration) -> bool {
        tokio::time::timeout(time, self.stream.peek(&mut [0; 1])).await.is_err()
    }

    pub async fn is_closed(&mut self) -> bool {
        self.receive().await.is_none()
    }
}
