//! TLS with real clients: libpq 15 (psql), libpq 18 (psycopg), and rustls by hand for what no client would do.

use crate::front::{Front, Setup, open_with, output};
use crate::pg::PASSWORD;
use crate::raw::{Raw, SSL_REQUEST, message, query, startup};
use portcullis::serve::tls::{self, TlsAcceptor};
use portcullis::wire::hba::HbaFile;
use portcullis::wire::pg::field;
use rcgen::*;
use rustls::pki_types::ServerName;
use rustls::pki_types::pem::PemObject;
use rustls::{ClientConfig, RootCertStore};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

/// A CA with what it signed, in files.
pub struct Pki {
    pub dir: tempfile::TempDir,
    pub issuer: Issuer<'static, KeyPair>,
}

impl Pki {
    pub fn new(name: &str) -> Pki {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, name);
        let key = KeyPair::generate().unwrap();
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("ca.pem"), params.self_signed(&key).unwrap().pem()).unwrap();
        Pki { dir, issuer: Issuer::new(params, key) }
    }

    pub fn ca(&self) -> PathBuf {
        self.dir.path().join("ca.pem")
    }

    /// Certificate and key in the name of a host or a role.
    fn sign(&self, name: &str, key: &KeyPair) -> (PathBuf, PathBuf) {
        let mut params = CertificateParams::new(vec![name.to_owned(), "127.0.0.1".to_owned()]).unwrap();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::OrganizationName, "test");
        params.distinguished_name.push(DnType::CommonName, name);
        self.sign_as(params, name, key)
    }

    /// As these parameters say, in files of that name.
    pub fn sign_as(&self, params: CertificateParams, name: &str, key: &KeyPair) -> (PathBuf, PathBuf) {
        let (cert, key_file) =
            (self.dir.path().join(format!("{name}.pem")), self.dir.path().join(format!("{name}.key")));
        std::fs::write(&cert, params.signed_by(key, &self.issuer).unwrap().pem()).unwrap();
        std::fs::write(&key_file, key.serialize_pem()).unwrap();
        std::fs::set_permissions(&key_file, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
        (cert, key_file)
    }

    pub fn issue(&self, name: &str) -> (PathBuf, PathBuf) {
        self.sign(name, &KeyPair::generate().unwrap())
    }

    pub fn acceptor(&self, ca: Option<&Path>) -> TlsAcceptor {
        let (cert, key) = self.issue("localhost");
        tls::load(&cert, &key, ca.map(|ca| (ca, None))).unwrap()
    }
}

async fn front(hba: &'static str, acceptor: TlsAcceptor) -> Front {
    open_with(Setup { hba, tls: Some(acceptor), ..Setup::default() }).await
}

pub fn psql(front: &Front, pki: &Pki, user: &str, more: &str) -> tokio::process::Command {
    let mut psql = front.psql(user, PASSWORD, "select current_user");
    psql.args(["-d", &format!("dbname=app sslmode=verify-full sslrootcert={} {more}", pki.ca().display())]);
    psql.env_remove("PGSSLMODE");
    psql
}

const SCRAM: &str = "hostssl all all all scram-sha-256";

