//! Client-side TLS: certificate, key and CA from their files, the handshake, and a client's stream with or without it.
//!
//! What it is NOT: no TLS towards PostgreSQL (that is a Unix socket), and no resumption: no ticket is sent and no
//! session kept, as PostgreSQL does it too (libpq never resumes), so that nothing of a handshake outlives it but the
//! keys in use. Handshakes are the caller's to run where no session waits for them.
//!
//! **Invariant:** with revocation lists, a client's certificate is good only while each of its chain is found in none
//! of them, and each CA has one that has not run out (as PostgreSQL).

use super::socket::Socket;
use super::tunnel::Tunnel;
use crate::base::fault::{ExitCode, Fault};
use crate::wire::tunnel::Secured;
use crate::wire::x509;
use bytes::Bytes;
use rustls::client::danger::HandshakeSignatureValid;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{NoServerSessionStorage, VerifierBuilderError, WebPkiClientVerifier};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, RootCertStore, ServerConfig, SignatureScheme,
};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::Interest;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::server::TlsStream;

/// What a client's ALPN must name, where it names anything (PostgreSQL 17, `PG_ALPN_PROTOCOL`).
const ALPN: &[u8] = b"postgresql";
/// Bytes of a TLS record with its header.
const MAX_RECORD: usize = 8192;
/// Pause between two looks whether a client that has sent more than was read is still there.
const LOOK_AGAIN: Duration = Duration::from_millis(250);

/// Certificate, key and CA, ready for handshakes.
#[derive(Clone)]
pub struct TlsAcceptor {
    acceptor: tokio_rustls::TlsAcceptor,
    end_point: Option<Arc<[u8]>>,
    has_ca: bool,
}

fn fault(file: &Path, what: String) -> Fault {
    Fault::new(ExitCode::Config, format!("{}: {what}", file.display()))
}

/// Reads a certificate chain and its key (PEM); with `clients` also the CA of clients' certificates and its revocation
/// lists. TLS 1.2 and 1.3. The key's file must not be readable by others.
pub fn load(cert_file: &Path, key_file: &Path, clients: Option<(&Path, Option<&Path>)>) -> Result<TlsAcceptor, Fault> {
    let chain = |file: &Path| {
        let chain = CertificateDer::pem_file_iter(file).and_then(Iterator::collect::<Result<Vec<_>, _>>);
        chain.map_err(|e| fault(file, format!("the certificate cannot be read ({e}); give a PEM file")))
    };
    let certificates = chain(cert_file)?;
    let end_point = certificates.first().and_then(|own| x509::end_point_hash(own)).map(Arc::from);
    let mode = std::fs::metadata(key_file).map(|meta| meta.permissions().mode());
    if mode.is_ok_and(|mode| mode & 0o007 != 0) {
        return Err(fault(key_file, "others may read this TLS key; run chmod o-rwx on it".to_owned()));
    }
    let key = PrivateKeyDer::from_pem_file(key_file)
        .map_err(|e| fault(key_file, format!("the TLS key cannot be read ({e}); give a PEM file")))?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let not_serving = |e: rustls::Error| {
        fault(cert_file, format!("certificate and key do not serve ({e}); check that they belong together"))
    };
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(not_serving)?;
    let builder = match clients {
        None => builder.with_no_client_auth(),
        Some((ca_file, crl_file)) => {
            let mut roots = RootCertStore::empty();
            for authority in chain(ca_file)? {
                roots.add(authority).map_err(|e| fault(ca_file, format!("not a CA certificate ({e}); take it out")))?;
            }
            let mut verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
            if let Some(file) = crl_file {
                verifier = verifier.with_crls(revocation_lists(file)?).enforce_revocation_expiration();
            }
            // Who shows none gets in as far as the rules let it, as with PostgreSQL.
            let verifier = verifier.allow_unauthenticated().build().map_err(|error| match (error, crl_file) {
                (VerifierBuilderError::InvalidCrl(e), Some(file)) => {
                    fault(file, format!("the revocation list is not understood ({e:?}); give the CA's, as PEM"))
                }
                (e, _) => fault(ca_file, format!("there is no CA in it ({e}); put its certificate there")),
            })?;
            builder.with_client_cert_verifier(Arc::new(Telling(verifier)))
        }
    };
    let mut config = builder.with_single_cert(certificates, key).map_err(not_serving)?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    // As PostgreSQL's own: a libpq that waits with select() reads at most so much at once, and does not hear of what
    // OpenSSL still keeps of a larger record (sixteen KiB are usual otherwise).
    config.max_fragment_size = Some(MAX_RECORD);
    Ok(TlsAcceptor { acceptor: Arc::new(config).into(), end_point, has_ca: clients.is_some() })
}

