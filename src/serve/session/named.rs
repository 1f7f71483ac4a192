//! What a client is called: `application_name`, in its start-up packet and in what it is told.

use crate::wire::pg::{self, HEADER, Startup};
use bytes::{BufMut, BytesMut};
use std::net::SocketAddr;

/// Longest `application_name` (PostgreSQL's NAMEDATALEN less the terminator).
const MAX_NAME: usize = 63;

/// Takes `application_name` out of a start-up packet, as PostgreSQL would keep it: printable ASCII, 63 bytes.
pub(super) fn take_application_name(startup: &mut Startup) -> String {
    let is_name = |(name, _): &mut (Vec<u8>, Vec<u8>)| name.eq_ignore_ascii_case(b"application_name");
    let taken = startup.parameters.extract_if(.., |pair| is_name(pair)).last();
    let clean = |b: &u8| if (32..127).contains(b) { char::from(*b) } else { '?' };
    taken.map_or_else(String::new, |(_, value)| value.iter().map(clean).take(MAX_NAME).collect())
}

/// The name with the client's address behind it, shortened where both are too long.
pub(super) fn with_address(name: &str, peer: SocketAddr) -> String {
    let address = format!("{}:{}", peer.ip().to_canonical(), peer.port());
    if name.is_empty() || name.ends_with(&address) {
        // One that was carried over has it already.
        return if name.is_empty() { address } else { name.to_owned() };
    }
    let room = MAX_NAME.saturating_sub(address.len() + 3);
    let name: String = name.chars().take(room).collect();
    format!("{name} - {address}")
}

/// What a backend said at its login, with this client's `application_name`.
pub(super) fn rename_application(said: &[u8], application: &str, out: &mut BytesMut) {
    let mut rest = said;
    while let Ok(Some(header)) = pg::header(rest) {
        let Some((message, tail)) = rest.split_at_checked(HEADER + header.body) else { break };
        rest = tail;
        if header.kind == b'S' && message[HEADER..].starts_with(b"application_name\0") {
            let length = 4 + b"application_name\0".len() + application.len() + 1;
            out.put_u8(b'S');
            out.put_u32(u32::try_from(length).unwrap_or(u32::MAX));
            out.put_slice(b"application_name\0");
            out.put_slice(application.as_bytes());
            out.put_u8(0);
        } else {
            out.put_slice(message);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_application_name_is_kept_as_postgresql_would() {
        let mut startup = Startup {
            minor: 0,
            user: "u".to_owned(),
            database: "d".to_owned(),
            parameters: vec![
                (b"Application_Name".to_vec(), "h\u{e9}llo".as_bytes().to_vec()),
                (b"client_encoding".to_vec(), b"UTF8".to_vec()),
            ],
            options: vec![],
        };
        assert_eq!(take_application_name(&mut startup), "h??llo");
        assert_eq!(startup.parameters.len(), 1);
        let peer: SocketAddr = "[::ffff:192.0.2.7]:4711".parse().expect("address");
        assert_eq!(with_address("psql", peer), "psql - 192.0.2.7:4711");
        assert_eq!(with_address("", peer), "192.0.2.7:4711");
        assert_eq!(with_address(&"x".repeat(80), peer).len(), MAX_NAME);
        let said = b"S\0\0\0\x16application_name\0\0Z\0\0\0\x05I";
        let mut out = BytesMut::new();
        rename_application(said, "psql", &mut out);
        assert_eq!(&out[..], b"S\0\0\0\x1aapplication_name\0psql\0Z\0\0\0\x05I");
    }
}
