//! What a gate reads in a certificate: the subject's name, and the hash that binds SCRAM to the server's own one.
//!
//! What it is NOT: it verifies nothing. A client's certificate comes here after rustls has verified it.

use ring::digest;
use x509_cert::Certificate;
use x509_cert::der::Decode;
use x509_cert::der::asn1::ObjectIdentifier;

/// The subject of a certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Subject {
    /// The first common name.
    pub common_name: Option<String>,
    /// All of it, as RFC 2253 writes it. Not for names beyond ASCII, which OpenSSL would escape.
    pub distinguished_name: String,
}

/// Reads the subject of a certificate (DER).
pub fn subject(certificate: &[u8]) -> Option<Subject> {
    let certificate = Certificate::from_der(certificate).ok()?;
    let name = certificate.tbs_certificate().subject();
    let common_name = name.common_name().ok().flatten().map(|name| name.value().to_string());
    Some(Subject { common_name, distinguished_name: name.to_string() })
}

/// Algorithms of signatures by the hash they use (RFC 8017, RFC 5758). MD5 and SHA-1 count as SHA-256 (RFC 5929).
const SHA256: [&str; 7] = [
    "1.2.840.113549.1.1.4",
    "1.2.840.113549.1.1.5",
    "1.2.840.10045.4.1",
    "1.2.840.10040.4.3",
    "1.2.840.113549.1.1.11",
    "1.2.840.10045.4.3.2",
    "2.16.840.1.101.3.4.3.2",
];
const SHA384: [&str; 2] = ["1.2.840.113549.1.1.12", "1.2.840.10045.4.3.3"];
const SHA512: [&str; 2] = ["1.2.840.113549.1.1.13", "1.2.840.10045.4.3.4"];

/// Channel binding `tls-server-end-point` (RFC 5929, section 4.1) of the server's certificate (DER). `None` where the
/// signature names no one hash (Ed25519, RSASSA-PSS): libpq finds none there either.
pub fn end_point_hash(certificate: &[u8]) -> Option<Vec<u8>> {
    let read = Certificate::from_der(certificate).ok()?;
    let algorithm = read.signature_algorithm().oid;
    let is_one_of = |names: &[&str]| names.iter().any(|name| ObjectIdentifier::new(name) == Ok(algorithm));
    let hash = if is_one_of(&SHA256) {
        &digest::SHA256
    } else if is_one_of(&SHA384) {
        &digest::SHA384
    } else if is_one_of(&SHA512) {
        &digest::SHA512
    } else {
        return None;
    };
    Some(digest::digest(hash, certificate).as_ref().to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn der(base64: &str) -> Vec<u8> {
        let text: String = base64.split_whitespace().collect();
        data_encoding::BASE64.decode(text.as_bytes()).expect("base64")
    }

    // openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 36500 -sha384 \
    //   -subj '/DC=org/O=Example, Inc./OU=a/CN=ann smith/CN=second'
    const P384: &str = "MIICFDCCAbmgAwIBAgIUN4JtabeNM2XSQH+1czvm8fUJBSMwCgYIKoZIzj0EAwMwXjETMBEGCgmSJomT8ixkARkWA2\
        9yZzEWMBQGA1UECgwNRXhhbXBsZSwgSW5jLjEKMAgGA1UECwwBYTESMBAGA1UEAwwJYW5uIHNtaXRoMQ8wDQYDVQQD\
        DAZzZWNvbmQwIBcNMjYxMTIxMTcwMzIzWhgPMjEyNjEwMjgxNzAzMjNaMF4xEzARBgoJkiaJk/IsZAEZFgNvcmcxFj\
        AUBgNVBAoMDUV4YW1wbGUsIEluYy4xCjAIBgNVBAsMAWExEjAQBgNVBAMMCWFubiBzbWl0aDEPMA0GA1UEAwwGc2Vj\
        b25kMFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEffmG5aNXYgCaDoIMm6wUu1UwNe0MYwWew2vS0LCqjwX268FFx4\
        2Y5ivAZ4JemOfrTZNwbWqX9Y+zrKmc17ceuqNTMFEwHQYDVR0OBBYEFNgBLajAlUY0aiP07eWyStkMZTbGMB8GA1Ud\
        IwQYMBaAFNgBLajAlUY0aiP07eWyStkMZTbGMA8GA1UdEwEB/wQFMAMBAf8wCgYIKoZIzj0EAwMDSQAwRgIhAJ5i1u\
        zFwQXGpPPqM8p2+nqGZLzCYSov9xHgkSVO/3cpAiEA9gvTamtX5IWUtkUNPtrNy/K5q47lRb9xt9wElrhPzdk=";
    // The same with ed25519 and -subj /O=nobody
    const ED: &str = "MIIBODCB66ADAgECAhQdTK6A4UPcsbMyVPXAkEP0FChAoTAFBgMrZXAwETEPMA0GA1UECgwGbm9ib2R5MCAXDTI2MT\
        EyMTE3MDE1NVoYDzIxMjYxMDI4MTcwMTU1WjARMQ8wDQYDVQQKDAZub2JvZHkwKjAFBgMrZXADIQAJP72ZSlwqfYJv\
        dBX4NuLxNbBkHAj+Pvjtz/inZ6vAjKNTMFEwHQYDVR0OBBYEFOQyWmVGqhdbxEXgdG3qXiPgiuP8MB8GA1UdIwQYMB\
        aAFOQyWmVGqhdbxEXgdG3qXiPgiuP8MA8GA1UdEwEB/wQFMAMBAf8wBQYDK2VwA0EAcoi19x1oKEBzrLRcacdpX568\
        T15PqD6Eln3dyhddiYz5VR+APjmXJiyLO2H4PA64gayynKWGMrmmcM/YUnbMDg==";

    #[test]
    fn names_and_hash_are_those_of_openssl() {
        let subject = subject(&der(P384)).expect("a certificate");
        assert_eq!(subject.common_name.as_deref(), Some("ann smith"));
        // openssl x509 -noout -subject -nameopt RFC2253
        assert_eq!(subject.distinguished_name, "CN=second,CN=ann smith,OU=a,O=Example\\, Inc.,DC=org");
        // openssl x509 -outform der | openssl dgst -sha384
        let hash = end_point_hash(&der(P384)).expect("a hash");
        assert_eq!(
            data_encoding::HEXLOWER.encode(&hash),
            "a957c1be84775cb5b08b677c98d395fdf0b2ffe48e9980c08bb91b629b4939463b4d411f6ff78e429096384b1102e7e6"
        );
    }

    #[test]
    fn what_has_no_name_or_no_hash_gives_none() {
        assert_eq!(subject(&der(ED)).expect("a certificate").common_name, None);
        assert_eq!(end_point_hash(&der(ED)), None);
        assert!(subject(b"0").is_none() && end_point_hash(b"").is_none());
    }
}
