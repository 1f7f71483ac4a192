//! SCRAM-SHA-256 (RFC 5802, RFC 7677), both sides, as text to values and back.
//!
//! The server side proves a client against the verifier PostgreSQL stores and *recovers the client key from the
//! proof*; the client side logs in to PostgreSQL with that key instead of a password. So the gate needs no password
//! file and never sees a password.
//!
//! With TLS the server side binds the exchange to its certificate (`SCRAM-SHA-256-PLUS`, `tls-server-end-point`, RFC
//! 5929), and a client that believes we could not is refused: somebody took the offer away.
//!
//! What it is NOT: no SASLprep (only a side that holds a password needs it), no source of randomness (nonces are handed
//! in), no work: neither side computes a PBKDF2, so an exchange costs a few hashes.
//!
//! **Invariant:** what an exchange says until the last message does not depend on whether the role exists.

use data_encoding::BASE64;
use ring::{digest, hmac, pbkdf2};
use std::fmt;
use std::num::NonZeroU32;
use zeroize::{Zeroize, ZeroizeOnDrop};

/// Name of the mechanism without channel binding.
pub const MECHANISM: &str = "SCRAM-SHA-256";
/// Name of the mechanism with it.
pub const MECHANISM_PLUS: &str = "SCRAM-SHA-256-PLUS";
/// The one channel binding type (RFC 5929).
const BINDING_TYPE: &str = "tls-server-end-point";
/// PostgreSQL's own default (`SCRAM_SHA_256_DEFAULT_ITERATIONS`), where `scram_iterations` is no setting (before 16).
pub const DEFAULT_ITERATIONS: u32 = 4096;
/// PostgreSQL's `SCRAM_DEFAULT_SALT_LEN`; used for roles that do not exist.
const MOCK_SALT_LEN: usize = 16;
/// Longest SCRAM message looked at, in bytes; a longer one ends the exchange. Real ones are below 200.
pub const MAX_MESSAGE: usize = 2048;
const KEY_LEN: usize = digest::SHA256_OUTPUT_LEN;
type Key = [u8; KEY_LEN];

/// Why an exchange ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ScramError {
    /// The message does not follow RFC 5802; the text says what.
    #[error("malformed SCRAM message ({0})")]
    Malformed(&'static str),
    /// The proof does not fit the verifier: a wrong password, or a role that may not log in this way.
    #[error("the SCRAM proof does not match")]
    WrongProof,
    /// The client could bind to the channel and thinks that we cannot: somebody between us took the offer away.
    #[error("SCRAM channel binding negotiation error")]
    Downgraded,
    /// The client is bound to another channel than ours.
    #[error("SCRAM channel binding check failed")]
    WrongChannel,
    #[error("unsupported SCRAM channel-binding type")]
    UnknownBinding,
    #[error("client uses authorization identity, but it is not supported")]
    AuthorizationIdentity,
}
use ScramError::Malformed;

/// What PostgreSQL stores in `pg_authid.rolpassword`: `SCRAM-SHA-256$iterations:salt$StoredKey:ServerKey`.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub struct Verifier {
    iterations: u32,
    salt: Vec<u8>,
    stored_key: Key,
    server_key: Key,
    /// Of a role that does not exist: no proof matches.
    mock: bool,
}

impl Verifier {
    /// Reads the stored form; `None` for anything else (an md5 hash, for one).
    pub fn parse(text: &str) -> Option<Verifier> {
        let (iterations, rest) = text.strip_prefix(MECHANISM)?.strip_prefix('$')?.split_once(':')?;
        let (salt, keys) = rest.split_once('$')?;
        let (stored, server) = keys.split_once(':')?;
        let iterations: u32 = iterations.parse().ok().filter(|n| *n > 0)?;
        Some(Verifier {
            iterations,
            salt: BASE64.decode(salt.as_bytes()).ok()?,
            stored_key: decode_key(stored)?,
            server_key: decode_key(server)?,
            mock: false,
        })
    }

