//! The front door, found and tried as a client finds it: what does the authority say, and does a gate answer there?
//!
//! What it is NOT: no login. A gate whose sockets are open has passed every condition of R1; what is checked here is
//! what lies between it and a client: the record, the address, the port. A warning never fails what was done.

use crate::base::config::{Config, DnsMode};
use crate::base::time::{Duration, Instant};
use crate::io::clock;
use crate::io::dns::{Authority, find_authorities};
use crate::wire::dns::ServiceNames;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// One question to an authority, one connection with its answer.
const STEP_LIMIT: Duration = Duration::from_secs(1);
/// Between two tries.
const TRY_AGAIN: Duration = Duration::from_millis(100);
/// SSLRequest of the PostgreSQL protocol: the first thing that any client's library asks a gate.
const SSL_REQUEST: [u8; 8] = [0, 0, 0, 8, 4, 210, 22, 47];

/// Where clients go in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Door {
    /// `None`: no DNS.
    dns: Option<Dns>,
    vips: Vec<IpAddr>,
    port: u16,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Dns {
    zone: String,
    name: String,
    /// Empty: found from the zone.
    servers: Vec<SocketAddr>,
}

impl Door {
    /// The door of the service that is configured.
    pub fn new(config: &Config) -> Door {
        let dns = config.dns.as_ref().map(|dns| {
            let mut servers = dns.servers.clone();
            if dns.mode == DnsMode::Update {
                // The others may lag.
                servers.truncate(1);
            }
            Dns { zone: dns.zone.clone(), name: config.service.name.clone(), servers }
        });
        let vips = config.vip.as_ref().map(|vip| vip.addresses.iter().map(ipnet::IpNet::addr).collect());
        // A socket that only this machine reaches is no front door.
        let listen = config.service.listen.iter().find(|at| !at.ip().is_loopback()).or(config.service.listen.first());
        Door { dns, vips: vips.unwrap_or_default(), port: listen.map_or(6432, SocketAddr::port) }
    }

    /// Tries until a gate answers, at most `limit`: where it did, or why not.
    pub(super) async fn answers_within(&self, limit: Duration) -> Result<SocketAddr, String> {
        let deadline: Instant = clock::now() + limit;
        loop {
            match self.answers().await {
                Ok(at) => return Ok(at),
                Err(why) if clock::now() >= deadline => return Err(why),
                Err(_) => tokio::time::sleep(TRY_AGAIN).await,
            }
        }
    }

    /// One try: every published address must be a gate's.
    pub(super) async fn answers(&self) -> Result<SocketAddr, String> {
        let addresses = self.addresses().await?;
        let mut first = None;
        for address in addresses {
            let at = SocketAddr::new(address, self.port);
            knock(at).await?;
            first = first.or(Some(at));
        }
        first.ok_or_else(|| "no address is published".to_owned())
    }

    async fn addresses(&self) -> Result<Vec<IpAddr>, String> {
        let Some(dns) = &self.dns else { return Ok(self.vips.clone()) };
        let names = Arc::new(ServiceNames::new(&dns.zone, &dns.name)?);
        let mut servers = dns.servers.clone();
        if servers.is_empty() {
            servers = find_authorities(&dns.zone).await?;
        }
        let mut why = format!("no DNS server of {} is known", dns.zone);
        for server in servers {
            match Authority::new(server, Arc::clone(&names), None).ask(STEP_LIMIT).await {
                Ok(reading) if reading.pair.addresses.is_empty() => {
                    return Err(format!("{server} knows no address of {}", dns.name));
                }
                Ok(reading) => return Ok(reading.pair.addresses),
                Err(silent) => why = format!("{server} does not say where {} is: {silent}", dns.name),
            }
        }
        Err(why)
    }
}

/// Connects and waits for the answer to the first question of the protocol.
async fn knock(at: SocketAddr) -> Result<(), String> {
    let knocking = async {
        let mut stream = TcpStream::connect(at).await?;
        stream.write_all(&SSL_REQUEST).await?;
        let mut answer = [0];
        stream.read_exact(&mut answer).await?;
        Ok::<u8, std::io::Error>(answer[0])
    };
    match timeout(STEP_LIMIT, knocking).await {
        Err(_) => Err(format!("{at} does not answer")),
        Ok(Err(error)) => Err(format!("{at}: {error}")),
        Ok(Ok(b'S' | b'N')) => Ok(()),
        Ok(Ok(_)) => Err(format!("{at} answers, but not as a gate does")),
    }
}
