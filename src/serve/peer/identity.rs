//! Who a node is to its peers: keys derived from the one cluster secret, and TLS settings that pin them.
//!
//! ```text
//! seed(node) = HKDF-SHA256(salt = none, secret = cluster key, info = LABEL | node name), 32 octets
//! key(node)  = Ed25519 private key of that seed (RFC 8032); its certificate is self-signed and says nothing
//! ```
//!
//! Whoever has the secret can be any node: the secret is the cluster. What the derivation adds is that a node cannot
//! be taken for another by mistake, and that there is nothing else to hand out, rotate or let expire.
//!
//! What this is NOT: a certificate authority. Names, dates, chains and extensions of a certificate are not looked at.
//!
//! **Invariant:** `Debug` shows names only; seeds and PKCS #8 documents made here are wiped.

use crate::base::config::Secret;
use crate::base::ids::NodeName;
use ring::hkdf;
use ring::signature::{Ed25519KeyPair, KeyPair};
use rustls::client::Resumption;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, ring as provider, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{NoServerSessionStorage, ParsedCertificate};
use rustls::version::TLS13;
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, ServerConfig, SignatureScheme};
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use zeroize::{Zeroize, Zeroizing};

/// Separates these keys from anything else ever derived from the cluster secret.
const LABEL: &[u8] = b"portcullis peer channel, Ed25519, version 1: ";
/// Octets of the cluster secret, and of an Ed25519 seed.
const SECRET_LENGTH: usize = 32;
/// What comes before the seed in a PKCS #8 version 1 Ed25519 key (RFC 8410, section 7).
const PKCS8_PREFIX: [u8; 16] = [0x30, 0x2e, 2, 1, 0, 0x30, 5, 6, 3, 0x2b, 0x65, 0x70, 4, 0x22, 4, 0x20];
/// What comes before the key in an Ed25519 SubjectPublicKeyInfo (RFC 8410, section 4).
const SPKI_PREFIX: [u8; 12] = [0x30, 0x2a, 0x30, 5, 6, 3, 0x2b, 0x65, 0x70, 3, 0x21, 0];
/// Stands in certificates and ClientHello where some name must; never looked at.
const NO_NAME: &str = "peer.portcullis.invalid";

type Spki = Vec<u8>;

/// This node's key, the keys it accepts, and the TLS settings made of them.
pub struct PeerIdentity {
    me: NodeName,
    server: Arc<ServerConfig>,
    clients: BTreeMap<NodeName, Arc<ClientConfig>>,
    accepted: Arc<Pinned>,
}

impl fmt::Debug for PeerIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PeerIdentity").field("me", &self.me).field("others", &self.clients.keys()).finish()
    }
}

impl PeerIdentity {
    /// Derives the keys of this node and of the others. Errors: the secret is not 32 octets, a name stands twice.
    pub fn new(secret: &Secret, me: &NodeName, others: &[NodeName]) -> Result<PeerIdentity, String> {
        if secret.expose().len() != SECRET_LENGTH {
            return Err(format!(
                "the cluster key has {} octets instead of {SECRET_LENGTH}; make one with portcullis init",
                secret.expose().len()
            ));
        }
        let seed = derive_seed(secret, me)?;
        let mut pinned = BTreeMap::new();
        for node in others {
            let spki = public_spki(&derive_seed(secret, node)?)?;
            if node == me || pinned.insert(node.clone(), spki).is_some() {
                return Err(format!("the node name {node} stands twice; give every [[node]] a name of its own"));
            }
        }
        let crypto = Arc::new(provider::default_provider());
        let pin = |keys| Arc::new(Pinned { keys, algorithms: crypto.signature_verification_algorithms });
        let (certificate, mut key) = certificate(&seed)?;
        let accepted = pin(pinned.clone());
        let server =
            server_config(&crypto, accepted.clone(), certificate.clone(), key.clone_key()).map_err(unusable)?;
        let mut clients = BTreeMap::new();
        for (node, spki) in pinned {
            let only = pin(BTreeMap::from([(node.clone(), spki)]));
            let config = client_config(&crypto, only, certificate.clone(), key.clone_key()).map_err(unusable)?;
            clients.insert(node, Arc::new(config));
        }
        key.zeroize();
        Ok(PeerIdentity { me: me.clone(), server: Arc::new(server), clients, accepted })
    }

