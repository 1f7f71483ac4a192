//! `auth.tls_crl_file`: whose certificate a CA has revoked is refused, as by PostgreSQL, and the log says who and why.

use crate::front::{Setup, free_port, open_with, output};
use crate::pg::{PASSWORD, Pg};
use crate::rules_maps::own_tls;
use crate::tls::{Pki, psql};
use portcullis::serve::tls::{self, TlsAcceptor};
use portcullis::wire::hba::HbaFile;
use rcgen::*;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

const RULES: &str = "hostssl all all all cert\nhostssl all all all scram-sha-256";

fn certificate(pki: &Pki, name: &str, serial: u64) -> String {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.serial_number = Some(serial.into());
    let (cert, key) = pki.sign_as(params, &format!("{name}{serial}"), &KeyPair::generate().unwrap());
    format!("sslcert={} sslkey={}", cert.display(), key.display())
}

/// A list of the CA that names these, good until that year.
fn list(pki: &Pki, file: &str, serials: &[u64], until: i32) -> PathBuf {
    let revoked = |serial: &u64| RevokedCertParams {
        serial_number: (*serial).into(),
        revocation_time: date_time_ymd(2021, 1, 1),
        reason_code: Some(RevocationReason::KeyCompromise),
        invalidity_date: None,
    };
    let params = CertificateRevocationListParams {
        this_update: date_time_ymd(2021, 1, 1),
        next_update: date_time_ymd(until, 1, 1),
        crl_number: 1u64.into(),
        issuing_distribution_point: None,
        revoked_certs: serials.iter().map(revoked).collect(),
        key_identifier_method: KeyIdMethod::Sha256,
    };
    let path = pki.dir.path().join(file);
    std::fs::write(&path, params.signed_by(&pki.issuer).unwrap().pem().unwrap()).unwrap();
    path
}