    /// Stands in for a role that does not exist or has no such verifier. The salt depends on the name alone, so that
    /// asking twice tells nothing (PostgreSQL's `mock_scram_secret`). `secret` outlives the process; `iterations` is
    /// what other roles have.
    pub fn mock(user: &str, secret: &[u8; 32], iterations: u32) -> Verifier {
        let tag = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, secret), user.as_bytes());
        let salt = tag.as_ref().iter().copied().take(MOCK_SALT_LEN).collect();
        Verifier { iterations, salt, stored_key: [0; KEY_LEN], server_key: [0; KEY_LEN], mock: true }
    }

    /// What PostgreSQL would store for `password` (already through SASLprep).
    pub fn derive(password: &[u8], salt: &[u8], iterations: NonZeroU32) -> Verifier {
        let keys = Keys::derive(password, salt, iterations);
        Verifier {
            iterations: iterations.get(),
            salt: salt.to_vec(),
            stored_key: sha256(&keys.client_key),
            server_key: keys.server_key,
            mock: false,
        }
    }
}

impl fmt::Debug for Verifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Verifier(...)")
    }
}

/// What is learnt from a client's proof, and enough to log in as that role. Wiped when dropped.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub struct Keys {
    client_key: Key,
    server_key: Key,
}

impl Keys {
    /// From a password (RFC 5802 section 3).
    pub fn derive(password: &[u8], salt: &[u8], iterations: NonZeroU32) -> Keys {
        let mut salted: Key = [0; KEY_LEN];
        pbkdf2::derive(pbkdf2::PBKDF2_HMAC_SHA256, iterations, salt, password, &mut salted);
        let keys = Keys { client_key: mac(&salted, b"Client Key"), server_key: mac(&salted, b"Server Key") };
        salted.zeroize();
        keys
    }

    /// As octets, for [`Keys::from_octets`]; the caller wipes them.
    pub fn octets(&self) -> Vec<u8> {
        [self.client_key, self.server_key].concat()
    }

    /// What [`Keys::octets`] gave; `None` for anything else.
    pub fn from_octets(octets: &[u8]) -> Option<Keys> {
        let (client, server) = octets.split_at_checked(KEY_LEN)?;
        Some(Keys { client_key: client.try_into().ok()?, server_key: server.try_into().ok()? })
    }
}

impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Keys(...)")
    }
}

/// What an exchange may be bound to.
#[derive(Debug, Clone, Copy, Default)]
pub struct Channel<'a> {
    /// The hash of our certificate; `None`: PLUS was not offered.
    pub end_point: Option<&'a [u8]>,
    /// The client chose PLUS.
    pub plus: bool,
}

impl Channel<'_> {
    /// What is offered, the best first.
    pub fn mechanisms(&self) -> Vec<String> {
        let plus = self.end_point.map(|_| MECHANISM_PLUS.to_owned());
        plus.into_iter().chain([MECHANISM.to_owned()]).collect()
    }
}

/// Parts the gs2 header (its last comma included) from the rest, as PostgreSQL's `read_client_first_message`.
fn gs2_header<'a>(text: &'a str, channel: Channel<'_>) -> Result<(&'a str, &'a str), ScramError> {
    let (flag, rest) = text.split_once(',').ok_or(Malformed("gs2 header"))?;
    match flag {
        "n" | "y" if channel.plus => return Err(Malformed("PLUS was chosen, but there is no channel binding data")),
        "n" => {}
        // "y": it knows channel binding and thinks that we do not.
        "y" if channel.end_point.is_some() => return Err(ScramError::Downgraded),
        "y" => {}
        _ => match flag.strip_prefix("p=") {
            Some(_) if !channel.plus => {
                return Err(Malformed("PLUS was not chosen, but there is channel binding data"));
            }
            Some(BINDING_TYPE) => {}
            Some(_) => return Err(ScramError::UnknownBinding),
            None => return Err(Malformed("gs2 header")),
        },
    }
    if rest.starts_with('a') {
        return Err(ScramError::AuthorizationIdentity);
    }
    let bare = rest.strip_prefix(',').ok_or(Malformed("gs2 header"))?;
    Ok((&text[..text.len() - bare.len()], bare))
}