#[tokio::test(flavor = "multi_thread")]
async fn scram_is_bound_to_the_certificate_where_it_has_a_hash() {
    let pki = Pki::new("server");
    for (algorithm, binds) in [(&PKCS_ECDSA_P256_SHA256, true), (&PKCS_ECDSA_P384_SHA384, true), (&PKCS_ED25519, false)]
    {
        // The hash is that of the signature: the CA's key decides.
        let mut params = CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
        params.distinguished_name.push(DnType::CommonName, "own");
        let key = KeyPair::generate_for(algorithm).unwrap();
        let (cert, key_file) = (pki.dir.path().join("own.pem"), pki.dir.path().join("own.key"));
        std::fs::write(&cert, params.self_signed(&key).unwrap().pem()).unwrap();
        std::fs::write(&key_file, key.serialize_pem()).unwrap();
        std::fs::set_permissions(&key_file, std::os::unix::fs::PermissionsExt::from_mode(0o640)).unwrap();
        let front = front(SCRAM, tls::load(&cert, &key_file, None).unwrap()).await;
        for version in ["TLSv1.2", "TLSv1.3"] {
            for binding in ["require", "prefer", "disable"] {
                let mut psql = front.psql("app", PASSWORD, "select current_user");
                psql.env("PGSSLMODE", "require").env("PGCHANNELBINDING", binding);
                psql.env("PGSSLMINPROTOCOLVERSION", version).env("PGSSLMAXPROTOCOLVERSION", version);
                let answer = output(&mut psql).await;
                if binding == "require" && !binds {
                    let why = answer.unwrap_err();
                    assert!(
                        why.contains("did not offer an authentication method that supports channel binding"),
                        "{why}"
                    );
                } else {
                    assert_eq!(answer.unwrap(), "app", "{version} {binding} {binds}");
                }
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_let_in_whose_name_they_have() {
    let (pki, other) = (Pki::new("ours"), Pki::new("another"));
    let hba = "hostssl all bare,ann,retired,ghost all cert\n\
               hostssl app app all scram-sha-256 clientcert=verify-ca\n\
               hostssl postgres app all scram-sha-256 clientcert=verify-full\n\
               hostssl all trusty all trust clientcert=verify-full\n\
               hostssl all \"CN=dn,O=test\" all cert clientname=DN\n\
               hostssl all all all scram-sha-256";
    let front = front(hba, pki.acceptor(Some(&pki.ca()))).await;
    let with = |name: &str, pki: &Pki| {
        let (cert, key) = pki.issue(name);
        format!("sslcert={} sslkey={}", cert.display(), key.display())
    };
    let ask = async |user: &str, more: &str| output(&mut psql(&front, &pki, user, more)).await;
    let none = "sslcert=/nowhere/c sslkey=/nowhere/k";
    assert_eq!(ask("ann", &with("ann", &pki)).await.unwrap(), "ann");
    for (user, more, expected) in [
        ("ann", none, "FATAL:  connection requires a valid client certificate"),
        ("ann", &*with("app", &pki), "FATAL:  certificate authentication failed for user \"ann\""),
        ("ann", &with("ann", &other), "alert unknown ca"),
        ("retired", &with("retired", &pki), "FATAL:  role \"retired\" is not permitted to log in"),
        ("ghost", &with("ghost", &pki), "FATAL:  role \"ghost\" does not exist"),
        ("bare", &with("bare", &pki), "local all bare peer map=portcullis"),
        ("app", none, "FATAL:  connection requires a valid client certificate"),
        ("trusty", none, "FATAL:  connection requires a valid client certificate"),
        ("trusty", &with("ann", &pki), "FATAL:  \"trust\" authentication failed for user \"trusty\""),
    ] {
        let said = ask(user, more).await.unwrap_err();
        assert!(said.contains(expected), "{user} {more}: {said}");
    }
    // Any name will do for verify-ca; a password is asked for beside it.
    let ann = with("ann", &pki);
    assert_eq!(ask("app", &ann).await.unwrap(), "app");
    let wrong = output(psql(&front, &pki, "app", &ann).env("PGPASSWORD", "wrong")).await.unwrap_err();
    assert!(wrong.contains("password authentication failed"), "{wrong}");
    let full = |more: &str| format!("{more} dbname=postgres");
    let said = ask("app", &full(&ann)).await.unwrap_err();
    assert!(said.contains("FATAL:  password authentication failed for user \"app\""), "{said}");
    let own = with("app", &pki);
    assert_eq!(ask("app", &full(&own)).await.unwrap(), "app");
    assert_eq!(ask("trusty", &with("trusty", &pki)).await.unwrap(), "trusty");
    // Whose rule asks for none, needs none.
    assert_eq!(ask("streamer", none).await.unwrap(), "streamer");
    // The whole name: PostgreSQL's own rules come after ours.
    let said = ask("CN=dn,O=test", &with("dn", &pki)).await.unwrap_err();
    assert!(!said.contains("certificate authentication failed"), "{said}");
    let said = ask("CN=dn,O=test", &with("dnx", &pki)).await.unwrap_err();
    assert!(said.contains("certificate authentication failed"), "{said}");

    // A reload replaces the CA for whoever comes then.
    front.rules.replace(
        HbaFile::parse("hba.conf", hba).unwrap(),
        Some(pki.acceptor(Some(&other.ca()))),
        Duration::ZERO,
    );
    assert!(ask("ann", &with("ann", &pki)).await.unwrap_err().contains("alert unknown ca"));
    assert_eq!(ask("ann", &with("ann", &other)).await.unwrap(), "ann");
    front.rules.replace(HbaFile::parse("hba.conf", hba).unwrap(), Some(pki.acceptor(None)), Duration::ZERO);
    let said = ask("ann", &with("ann", &pki)).await.unwrap_err();
    assert!(
        said.contains("FATAL:  client certificates can only be checked if a root certificate store is available"),
        "{said}"
    );
}

#[test]
fn files_that_do_not_serve_say_why() {
    let pki = Pki::new("ours");
    let (cert, key) = pki.issue("localhost");
    let fault = |cert: &Path, key: &Path, ca: &Path| tls::load(cert, key, Some((ca, None))).err().unwrap().text;
    assert!(fault(&cert, &key, &key).contains("no CA in it"), "{}", fault(&cert, &key, &key));
    assert!(fault(&cert, &key, Path::new("/nowhere")).contains("give a PEM file"));
    let other = Pki::new("x");
    let (_, strange) = other.issue("localhost");
    assert!(fault(&cert, &strange, &pki.ca()).contains("belong together"));
    std::fs::set_permissions(&key, std::os::unix::fs::PermissionsExt::from_mode(0o644)).unwrap();
    assert!(fault(&cert, &key, &pki.ca()).contains("chmod o-rwx"));
}

/// TLS by hand, at once or after an SSLRequest.
pub async fn by_hand(front: &Front, pki: &Pki, direct: bool, alpn: &[&[u8]]) -> std::io::Result<TlsStream<TcpStream>> {
    by_hand_at(front.address, pki, direct, alpn).await
}

async fn by_hand_at(
    address: SocketAddr,
    pki: &Pki,
    direct: bool,
    alpn: &[&[u8]],
) -> std::io::Result<TlsStream<TcpStream>> {
    let mut roots = RootCertStore::empty();
    roots.add(rustls::pki_types::CertificateDer::from_pem_file(pki.ca()).unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    let mut stream = TcpStream::connect(address).await?;
    if !direct {
        stream.write_all(&SSL_REQUEST).await?;
        assert_eq!(stream.read_u8().await?, b'S');
    }
    TlsConnector::from(Arc::new(config)).connect(ServerName::try_from("localhost").unwrap(), stream).await
}

pub async fn receive(stream: &mut TlsStream<TcpStream>) -> Option<(u8, Vec<u8>)> {
    let kind = stream.read_u8().await.ok()?;
    let length = stream.read_u32().await.ok()?;
    let mut body = vec![0; usize::try_from(length).unwrap() - 4];
    stream.read_exact(&mut body).await.ok()?;
    Some((kind, body))
}

/// libpq takes at most 8 KiB from OpenSSL at once where it has no more room, and a client that waits with select() then
/// does not hear of the rest: PostgreSQL's records are no larger either.
#[tokio::test(flavor = "multi_thread")]
async fn no_tls_record_is_larger_than_postgresqls() {
    let pki = Pki::new("ours");
    let front = front("hostssl all trusty all trust", pki.acceptor(None)).await;
    // Between the client and the gate, to read the heads of the records.
    let listener = tokio::net::TcpListener::bind(("127.0.0.1", crate::front::free_port())).await.unwrap();
    let between = listener.local_addr().unwrap();
    let gate = front.address;
    let largest = tokio::spawn(async move {
        let (mut client, _) = listener.accept().await.unwrap();
        let mut server = TcpStream::connect(gate).await.unwrap();
        let (mut from_client, mut to_client) = client.split();
        let (mut from_server, mut to_server) = server.split();
        let down = async {
            let mut largest = 0;
            to_client.write_u8(from_server.read_u8().await.unwrap()).await.unwrap();
            loop {
                let mut head = [0; 5];
                if from_server.read_exact(&mut head).await.is_err() {
                    return largest;
                }
                let length = usize::from(u16::from_be_bytes([head[3], head[4]]));
                let mut record = vec![0; length];
                from_server.read_exact(&mut record).await.unwrap();
                largest = largest.max(length);
                let _ = to_client.write_all(&[&head[..], &record].concat()).await;
            }
        };
        let up = async {
            let _ = tokio::io::copy(&mut from_client, &mut to_server).await;
            let _ = to_server.shutdown().await;
        };
        tokio::join!(down, up).0
    });
    let mut stream = by_hand_at(between, &pki, false, &[]).await.unwrap();
    stream.write_all(&startup(0, &[("user", "trusty"), ("database", "app")])).await.unwrap();
    stream.write_all(&query("select repeat('x', 200000)")).await.unwrap();
    let mut received = 0;
    while let Some((kind, body)) = receive(&mut stream).await {
        received += body.len();
        if kind == b'C' {
            break;
        }
    }
    assert!(received > 200_000);
    drop(stream);
    let largest = largest.await.unwrap();
    assert!((4096..=8192 + 64).contains(&largest), "a record of {largest} bytes");
}

#[tokio::test(flavor = "multi_thread")]
async fn direct_tls_must_say_by_alpn_what_it_is() {
    let pki = Pki::new("ours");
    let hba = "hostssl all trusty all trust";
    let front = front(hba, pki.acceptor(None)).await;
    let hello = startup(0, &[("user", "trusty"), ("database", "app")]);
    for (direct, alpn, serves) in [
        (true, &[&b"postgresql"[..]][..], true),
        (true, &[b"h2", b"postgresql"], true),
        (true, &[], false),
        (true, &[b"http/1.1"], false),
        (false, &[], true),
        (false, &[b"postgresql"], true),
        (false, &[b"http/1.1"], false),
    ] {
        let answer = match by_hand(&front, &pki, direct, alpn).await {
            Ok(mut stream) => {
                // Whoever is closed on may not get that far.
                let _ = stream.write_all(&hello).await;
                receive(&mut stream).await.map(|(kind, _)| kind)
            }
            Err(_) => None,
        };
        assert_eq!(answer, serves.then_some(b'R'), "direct {direct}, ALPN {alpn:?}");
    }
    // Inside of TLS there is no second one, and no way back.
    let mut stream = by_hand(&front, &pki, true, &[b"postgresql"]).await.unwrap();
    stream.write_all(&SSL_REQUEST).await.unwrap();
    let (kind, body) = receive(&mut stream).await.unwrap();
    assert_eq!((kind, field(&body, b'C').as_deref()), (b'E', Some("08P01")));
    // Without a certificate there is nobody to shake hands with.
    let plain = open_with(Setup::default()).await;
    assert!(by_hand(&plain, &pki, true, &[b"postgresql"]).await.is_err());
    let mut raw = Raw::connect(&plain).await;
    raw.send(&[0x16, 3, 1, 0, 5]).await;
    assert!(raw.is_closed().await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_whose_offer_was_taken_away_is_refused() {
    let pki = Pki::new("ours");
    let front = front(SCRAM, pki.acceptor(None)).await;
    for (mechanism, first, code) in [
        ("SCRAM-SHA-256", "y,,n=,r=abcdefghijklmnop", "28000"),
        ("SCRAM-SHA-256", "p=tls-server-end-point,,n=,r=abcdefghijklmnop", "08P01"),
        ("SCRAM-SHA-256-PLUS", "n,,n=,r=abcdefghijklmnop", "08P01"),
        ("SCRAM-SHA-256-PLUS", "p=tls-unique,,n=,r=abcdefghijklmnop", "08P01"),
        ("SCRAM-SHA-1", "n,,n=,r=abcdefghijklmnop", "08P01"),
        ("SCRAM-SHA-256-PLUS", "p=tls-server-end-point,,n=,r=abcdefghijklmnop", ""),
        ("SCRAM-SHA-256", "n,,n=,r=abcdefghijklmnop", ""),
    ] {
        let mut stream = by_hand(&front, &pki, false, &[]).await.unwrap();
        stream.write_all(&startup(0, &[("user", "app"), ("database", "app")])).await.unwrap();
        let (_, offered) = receive(&mut stream).await.unwrap();
        assert_eq!(&offered[4..], b"SCRAM-SHA-256-PLUS\0SCRAM-SHA-256\0\0");
        let length = u32::try_from(first.len()).unwrap().to_be_bytes();
        let body = [mechanism.as_bytes(), b"\0", &length[..], first.as_bytes()].concat();
        stream.write_all(&message(b'p', &body)).await.unwrap();
        let (kind, body) = receive(&mut stream).await.unwrap();
        if code.is_empty() {
            assert_eq!((kind, body[3]), (b'R', 11), "{mechanism} {first}");
        } else {
            assert_eq!((kind, field(&body, b'C').as_deref()), (b'E', Some(code)), "{mechanism} {first}");
        }
    }
}

/// psycopg brings a libpq that is newer than Debian's; installed once below target/.
fn python() -> PathBuf {
    const WANTED: &str = "3.3.9";
    let venv = Path::new(env!("CARGO_TARGET_TMPDIR")).join("login-venv");
    let python = venv.join("bin/python");
    let imports = |python: &Path| {
        let check = format!("import psycopg; assert psycopg.__version__ == '{WANTED}'");
        Command::new(python).args(["-c", &check]).output().is_ok_and(|out| out.status.success())
    };
    if !imports(&python) {
        let run = |command: &mut Command| {
            let out = command.output().unwrap();
            assert!(out.status.success(), "{command:?}: {}", String::from_utf8_lossy(&out.stderr));
        };
        run(Command::new("/usr/bin/python3").args(["-m", "venv", "--clear"]).arg(&venv));
        let package = format!("psycopg[binary]=={WANTED}");
        let pip = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--only-binary", ":all:"];
        run(Command::new(&python).args(pip).arg(package));
    }
    python
}

#[tokio::test(flavor = "multi_thread")]
async fn libpq_18_connects_directly_bound_and_verified() {
    const SCRIPT: &str = "
import psycopg, sys
assert psycopg.pq.version() >= 170000, psycopg.pq.version()
with psycopg.connect(sys.argv[1]) as c:
    print(*c.execute('select current_user').fetchone())
";
    let python = tokio::task::spawn_blocking(python).await.unwrap();
    let pki = Pki::new("ours");
    let hba = "hostssl all ann all cert\nhostssl all all all scram-sha-256";
    let front = front(hba, pki.acceptor(Some(&pki.ca()))).await;
    let (cert, key) = pki.issue("ann");
    let certificate = format!("sslcert={} sslkey={}", cert.display(), key.display());
    for (user, more) in [
        ("app", "sslnegotiation=direct channel_binding=require"),
        ("app", "sslnegotiation=postgres channel_binding=require"),
        ("ann", &*format!("sslnegotiation=direct {certificate}")),
    ] {
        let conninfo = format!(
            "host=localhost hostaddr=127.0.0.1 port={} user={user} password='{PASSWORD}' dbname=app \
             sslmode=verify-full sslrootcert={} connect_timeout=10 {more}",
            front.address.port(),
            pki.ca().display()
        );
        let mut command = tokio::process::Command::new(&python);
        let answer = output(command.args(["-c", SCRIPT]).arg(conninfo).kill_on_drop(true)).await;
        assert_eq!(answer.as_deref(), Ok(user), "{more}");
    }
}
