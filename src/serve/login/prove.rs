//! The server side of a password exchange: SCRAM or md5, against what PostgreSQL stores.
//!
//! What it is NOT: no password is seen or stored, and none is hashed: both exchanges are proven against stored hashes,
//! with a few more hashes and no PBKDF2.
//!
//! **Invariant:** until its last message an exchange does not depend on whether the role exists, has a password, may
//! log in, or had one until yesterday: the catalogue is asked first, always with one question, and a stand-in takes the
//! place of what is missing. (With `auth.cache`, a role that logged in just now is answered sooner.)

use super::rules::no_login;
use super::{Stop, nonce, random, say};
use crate::serve::backend::Proof;
use crate::serve::listener::Proxy;
use crate::serve::roles::Secret;
use crate::serve::tls::ClientStream;
use crate::wire::hba::Method;
use crate::wire::md5;
use crate::wire::pg::{self, HEADER, Refusal, Startup};
use crate::wire::scram::{self, Channel, ScramError, Verifier};
use pgwire::messages::startup::Authentication;
use std::net::SocketAddr;
use tokio::io::AsyncReadExt;

/// Longest message a client may send while it logs in, in bytes; a longer one ends the connection.
const MAX_LOGIN_MESSAGE: usize = scram::MAX_MESSAGE + 64;

/// The client proves that it knows the role's password: up to and with AuthenticationSASLFinal.
pub(super) async fn password(
    client: &mut ClientStream,
    peer: SocketAddr,
    startup: &Startup,
    method: Method,
    proxy: &Proxy,
) -> Result<Proof, Stop> {
    let user = startup.user.as_str();
    let remembered = proxy.roles.remembered(user);
    let was_remembered = remembered.is_some();
    let mut role = match remembered {
        Some(role) => role,
        None => proxy.roles.role(user).await.map_err(no_login)?,
    };
    let refuse = |why: &str| {
        proxy.roles.forget(user);
        wrong(proxy, user, peer, why)
    };
    // As PostgreSQL: the kind of secret decides, and a role without one looks like most others.
    let is_md5 = match role.secret {
        Some(Secret::Md5(_)) => true,
        Some(Secret::Scram(_)) => false,
        None => role.md5_is_usual,
    };
    let why = match (role.may_log_in, &role.secret) {
        (None, _) => "there is no such role",
        (_, None) => "the role has no password, or none that is valid now",
        (_, Some(Secret::Md5(_))) if method != Method::Md5 => "the role's password is stored as md5",
        _ if was_remembered => "the password is wrong, or was changed a moment ago (auth.cache)",
        _ => "the password is wrong",
    };
    // Made for every role, so that it takes no longer for one that does not exist.
    let mock = Verifier::mock(user, &proxy.options.mock_secret, role.iterations);
    let mock_hash = md5::Hash::mock(user, &proxy.options.mock_secret);
    let proof = if method == Method::Md5 && is_md5 {
        let salt: [u8; md5::SALT_LEN] = random();
        let answer = md5(client, salt).await?;
        let proven = |secret: &Option<Secret>| {
            let (hash, is_real) = match secret {
                Some(Secret::Md5(hash)) => (hash, true),
                _ => (&mock_hash, false),
            };
            (hash.is_proven_by(&answer, salt) && is_real).then(|| hash.clone())
        };
        let mut hash = proven(&role.secret);
        if hash.is_none() && was_remembered {
            // The salt is not the secret's own: the new password is taken at once.
            role = proxy.roles.role(user).await.map_err(no_login)?;
            hash = proven(&role.secret);
        }
        Proof::Md5(hash.ok_or_else(|| refuse(why))?)
    } else {
        let verifier = if let Some(Secret::Scram(verifier)) = &role.secret { verifier.clone() } else { mock };
        match scram(client, verifier).await? {
            Some(keys) => Proof::Scram(keys),
            None => return Err(refuse(why)),
        }
    };
    if role.may_log_in == Some(false) {
        return Err(not_permitted(proxy, user, peer));
    }
    // Only now: what strangers ask for is remembered of no role, and so tells nothing by its speed.
    proxy.roles.remember(user, &role);
    Ok(proof)
}

