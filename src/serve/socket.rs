//! A socket on the way of every byte: a Unix socket to PostgreSQL, or a client's TCP connection.
//!
//! What it is NOT: a general stream. It waits for room to write only while there is none: the kernel wakes everyone who
//! waits for a Unix socket's room whenever the other side has read (`unix_write_space`), so a thread that always waited
//! for both would be woken by every request that PostgreSQL takes up. System calls are made directly (rustix): libc's
//! `send` and `recv` look twice each whether their thread was cancelled.

use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, Shutdown, recv, send, shutdown};
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};

/// Pause where there is no descriptor to wait with.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// A connected socket, which does not block.
pub(crate) struct Socket<S: AsRawFd = UnixStream> {
    stream: AsyncFd<S>,
    /// The same socket by another descriptor, while there is no room to write.
    blocked: Option<Box<AsyncFd<OwnedFd>>>,
}

/// A descriptor for events of one kind.
#[expect(
    deprecated,
    reason = "std's own types keep their descriptor, which is all that its successor asks for, unsafely"
)]
fn watched<T: AsRawFd>(inner: T, interest: Interest) -> io::Result<AsyncFd<T>> {
    AsyncFd::with_interest(inner, interest)
}

impl Socket<UnixStream> {
    /// Connects. A Unix socket does so at once, or says why not.
    pub(crate) async fn connect(path: &Path) -> io::Result<Socket<UnixStream>> {
        Socket::new(tokio::net::UnixStream::connect(path).await?.into_std()?)
    }

    /// The same connection once more, for [`Socket::new`].
    pub(crate) fn again(&self) -> io::Result<UnixStream> {
        self.stream.get_ref().try_clone()
    }
}

impl<S: AsRawFd + AsFd> Socket<S> {
    /// Of a connected one that does not block, on the runtime it will be used on.
    pub(crate) fn new(stream: S) -> io::Result<Socket<S>> {
        Ok(Socket { stream: watched(stream, Interest::READABLE)?, blocked: None })
    }

    pub(crate) fn get_ref(&self) -> &S {
        self.stream.get_ref()
    }

    /// Off this runtime.
    pub(crate) fn into_inner(self) -> S {
        self.stream.into_inner()
    }

    /// There is nothing to be read. Costs a system call only where the runtime believes that there may be something.
    pub(crate) fn is_silent(&self) -> bool {
        let read = self.stream.try_io(Interest::READABLE, |stream| {
            recv(stream, &mut [0; 1], RecvFlags::empty()).map(|(n, _)| n).map_err(io::Error::from)
        });
        matches!(read, Err(error) if error.kind() == io::ErrorKind::WouldBlock)
    }

    /// Waits for something to read, or the other side's end; whether it was the end.
    pub(crate) async fn is_closed_when_readable(&self) -> io::Result<bool> {
        Ok(self.stream.readable().await?.ready().is_read_closed())
    }

    fn poll_write_with(
        &mut self,
        cx: &mut Context<'_>,
        mut write: impl FnMut(&S) -> io::Result<usize>,
    ) -> Poll<io::Result<usize>> {
        loop {
            if let Some(blocked) = &self.blocked {
                ready!(blocked.poll_write_ready(cx))?.clear_ready();
                self.blocked = None;
            }
            match write(self.stream.get_ref()) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let again = self.stream.get_ref().as_fd().try_clone_to_owned();
                    let Ok(blocked) = again.and_then(|again| watched(again, Interest::WRITABLE)) else {
                        // No descriptor is left: look again in a moment.
                        let waker = cx.waker().clone();
                        drop(tokio::spawn(async move {
                            tokio::time::sleep(LOOK_AGAIN).await;
                            waker.wake();
                        }));
                        return Poll::Pending;
                    };
                    self.blocked = Some(Box::new(blocked));
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                done => return Poll::Ready(done),
            }
        }
    }
}

impl<S: AsRawFd + AsFd + Unpin> AsyncRead for Socket<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            let mut ready = ready!(self.stream.poll_read_ready(cx))?;
            let room = buf.initialize_unfilled();
            match recv(self.stream.get_ref(), &mut *room, RecvFlags::empty()) {
                Ok((n, _)) => {
                    // A short read has emptied the socket: the next bytes are a new event.
                    if n > 0 && n < room.len() {
                        ready.clear_ready();
                    }
                    buf.advance(n);
                    return Poll::Ready(Ok(()));
                }
                Err(Errno::WOULDBLOCK) => ready.clear_ready(),
                Err(Errno::INTR) => {}
                Err(error) => return Poll::Ready(Err(error.into())),
            }
        }
    }
}

impl<S: AsRawFd + AsFd + Unpin> AsyncWrite for Socket<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.get_mut().poll_write_with(cx, |stream| Ok(send(stream, buf, SendFlags::NOSIGNAL)?))
    }
    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.get_mut().poll_write_with(cx, |stream| Ok(rustix::io::writev(stream, bufs)?))
    }
    fn is_write_vectored(&self) -> bool {
        true
    }
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(shutdown(self.stream.get_ref(), Shutdown::Write).map_err(io::Error::from))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    #[tokio::test]
    async fn a_socket_without_room_waits_for_it_and_goes_on() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("s");
        let listener = tokio::net::UnixListener::bind(&path).expect("binds");
        let mut near = Socket::connect(&path).await.expect("connects");
        let (mut far, _) = listener.accept().await.expect("accepts");
        assert!(near.is_silent());
        let sent: Vec<u8> = (0..2_000_000_u32).map(|n| u8::try_from(n % 251).expect("small")).collect();
        let expected = sent.clone();
        let writer = tokio::spawn(async move {
            near.write_all(&sent).await.expect("written");
            let mut answer = [0; 3];
            near.read_exact(&mut answer).await.expect("read");
            assert_eq!(&answer, b"yes");
            near
        });
        let mut heard = vec![0; expected.len()];
        far.read_exact(&mut heard).await.expect("heard");
        assert!(heard == expected);
        far.write_all(b"yes").await.expect("said");
        let near = writer.await.expect("done");
        assert!(near.is_silent() && near.blocked.is_none());
        far.write_all(b"!").await.expect("said");
        tokio::time::timeout(std::time::Duration::from_secs(30), async {
            while near.is_silent() {
                tokio::task::yield_now().await;
            }
        })
        .await
        .expect("it is heard that something is there");
    }
}
