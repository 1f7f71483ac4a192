//! Listening: the accept loop for TCP and for the Unix socket, with its bounds, and the control socket's file.
//!
//! NOT here: what is answered. **Invariant:** at no moment can somebody outside the socket's owner and group connect
//! to the control socket: it is bound under another name, given its mode, and only then put in place.

use super::control::Credentials;
use crate::base::fault::{ExitCode, Fault};
use axum::{Extension, Router};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use rustix::fs::{FileType, Mode};
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{sleep, timeout};

/// Connections served at once, on TCP and on the socket each. When full, further ones wait in the kernel's backlog
/// until one ends, which on TCP is at most [`TCP_LIFE`] + [`LAST_ANSWER`].
pub const MAX_CONNECTIONS: usize = 64;
/// A client that has not sent its request's head by then is closed.
pub const HEAD_TIME: Duration = Duration::from_secs(5);
/// A TCP connection that has lived so long gets its current answer and is then closed; clients connect anew.
pub const TCP_LIFE: Duration = Duration::from_secs(60);
/// A client that takes longer than this to read its last answer is cut off.
pub const LAST_ANSWER: Duration = Duration::from_secs(5);
/// A request's head (and the read buffer) may be this long; more is answered with 431.
pub const MAX_HEAD_BYTES: usize = 16 * 1024;
/// Pause after an `accept` that failed for want of descriptors, so that the loop does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);
/// Somebody who accepts on an existing control socket within this time is a live daemon.
const LIVE_TIME: Duration = Duration::from_secs(1);

/// Binds `listen` and serves `router` there for ever. Returns only with the reason why it cannot listen.
pub async fn serve_tcp(listen: SocketAddr, router: Router) -> Fault {
    match TcpListener::bind(listen).await {
        Ok(listener) => serve_listener(listener, router).await,
        Err(error) => Fault::new(
            ExitCode::Failed,
            format!("cannot listen on {listen} ({error}); change [status] listen or free the port"),
        ),
    }
}

/// Serves `router` on a listener made before, for ever.
pub async fn serve_listener<T>(listener: TcpListener, router: Router) -> T {
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let slot = slot(&slots).await;
        match listener.accept().await {
            Ok((stream, _)) => drop(tokio::spawn(serve_one(stream, router.clone(), Some(TCP_LIFE), slot))),
            Err(error) => refused(&error).await,
        }
    }
}

/// Binds the control socket at `path` and serves `router` (that of [`super::control_router`]) there for ever. Returns
/// only with the reason why it cannot.
pub async fn serve_control(path: &Path, router: Router) -> Fault {
    match bind_control(path).await {
        Ok(socket) => socket.serve(router).await,
        Err(fault) => fault,
    }
}

/// The bound control socket; its file goes away with it, unless another daemon has put its own there since.
#[derive(Debug)]
pub struct ControlSocket {
    listener: UnixListener,
    path: PathBuf,
    inode: (u64, u64),
}

impl ControlSocket {
    /// Serves for ever. A connection here has no life span: `promote` streams for as long as it takes.
    pub async fn serve<T>(&self, router: Router) -> T {
        let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        loop {
            let slot = slot(&slots).await;
            match self.listener.accept().await {
                Ok((stream, _)) => {
                    let router = router.clone().layer(Extension(Credentials::of(&stream)));
                    drop(tokio::spawn(serve_one(stream, router, None, slot)));
                }
                Err(error) => refused(&error).await,
            }
        }
    }
}

impl Drop for ControlSocket {
    fn drop(&mut self) {
        if inode(&self.path).is_some_and(|found| found == self.inode) {
            // Nobody can be told here, and a file left behind is only a stale socket.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn inode(path: &Path) -> Option<(u64, u64)> {
    rustix::fs::lstat(path).ok().map(|stat| (stat.st_dev, stat.st_ino))
}

/// Creates the control socket, mode 0660. The socket of a dead daemon is replaced; a live one is an error.
pub async fn bind_control(path: &Path) -> Result<ControlSocket, Fault> {
    let shown = path.display();
    let fault = |what: String| Fault::new(ExitCode::Failed, what);
    refuse_live(path).await?;
    let folder = path.parent().ok_or_else(|| fault(format!("{shown} has no folder; set runtime_dir")))?;
    let fresh = folder.join(format!(".control.{}", std::process::id()));
    match std::fs::remove_file(&fresh) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            return Err(fault(format!("cannot remove {} ({error}); remove it by hand", fresh.display())));
        }
        _ => {}
    }
    let listener = UnixListener::bind(&fresh).map_err(|error| {
        fault(format!("cannot make the control socket {} ({error}); check runtime_dir and its owner", fresh.display()))
    })?;
    let mode = Mode::RUSR | Mode::WUSR | Mode::RGRP | Mode::WGRP;
    let placed = rustix::fs::chmod(&fresh, mode).map_err(std::io::Error::from).and_then(|()| {
        let inode = inode(&fresh).ok_or_else(|| std::io::Error::from(ErrorKind::NotFound))?;
        std::fs::rename(&fresh, path).map(|()| inode)
    });
    match placed {
        Ok(inode) => Ok(ControlSocket { listener, path: path.to_owned(), inode }),
        Err(error) => {
            let _ = std::fs::remove_file(&fresh);
            Err(fault(format!("cannot put the control socket at {shown} ({error}); check runtime_dir and its owner")))
        }
    }
}

/// An error where `path` is something else than a socket nobody listens on.
async fn refuse_live(path: &Path) -> Result<(), Fault> {
    let shown = path.display();
    let fault = |what: String| Err(Fault::new(ExitCode::Failed, what));
    match rustix::fs::lstat(path) {
        Ok(stat) if FileType::from_raw_mode(stat.st_mode) != FileType::Socket => {
            return fault(format!("{shown} is there and is no socket; move it away"));
        }
        Ok(_) => {}
        Err(rustix::io::Errno::NOENT) => return Ok(()),
        Err(error) => return fault(format!("cannot look at {shown} ({error}); check runtime_dir and its owner")),
    }
    match timeout(LIVE_TIME, UnixStream::connect(path)).await {
        Ok(Err(error)) if matches!(error.kind(), ErrorKind::ConnectionRefused | ErrorKind::NotFound) => Ok(()),
        Ok(Err(error)) => fault(format!("cannot ask who listens on {shown} ({error}); remove it if no daemon runs")),
        Ok(Ok(_)) | Err(_) => {
            fault(format!("another daemon listens on {shown}; stop it first, or give this one its own runtime_dir"))
        }
    }
}

async fn slot(slots: &Arc<Semaphore>) -> OwnedSemaphorePermit {
    Arc::clone(slots).acquire_owned().await.expect("the semaphore is never closed")
}

async fn refused(error: &std::io::Error) {
    tracing::warn!(%error, "a status connection could not be accepted");
    sleep(ACCEPT_PAUSE).await;
}

async fn serve_one<S>(stream: S, router: Router, life: Option<Duration>, _slot: OwnedSemaphorePermit)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIME)
        .max_buf_size(MAX_HEAD_BYTES)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    let mut connection = std::pin::pin!(connection);
    // What goes wrong on one connection is its client's to notice.
    match life {
        None => drop(connection.await),
        Some(life) => {
            tokio::select! {
                _ = connection.as_mut() => {}
                () = sleep(life) => {
                    connection.as_mut().graceful_shutdown();
                    drop(timeout(LAST_ANSWER, connection).await);
                }
            }
        }
    }
}