/// What who may not log in hears after the right password or certificate, in PostgreSQL's words.
pub(super) fn not_permitted(proxy: &Proxy, user: &str, peer: SocketAddr) -> Stop {
    proxy.gate.count_auth_failure();
    tracing::info!(user, %peer, "the role may not log in");
    Refusal::new("28000", format!("role \"{user}\" is not permitted to log in")).into()
}

/// What a client hears that failed, whatever the reason; that is for the log.
pub(super) fn wrong(proxy: &Proxy, user: &str, peer: SocketAddr, why: &str) -> Stop {
    proxy.gate.count_auth_failure();
    tracing::info!(user, %peer, why, "password authentication failed");
    Refusal::new("28P01", format!("password authentication failed for user \"{user}\"")).into()
}

/// AuthenticationMD5Password, and the answer.
async fn md5(client: &mut ClientStream, salt: [u8; md5::SALT_LEN]) -> Result<Vec<u8>, Stop> {
    say(client, &Authentication::MD5Password(salt.to_vec())).await?;
    let answer = read_response(client, "password response").await?;
    match answer.split_last() {
        Some((0, [])) => Err(Refusal::new("28P01", "empty password returned by client").into()),
        Some((0, answer)) if !answer.contains(&0) => Ok(answer.to_vec()),
        _ => Err(pg::Malformed("invalid password packet size").into()),
    }
}

/// The server side of SCRAM; `None`: the proof does not fit.
async fn scram(client: &mut ClientStream, verifier: Verifier) -> Result<Option<scram::Keys>, Stop> {
    let end_point = client.end_point();
    let offer = Channel { end_point: end_point.as_deref(), plus: false };
    say(client, &Authentication::SASL(offer.mechanisms())).await?;
    let initial = read_response(client, "SASL response").await?;
    let (plus, first) = initial_response(&initial, offer)?;
    let channel = Channel { plus, ..offer };
    let (server, answer) = scram::Server::start(verifier, channel, first, &nonce()).map_err(refusal)?;
    say(client, &Authentication::SASLContinue(answer.into_bytes().into())).await?;
    let last = read_response(client, "SASL response").await?;
    match server.finish(&last) {
        Ok((keys, signature)) => {
            say(client, &Authentication::SASLFinal(signature.into_bytes().into())).await?;
            Ok(Some(keys))
        }
        Err(ScramError::WrongProof) => Ok(None),
        Err(error) => Err(refusal(error).into()),
    }
}

fn refusal(error: ScramError) -> Refusal {
    let code = match error {
        ScramError::Malformed(_) | ScramError::UnknownBinding => "08P01",
        ScramError::AuthorizationIdentity => "0A000",
        ScramError::Downgraded | ScramError::WrongChannel | ScramError::WrongProof => "28000",
    };
    Refusal::new(code, error.to_string())
}

/// The body of a message of the password family.
async fn read_response(client: &mut ClientStream, what: &'static str) -> Result<Vec<u8>, Stop> {
    let mut head = [0; HEADER];
    client.read_exact(&mut head).await?;
    let header = pg::header(&head)?.ok_or(Stop::Silent)?;
    if header.kind != b'p' {
        return Err(Refusal::new("08P01", format!("expected {what}, got message type {}", header.kind)).into());
    }
    if header.body > MAX_LOGIN_MESSAGE {
        return Err(Refusal::new("08P01", format!("{what} is too long")).into());
    }
    let mut body = vec![0; header.body];
    client.read_exact(&mut body).await?;
    Ok(body)
}

/// Whether a SASLInitialResponse chose PLUS, and the SCRAM message in it.
fn initial_response<'a>(body: &'a [u8], offer: Channel<'_>) -> Result<(bool, &'a [u8]), Stop> {
    const LAYOUT: pg::Malformed = pg::Malformed("malformed SASLInitialResponse");
    let end = body.iter().position(|b| *b == 0).ok_or(LAYOUT)?;
    let (mechanism, rest) = body.split_at(end);
    let plus = mechanism == scram::MECHANISM_PLUS.as_bytes();
    if !(plus && offer.end_point.is_some() || mechanism == scram::MECHANISM.as_bytes()) {
        return Err(pg::Malformed("client selected an invalid SASL authentication mechanism").into());
    }
    let (length, data) = rest[1..].split_first_chunk::<4>().ok_or(LAYOUT)?;
    if usize::try_from(u32::from_be_bytes(*length)) != Ok(data.len()) {
        return Err(LAYOUT.into());
    }
    Ok((plus, data))
}
