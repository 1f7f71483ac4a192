//! PostgreSQL's md5 passwords (PostgreSQL 15, chapter 55.2.3), both sides, from the stored hash: no password is needed.
//!
//! What it is NOT: not a good idea. Who has the stored hash can log in with it; it is here for roles that still have
//! one.

use md5::{Digest, Md5};
use std::fmt;
use zeroize::{Zeroize, ZeroizeOnDrop};

/// Bytes of a salt.
pub const SALT_LEN: usize = 4;
const PREFIX: &str = "md5";
const HEX_LEN: usize = 32;

/// What PostgreSQL stores in `pg_authid.rolpassword`, without its prefix: the hash of password and name in hexadecimal
/// digits. Wiped when dropped.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub struct Hash([u8; HEX_LEN]);

impl Hash {
    /// Reads the stored form; `None` for anything else.
    pub fn parse(text: &str) -> Option<Hash> {
        let hex: [u8; HEX_LEN] = text.strip_prefix(PREFIX)?.as_bytes().try_into().ok()?;
        hex.iter().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')).then_some(Hash(hex))
    }

    /// As octets, for [`Hash::from_octets`].
    pub fn octets(&self) -> Vec<u8> {
        self.0.to_vec()
    }

    /// What [`Hash::octets`] gave; `None` for anything else.
    pub fn from_octets(octets: &[u8]) -> Option<Hash> {
        octets.try_into().ok().map(Hash)
    }

    /// What a client that knows the password answers to this salt.
    pub fn response(&self, salt: [u8; SALT_LEN]) -> String {
        let digest = Md5::new().chain_update(self.0).chain_update(salt).finalize();
        format!("{PREFIX}{}", data_encoding::HEXLOWER.encode(&digest))
    }

    /// Whether a client's answer (without its terminator) is that. Compares in constant time.
    pub fn is_proven_by(&self, answer: &[u8], salt: [u8; SALT_LEN]) -> bool {
        super::scram::equal(answer, self.response(salt).as_bytes())
    }

    /// Stands in for a role that does not exist; nobody knows its password. `secret` outlives the process.
    pub fn mock(user: &str, secret: &[u8; 32]) -> Hash {
        let digest = Md5::new().chain_update(secret).chain_update(user).finalize();
        let mut hash = Hash([0; HEX_LEN]);
        data_encoding::HEXLOWER.encode_mut(&digest, &mut hash.0);
        hash
    }
}

impl fmt::Debug for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Hash(...)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_as_libpq_does_and_takes_nothing_else() {
        // select rolpassword of: create role app password 'secret' with password_encryption = md5
        let stored = format!("md5{}", data_encoding::HEXLOWER.encode(&Md5::digest(b"secretapp")));
        let hash = Hash::parse(&stored).expect("a hash");
        let inner = stored.strip_prefix("md5").expect("prefix");
        let outer = Md5::digest([inner.as_bytes(), &[1, 2, 3, 4]].concat());
        assert_eq!(hash.response([1, 2, 3, 4]), format!("md5{}", data_encoding::HEXLOWER.encode(&outer)));
        assert!(hash.is_proven_by(hash.response([1, 2, 3, 4]).as_bytes(), [1, 2, 3, 4]));
        assert!(!hash.is_proven_by(hash.response([1, 2, 3, 4]).as_bytes(), [1, 2, 3, 5]));
        for wrong in [&b""[..], b"md5", b"secret", stored.as_bytes()] {
            assert!(!hash.is_proven_by(wrong, [1, 2, 3, 4]));
        }
        for wrong in ["", "md5", "md5ABCDEF", &stored[..34], &stored.to_uppercase(), "SCRAM-SHA-256$4096:x"] {
            assert!(Hash::parse(wrong).is_none(), "{wrong}");
        }
        assert_eq!(format!("{hash:?}"), "Hash(...)");
        let (mock, again) = (Hash::mock("x", &[7; 32]), Hash::mock("x", &[7; 32]));
        assert_eq!(mock.0, again.0);
        assert!(Hash::parse(&format!("md5{}", String::from_utf8_lossy(&mock.0))).is_some());
    }
}