/// The side that proves a client.
#[derive(Debug)]
pub struct Server {
    verifier: Verifier,
    /// Base64 of the client's gs2 header and, with PLUS, our end point's hash; its last message must repeat it.
    binding: String,
    plus: bool,
    nonce: String,
    /// `client-first-message-bare "," server-first-message`.
    auth_message: String,
}

impl Server {
    /// Takes the client's first message; `nonce` is ours, printable and without commas. Returns our first message.
    pub fn start(
        verifier: Verifier,
        channel: Channel<'_>,
        client_first: &[u8],
        nonce: &str,
    ) -> Result<(Server, String), ScramError> {
        let text = text(client_first)?;
        let (header, bare) = gs2_header(text, channel)?;
        let mut binding = header.as_bytes().to_vec();
        if channel.plus {
            binding.extend_from_slice(channel.end_point.ok_or(Malformed("PLUS was not offered"))?);
        }
        let binding = BASE64.encode(&binding);
        // PostgreSQL ignores the name in here and uses the one of the startup message, and so do we.
        let rest = bare.strip_prefix("n=").ok_or(Malformed("user name"))?;
        let (_, rest) = rest.split_once(',').ok_or(Malformed("user name"))?;
        let theirs = rest.strip_prefix("r=").ok_or(Malformed("nonce"))?;
        let theirs = theirs.split_once(',').map_or(theirs, |(nonce, _extensions)| nonce);
        if theirs.is_empty() || !theirs.bytes().all(|b| b.is_ascii_graphic()) {
            return Err(Malformed("nonce"));
        }
        let nonce = format!("{theirs}{nonce}");
        let first = format!("r={nonce},s={},i={}", BASE64.encode(&verifier.salt), verifier.iterations);
        let auth_message = format!("{bare},{first}");
        Ok((Server { verifier, binding, plus: channel.plus, nonce, auth_message }, first))
    }

    /// Takes the client's last message. Returns the keys it proved, and our last message.
    pub fn finish(self, client_final: &[u8]) -> Result<(Keys, String), ScramError> {
        let text = text(client_final)?;
        let (without_proof, proof) = text.rsplit_once(",p=").ok_or(Malformed("proof"))?;
        let mut parts = without_proof.split(',');
        let binding = parts.next().and_then(|p| p.strip_prefix("c=")).ok_or(Malformed("channel binding"))?;
        let nonce = parts.next().and_then(|p| p.strip_prefix("r=")).ok_or(Malformed("nonce"))?;
        if binding != self.binding {
            return Err(if self.plus { ScramError::WrongChannel } else { Malformed("channel binding") });
        }
        if nonce != self.nonce {
            return Err(Malformed("nonce"));
        }
        let proof = decode_key(proof).ok_or(Malformed("proof"))?;
        let auth_message = format!("{},{without_proof}", self.auth_message);
        let signature = mac(&self.verifier.stored_key, auth_message.as_bytes());
        let client_key = xor(&proof, &signature);
        let matches = equal(&sha256(&client_key), &self.verifier.stored_key);
        if !matches || self.verifier.mock {
            return Err(ScramError::WrongProof);
        }
        let server_signature = mac(&self.verifier.server_key, auth_message.as_bytes());
        let keys = Keys { client_key, server_key: self.verifier.server_key };
        Ok((keys, format!("v={}", BASE64.encode(&server_signature))))
    }
}

/// The side that logs in, with keys instead of a password.
#[derive(Debug)]
pub struct Client {
    keys: Keys,
    nonce: String,
    /// After the answer: what the server must sign.
    auth_message: String,
}