/// All lists of a file: one of each CA.
fn revocation_lists(file: &Path) -> Result<Vec<CertificateRevocationListDer<'static>>, Fault> {
    let lists = CertificateRevocationListDer::pem_file_iter(file).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    let lists = lists.map_err(|e| fault(file, format!("the revocation list cannot be read ({e}); give a PEM file")))?;
    if lists.is_empty() {
        // Taken as such, it would let in whom it should name.
        let text = "there is no revocation list in it; put the CA's there (PEM), or take auth.tls_crl_file out";
        return Err(fault(file, text.to_owned()));
    }
    Ok(lists)
}

/// Verifies, and says in the log whose certificate it refused and why: the handshake's own error names nobody.
#[derive(Debug)]
struct Telling(Arc<dyn ClientCertVerifier>);

/// What an administrator can do about it is in here; the rest is the client's.
fn why_refused(error: &rustls::Error) -> String {
    let rustls::Error::InvalidCertificate(error) = error else { return error.to_string() };
    match error {
        CertificateError::Revoked => "it is revoked (auth.tls_crl_file)".to_owned(),
        CertificateError::UnknownRevocationStatus => {
            "its CA has no list in auth.tls_crl_file; add that list, then reload portcullis".to_owned()
        }
        CertificateError::ExpiredRevocationList | CertificateError::ExpiredRevocationListContext { .. } => {
            "its CA's list in auth.tls_crl_file has run out; put the next one there, then reload portcullis".to_owned()
        }
        CertificateError::UnknownIssuer => "it is of no CA in auth.tls_ca_file".to_owned(),
        other => other.to_string(),
    }
}

impl ClientCertVerifier for Telling {
    fn offer_client_auth(&self) -> bool {
        self.0.offer_client_auth()
    }
    fn client_auth_mandatory(&self) -> bool {
        self.0.client_auth_mandatory()
    }
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.0.root_hint_subjects()
    }
    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.0.verify_client_cert(end_entity, intermediates, now).inspect_err(|error| {
            let subject = x509::subject(end_entity).map(|subject| subject.distinguished_name).unwrap_or_default();
            let (subject, why) = (subject.escape_debug(), why_refused(error));
            tracing::warn!(%subject, why, "a client's certificate is refused");
        })
    }
    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.0.verify_tls12_signature(message, cert, dss)
    }
    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.0.verify_tls13_signature(message, cert, dss)
    }
    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_verify_schemes()
    }
}

impl TlsAcceptor {
    /// The handshake. `direct`: the client began with it, and must have said by ALPN what it wants, so that no other
    /// protocol's client can be led here (PostgreSQL 17). The caller bounds the time.
    pub(crate) async fn accept(&self, carrier: Carrier, direct: bool) -> io::Result<ClientStream> {
        let stream = self.acceptor.accept(carrier).await?;
        if direct && stream.get_ref().1.alpn_protocol() != Some(ALPN) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "direct TLS without ALPN"));
        }
        let tls = Tls { stream, end_point: self.end_point.clone(), has_ca: self.has_ca };
        Ok(ClientStream::Tls(Box::new(tls)))
    }
}

/// A client's side of a session.
pub(crate) enum ClientStream {
    /// At the door.
    Plain(TcpStream),
    /// The same on its data thread.
    Settled(Socket<std::net::TcpStream>),
    Tls(Box<Tls>),
    /// Without TLS of its own, through the other node.
    Tunnel(Box<Tunnel>),
    /// Of one that came back from there: what was read of it goes first.
    Ahead(Box<Ahead>),
}

/// A client's stream behind octets that were read of it already.
pub(crate) struct Ahead {
    octets: Bytes,
    stream: ClientStream,
}

/// What a client's TLS comes over.
pub(crate) enum Carrier {
    Own(Moving),
    Tunnel(Box<Tunnel>),
}

impl Carrier {
    fn moving(&self) -> &Moving {
        match self {
            Carrier::Own(moving) => moving,
            Carrier::Tunnel(tunnel) => tunnel.moving(),
        }
    }

    fn moving_mut(&mut self) -> &mut Moving {
        match self {
            Carrier::Own(moving) => moving,
            Carrier::Tunnel(tunnel) => tunnel.moving_mut(),
        }
    }
}