    /// This node's name.
    pub fn me(&self) -> &NodeName {
        &self.me
    }

    /// How to accept connections: the key of any other node, TLS 1.3.
    pub fn server(&self) -> Arc<ServerConfig> {
        self.server.clone()
    }

    /// How to connect to that node, with its key alone accepted.
    pub fn client(&self, peer: &NodeName) -> Option<Arc<ClientConfig>> {
        self.clients.get(peer).cloned()
    }

    /// Which configured node a certificate's key stands for.
    pub(super) fn node_of(&self, certificates: Option<&[CertificateDer<'_>]>) -> Option<NodeName> {
        self.accepted.node_of(certificates?.first()?).ok()
    }

    /// The name that every ClientHello would carry if one were sent.
    pub(super) fn no_name() -> Result<ServerName<'static>, String> {
        ServerName::try_from(NO_NAME).map_err(|error| error.to_string())
    }
}

fn unusable(error: rustls::Error) -> String {
    format!("no TLS settings can be made of the cluster key: {error}; make a new key with portcullis init")
}

struct SeedLength;
impl hkdf::KeyType for SeedLength {
    fn len(&self) -> usize {
        SECRET_LENGTH
    }
}

fn derive_seed(secret: &Secret, node: &NodeName) -> Result<Zeroizing<[u8; SECRET_LENGTH]>, String> {
    let mut seed = Zeroizing::new([0; SECRET_LENGTH]);
    hkdf::Salt::new(hkdf::HKDF_SHA256, &[])
        .extract(secret.expose())
        .expand(&[LABEL, node.as_str().as_bytes()], SeedLength)
        .and_then(|key| key.fill(seed.as_mut()))
        .map_err(|_| format!("no key can be derived for {node}; make a new cluster key with portcullis init"))?;
    Ok(seed)
}

fn public_spki(seed: &Zeroizing<[u8; SECRET_LENGTH]>) -> Result<Spki, String> {
    let pair = Ed25519KeyPair::from_seed_unchecked(seed.as_ref()).map_err(|error| error.to_string())?;
    Ok([&SPKI_PREFIX[..], pair.public_key().as_ref()].concat())
}

/// A self-signed certificate for the key of the seed: the envelope in which TLS carries it.
fn certificate(
    seed: &Zeroizing<[u8; SECRET_LENGTH]>,
) -> Result<(CertificateDer<'static>, PrivateKeyDer<'static>), String> {
    let mut pkcs8 = Vec::with_capacity(PKCS8_PREFIX.len() + SECRET_LENGTH);
    pkcs8.extend_from_slice(&PKCS8_PREFIX);
    pkcs8.extend_from_slice(seed.as_ref());
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(pkcs8));
    let made = rcgen::KeyPair::try_from(&key)
        .and_then(|pair| rcgen::CertificateParams::new([NO_NAME.to_owned()])?.self_signed(&pair));
    let made = made.map_err(|error| format!("no certificate can be made of the cluster key: {error}"))?;
    Ok((made.der().clone(), key))
}

fn server_config(
    crypto: &Arc<CryptoProvider>,
    pinned: Arc<Pinned>,
    certificate: CertificateDer<'static>,
    key: PrivateKeyDer<'static>,
) -> Result<ServerConfig, rustls::Error> {
    let mut config = ServerConfig::builder_with_provider(crypto.clone())
        .with_protocol_versions(&[&TLS13])?
        .with_client_cert_verifier(pinned)
        .with_single_cert(vec![certificate], key)?;
    // No resumption and no early data: every connection proves its key anew, and nothing can be replayed.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config.max_early_data_size = 0;
    Ok(config)
}