impl Client {
    /// Returns the first message. `nonce` is fresh, printable and without commas.
    pub fn start(keys: Keys, nonce: &str) -> (Client, String) {
        (Client { keys, nonce: nonce.to_owned(), auth_message: String::new() }, format!("n,,n=,r={nonce}"))
    }

    /// Takes the server's first message, returns our last. Salt and iterations are of no interest: the keys are made.
    pub fn answer(&mut self, server_first: &[u8]) -> Result<String, ScramError> {
        let first = text(server_first)?;
        let nonce = first.strip_prefix("r=").and_then(|r| r.split_once(',')).ok_or(Malformed("nonce"))?.0;
        if !nonce.starts_with(&self.nonce) || nonce.len() == self.nonce.len() {
            return Err(Malformed("nonce"));
        }
        let without_proof = format!("c=biws,r={nonce}");
        self.auth_message = format!("n=,r={},{first},{without_proof}", self.nonce);
        let signature = mac(&sha256(&self.keys.client_key), self.auth_message.as_bytes());
        let proof = xor(&self.keys.client_key, &signature);
        Ok(format!("{without_proof},p={}", BASE64.encode(&proof)))
    }

    /// Takes the server's last message: whoever sent it knows the role's server key.
    pub fn verify(self, server_final: &[u8]) -> Result<(), ScramError> {
        let signature = text(server_final)?.strip_prefix("v=").and_then(decode_key).ok_or(Malformed("signature"))?;
        let expected = mac(&self.keys.server_key, self.auth_message.as_bytes());
        if equal(&signature, &expected) { Ok(()) } else { Err(ScramError::WrongProof) }
    }
}

fn text(message: &[u8]) -> Result<&str, ScramError> {
    if message.len() > MAX_MESSAGE {
        return Err(Malformed("too long"));
    }
    std::str::from_utf8(message).map_err(|_| Malformed("not UTF-8"))
}

fn decode_key(text: &str) -> Option<Key> {
    BASE64.decode(text.as_bytes()).ok()?.try_into().ok()
}

fn sha256(data: &[u8]) -> Key {
    let mut out = [0; KEY_LEN];
    out.copy_from_slice(digest::digest(&digest::SHA256, data).as_ref());
    out
}

fn mac(key: &[u8], data: &[u8]) -> Key {
    let mut out = [0; KEY_LEN];
    out.copy_from_slice(hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, key), data).as_ref());
    out
}

fn xor(a: &Key, b: &Key) -> Key {
    std::array::from_fn(|i| a[i] ^ b[i])
}