impl AsyncRead for Carrier {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Carrier::Own(moving) => Pin::new(moving).poll_read(cx, buf),
            Carrier::Tunnel(tunnel) => Pin::new(tunnel.as_mut()).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Carrier {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Carrier::Own(moving) => Pin::new(moving).poll_write(cx, buf),
            Carrier::Tunnel(tunnel) => Pin::new(tunnel.as_mut()).poll_write(cx, buf),
        }
    }
    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Carrier::Own(moving) => Pin::new(moving).poll_write_vectored(cx, bufs),
            Carrier::Tunnel(tunnel) => Pin::new(tunnel.as_mut()).poll_write_vectored(cx, bufs),
        }
    }
    fn is_write_vectored(&self) -> bool {
        true
    }
    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Carrier::Own(moving) => Pin::new(moving).poll_flush(cx),
            Carrier::Tunnel(tunnel) => Pin::new(tunnel.as_mut()).poll_flush(cx),
        }
    }
    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Carrier::Own(moving) => Pin::new(moving).poll_shutdown(cx),
            Carrier::Tunnel(tunnel) => Pin::new(tunnel.as_mut()).poll_shutdown(cx),
        }
    }
}

/// A client's TLS, and what the certificate of its handshake was: a reload may have replaced it since.
pub(crate) struct Tls {
    stream: TlsStream<Carrier>,
    end_point: Option<Arc<[u8]>>,
    has_ca: bool,
}

/// A socket that can be taken out from under its TLS, to be put on another thread's runtime.
pub(crate) struct Moving(pub(crate) Option<TcpStream>);

impl Moving {
    /// The socket; absent only on its way from one thread to another.
    fn socket(self: Pin<&mut Self>) -> io::Result<Pin<&mut TcpStream>> {
        self.get_mut().0.as_mut().map(Pin::new).ok_or_else(|| io::ErrorKind::NotConnected.into())
    }
}

impl AsyncRead for Moving {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.socket()?.poll_read(cx, buf)
    }
}

impl AsyncWrite for Moving {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.socket()?.poll_write(cx, buf)
    }
    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.socket()?.poll_write_vectored(cx, bufs)
    }
    fn is_write_vectored(&self) -> bool {
        true
    }
    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.socket()?.poll_flush(cx)
    }
    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.socket()?.poll_shutdown(cx)
    }
}

/// A client's side on its way from one thread to another.
pub(crate) struct Parked {
    socket: std::net::TcpStream,
    over: Over,
    ahead: Bytes,
}

/// What goes over a parked socket.
enum Over {
    Nothing,
    Tls(Box<Tls>),
    Tunnel(Box<Tunnel>),
}

impl Parked {
    /// On the thread it came to.
    pub(crate) fn unpark(self) -> io::Result<ClientStream> {
        self.unpark_with(|socket| Ok(ClientStream::Settled(Socket::new(socket)?)))
    }

    /// Where clients log in.
    pub(crate) fn unpark_at_the_door(self) -> io::Result<ClientStream> {
        self.unpark_with(|socket| Ok(ClientStream::Plain(TcpStream::from_std(socket)?)))
    }

    fn unpark_with(
        self,
        bare: impl FnOnce(std::net::TcpStream) -> io::Result<ClientStream>,
    ) -> io::Result<ClientStream> {
        let stream = match self.over {
            Over::Nothing => bare(self.socket)?,
            Over::Tls(mut tls) => {
                tls.stream.get_mut().0.moving_mut().0 = Some(TcpStream::from_std(self.socket)?);
                ClientStream::Tls(tls)
            }
            Over::Tunnel(mut tunnel) => {
                tunnel.moving_mut().0 = Some(TcpStream::from_std(self.socket)?);
                ClientStream::Tunnel(tunnel)
            }
        };
        Ok(stream.with_ahead(self.ahead))
    }
}

impl ClientStream {
    /// Takes it off this thread.
    pub(crate) fn park(self) -> io::Result<Parked> {
        let (stream, ahead) = self.without_ahead();
        let (socket, over) = match stream {
            ClientStream::Plain(stream) => (Some(stream), Over::Nothing),
            ClientStream::Tls(mut tls) => (tls.stream.get_mut().0.moving_mut().0.take(), Over::Tls(tls)),
            ClientStream::Tunnel(mut tunnel) => (tunnel.moving_mut().0.take(), Over::Tunnel(tunnel)),
            ClientStream::Settled(socket) => {
                return Ok(Parked { socket: socket.into_inner(), over: Over::Nothing, ahead });
            }
            // There is one at most.
            ClientStream::Ahead(_) => (None, Over::Nothing),
        };
        let socket = socket.ok_or(io::ErrorKind::NotConnected)?.into_std()?;
        Ok(Parked { socket, over, ahead })
    }

