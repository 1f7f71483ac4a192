//! `map=` against PostgreSQL itself: the same lines are taken, the same certificate is the same roles, and a group of
//! an expression is the same part of a name.

use crate::front::{Setup, eventually, free_port, open_with, output};
use crate::pg::Pg;
use crate::tls::{Pki, psql};
use portcullis::wire::hba::{Asker, Decision, Facts, HbaFile, IdentFile};
use rcgen::*;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Lines that both must take, or both refuse. One a line.
const LINES: &str = r#"
m ann boss
m "ann smith" "two words"
m ann
m
m,n ann boss
m ann,bob boss
m ann boss,worker
m /^(.*)@example\.org$ \1
m "/^CN=(.*),O=test$" \1
m /( boss
m /[ boss
m ann +staff
m ann all
m ann "\1"
"m" "ann" "boss"
m ann boss # comment
m @/nowhere/file boss
# nothing
"#;

/// Taken by PostgreSQL 15 and not by us, with a word of our reason.
const STRICTER: &str = r#"
m ann boss worker | fourth
m ann "boss x | not closed
m /^ann$ \1 | has none
m /(ann) \1 | begin it
m /^(a|ab)c$ \1 | choice
m /^(.*?)c$ \1 | rarely
m /\yann boss | \y
m ann /( | not understood
include file | file is not there
"#;

fn refused_by_us(text: &str) -> Vec<(usize, String)> {
    let errors = IdentFile::parse("pg_ident.conf", text).err().unwrap_or_default();
    errors.into_iter().map(|error| (error.line, error.problem)).collect()
}

fn refused_by_postgresql(pg: &Pg, text: &str) -> Vec<usize> {
    std::fs::write(pg.scratch("data/pg_ident.conf"), text).unwrap();
    let asked = pg.admin("select line_number from pg_ident_file_mappings where error is not null order by 1");
    asked.unwrap().lines().map(|line| line.parse().unwrap()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn postgresql_takes_and_refuses_the_same_maps() {
    let pg = tokio::task::spawn_blocking(Pg::start).await.unwrap();
    let ours: Vec<usize> = refused_by_us(LINES).iter().map(|(line, _)| *line).collect();
    assert_eq!(ours, refused_by_postgresql(&pg, LINES));
    assert!(ours.len() > 6, "{ours:?}");
    for line in STRICTER.lines().filter(|line| line.contains(" | ")) {
        let (line, word) = line.split_once(" | ").unwrap();
        // It reads `include` as the name of a map.
        if !line.starts_with("include") {
            assert_eq!(refused_by_postgresql(&pg, line), [0; 0], "{line}");
        }
        let ours = refused_by_us(line);
        assert!(ours.len() == 1 && ours[0].1.contains(word), "{line}: {ours:?}");
    }
}

const RULES: &str = "
hostssl plain     all  all  cert
hostssl cn        all  all  cert map=cn
hostssl dn        all  all  cert map=dn clientname=DN
hostssl dnplain   all  all  cert clientname=DN
hostssl verified  all  all  trust clientcert=verify-ca
hostssl whole     all  all  trust clientcert=verify-full
hostssl wholedn   all  all  trust clientcert=verify-full clientname=DN
";
/// Read alike by 15 and later: nothing that 16 gave a meaning stands for a database user.
const MAPS: &str = "
cn  ann                       boss
cn  ann                       lame
cn  ann                       ghost
cn  \"ann smith\"             \"ann smith\"
cn  /^(.*)@example\\.org$     \\1
cn  /^svc-([a-z]+)$           app_\\1
cn  /^svc                     boss
cn  svc-ann                   \\1
dn  \"/^CN=([^,]+),O=test$\"  \\1
dn  \"CN=bob,O=test\"         boss
dn  /O=other                  lame
other  bob                    ann
";
const PEOPLE: &str = "
create role ann login; create role boss login; create role app_ann login; create role \"ann smith\" login;
create role lame; create role bob login; create role \"CN=bob,O=test\" login;
create database plain; create database cn; create database dn; create database dnplain; create database verified;
create database whole; create database wholedn;
";

/// Certificates that differ in what names them; the files' names are these.
fn certificates(pki: &Pki) -> Vec<(&'static str, PathBuf, PathBuf)> {
    use DnType::{CommonName, OrganizationName};
    let all: [(&str, &[(DnType, &str)]); 8] = [
        ("ann", &[(OrganizationName, "test"), (CommonName, "ann")]),
        ("ann smith", &[(OrganizationName, "test"), (CommonName, "ann smith")]),
        ("mail", &[(OrganizationName, "test"), (CommonName, "ann@example.org")]),
        ("svc", &[(OrganizationName, "test"), (CommonName, "svc-ann")]),
        ("bob", &[(OrganizationName, "test"), (CommonName, "bob")]),
        ("other", &[(OrganizationName, "other"), (CommonName, "ann")]),
        ("nameless", &[(OrganizationName, "test")]),
        ("comma", &[(OrganizationName, "test"), (CommonName, "x,O=test")]),
    ];
    let sign = |(name, parts): (&'static str, &[(DnType, &str)])| {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.distinguished_name = DistinguishedName::new();
        parts.iter().for_each(|(kind, text)| params.distinguished_name.push(kind.clone(), *text));
        let (cert, key) = pki.sign_as(params, name, &KeyPair::generate().unwrap());
        (name, cert, key)
    };
    all.into_iter().map(sign).collect()
}

/// Settings of a PostgreSQL that does TLS by itself, with these files in a directory it can enter.
pub fn own_tls(pki: &Pki, more: &[(&str, &Path)]) -> (tempfile::TempDir, String) {
    use std::os::unix::fs::{PermissionsExt, chown};
    let dir = tempfile::Builder::new().prefix("portcullis-tls-").tempdir_in("/tmp").unwrap();
    std::fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o755)).unwrap();
    let (cert, key) = pki.issue("localhost");
    let ca = pki.ca();
    let mut conf = "ssl = on\nlisten_addresses = '127.0.0.1'\n".to_owned();
    let files = [("ssl_cert_file", &*cert), ("ssl_key_file", &*key), ("ssl_ca_file", &*ca)];
    for (setting, file) in files.iter().chain(more) {
        let copy = dir.path().join(setting);
        std::fs::copy(file, &copy).unwrap();
        let mode = if *setting == "ssl_key_file" { 0o640 } else { 0o644 };
        std::fs::set_permissions(&copy, PermissionsExt::from_mode(mode)).unwrap();
        // PostgreSQL takes a key of root that its group can read.
        let group = nix_group("postgres");
        chown(&copy, Some(0), Some(group)).unwrap();
        conf += &format!("{setting} = '{}'\n", copy.display());
    }
    (dir, conf)
}

fn nix_group(name: &str) -> u32 {
    portcullis::io::files::group_id(name).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_certificate_is_the_same_roles() {
    let (pki, port) = (Pki::new("ours"), free_port());
    let (dir, conf) = own_tls(&pki, &[]);
    let maps = dir.path().join("pg_ident.conf");
    std::fs::write(&maps, MAPS).unwrap();
    let conf = format!("{conf}ident_file = '{}'\n", maps.display());
    let start = move || Pg::start_with(port, &conf, &format!("local all all trust\n{RULES}"));
    let pg = Arc::new(tokio::task::spawn_blocking(start).await.unwrap());
    pg.admin(PEOPLE).unwrap();
    let tls = Some(pki.acceptor(Some(&pki.ca())));
    let front = open_with(Setup { hba: RULES, ident: MAPS, tls, pg: Some(Arc::clone(&pg)), ..Setup::default() }).await;
    front.extend(std::time::Duration::from_secs(600));
    let ask = async |port: u16, user: &str, database: &str, (_, cert, key): &(&str, PathBuf, PathBuf)| {
        let more = format!("sslcert='{}' sslkey='{}' dbname={database}", cert.display(), key.display());
        let said = output(psql(&front, &pki, user, &more).env("PGPORT", port.to_string())).await;
        said.map_err(|said| said.split_once("failed: ").map_or(said.clone(), |(_, why)| why.trim().to_owned()))
    };
    let mut let_in = Vec::new();
    for certificate in certificates(&pki) {
        for (database, users) in [
            ("plain", &["ann", "boss", "ann smith"][..]),
            ("cn", &["ann", "boss", "app_ann", "ann smith", "lame", "ghost", "bob"]),
            ("dn", &["ann", "boss", "bob", "lame", "ann smith"]),
            ("dnplain", &["bob", "CN=bob,O=test"]),
            ("verified", &["boss", "lame", "ghost"]),
            ("whole", &["ann", "bob"]),
            ("wholedn", &["bob", "CN=bob,O=test"]),
        ] {
            for user in users {
                let theirs = ask(port, user, database, &certificate).await;
                let ours = ask(front.address.port(), user, database, &certificate).await;
                assert_eq!(ours, theirs, "{} as {user} in {database}", certificate.0);
                if ours.is_ok() {
                    let_in.push(format!("{} {database} {user}", certificate.0));
                }
            }
        }
    }
    // What was compared did tell apart; who is let in by map is who should be.
    let by_map: Vec<&String> = let_in.iter().filter(|one| one.contains(" cn ") || one.contains(" dn ")).collect();
    assert_eq!(
        by_map,
        [
            "ann cn boss",
            "ann dn ann",
            "ann smith cn ann smith",
            "ann smith dn ann smith",
            "mail cn ann",
            "svc cn boss",
            "svc cn app_ann",
            "bob dn boss",
            "bob dn bob",
            "other cn boss"
        ]
    );
    assert_eq!(let_in.len() - by_map.len(), 8 + 8, "{let_in:#?}");
}

/// A small generator of its own: what it makes must be the same each time.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(self.0 >> 33).unwrap() % sides
    }

    fn one_of<'a>(&mut self, words: &[&'a str]) -> &'a str {
        words[self.roll(words.len())]
    }

    fn expression(&mut self, groups: &mut u32) -> String {
        let mut text = String::new();
        for _ in 0..=self.roll(4) {
            match self.roll(9) {
                0 | 1 if *groups < 4 => {
                    *groups += 1;
                    let open = self.one_of(&["(", "(", "(?:"]);
                    let inner = self.expression(groups);
                    let other = if self.roll(3) == 0 { format!("|{}", self.expression(groups)) } else { String::new() };
                    let more = self.one_of(&["", "", "", "*", "?", "{2}"]);
                    text += &format!("{open}{inner}{other}){more}");
                }
                _ => {
                    let atom = self.one_of(&["a", "b", "c", ".", "[ab]", "[^a]", "[b-c]", "\\w"]);
                    let more = self.one_of(&["", "", "*", "+", "?", "{2}", "*?", "??"]);
                    text += &format!("{atom}{more}");
                }
            }
        }
        text
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_group_is_the_same_part_of_a_name() {
    let pg = tokio::task::spawn_blocking(crate::pg::shared).await.unwrap();
    let (mut dice, mut cases) = (Dice(4), Vec::new());
    let mut refused = 0;
    while cases.len() < 500 {
        let expression = format!("^{}$", dice.expression(&mut 0));
        let name: String = (0..=dice.roll(7)).map(|_| dice.one_of(&["a", "b", "c"])).collect();
        match IdentFile::parse("f", &format!("m \"/{expression}\" \\1")) {
            Ok(maps) => cases.push((expression, name, maps)),
            Err(_) => refused += 1,
        }
    }
    assert!(refused > 500, "{refused}: what is not clear is generated too");
    let mut sql = String::new();
    for (expression, name, _) in &cases {
        sql += &format!("select coalesce((regexp_match('{name}', '{expression}'))[1], 'no') ;\n");
    }
    let answers = tokio::task::spawn_blocking(move || pg.admin(&sql)).await.unwrap().unwrap();
    // One row each; psql shows an empty one as an empty line, and the last may be trimmed.
    let mut answers: Vec<&str> = answers.split('\n').collect();
    answers.resize(cases.len(), "");
    let rules = "hostssl all all all cert map=m";
    let mut matched = 0;
    for ((expression, name, maps), answer) in cases.into_iter().zip(answers) {
        let rules = HbaFile::parse("h", rules).unwrap().with_maps(maps).unwrap();
        let parts = (0..=name.len()).flat_map(|from| (from..=name.len()).map(move |to| (from, to)));
        let fits = |user: &str| {
            let asker = Asker { address: [127, 0, 0, 1].into(), tls: true, user, database: "x", replication: false };
            let Decision::Entry(entry) = rules.decide(asker, &Facts::default()) else { panic!("no rule") };
            rules.fits(entry, &name, asker, &Facts::default()).unwrap()
        };
        let mut ours: Vec<&str> = parts.map(|(from, to)| &name[from..to]).filter(|part| fits(part)).collect();
        ours.dedup();
        let ours = ours.first().copied().unwrap_or("no");
        assert_eq!(ours, answer, "{expression} of {name}");
        matched += usize::from(answer != "no");
    }
    assert!(matched > 50, "{matched}: enough of them match");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_group_of_roles_may_stand_for_the_role_and_a_reload_counts_for_who_comes_then() {
    let pki = Pki::new("ours");
    let hba = "hostssl all all all cert map=m";
    let tls = pki.acceptor(Some(&pki.ca()));
    let front = open_with(Setup { hba, ident: "m door +carded", tls: Some(tls.clone()), ..Setup::default() }).await;
    let (cert, key) = pki.issue("door");
    let more = format!("sslcert={} sslkey={}", cert.display(), key.display());
    let ask = async |user: &str| output(&mut psql(&front, &pki, user, &more)).await;
    assert_eq!(ask("ann").await.unwrap(), "ann");
    let refused = ask("trusty").await.unwrap_err();
    assert!(refused.contains("FATAL:  certificate authentication failed for user \"trusty\""), "{refused}");
    let refused = ask("carded").await.unwrap_err();
    assert!(refused.contains("role \"carded\" is not permitted to log in"), "{refused}");
    let maps = IdentFile::parse("pg_ident.conf", "m door all").unwrap();
    let rules = HbaFile::parse("hba.conf", hba).unwrap().with_maps(maps).unwrap();
    front.rules.replace(rules, Some(tls), std::time::Duration::ZERO);
    assert_eq!(ask("trusty").await.unwrap(), "trusty");
    eventually("sessions end", async || front.gate.sessions() == 0).await;
}