/// Compares in constant time: both sides go through an HMAC, and ring compares the tags.
pub(super) fn equal(a: &[u8], b: &[u8]) -> bool {
    let key = hmac::Key::new(hmac::HMAC_SHA256, b"compare");
    hmac::verify(&key, a, hmac::sign(&key, b).as_ref()).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const NO_CHANNEL: Channel<'_> = Channel { end_point: None, plus: false };
    const ITERATIONS: NonZeroU32 = NonZeroU32::new(4096).expect("not zero");
    const SALT: &str = "W22ZaJ0SNY7soEsUEjb6gQ==";
    const THEIRS: &str = "rOprNGfwEbeRWgbNEkqO";
    const OURS: &str = "%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0";
    // RFC 7677 section 3, with the user name and password of the example.
    const CLIENT_FIRST: &str = "n,,n=user,r=rOprNGfwEbeRWgbNEkqO";
    const SERVER_FIRST: &str = "r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096";
    const CLIENT_FINAL: &str =
        "c=biws,r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,p=dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ=";
    const SERVER_FINAL: &str = "v=6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4=";

    fn salt() -> Vec<u8> {
        BASE64.decode(SALT.as_bytes()).expect("base64")
    }
    fn verifier() -> Verifier {
        Verifier::derive(b"pencil", &salt(), ITERATIONS)
    }

    #[test]
    fn the_server_side_follows_the_example_of_rfc_7677() {
        let (server, first) = Server::start(verifier(), NO_CHANNEL, CLIENT_FIRST.as_bytes(), OURS).expect("first");
        assert_eq!(first, SERVER_FIRST);
        let (keys, last) = server.finish(CLIENT_FINAL.as_bytes()).expect("final");
        assert_eq!(last, SERVER_FINAL);
        let derived = Keys::derive(b"pencil", &salt(), ITERATIONS);
        assert_eq!(keys.client_key, derived.client_key, "the proof gives the client key away to us");
        assert_eq!(keys.server_key, derived.server_key);
    }

    #[test]
    fn keys_of_a_proof_log_in_without_the_password() {
        let (server, _) = Server::start(verifier(), NO_CHANNEL, CLIENT_FIRST.as_bytes(), OURS).expect("first");
        let (keys, _) = server.finish(CLIENT_FINAL.as_bytes()).expect("final");
        let (mut client, first) = Client::start(keys, THEIRS);
        let (server, answer) = Server::start(verifier(), NO_CHANNEL, first.as_bytes(), "another").expect("first");
        let last = client.answer(answer.as_bytes()).expect("answer");
        let (_, proof) = server.finish(last.as_bytes()).expect("accepted");
        client.verify(proof.as_bytes()).expect("mutual");
    }

    #[test]
    fn a_wrong_password_a_bent_signature_and_a_mock_fail() {
        let wrong = Verifier::derive(b"pencils", &salt(), ITERATIONS);
        let (server, _) = Server::start(wrong, NO_CHANNEL, CLIENT_FIRST.as_bytes(), OURS).expect("first");
        assert_eq!(server.finish(CLIENT_FINAL.as_bytes()).err(), Some(ScramError::WrongProof));

        let keys = Keys::derive(b"pencil", &salt(), ITERATIONS);
        let (mut client, _) = Client::start(keys, THEIRS);
        client.answer(SERVER_FIRST.as_bytes()).expect("answer");
        let bent = client.verify(b"v=7rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4=");
        assert_eq!(bent, Err(ScramError::WrongProof));

        let mock = Verifier::mock("nobody", &[7; 32], 4096);
        let again = Verifier::mock("nobody", &[7; 32], 4096);
        assert_eq!(mock.salt, again.salt, "asking twice tells nothing");
        assert_ne!(mock.salt, Verifier::mock("other", &[7; 32], 4096).salt);
        let (server, first) = Server::start(mock, NO_CHANNEL, CLIENT_FIRST.as_bytes(), OURS).expect("looks the same");
        assert!(first.ends_with(",i=4096"));
        let last = CLIENT_FINAL.as_bytes();
        assert_eq!(server.finish(last).err(), Some(ScramError::WrongProof));
    }

    /// What a client that is bound to `end_point` says in the end, after this header in the beginning.
    fn bound(header: &str, channel: Channel<'_>, end_point: &[u8]) -> Result<(Keys, String), ScramError> {
        let first = CLIENT_FIRST.replacen("n,,", header, 1);
        let (server, answer) = Server::start(verifier(), channel, first.as_bytes(), OURS)?;
        let binding = BASE64.encode(&[header.as_bytes(), end_point].concat());
        let without_proof = format!("c={binding},r={THEIRS}{OURS}");
        let bare = first.strip_prefix(header).expect("our header");
        let keys = Keys::derive(b"pencil", &salt(), ITERATIONS);
        let message = format!("{bare},{answer},{without_proof}");
        let proof = xor(&keys.client_key, &mac(&sha256(&keys.client_key), message.as_bytes()));
        server.finish(format!("{without_proof},p={}", BASE64.encode(&proof)).as_bytes())
    }

    #[test]
    fn the_binding_must_be_what_the_header_said() {
        const PLUS: &str = "p=tls-server-end-point,,";
        let ours = [7; 32];
        let tls = Channel { end_point: Some(&ours), plus: false };
        let plus = Channel { plus: true, ..tls };
        for (header, channel, hash, expected) in [
            ("n,,", NO_CHANNEL, &[][..], None),
            ("y,,", NO_CHANNEL, &[], None),
            ("n,,", tls, &[], None),
            (PLUS, plus, &ours, None),
            ("y,,", tls, &[], Some(ScramError::Downgraded)),
            (PLUS, plus, &[8; 32], Some(ScramError::WrongChannel)),
            (PLUS, plus, &[], Some(ScramError::WrongChannel)),
            ("n,,", plus, &[], Some(Malformed("PLUS was chosen, but there is no channel binding data"))),
            ("y,,", plus, &[], Some(Malformed("PLUS was chosen, but there is no channel binding data"))),
            (PLUS, tls, &ours, Some(Malformed("PLUS was not chosen, but there is channel binding data"))),
            (PLUS, NO_CHANNEL, &ours, Some(Malformed("PLUS was not chosen, but there is channel binding data"))),
            ("p=tls-unique,,", plus, &ours, Some(ScramError::UnknownBinding)),
            ("n,a=root,", NO_CHANNEL, &[], Some(ScramError::AuthorizationIdentity)),
            ("x,,", NO_CHANNEL, &[], Some(Malformed("gs2 header"))),
            ("n,x,", NO_CHANNEL, &[], Some(Malformed("gs2 header"))),
        ] {
            assert_eq!(bound(header, channel, hash).err(), expected, "{header} {channel:?}");
        }
        // The header of the beginning counts, not another that would be allowed.
        let yes = CLIENT_FIRST.replacen("n,,", "y,,", 1);
        let (server, _) = Server::start(verifier(), NO_CHANNEL, yes.as_bytes(), OURS).expect("y without PLUS");
        assert_eq!(server.finish(CLIENT_FINAL.as_bytes()).err(), Some(Malformed("channel binding")));
        assert_eq!(tls.mechanisms(), [MECHANISM_PLUS, MECHANISM]);
        assert_eq!(NO_CHANNEL.mechanisms(), [MECHANISM]);
    }

    #[test]
    fn reads_what_postgresql_stores_and_nothing_else() {
        let stored = format!(
            "SCRAM-SHA-256$4096:{SALT}${}:{}",
            BASE64.encode(&verifier().stored_key),
            BASE64.encode(&verifier().server_key)
        );
        let parsed = Verifier::parse(&stored).expect("parses");
        assert_eq!((parsed.iterations, &parsed.salt), (4096, &salt()));
        assert_eq!(parsed.stored_key, verifier().stored_key);
        for bad in ["", "md5abc", "SCRAM-SHA-256$", "SCRAM-SHA-256$0:AA==$AA==:AA==", "SCRAM-SHA-1$1:AA==$AA==:AA=="] {
            assert!(Verifier::parse(bad).is_none(), "{bad}");
        }
        assert_eq!(format!("{parsed:?}"), "Verifier(...)");
    }

    proptest::proptest! {
        #[test]
        fn arbitrary_messages_never_panic(
            a in proptest::collection::vec(proptest::num::u8::ANY, 0..200),
            b in "[cnrpv=,a-zA-Z0-9+/]{0,80}",
        ) {
            let _ = Server::start(verifier_cheap(), NO_CHANNEL, &a, OURS);
            let _ = Server::start(verifier_cheap(), NO_CHANNEL, b.as_bytes(), OURS);
            if let Ok((server, _)) = Server::start(verifier_cheap(), NO_CHANNEL, CLIENT_FIRST.as_bytes(), OURS) {
                let _ = server.finish(b.as_bytes());
            }
            let (mut client, _) = Client::start(Keys { client_key: [0; 32], server_key: [0; 32] }, THEIRS);
            let _ = client.answer(b.as_bytes());
            let _ = client.verify(&a);
            let _ = Verifier::parse(&b);
        }
    }
    fn verifier_cheap() -> Verifier {
        Verifier::mock("x", &[0; 32], 4096)
    }
}
