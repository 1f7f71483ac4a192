//! Octets both ways between a client and its tunnel, and the client taken back out of it.
//!
//! ```text
//!  the other node serves        client <-> tunnel
//!  Frame::Stop                  nothing more of the client is read, and the tunnel's way there is closed
//!  Opening, Ahead, End          what the client is, and what of it was read and not passed: it comes home
//! ```
//!
//! **Invariants:** memory is bounded: two buffers for each client, and a side is not read while the other does not
//! take. No octet of a client is lost or passed twice: what was read here and not taken there comes behind what comes
//! back. A client that comes home is the one that was sent, by its address.

use super::super::peer::OpenTunnel;
use super::super::tls::ClientStream;
use super::super::tunnel::{EARLY_MOST, RETURN_LIMIT};
use super::Home;
use crate::wire::peer;
use crate::wire::tunnel::{FRAME_HEAD, Frame, Opening};
use bytes::BytesMut;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf, copy, split};
use tokio::time::timeout;
use zeroize::Zeroizing;

/// Octets of a direction's buffer.
const BUFFER: usize = 8 * 1024;
/// How long a client may take to close after the other node has; then it is closed on.
const FAREWELL_TIMEOUT: Duration = Duration::from_millis(500);

/// Copies both ways until both sides have closed, one breaks, or `ended`; what breaks is shown to the other side.
/// A client that was given back is returned.
pub(super) async fn through(
    mut client: ClientStream,
    ahead: &[u8],
    mut tunnel: OpenTunnel,
    ended: impl Future<Output = ()>,
) -> Option<Home> {
    if tunnel.framed {
        return framed(client, ahead, tunnel, ended).await;
    }
    let copied = tokio::select! {
        biased;
        () = ended => false,
        copied = async {
            tunnel.write_all(ahead).await?;
            splice(&mut client, &mut tunnel).await
        } => copied.is_ok(),
    };
    if !copied {
        tunnel.reset();
        client.reset();
    }
    None
}

/// Copies both ways, in a buffer each: a client's end is passed on, and that of the other node ends both. A side that
/// takes nothing is read for nothing.
async fn splice(
    client: &mut (impl AsyncRead + AsyncWrite + Unpin),
    tunnel: &mut (impl AsyncRead + AsyncWrite + Unpin),
) -> io::Result<()> {
    let (mut from_client, mut to_client) = split(&mut *client);
    let (mut from_tunnel, mut to_tunnel) = split(tunnel);
    let up = async {
        copy(&mut from_client, &mut to_tunnel).await?;
        to_tunnel.shutdown().await?;
        // Its answer is still to come.
        std::future::pending().await
    };
    let down = async {
        copy(&mut from_tunnel, &mut to_client).await?;
        to_client.shutdown().await
    };
    tokio::select! {
        done = up => done,
        done = down => done,
    }?;
    take_leave(client).await;
    Ok(())
}

/// Closed with octets unread it would be a reset, which may overtake what was written.
async fn take_leave(client: &mut (impl AsyncRead + Unpin)) {
    let mut rest = [0; 1024];
    let closing = async { while matches!(client.read(&mut rest).await, Ok(1..)) {} };
    let _closed_on = timeout(FAREWELL_TIMEOUT, closing).await;
}

/// Read of the client, and not yet taken by the tunnel.
struct Held {
    buffer: Box<[u8]>,
    at: usize,
    end: usize,
}

impl Held {
    fn octets(&self) -> &[u8] {
        &self.buffer[self.at..self.end]
    }

    /// From the client to the tunnel, for as long as it is polled. Dropped at any moment it has lost nothing.
    async fn pass(
        &mut self,
        from: &mut ReadHalf<&mut ClientStream>,
        to: &mut WriteHalf<OpenTunnel>,
    ) -> io::Result<Told> {
        loop {
            while self.at < self.end {
                match to.write(self.octets()).await? {
                    0 => return Err(io::ErrorKind::WriteZero.into()),
                    n => self.at += n,
                }
            }
            to.flush().await?;
            (self.at, self.end) = (0, from.read(&mut self.buffer).await?);
            if self.end == 0 {
                to.shutdown().await?;
                // Its answer is still to come.
                std::future::pending::<()>().await;
            }
        }
    }
}

/// What ended the copying.
enum Told {
    /// The other node is done with the client.
    Closed,
    /// It gives the client back.
    Stop,
}

/// What comes out of a tunnel.
struct Down {
    from: ReadHalf<OpenTunnel>,
    /// What proves a client may be in it.
    buffer: Zeroizing<Vec<u8>>,
    at: usize,
    end: usize,
    /// Something was written to the client and not flushed.
    unflushed: bool,
}

impl Down {
    /// What is there, at least an octet; none at the end. The client has everything before that.
    async fn more(&mut self, to: &mut (impl AsyncWrite + Unpin)) -> io::Result<&[u8]> {
        if self.at == self.end {
            if std::mem::take(&mut self.unflushed) {
                to.flush().await?;
            }
            (self.at, self.end) = (0, self.from.read(&mut self.buffer).await?);
        }
        Ok(&self.buffer[self.at..self.end])
    }

