//! Thousands of sessions that do nothing: what each costs in memory, whether busy ones beside them suffer, and whether
//! all of them still answer afterwards.

use crate::client::{query, startup};
use crate::harness::sys::{Fail, Outcome, in_netns, millis, pause, secs};
use crate::load::{self, Load, Sample};
use crate::rig::Rig;
use crate::systems::Running;
use crate::usage::pss_kib;
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, RootCertStore};
use std::sync::Arc;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio_rustls::TlsConnector;

/// Sessions that log in at once.
const AT_ONCE: usize = 64;
/// The name in the certificate.
const NAME: &str = "localhost";
/// SSLRequest.
const SSL_REQUEST: [u8; 8] = [0, 0, 0, 8, 4, 210, 22, 47];

/// What the sessions cost.
#[derive(Debug, Clone, Copy)]
pub struct Idle {
    /// KiB (Pss) of the system before the first session, with all of them idle, and after the busy ones beside them.
    pub before: u64,
    pub with_all: u64,
    pub after_busy: u64,
    pub sessions: u32,
    /// The busy sessions beside them, where there were any.
    pub busy: Option<Sample>,
}

impl Idle {
    /// KiB of one session.
    pub fn each(&self) -> f64 {
        #[allow(clippy::cast_precision_loss, reason = "far below 2^52")]
        let grown = self.with_all.saturating_sub(self.before) as f64;
        grown / f64::from(self.sessions)
    }
}

/// Writes `tls.pem` and `tls.key`, and returns what clients trust.
pub fn certificate(rig: &Rig) -> Outcome<Trust> {
    let made = rcgen::generate_simple_self_signed(vec![NAME.to_owned()]).map_err(|error| Fail(error.to_string()))?;
    rig.write("tls.pem", &made.cert.pem())?;
    rig.write("tls.key", &made.signing_key.serialize_pem())?;
    let mut roots = RootCertStore::empty();
    roots.add(made.cert.der().clone()).map_err(|error| Fail(error.to_string()))?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    let mut config =
        config.map_err(|error| Fail(error.to_string()))?.with_root_certificates(roots).with_no_client_auth();
    config.resumption = rustls::client::Resumption::disabled();
    Ok(Trust(TlsConnector::from(Arc::new(config))))
}

/// The client side of TLS.
#[derive(Clone)]
pub struct Trust(TlsConnector);

trait Wire: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Wire for T {}
type Session = Box<dyn Wire>;

/// Opens the sessions, each asks once and then sits; with `busy`, a load runs beside them, and each asks again.
pub fn measure(rig: &Rig, on: &Running, sessions: u32, trust: Option<&Trust>, busy: Option<&Load>) -> Outcome<Idle> {
    let pid = on.pid.ok_or("idle sessions are measured at a proxy")?;
    let address = on.address()?;
    in_netns(rig.lab.a.ns(), || {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        // Its own caches and first-time work belong to nobody's session.
        let warm = runtime.block_on(open_all(address, 32, trust))?;
        drop(warm);
        pause(millis(500));
        let before = pss_kib(pid)?;
        let mut open = runtime.block_on(open_all(address, sessions as usize, trust))?;
        let with_all = settled(pid)?;
        let busy = busy.map(|load| load::run(rig, on, load)).transpose()?;
        let after_busy = settled(pid)?;
        runtime.block_on(async {
            for session in &mut open {
                ask(session).await?;
            }
            Ok::<(), Fail>(())
        })?;
        drop(open);
        Ok(Idle { before, with_all, after_busy, sessions, busy })
    })
}

/// Memory once it stands still for half a second.
fn settled(pid: i32) -> Outcome<u64> {
    let mut last = pss_kib(pid)?;
    for _ in 0..20 {
        pause(millis(500));
        let next = pss_kib(pid)?;
        if next.abs_diff(last) < 64 {
            return Ok(next);
        }
        last = next;
    }
    Ok(last)
}

async fn open_all(address: std::net::SocketAddr, count: usize, trust: Option<&Trust>) -> Outcome<Vec<Session>> {
    let mut opening = JoinSet::new();
    let mut open = Vec::with_capacity(count);
    for started in 0..count {
        if started >= AT_ONCE {
            open.push(joined(opening.join_next().await)?);
        }
        let trust = trust.cloned();
        opening.spawn(async move {
            let opening = tokio::time::timeout(secs(30), open_one(address, trust));
            opening.await.map_err(|_| Fail("no session within 30 s".to_owned()))?
        });
    }
    while !opening.is_empty() {
        open.push(joined(opening.join_next().await)?);
    }
    Ok(open)
}

fn joined(next: Option<Result<Outcome<Session>, tokio::task::JoinError>>) -> Outcome<Session> {
    next.ok_or("a session was lost")?.map_err(|error| Fail(error.to_string()))?
}

async fn open_one(address: std::net::SocketAddr, trust: Option<Trust>) -> Outcome<Session> {
    let mut stream = TcpStream::connect(address).await?;
    let mut session: Session = match trust {
        None => Box::new(stream),
        Some(Trust(connector)) => {
            stream.write_all(&SSL_REQUEST).await?;
            if stream.read_u8().await? != b'S' {
                return Err(Fail("it has no TLS".to_owned()));
            }
            let name = ServerName::try_from(NAME).map_err(|error| Fail(error.to_string()))?;
            Box::new(connector.connect(name, stream).await?)
        }
    };
    session.write_all(&startup()).await?;
    session.flush().await?;
    until_ready(&mut session).await?;
    ask(&mut session).await?;
    Ok(session)
}

async fn ask(session: &mut Session) -> Outcome {
    session.write_all(&query("SELECT 1")).await?;
    session.flush().await?;
    let answer = tokio::time::timeout(secs(30), until_ready(session));
    answer.await.map_err(|_| Fail("an idle session got no answer within 30 s".to_owned()))?
}

async fn until_ready(session: &mut Session) -> Outcome {
    loop {
        let kind = session.read_u8().await?;
        let length = session.read_u32().await?.saturating_sub(4) as usize;
        let mut body = vec![0; length];
        session.read_exact(&mut body).await?;
        match kind {
            b'E' => return Err(Fail(String::from_utf8_lossy(&body).replace('\0', " "))),
            b'Z' => return Ok(()),
            _ => {}
        }
    }
}
