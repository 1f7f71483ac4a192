//! Client-side TLS: the certificate from its files, and a client's stream with or without it.
//!
//! What it is NOT: no client certificates (method `cert` is not built yet), no direct TLS without SSLRequest, no TLS
//! towards PostgreSQL (that is a Unix socket).

use crate::base::fault::{ExitCode, Fault};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
pub use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

/// Reads a certificate chain and its key (PEM). TLS 1.2 and 1.3. The key's file must not be readable by others.
pub fn load(cert_file: &Path, key_file: &Path) -> Result<TlsAcceptor, Fault> {
    let fault = |file: &Path, what: String| Fault::new(ExitCode::Config, format!("{}: {what}", file.display()));
    let chain = CertificateDer::pem_file_iter(cert_file)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|e| fault(cert_file, format!("the certificate cannot be read ({e}); give a PEM file")))?;
    let mode = std::fs::metadata(key_file).map(|meta| meta.permissions().mode());
    if mode.is_ok_and(|mode| mode & 0o007 != 0) {
        return Err(fault(key_file, "others may read this TLS key; run chmod o-rwx on it".to_owned()));
    }
    let key = PrivateKeyDer::from_pem_file(key_file)
        .map_err(|e| fault(key_file, format!("the TLS key cannot be read ({e}); give a PEM file")))?;
    let config = rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .and_then(|builder| builder.with_no_client_auth().with_single_cert(chain, key))
        .map_err(|e| {
            fault(cert_file, format!("certificate and key do not serve ({e}); check that they belong together"))
        })?;
    Ok(TlsAcceptor::from(Arc::new(config)))
}

/// A client's side of a session.
pub(crate) enum ClientStream {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

/// A client's side on its way from one thread to another.
pub(crate) enum Parked {
    Plain(std::net::TcpStream),
    /// Its socket stays with the runtime of the door, which wakes the session.
    Tls(Box<TlsStream<TcpStream>>),
}

impl Parked {
    /// On the thread it came to.
    pub(crate) fn unpark(self) -> io::Result<ClientStream> {
        Ok(match self {
            Parked::Plain(stream) => ClientStream::Plain(TcpStream::from_std(stream)?),
            Parked::Tls(stream) => ClientStream::Tls(stream),
        })
    }
}

impl ClientStream {
    /// Takes it off this thread.
    pub(crate) fn park(self) -> io::Result<Parked> {
        Ok(match self {
            ClientStream::Plain(stream) => Parked::Plain(stream.into_std()?),
            ClientStream::Tls(stream) => Parked::Tls(stream),
        })
    }

    pub(crate) fn is_tls(&self) -> bool {
        matches!(self, ClientStream::Tls(_))
    }

    /// Closes with a reset, telling nothing.
    pub(crate) fn reset(self) {
        let stream = match &self {
            ClientStream::Plain(stream) => stream,
            ClientStream::Tls(stream) => stream.get_ref().0,
        };
        if let Err(error) = stream.set_zero_linger() {
            tracing::debug!(%error, "a client's connection is closed without a reset");
        }
    }
}

impl AsyncRead for ClientStream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            ClientStream::Plain(stream) => Pin::new(stream).poll_read(cx, buf),
            ClientStream::Tls(stream) => Pin::new(stream.as_mut()).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for ClientStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            ClientStream::Plain(stream) => Pin::new(stream).poll_write(cx, buf),
            ClientStream::Tls(stream) => Pin::new(stream.as_mut()).poll_write(cx, buf),
        }
    }
    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            ClientStream::Plain(stream) => Pin::new(stream).poll_flush(cx),
            ClientStream::Tls(stream) => Pin::new(stream.as_mut()).poll_flush(cx),
        }
    }
    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            ClientStream::Plain(stream) => Pin::new(stream).poll_shutdown(cx),
            ClientStream::Tls(stream) => Pin::new(stream.as_mut()).poll_shutdown(cx),
        }
    }
}
