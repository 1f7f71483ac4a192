//! journald's native protocol (systemd: "Native Journal Protocol"): a datagram of fields.
//!
//! **Invariant:** a value with a line break is sent with its length, so that no text can make a field of its own.

use super::Record;
use crate::app::render::clean;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};

const SOCKET: &str = "/run/systemd/journal/socket";
/// Longer ones would need a file of their own, and no line of ours is.
const MAX_VALUE: usize = 16 * 1024;

/// The way to journald.
pub(super) struct Journal {
    socket: UnixDatagram,
    path: PathBuf,
}

impl Journal {
    /// Where standard error is journald's: systemd says so with its device and inode.
    pub(super) fn of_stderr() -> Option<Journal> {
        let named = std::env::var("JOURNAL_STREAM").ok()?;
        let meta = std::fs::metadata("/proc/self/fd/2").ok()?;
        (named == format!("{}:{}", meta.dev(), meta.ino())).then(|| Journal::at(Path::new(SOCKET)))?
    }

    pub(super) fn at(path: &Path) -> Option<Journal> {
        let socket = UnixDatagram::unbound().ok()?;
        Some(Journal { socket, path: path.to_owned() })
    }

    pub(super) fn send(&self, record: &Record, node: Option<&str>) -> std::io::Result<()> {
        self.socket.send_to(&encode(record, node), &self.path).map(drop)
    }
}

fn encode(record: &Record, node: Option<&str>) -> Vec<u8> {
    let mut out = Vec::new();
    let mut message = clean(&record.message);
    for (name, value, _) in record.fields.iter().filter(|(name, ..)| *name != "kind") {
        message.push_str(&format!(" {name}={}", clean(value)));
    }
    put(&mut out, "MESSAGE", &message);
    put(&mut out, "PRIORITY", &record.priority().to_string());
    put(&mut out, "SYSLOG_IDENTIFIER", "portcullis");
    put(&mut out, "PORTCULLIS_TARGET", &record.target);
    if let Some(node) = node {
        put(&mut out, "PORTCULLIS_NODE", node);
        put(&mut out, "PORTCULLIS_EPOCH", &record.epoch.to_string());
    }
    for (name, value, _) in &record.fields {
        match *name {
            "kind" => put(&mut out, "PORTCULLIS_EVENT", value),
            name => put(&mut out, &field_name(name), value),
        }
    }
    out
}

/// Capital letters, digits and underscores are all that a name may have.
fn field_name(name: &str) -> String {
    let fit = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_uppercase() } else { '_' };
    format!("PORTCULLIS_{}", name.chars().take(40).map(fit).collect::<String>())
}

fn put(out: &mut Vec<u8>, name: &str, value: &str) {
    let end = (0..=MAX_VALUE.min(value.len())).rev().find(|at| value.is_char_boundary(*at)).unwrap_or(0);
    let value = &value.as_bytes()[..end];
    out.extend_from_slice(name.as_bytes());
    if value.contains(&b'\n') {
        out.push(b'\n');
        out.extend_from_slice(&u64::try_from(value.len()).unwrap_or(0).to_le_bytes());
    } else {
        out.push(b'=');
    }
    out.extend_from_slice(value);
    out.push(b'\n');
}

#[cfg(test)]
mod tests {
    use super::super::tests::record;
    use super::*;

    #[test]
    fn an_event_is_an_entry_with_its_fields_and_no_text_makes_another() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("socket");
        let journald = UnixDatagram::bind(&path).expect("a socket");
        let journal = Journal::at(&path).expect("a way to it");
        let line = record("the gate was cut", &[("kind", "gate_cut"), ("address", "192.0.2.1\nPRIORITY=0")]);
        journal.send(&line, Some("alp")).expect("sent");
        let mut bytes = [0; 4096];
        let n = journald.recv(&mut bytes).expect("received");
        let mut expected = b"MESSAGE=the gate was cut address=192.0.2.1?PRIORITY=0\nPRIORITY=3\n".to_vec();
        expected.extend_from_slice(b"SYSLOG_IDENTIFIER=portcullis\nPORTCULLIS_TARGET=portcullis::app::driver\n");
        expected.extend_from_slice(b"PORTCULLIS_NODE=alp\nPORTCULLIS_EPOCH=7\nPORTCULLIS_EVENT=gate_cut\n");
        expected.extend_from_slice(b"PORTCULLIS_ADDRESS\n\x14\0\0\0\0\0\0\x00192.0.2.1\nPRIORITY=0\n");
        assert_eq!(String::from_utf8_lossy(&bytes[..n]), String::from_utf8_lossy(&expected));
        drop(journald);
        std::fs::remove_file(&path).expect("removed");
        assert!(journal.send(&line, None).is_err(), "then it goes to standard error");
    }
}