    /// The same with octets that come first.
    pub(crate) fn with_ahead(self, octets: Bytes) -> ClientStream {
        if octets.is_empty() {
            return self;
        }
        let (stream, behind) = self.without_ahead();
        let octets = if behind.is_empty() { octets } else { [&octets[..], &behind[..]].concat().into() };
        ClientStream::Ahead(Box::new(Ahead { octets, stream }))
    }

    /// The stream, and what of it was read already and is still to be passed.
    pub(crate) fn without_ahead(self) -> (ClientStream, Bytes) {
        match self {
            ClientStream::Ahead(ahead) => (ahead.stream, ahead.octets),
            stream => (stream, Bytes::new()),
        }
    }

    /// Behind whatever was read already.
    fn bare(&self) -> &ClientStream {
        if let ClientStream::Ahead(ahead) = self { &ahead.stream } else { self }
    }

    /// What a handshake may begin on: nothing was read of it but what [`ClientStream::peek`] showed.
    pub(crate) fn into_carrier(self) -> Option<Carrier> {
        match self {
            ClientStream::Plain(stream) => Some(Carrier::Own(Moving(Some(stream)))),
            ClientStream::Tunnel(tunnel) => Some(Carrier::Tunnel(tunnel)),
            ClientStream::Settled(_) | ClientStream::Tls(_) | ClientStream::Ahead(_) => None,
        }
    }

    /// Waits for bytes and shows them without taking them; zero at the end. Before TLS only.
    pub(crate) async fn peek(&mut self, into: &mut [u8]) -> io::Result<usize> {
        match self {
            ClientStream::Plain(stream) => stream.peek(into).await,
            ClientStream::Tunnel(tunnel) => tunnel.peek(into).await,
            ClientStream::Ahead(ahead) => {
                let n = ahead.octets.len().min(into.len());
                into[..n].copy_from_slice(&ahead.octets[..n]);
                Ok(n)
            }
            ClientStream::Settled(_) | ClientStream::Tls(_) => Ok(0),
        }
    }

    /// What is written may stay here until it is flushed.
    pub(crate) fn holds_back(&self) -> bool {
        matches!(self.bare(), ClientStream::Tls(_) | ClientStream::Tunnel(_))
    }

    /// It came through the other node, and cannot go back there: that knows no returns, or the client's TLS ends here.
    pub(crate) fn is_bound_here(&self) -> bool {
        match self {
            ClientStream::Plain(_) | ClientStream::Settled(_) | ClientStream::Ahead(_) => false,
            ClientStream::Tunnel(tunnel) => !tunnel.may_go_back(),
            ClientStream::Tls(tls) => matches!(tls.stream.get_ref().0, Carrier::Tunnel(_)),
        }
    }

    pub(crate) fn is_tls(&self) -> bool {
        match self.bare() {
            ClientStream::Tls(_) => true,
            ClientStream::Tunnel(tunnel) => tunnel.secure.is_some(),
            ClientStream::Plain(_) | ClientStream::Settled(_) | ClientStream::Ahead(_) => false,
        }
    }

    /// What SCRAM binds to; `None` without TLS, or with a certificate that has no such hash.
    pub(crate) fn end_point(&self) -> Option<Arc<[u8]>> {
        match self.bare() {
            ClientStream::Plain(_) | ClientStream::Settled(_) | ClientStream::Ahead(_) => None,
            ClientStream::Tunnel(tunnel) => tunnel.secure.as_ref()?.end_point.clone(),
            ClientStream::Tls(tls) => tls.end_point.clone(),
        }
    }

    /// Certificates were asked for in the handshake.
    pub(crate) fn has_ca(&self) -> bool {
        match self.bare() {
            ClientStream::Tls(tls) => tls.has_ca,
            ClientStream::Tunnel(tunnel) => tunnel.secure.as_ref().is_some_and(|secure| secure.has_ca),
            ClientStream::Plain(_) | ClientStream::Settled(_) | ClientStream::Ahead(_) => false,
        }
    }

