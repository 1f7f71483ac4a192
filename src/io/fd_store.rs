//! Listening sockets that the service manager keeps from one daemon to the next (`FDSTORE=1` of sd_notify(3),
//! `FileDescriptorStoreMax=` of the unit): during `systemctl restart` connections wait in the kernel's queue and are
//! not refused. `systemctl stop` drops them, so that clients of a daemon that was stopped are refused at once.
//!
//! What it is NOT: it knows neither gate nor addresses. **Invariant:** the manager has a socket only from the end of
//! one daemon to the start of the next: what was handed back is taken out of its store.

use sd_notify::NotifyState;
use std::net::TcpListener;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd};

/// How our sockets are called in the store; it may hold no colon.
const NAME: &str = "portcullis-gate";

/// Takes what the manager kept. Once, at the start, before anything else opens descriptors.
pub fn take() -> Vec<TcpListener> {
    let handed = match sd_notify::listen_fds_with_names() {
        Ok(handed) => handed,
        Err(error) => {
            tracing::warn!("what the service manager handed over cannot be used: {error}");
            return Vec::new();
        }
    };
    let mut sockets = Vec::new();
    for (fd, name) in handed {
        let socket = own(fd);
        // One that listens no more would fail each accept.
        if name == NAME && rustix::net::sockopt::socket_acceptconn(&socket).unwrap_or(false) {
            sockets.push(TcpListener::from(socket));
        } else {
            tracing::warn!(
                "the service manager handed over a descriptor named {name:?}, which is none of ours: closed"
            );
        }
    }
    if !sockets.is_empty() {
        let _kept_by_nobody = sd_notify::notify(&[NotifyState::FdStoreRemove, NotifyState::FdName(NAME)]);
    }
    sockets
}

#[allow(unsafe_code)]
fn own(fd: i32) -> OwnedFd {
    // SAFETY: sd_listen_fds(3) gives these numbers to this process alone (`LISTEN_PID`), they are open (their flags
    // were just set), and nobody else here owns them: they are asked for once, before anything is opened.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// Gives a listening socket to the manager, which drops it where its unit has no place for it. Without a manager
/// nothing happens.
pub fn keep(socket: BorrowedFd<'_>) {
    if let Err(error) = sd_notify::notify_with_fds(&[NotifyState::FdStore, NotifyState::FdName(NAME)], &[socket]) {
        tracing::warn!(
            "the service manager does not keep the listening socket ({error}): until the next start clients \
             are refused"
        );
    }
}
