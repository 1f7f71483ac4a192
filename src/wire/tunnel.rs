//! A tunnel: a connection of the peer channel that carries one client to the active node's gate.
//!
//! ```text
//! TLS and both greetings as on any connection of the channel (wire::peer), then
//!   forwarding node   Call::Tunnel(Opening)
//!   active node       Reply::Tunnelled, or Reply::Refused
//! then nothing but the client's octets, in both directions, until either side closes
//! ```
//!
//! What this is NOT: the active node's gate is not asked here. It alone asks its lease; one hop, never forwarded on.
//!
//! **Invariant:** what proves a client ([`Proven`]) is never shown by `Debug`.

use crate::base::ids::Epoch;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::net::SocketAddr;

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
    /// The rest of the start-up packet, in order and as bytes.
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
    pub name: Vec<u8>,
    /// The Parse message's body behind the name: query, terminator, number and OIDs of the parameter types.
    pub text: Vec<u8>,
}

/// How the client proved itself to the old node. Physical replication makes the stored secrets the same on both.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Proven {
    /// Keys of RFC 5802 (ClientKey, then what the gate needs of the verifier), as the gate keeps them.
    Scram(Vec<u8>),
    Md5(Vec<u8>),
    Certificate,
    Trust,
}

impl fmt::Debug for Proven {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Proven(...)")
    }
}