    /// The client's own certificate, which is of our CA.
    pub(crate) fn certificate(&self) -> Option<&CertificateDer<'static>> {
        match self.bare() {
            ClientStream::Plain(_) | ClientStream::Settled(_) | ClientStream::Ahead(_) => None,
            ClientStream::Tunnel(tunnel) => tunnel.secure.as_ref()?.certificate.as_ref(),
            ClientStream::Tls(tls) => tls.stream.get_ref().1.peer_certificates()?.first(),
        }
    }

    /// All of that, for the other node; `None` without TLS.
    pub(crate) fn secured(&self) -> Option<Secured> {
        self.is_tls().then(|| Secured {
            end_point: self.end_point().map(|hash| hash.to_vec()).unwrap_or_default(),
            certificate: self.certificate().map(|certificate| certificate.to_vec()).unwrap_or_default(),
            has_ca: self.has_ca(),
        })
    }

    /// Under TLS too; `None` for a settled one.
    fn socket(&self) -> Option<&TcpStream> {
        match self.bare() {
            ClientStream::Plain(stream) => Some(stream),
            ClientStream::Settled(_) | ClientStream::Ahead(_) => None,
            ClientStream::Tls(tls) => tls.stream.get_ref().0.moving().0.as_ref(),
            ClientStream::Tunnel(tunnel) => tunnel.moving().0.as_ref(),
        }
    }

    /// Returns when the client has closed its side, whatever of it is still to be read.
    pub(crate) async fn left(&self) {
        // While there are bytes to read it is ready all the time.
        if let ClientStream::Settled(socket) = self.bare() {
            while matches!(socket.is_closed_when_readable().await, Ok(false)) {
                tokio::time::sleep(LOOK_AGAIN).await;
            }
            return;
        }
        let Some(socket) = self.socket() else { return };
        while matches!(socket.ready(Interest::READABLE).await, Ok(ready) if !ready.is_read_closed()) {
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }

    /// The client's host said that nobody takes what was sent to it. Said once.
    pub(crate) fn was_reset(&self) -> bool {
        match self.bare() {
            ClientStream::Settled(socket) => {
                !matches!(rustix::net::sockopt::socket_error(socket.get_ref()), Ok(Ok(())))
            }
            _ => self.socket().is_none_or(|socket| !matches!(socket.take_error(), Ok(None))),
        }
    }

    /// Closes with a reset, telling nothing.
    pub(crate) fn reset(self) {
        let set = match self.bare() {
            ClientStream::Settled(socket) => Some(
                rustix::net::sockopt::set_socket_linger(socket.get_ref(), Some(Duration::ZERO)).map_err(Into::into),
            ),
            _ => self.socket().map(TcpStream::set_zero_linger),
        };
        if let Some(Err(error)) = set {
            tracing::debug!(%error, "a client's connection is closed without a reset");
        }
    }
}

impl AsyncRead for ClientStream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            ClientStream::Plain(stream) => Pin::new(stream).poll_read(cx, buf),
            ClientStream::Settled(socket) => Pin::new(socket).poll_read(cx, buf),
            ClientStream::Tls(tls) => Pin::new(&mut tls.stream).poll_read(cx, buf),
            ClientStream::Tunnel(tunnel) => Pin::new(tunnel.as_mut()).poll_read(cx, buf),
            ClientStream::Ahead(ahead) if ahead.octets.is_empty() => Pin::new(&mut ahead.stream).poll_read(cx, buf),
            ClientStream::Ahead(ahead) => {
                let n = ahead.octets.len().min(buf.remaining());
                buf.put_slice(&ahead.octets.split_to(n));
                if ahead.octets.is_empty() {
                    // Shared with what was split off: given back now.
                    ahead.octets = Bytes::new();
                }
                Poll::Ready(Ok(()))
            }
        }
    }
}

impl AsyncWrite for ClientStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            ClientStream::Plain(stream) => Pin::new(stream).poll_write(cx, buf),
            ClientStream::Settled(socket) => Pin::new(socket).poll_write(cx, buf),
            ClientStream::Tls(tls) => Pin::new(&mut tls.stream).poll_write(cx, buf),
            ClientStream::Tunnel(tunnel) => Pin::new(tunnel.as_mut()).poll_write(cx, buf),
            ClientStream::Ahead(ahead) => Pin::new(&mut ahead.stream).poll_write(cx, buf),
        }
    }
    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            ClientStream::Plain(stream) => Pin::new(stream).poll_flush(cx),
            ClientStream::Settled(socket) => Pin::new(socket).poll_flush(cx),
            ClientStream::Tls(tls) => Pin::new(&mut tls.stream).poll_flush(cx),
            ClientStream::Tunnel(tunnel) => Pin::new(tunnel.as_mut()).poll_flush(cx),
            ClientStream::Ahead(ahead) => Pin::new(&mut ahead.stream).poll_flush(cx),
        }
    }
    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            ClientStream::Plain(stream) => Pin::new(stream).poll_shutdown(cx),
            ClientStream::Settled(socket) => Pin::new(socket).poll_shutdown(cx),
            ClientStream::Tls(tls) => Pin::new(&mut tls.stream).poll_shutdown(cx),
            ClientStream::Tunnel(tunnel) => Pin::new(tunnel.as_mut()).poll_shutdown(cx),
            ClientStream::Ahead(ahead) => Pin::new(&mut ahead.stream).poll_shutdown(cx),
        }
    }
}
