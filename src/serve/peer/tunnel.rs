//! Tunnels on the channel (`wire::tunnel`): a connection whose first call asks to be one.
//!
//! What this is NOT: it knows nothing of clients; the gate's `serve::tunnel` lets them in, `serve::forward` brings
//! them.
//!
//! **Invariants:** a tunnel takes none of a node's places for conversations, and has no part in their threads: the
//! pulse waits for none. Openings under way and tunnels that stand are bounded, each by itself.

use super::client::Dial;
use super::server::{House, Refused, wire_refused};
use super::{FrameReader, PeerClient, PeerError, ReadError, Refusal};
use crate::base::ids::NodeName;
use crate::serve::tls::Moving;
use crate::serve::tunnel::{Tunnel, Tunnels};
use crate::wire::peer::{self, Call, FRAME_LIMIT, Reply, WireError};
use crate::wire::tunnel::{self, OPENING_LIMIT, Opening};
use bytes::{Buf, BytesMut};
use socket2::SockRef;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tokio_rustls::client::TlsStream as ClientTls;
use tokio_rustls::server::TlsStream as ServerTls;
use zeroize::Zeroizing;

/// Tunnels that stand at a time; `pool.max_clients` bounds who gets in.
const STANDING: usize = 10_000;
/// Openings that are read at a time; each may be long.
const OPENINGS: usize = 32;
/// Longest an opening takes to come.
const OPENING_TIME: Duration = Duration::from_secs(5);
/// How long octets in a tunnel may stay unacknowledged, a shut window included: as for a client's own connection.
const USER_TIMEOUT: Duration = Duration::from_secs(900);

/// The receiving end's limits, and who lets in.
pub(super) struct Entrance {
    tunnels: Option<Tunnels>,
    standing: Arc<Semaphore>,
    openings: Semaphore,
}

impl Entrance {
    pub(super) fn new(tunnels: Option<Tunnels>) -> Entrance {
        Entrance { tunnels, standing: Arc::new(Semaphore::new(STANDING)), openings: Semaphore::new(OPENINGS) }
    }
}

/// A connection asked to be a tunnel: lets it in, or says why not.
pub(super) async fn receive(
    house: &House,
    node: &NodeName,
    reader: FrameReader<ServerTls<Moving>>,
    (octets, returns): (usize, bool),
) -> Result<(), Refused> {
    let entrance = &house.entrance;
    let FrameReader { mut stream, mut received } = reader;
    let no = |reason: &str| Err(reason.to_owned());
    let Ok(_opening) = entrance.openings.try_acquire() else {
        return refuse(stream, no("too many tunnels are being opened; try again")).await;
    };
    if octets > OPENING_LIMIT {
        let _refused = refuse(stream, no("the opening of the tunnel is too long")).await;
        return Err(wire_refused(&WireError::Oversize(octets, OPENING_LIMIT)));
    }
    let json = match timeout(OPENING_TIME, read_exactly(&mut stream, &mut received, octets)).await {
        Ok(Ok(json)) => json,
        Ok(Err(_)) => return Ok(()), // the other side is gone
        Err(_) => return Err((Refusal::Timeout, format!("no opening of a tunnel within {OPENING_TIME:?}"))),
    };
    let opening = match peer::decode::<Opening>(&json) {
        Ok(opening) => opening,
        Err(error) => {
            let _refused = refuse(stream, Err(error.to_string())).await;
            return Err(wire_refused(&error));
        }
    };
    drop(json);
    let Some(tunnels) = &entrance.tunnels else { return refuse(stream, no("this daemon takes no tunnels")).await };
    let Ok(place) = Arc::clone(&entrance.standing).try_acquire_owned() else {
        return refuse(stream, no("too many tunnels stand already")).await;
    };
    let ticket = match tunnels.admit(node, opening) {
        Ok(ticket) => ticket,
        Err(reason) => return refuse(stream, Err(reason)).await,
    };
    if !received.is_empty() {
        // Octets of the tunnel come behind the answer, or they are not the client's.
        return Err((Refusal::Malformed, "octets before the answer to a tunnel's opening".to_owned()));
    }
    let tuned = stream.get_ref().0.0.as_ref().map(tune);
    let answer = if returns { Reply::Framed } else { Reply::Tunnelled };
    let said = timeout(OPENING_TIME, say(&mut stream, &answer)).await;
    if matches!((tuned, said), (Some(Ok(())), Ok(Ok(())))) {
        tunnels.enter(Tunnel::new(stream, place, returns), ticket);
    }
    Ok(())
}

