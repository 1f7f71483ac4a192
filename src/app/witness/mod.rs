//! `portcullis witness`: the embedded authoritative server of one zone, a tiny compare-and-swap register with a DNS
//! face.
//!
//! ```text
//!  sockets, framing, time-outs (hickory-server) -> responder (TSIG, question or update)
//!                                                     | one lock: prerequisites, change, disk
//!                                                     v
//!                                        zone (a value) + store (one file, replaced whole)
//! ```
//!
//! It is NOT a general name server: one zone, addresses and text, no transfers, no secondaries, no recursion, no
//! DNSSEC. It must stand with neither node (design.md section 2).
//!
//! **Invariants:** see `responder`, `zone` and `store`; together: an update that was answered NOERROR survives
//! `kill -9` and power loss, and of two updates with the same prerequisites at most one is answered NOERROR.

mod responder;
mod store;
mod zone;

use crate::base::fault::{ExitCode, Fault};
use crate::wire::dns::{ServiceNames, TsigKey};
use hickory_server::Server;
use hickory_server::proto::rr::Name;
use responder::{Keeper, Responder};
use std::future::Future;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use store::{Store, Unwritten};
use tokio::net::{TcpListener, UdpSocket};
use zone::Zone;

/// How long a TCP connection may be idle before it is closed.
const TCP_IDLE: Duration = Duration::from_secs(30);

/// Answers buffered on one TCP connection; when full, its next request waits.
const TCP_ANSWERS: usize = 16;

/// All that the witness needs to know.
#[derive(Debug, Clone)]
pub struct WitnessOptions {
    /// UDP and TCP on each.
    pub listen: Vec<SocketAddr>,
    pub zone: String,
    /// The zone's NS and SOA primary.
    pub ns: String,
    pub service_name: String,
    /// Of the first records; whole seconds.
    pub ttl: Duration,
    /// Signs updates, and questions that are signed.
    pub key: TsigKey,
    /// The file that holds the zone; its directory must exist.
    pub store: PathBuf,
    /// The service's addresses, written once when the store is empty.
    pub first_addresses: Vec<IpAddr>,
}

/// Serves until `shutdown` ends, then stops cleanly. Nothing is to be saved then: every change is on disk already.
///
/// Errors: the store is damaged, of another zone or in use; an address cannot be bound; the disk failed in a way that
/// leaves unclear what is on it.
pub async fn run(options: WitnessOptions, shutdown: impl Future<Output = ()>) -> Result<(), Fault> {
    let names =
        ServiceNames::new(&options.zone, &options.service_name).map_err(|why| Fault::new(ExitCode::Config, why))?;
    let store = Store::open(&options.store)?;
    let zone = match store.read()? {
        Some(zone) if *zone.origin() == names.zone => zone,
        Some(zone) => {
            return Err(Fault::new(
                ExitCode::Config,
                format!(
                    "the store {} holds zone {}, not {}; set dns.zone to it, or move the store away",
                    options.store.display(),
                    zone.origin(),
                    names.zone
                ),
            ));
        }
        None => first_zone(&options, &names, &store)?,
    };
    tracing::info!(zone = %names.zone, serial = zone.serial(), "the witness starts");
    let keeper = Arc::new(Keeper::new(zone, store));
    let mut server = Server::new(Responder { keeper: keeper.clone(), key: options.key.clone() });
    for address in &options.listen {
        let cannot = |error: std::io::Error| {
            Fault::new(
                ExitCode::Failed,
                format!("the witness cannot listen on {address}: {error}; free the address or change witness.listen"),
            )
        };
        server.register_socket(UdpSocket::bind(address).await.map_err(cannot)?);
        server.register_listener(TcpListener::bind(address).await.map_err(cannot)?, TCP_IDLE, TCP_ANSWERS);
    }
    tokio::select! {
        () = shutdown => {}
        () = keeper.ended.cancelled() => {}
        ended = server.block_until_done() => {
            let why = ended.err().map_or_else(|| "its sockets were closed".into(), |error| error.to_string());
            return Err(Fault::new(ExitCode::Failed, format!("the witness stopped: {why}; start it again")));
        }
    }
    // Errors of closing sockets help nobody.
    let _ = server.shutdown_gracefully().await;
    match keeper.lost() {
        Some(why) => Err(Fault::new(ExitCode::Failed, format!("the witness stopped: {why}"))),
        None => Ok(()),
    }
}

/// The zone of an empty store: SOA, NS, the service's first addresses, and the address of the name server where it is
/// in the zone and the witness listens on a particular one.
fn first_zone(options: &WitnessOptions, names: &ServiceNames, store: &Store) -> Result<Zone, Fault> {
    let config = |why: String| Fault::new(ExitCode::Config, why);
    let mut ns = Name::from_ascii(&options.ns)
        .map_err(|error| config(format!("witness.ns \"{}\" is not a domain name: {error}; correct it", options.ns)))?
        .to_lowercase();
    ns.set_fqdn(true);
    let ttl = u32::try_from(options.ttl.as_secs())
        .map_err(|_| config("dns.ttl is longer than DNS can say; shorten it".into()))?;
    let mut zone = Zone::new(names.zone.clone(), ns.clone(), ttl);
    if names.zone.zone_of(&ns) {
        for address in options.listen.iter().map(SocketAddr::ip).filter(|ip| !ip.is_unspecified()) {
            zone.add_address(&ns, ttl, address);
        }
    }
    for address in &options.first_addresses {
        zone.add_address(&names.name, ttl, *address);
    }
    store.write(&zone).map_err(|unwritten| {
        let (Unwritten::Old(error) | Unwritten::Unclear(error)) = unwritten;
        let path = options.store.display();
        Fault::new(ExitCode::Failed, format!("the first zone cannot be written to {path}: {error}; make room there"))
    })?;
    Ok(zone)
}