fn acceptor(pki: &Pki, crl: &Path) -> TlsAcceptor {
    let (cert, key) = pki.issue("localhost");
    tls::load(&cert, &key, Some((&pki.ca(), Some(crl)))).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_revoked_is_refused_as_by_postgresql() {
    let (pki, other, port) = (Pki::new("ours"), Pki::new("another"), free_port());
    let lists = [
        list(&pki, "none.crl", &[], 2100),
        list(&pki, "one.crl", &[7, 8], 2100),
        list(&pki, "old.crl", &[7], 2022),
        list(&other, "other.crl", &[], 2100),
    ];
    let (dir, conf) = own_tls(&pki, &[("ssl_crl_file", &lists[0])]);
    let start = move || Pg::start_with(port, &conf, &format!("local all all trust\n{RULES}"));
    let pg = Arc::new(tokio::task::spawn_blocking(start).await.unwrap());
    pg.admin("create role ann login; create database app").unwrap();
    let tls = Some(acceptor(&pki, &lists[0]));
    let front = open_with(Setup { hba: RULES, tls, pg: Some(Arc::clone(&pg)), ..Setup::default() }).await;
    let (good, revoked) = (certificate(&pki, "ann", 6), certificate(&pki, "ann", 7));
    let none = "sslcert=/nowhere/c sslkey=/nowhere/k".to_owned();
    let ask =
        async |port: u16, more: &str| output(psql(&front, &pki, "ann", more).env("PGPORT", port.to_string())).await;
    // Two to each list: whether the good and the revoked certificate serve.
    for (list, serves) in lists.iter().zip([[true, true], [true, false], [false, false], [false, false]]) {
        std::fs::copy(list, dir.path().join("ssl_crl_file")).unwrap();
        pg.admin("select pg_reload_conf()").unwrap();
        front.rules.replace(HbaFile::parse("hba.conf", RULES).unwrap(), Some(acceptor(&pki, list)), Duration::ZERO);
        for (more, serves) in [&good, &revoked].into_iter().zip(serves) {
            let ours = ask(front.address.port(), more).await;
            assert_eq!(ours.is_ok(), serves, "{}: {ours:?}", list.display());
            // Until its reload has come through.
            crate::front::eventually("PostgreSQL decides alike", async || ask(port, more).await.is_ok() == serves)
                .await;
        }
        // Whoever shows none is none of the list's business.
        let without = ask(front.address.port(), &none).await.unwrap_err();
        assert!(without.contains("connection requires a valid client certificate"), "{without}");
    }
    let tls = acceptor(&pki, &lists[1]);
    front.rules.replace(HbaFile::parse("hba.conf", RULES).unwrap(), Some(tls), Duration::ZERO);
    let said = ask(front.address.port(), &revoked).await.unwrap_err();
    assert!(said.contains("alert certificate revoked"), "{said}");
}

/// What was logged on this thread.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl std::io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

// One thread: the log is this thread's.
#[tokio::test]
async fn the_log_names_whose_certificate_was_refused_and_why_and_no_secret() {
    let log = Log::default();
    let writer = log.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_writer(move || writer.clone())
        .with_max_level(tracing::Level::TRACE)
        .with_ansi(false)
        .finish();
    let _guard = tracing::subscriber::set_default(subscriber);
    let (pki, other) = (Pki::new("ours"), Pki::new("another"));
    let (revoked, old) = (list(&pki, "one.crl", &[7], 2100), list(&pki, "old.crl", &[], 2022));
    let hba = "hostssl all ann all cert map=m\nhostssl all all all scram-sha-256";
    let tls = Some(acceptor(&pki, &revoked));
    let cache = Duration::from_secs(60);
    let front = open_with(Setup { hba, ident: "m door boss", tls, cache, ..Setup::default() }).await;
    let ask = async |user: &str, more: &str| output(&mut psql(&front, &pki, user, more)).await;
    let seven = certificate(&pki, "ann", 7);
    ask("ann", &seven).await.unwrap_err();
    ask("ann", &certificate(&other, "ann", 7)).await.unwrap_err();
    ask("ann", &certificate(&pki, "door", 9)).await.unwrap_err();
    let rules = || HbaFile::parse("hba.conf", "hostssl all all all cert").unwrap();
    for (crl, with) in
        [(&old, certificate(&pki, "late", 8)), (&list(&other, "o.crl", &[], 2100), certificate(&pki, "lost", 8))]
    {
        front.rules.replace(rules(), Some(acceptor(&pki, crl)), cache);
        ask("ann", &with).await.unwrap_err();
    }
    front.rules.replace(
        HbaFile::parse("hba.conf", "hostssl all all all scram-sha-256").unwrap(),
        Some(acceptor(&pki, &revoked)),
        cache,
    );
    let none = "sslcert=/nowhere/c sslkey=/nowhere/k";
    for _ in 0..2 {
        assert_eq!(ask("app", none).await.as_deref(), Ok("app"));
    }
    ask("nobody", none).await.unwrap_err();
    let log = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
    for (subject, why) in [
        ("subject=CN=ann ", "it is revoked (auth.tls_crl_file)"),
        ("subject=CN=ann ", "it is of no CA in auth.tls_ca_file"),
        ("subject=CN=late ", "its CA's list in auth.tls_crl_file has run out"),
        ("subject=CN=lost ", "its CA has no list in auth.tls_crl_file"),
        ("certificate authentication failed", "in the name of \\\"door\\\""),
    ] {
        assert!(log.lines().any(|line| line.contains(subject) && line.contains(why)), "{subject} {why}: {log}");
    }
    let stored = front.pg.admin("select rolpassword from pg_authid where rolname = 'app'").unwrap();
    let keys = stored.rsplit_once('$').unwrap().1;
    for secret in [keys.split_once(':').unwrap().0, keys.split_once(':').unwrap().1, PASSWORD] {
        assert!(!log.contains(secret), "a secret is in the log");
    }
}

#[test]
fn lists_that_do_not_serve_say_why() {
    let pki = Pki::new("ours");
    let (cert, key) = pki.issue("localhost");
    let fault = |crl: &Path| tls::load(&cert, &key, Some((&pki.ca(), Some(crl)))).err().unwrap().text;
    let wrong = pki.dir.path().join("wrong.crl");
    assert!(fault(&pki.ca()).contains("no revocation list in it"), "{}", fault(&pki.ca()));
    assert!(fault(Path::new("/nowhere")).starts_with("/nowhere: the revocation list cannot be read"));
    std::fs::write(&wrong, "-----BEGIN X509 CRL-----\nMAA=\n-----END X509 CRL-----\n").unwrap();
    assert!(fault(&wrong).contains("is not understood"), "{}", fault(&wrong));
}