fn client_config(
    crypto: &Arc<CryptoProvider>,
    pinned: Arc<Pinned>,
    certificate: CertificateDer<'static>,
    key: PrivateKeyDer<'static>,
) -> Result<ClientConfig, rustls::Error> {
    let mut config = ClientConfig::builder_with_provider(crypto.clone())
        .with_protocol_versions(&[&TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(pinned)
        .with_client_auth_cert(vec![certificate], key)?;
    config.resumption = Resumption::disabled();
    config.enable_early_data = false;
    config.enable_sni = false;
    Ok(config)
}

/// Accepts the pinned public keys and nothing else, whatever the certificate around them says.
struct Pinned {
    keys: BTreeMap<NodeName, Spki>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl fmt::Debug for Pinned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.keys.keys()).finish()
    }
}

impl Pinned {
    fn node_of(&self, certificate: &CertificateDer<'_>) -> Result<NodeName, rustls::Error> {
        let parsed = ParsedCertificate::try_from(certificate)?;
        let spki = parsed.subject_public_key_info();
        let known = self.keys.iter().find(|(_, key)| key.as_slice() == spki.as_ref());
        known.map(|(node, _)| node.clone()).ok_or(CertificateError::ApplicationVerificationFailure.into())
    }

    /// That the other side holds the private key of the certificate's (so of the pinned) public key.
    fn verify(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signature, &self.algorithms)
    }
}

fn never_tls12() -> Result<HandshakeSignatureValid, rustls::Error> {
    Err(rustls::Error::General("only TLS 1.3 is spoken here".to_owned()))
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.node_of(end_entity).map(|_| ServerCertVerified::assertion())
    }
    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        never_tls12()
    }
    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.verify(message, cert, dss)
    }
    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }
}

impl ClientCertVerifier for Pinned {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }
    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.node_of(end_entity).map(|_| ClientCertVerified::assertion())
    }
    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        never_tls12()
    }
    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.verify(message, cert, dss)
    }
    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> NodeName {
        text.parse().expect("name")
    }

    #[test]
    fn the_derivation_stays_what_it_is() {
        // Changing it would part nodes of different versions: raise the label's version then, and say so.
        let secret = Secret::new((0..32).collect());
        // These two were computed with Python's hmac and openssl.
        for (node, key) in [
            ("alp", "018fca3828c4230a58d9a3b92354954806e7b4d2ff75abf95abc516af9f11465"),
            ("midna", "6b6e9dfa36bbf2796c17c32783094dda5d702a055fb67de905be8aa31cafc29d"),
        ] {
            let spki = public_spki(&derive_seed(&secret, &name(node)).expect("seed")).expect("key");
            assert_eq!(data_encoding::HEXLOWER.encode(&spki[12..]), key, "{node}");
        }
    }

    #[test]
    fn a_secret_is_32_octets_and_a_name_stands_once() {
        let others = [name("midna")];
        for length in [0, 31, 33] {
            assert!(PeerIdentity::new(&Secret::new(vec![7; length]), &name("alp"), &others).is_err(), "{length}");
        }
        let secret = Secret::new(vec![7; 32]);
        assert!(PeerIdentity::new(&secret, &name("alp"), &[name("alp")]).is_err());
        assert!(PeerIdentity::new(&secret, &name("alp"), &[name("midna"), name("midna")]).is_err());
    }

    #[test]
    fn debug_shows_names_and_nothing_else() {
        let identity = PeerIdentity::new(&Secret::new(vec![0x5a; 32]), &name("alp"), &[name("midna")]).expect("good");
        assert_eq!(format!("{identity:?}"), r#"PeerIdentity { me: "alp", others: ["midna"] }"#);
        assert_eq!(format!("{:?}", identity.accepted), r#"["midna"]"#);
    }
}