async fn refuse(mut stream: ServerTls<Moving>, reason: Result<(), String>) -> Result<(), Refused> {
    let Err(reason) = reason else { return Ok(()) };
    let farewell = async {
        say(&mut stream, &Reply::Refused { id: 0, reason }).await?;
        stream.shutdown().await
    };
    let _gone = timeout(OPENING_TIME, farewell).await;
    Ok(())
}

async fn say<S: AsyncWrite + Unpin>(stream: &mut S, reply: &Reply) -> io::Result<()> {
    let frame = peer::encode(reply).map_err(io::Error::other)?;
    stream.write_all(&frame).await?;
    stream.flush().await
}

/// So many octets, those that were read already first. Wiped when dropped: they may be secrets.
async fn read_exactly<S: AsyncRead + Unpin>(
    stream: &mut S,
    received: &mut BytesMut,
    octets: usize,
) -> io::Result<Zeroizing<Vec<u8>>> {
    let mut read = Zeroizing::new(vec![0; octets]);
    let here = received.len().min(octets);
    read[..here].copy_from_slice(&received[..here]);
    received[..here].fill(0);
    received.advance(here);
    stream.read_exact(&mut read[here..]).await?;
    Ok(read)
}

/// What a tunnel gets instead of the channel's own limits: a client may read nothing for minutes.
fn tune(stream: &TcpStream) -> io::Result<()> {
    SockRef::from(stream).set_tcp_user_timeout(Some(USER_TIMEOUT))
}

/// The opening end of a tunnel, once it was let in.
pub(crate) struct OpenTunnel {
    stream: Box<ClientTls<TcpStream>>,
    /// Octets that came with the answer.
    ahead: BytesMut,
    /// What comes out of it are frames: its client may be given back.
    pub(crate) framed: bool,
}

impl PeerClient {
    /// Opens a tunnel, over a connection of its own. Until this returns it may have one of the peer's places for
    /// handshakes.
    pub(crate) async fn open_tunnel(&self, opening: &Opening, limit: Duration) -> Result<OpenTunnel, PeerError> {
        let dial = self.dial();
        timeout(limit, open(&dial, opening)).await.unwrap_or(Err(PeerError::Timeout))
    }
}

async fn open(dial: &Dial, opening: &Opening) -> Result<OpenTunnel, PeerError> {
    let json = tunnel::encode(opening)?;
    let mut reader = dial.connect().await?;
    let broken = |error: io::Error| PeerError::Broken(error.to_string());
    let call = peer::encode(&Call::Tunnel { octets: json.len(), returns: true })?;
    let stream = &mut reader.stream;
    let written = async {
        stream.write_all(&call).await?;
        stream.write_all(&json).await?;
        stream.flush().await
    };
    let written = written.await;
    // Who refuses may have closed before all was written: the reason is there to be read.
    let frame = match (reader.next().await, written) {
        (Ok(frame), _) => frame,
        (Err(ReadError::Wire(error)), _) => return Err(error.into()),
        (Err(ReadError::Io(error)), _) if error.kind() == io::ErrorKind::UnexpectedEof => {
            let text = "it closed instead of answering; upgrade it if its version knows no tunnels";
            return Err(PeerError::Refused(text.to_owned()));
        }
        (Err(ReadError::Io(error)), _) => return Err(broken(error)),
    };
    let framed = match peer::decode::<Reply>(&frame)? {
        // It knows no TLS but its own, and would judge this client as one without.
        Reply::Tunnelled if matches!(opening, Opening::Connection { tls: Some(_), .. }) => {
            return Err(PeerError::Refused(
                "its version takes no client whose TLS ends elsewhere; upgrade it".to_owned(),
            ));
        }
        Reply::Tunnelled => false,
        Reply::Framed => true,
        Reply::Refused { reason, .. } => return Err(PeerError::Refused(reason)),
        _ => return Err(PeerError::Malformed("another answer than one to a tunnel".to_owned())),
    };
    tune(reader.stream.get_ref().0).map_err(broken)?;
    let FrameReader { stream, received } = reader;
    debug_assert!(received.len() <= FRAME_LIMIT);
    Ok(OpenTunnel { stream: Box::new(stream), ahead: received, framed })
}

impl OpenTunnel {
    /// Closes with a reset, so that the other side knows that this is no end of the client's.
    pub(crate) fn reset(self) {
        let _gone_anyway = self.stream.get_ref().0.set_zero_linger();
    }
}

impl AsyncRead for OpenTunnel {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.ahead.is_empty() {
            // A gate that is done with a client closes without TLS's own farewell; what it had to say is in messages.
            match ready!(Pin::new(&mut self.stream).poll_read(cx, buf)) {
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {}
                read => return Poll::Ready(read),
            }
        } else {
            let n = self.ahead.len().min(buf.remaining());
            buf.put_slice(&self.ahead.split_to(n));
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for OpenTunnel {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