    async fn exactly(&mut self, into: &mut [u8], to: &mut (impl AsyncWrite + Unpin)) -> io::Result<bool> {
        let mut at = 0;
        while at < into.len() {
            let here = self.more(to).await?;
            if here.is_empty() {
                return Ok(false);
            }
            let n = here.len().min(into.len() - at);
            into[at..at + n].copy_from_slice(&here[..n]);
            self.at += n;
            at += n;
        }
        Ok(true)
    }

    /// The next frame that is none of octets, which the client gets; `None` at the end.
    async fn next(&mut self, to: &mut (impl AsyncWrite + Unpin)) -> io::Result<Option<(Frame, usize)>> {
        loop {
            let mut head = [0; FRAME_HEAD];
            if !self.exactly(&mut head, to).await? {
                return Ok(None);
            }
            let (frame, mut left) = Frame::parse(head).map_err(io::Error::other)?;
            if frame != Frame::Octets {
                return Ok(Some((frame, left)));
            }
            while left > 0 {
                let here = self.more(to).await?;
                if here.is_empty() {
                    return Ok(None);
                }
                let n = here.len().min(left);
                to.write_all(&here[..n]).await?;
                self.unflushed = true;
                self.at += n;
                left -= n;
            }
        }
    }

    /// What the client is, and what of it was read there; `None`: it was told something else, and all is said.
    async fn home(&mut self, to: &mut (impl AsyncWrite + Unpin)) -> io::Result<Option<(Opening, BytesMut)>> {
        let (mut opening, mut early) = (None, BytesMut::new());
        let malformed = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what.to_owned());
        loop {
            let Some((frame, octets)) = self.next(to).await? else { return Ok(None) };
            match frame {
                Frame::Opening => {
                    let mut json = Zeroizing::new(vec![0; octets]);
                    if !self.exactly(&mut json, to).await? {
                        return Ok(None);
                    }
                    opening = Some(peer::decode(&json).map_err(io::Error::other)?);
                }
                Frame::Ahead => {
                    let at = early.len();
                    if at + octets > EARLY_MOST {
                        return Err(malformed("more of a client than may come back"));
                    }
                    early.resize(at + octets, 0);
                    if !self.exactly(&mut early[at..], to).await? {
                        return Ok(None);
                    }
                }
                Frame::End => return Ok(opening.map(|opening| (opening, early))),
                Frame::Stop | Frame::Octets => return Err(malformed("a frame that does not belong there")),
            }
        }
    }
}

async fn framed(
    mut client: ClientStream,
    ahead: &[u8],
    tunnel: OpenTunnel,
    ended: impl Future<Output = ()>,
) -> Option<Home> {
    let mut held = Held { buffer: vec![0; BUFFER.max(ahead.len())].into(), at: 0, end: ahead.len() };
    held.buffer[..ahead.len()].copy_from_slice(ahead);
    let (from, mut to_tunnel) = split(tunnel);
    let mut down = Down { from, buffer: Zeroizing::new(vec![0; BUFFER]), at: 0, end: 0, unflushed: false };
    let (mut from_client, mut to_client) = split(&mut client);
    let copied = tokio::select! {
        () = ended => None,
        told = held.pass(&mut from_client, &mut to_tunnel) => told.ok(),
        next = down.next(&mut to_client) => match next {
            Ok(None) => Some(Told::Closed),
            Ok(Some((Frame::Stop, _))) => Some(Told::Stop),
            Ok(Some(_)) | Err(_) => None,
        },
    };
    let done = match copied {
        Some(Told::Stop) => {
            let back = async {
                let closed = async { to_tunnel.shutdown().await };
                // Whoever reads may have closed before our farewell was written.
                let (_closed, home) = tokio::join!(closed, down.home(&mut to_client));
                home
            };
            timeout(RETURN_LIMIT, back).await.unwrap_or(Err(io::ErrorKind::TimedOut.into())).map_err(drop)
        }
        Some(Told::Closed) => Ok(None),
        None => Err(()),
    };
    match done {
        Ok(Some((opening, early))) => {
            drop((from_client, to_client));
            let mut early = early;
            early.extend_from_slice(held.octets());
            return Some(Home { client, opening, ahead: early.freeze() });
        }
        Ok(None) => {
            let _gone_anyway = to_client.shutdown().await;
            drop((from_client, to_client));
            take_leave(&mut client).await;
        }
        Err(()) => {
            drop((from_client, to_client));
            down.from.unsplit(to_tunnel).reset();
            client.reset();
        }
    }
    None
}

impl Home {
    /// Whether it is the client that was sent, as the role that it had then, if any.
    pub(super) fn is_of(&self, client: SocketAddr, user: &str) -> bool {
        let same = self.opening.client() == client && (user.is_empty() || self.opening.user() == user);
        if !same {
            tracing::error!(%client, "another client came back than was carried over; it is closed");
        }
        same
    }
}
