//! A tunnel: a connection of the peer channel that carries one client to the active node's gate.
//!
//! ```text
//! TLS and both greetings as on any connection of the channel (wire::peer), then
//!   forwarding node   Call::Tunnel { octets }, then so many octets of JSON: an Opening
//!   active node       Reply::Tunnelled, or Reply::Refused
//! then nothing but the client's octets, in both directions, until either side closes
//! ```
//!
//! An opening is no frame: a session brings its prepared statements along, and frames are short. A daemon that knows no
//! tunnels closes at such a call.
//!
//! What this is NOT: the active node's gate is not asked here. It alone asks its lease; one hop, never forwarded on.
//!
//! **Invariant:** what proves a client ([`Proven`]) is never shown by `Debug`, and wiped when dropped.

use super::peer::WireError;
use crate::base::ids::Epoch;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::net::SocketAddr;
use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

/// Longest opening; a session with more prepared statements than fit is not carried over.
pub const OPENING_LIMIT: usize = 1024 * 1024;

/// What a tunnel is for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Opening {
    /// A connection that was just accepted (`service.passive = "forward"`): its octets from the first one on, TLS and
    /// login included. The rules of pg_hba see this address.
    Connection { client: SocketAddr, epoch: Epoch },
    /// A session that was held through a switchover: it goes on where it was.
    Session(Box<Carried>),
}

/// A session that is carried over, at a transaction boundary, with nothing in flight.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Carried {
    pub client: SocketAddr,
    pub tls: bool,
    /// Of the active node as the old one heard it: a gate at another epoch refuses.
    pub epoch: Epoch,
    pub user: String,
    pub database: String,
    /// The rest of the start-up packet, in order and as bytes; `application_name` here or among the settings.
    #[serde(with = "base64::pairs")]
    pub parameters: Vec<(Vec<u8>, Vec<u8>)>,
    pub proven: Proven,
    /// What the client was given for cancel requests.
    pub pid: i32,
    pub key: u32,
    /// Settings that differ from what the start-up packet made them.
    pub settings: Vec<(String, String)>,
    /// Prepared statements under the client's own names.
    pub statements: Vec<Prepared>,
}

/// A prepared statement, as its Parse message said it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Prepared {
    /// Without its terminator; empty: the unnamed one.
    #[serde(with = "base64")]
    pub name: Vec<u8>,
    /// The Parse message's body behind the name: query, terminator, number and OIDs of the parameter types.
    #[serde(with = "base64")]
    pub text: Vec<u8>,
}

impl Prepared {
    /// It may be a DEALLOCATE.
    pub fn is_deallocate(&self) -> bool {
        let text = self.text.trim_ascii_start();
        text.get(..10).is_some_and(|word| word.eq_ignore_ascii_case(b"deallocate"))
    }
}

/// How the client proved itself to the old node. Physical replication makes the stored secrets the same on both.
#[derive(Clone, PartialEq, Zeroize, ZeroizeOnDrop, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Proven {
    /// `wire::scram::Keys` as octets.
    Scram(#[serde(with = "base64")] Vec<u8>),
    /// `wire::md5::Hash` as octets.
    Md5(#[serde(with = "base64")] Vec<u8>),
    Certificate,
    Trust,
}

impl fmt::Debug for Proven {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Proven(...)")
    }
}

/// An opening as JSON, wiped when dropped.
///
/// # Errors
/// It is longer than [`OPENING_LIMIT`].
pub fn encode(opening: &Opening) -> Result<Zeroizing<Vec<u8>>, WireError> {
    // At its full size from the beginning: what a growing buffer leaves behind is not wiped.
    let mut json = Zeroizing::new(Vec::with_capacity(size_hint(opening)));
    serde_json::to_writer(&mut *json, opening).map_err(|error| WireError::Malformed(error.to_string()))?;
    if json.len() > OPENING_LIMIT { Err(WireError::Oversize(json.len(), OPENING_LIMIT)) } else { Ok(json) }
}

/// At least as long as its JSON, unless there is much to be escaped in it.
fn size_hint(opening: &Opening) -> usize {
    const MORE: usize = 1024;
    let Opening::Session(carried) = opening else { return MORE };
    let pair = |a: usize, b: usize| 2 * (a + b) + 32;
    let parameters: usize = carried.parameters.iter().map(|(name, value)| pair(name.len(), value.len())).sum();
    let settings: usize = carried.settings.iter().map(|(name, value)| pair(name.len(), value.len())).sum();
    let statements: usize = carried.statements.iter().map(|one| pair(one.name.len(), one.text.len())).sum();
    MORE + carried.user.len() + carried.database.len() + parameters + settings + statements
}

/// Octets in JSON: an array of numbers would be three times as long.
mod base64 {
    use data_encoding::BASE64;
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub fn serialize<S: Serializer>(octets: &[u8], to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(&BASE64.encode_display(octets))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<u8>, D::Error> {
        let text = zeroize::Zeroizing::new(String::deserialize(from)?);
        BASE64.decode(text.as_bytes()).map_err(D::Error::custom)
    }

    pub mod pairs {
        use super::BASE64;
        use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};

        type Pairs = Vec<(Vec<u8>, Vec<u8>)>;

        pub fn serialize<S: Serializer>(pairs: &Pairs, to: S) -> Result<S::Ok, S::Error> {
            let encode = |(name, value): &(Vec<u8>, Vec<u8>)| (BASE64.encode(name), BASE64.encode(value));
            pairs.iter().map(encode).collect::<Vec<_>>().serialize(to)
        }

        pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Pairs, D::Error> {
            let decode = |text: String| BASE64.decode(text.as_bytes()).map_err(D::Error::custom);
            let pairs = Vec::<(String, String)>::deserialize(from)?;
            pairs.into_iter().map(|(name, value)| Ok((decode(name)?, decode(value)?))).collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn carried() -> Carried {
        Carried {
            client: ([192, 0, 2, 7], 4711).into(),
            tls: true,
            epoch: Epoch(8),
            user: "app".to_owned(),
            database: "shop".to_owned(),
            parameters: vec![(b"client_encoding".to_vec(), b"\xff\x00".to_vec())],
            proven: Proven::Scram(b"secret".to_vec()),
            pid: -3,
            key: u32::MAX,
            settings: vec![("search_path".to_owned(), "\"$user\", public".to_owned())],
            statements: vec![Prepared { name: b"s1".to_vec(), text: b"select 1\0\0\0".to_vec() }],
        }
    }

    #[test]
    fn an_opening_reads_back_and_shows_no_secret() {
        for opening in [
            Opening::Session(Box::new(carried())),
            Opening::Connection { client: "[2001:db8::1]:5".parse().expect("address"), epoch: Epoch(7) },
        ] {
            let json = encode(&opening).expect("short");
            assert!(json.len() <= size_hint(&opening), "{}", json.len());
            assert_eq!(super::super::peer::decode::<Opening>(&json).expect("reads"), opening);
        }
        let shown = format!("{:?}", carried());
        assert!(
            shown.contains("Proven(...)") && !shown.contains("secret") && !shown.contains("115, 101, 99, 114"),
            "{shown}"
        );
    }

    #[test]
    fn what_is_too_long_is_refused() {
        let text = vec![b'x'; OPENING_LIMIT];
        let carried = Carried { statements: vec![Prepared { name: Vec::new(), text }], ..carried() };
        let refused = encode(&Opening::Session(Box::new(carried)));
        assert!(matches!(refused, Err(WireError::Oversize(n, OPENING_LIMIT)) if n > OPENING_LIMIT));
    }
}
