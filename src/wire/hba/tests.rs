//! Rules and verdicts, in tables. That PostgreSQL reads the same lines the same way is tested against PostgreSQL itself
//! (`tests/it/proxy/rules.rs`).

use super::*;
use std::collections::HashMap;

fn parse(text: &str) -> HbaFile {
    HbaFile::parse("hba.conf", text).expect("valid")
}

fn problem(line: &str) -> String {
    let errors = HbaFile::parse("hba.conf", line).expect_err(line);
    assert_eq!(errors.len(), 1, "{errors:?}");
    errors[0].to_string()
}

fn asker<'a>(address: &str, tls: bool, user: &'a str, database: &'a str) -> Asker<'a> {
    Asker { address: address.parse().expect("address"), tls, user, database, replication: false }
}

fn ask(file: &HbaFile, address: &str, tls: bool, user: &str, database: &str) -> Option<Method> {
    match file.decide(asker(address, tls, user, database), &Facts::default()) {
        Decision::Entry(entry) => Some(entry.method),
        Decision::NoEntry => None,
        Decision::Ask(question) => panic!("{question:?}"),
    }
}

#[test]
fn the_first_match_decides_and_no_match_refuses() {
    let file = parse(
        "# comment\n\nlocal all all peer\nhost all bad 0.0.0.0/0 reject # why\n\
         host app,\"two words\" a,b 192.0.2.0/24 scram-sha-256\n\
         hostssl sameuser all all trust\nhostnossl \"all\" all 127.0.0.1 255.255.255.255 trust\n\
         host all all ::1/128 md5\nhostgssenc all all all trust\nhostnogssenc gss all all trust\n",
    );
    assert_eq!(ask(&file, "127.0.0.1", false, "bad", "app"), Some(Method::Reject));
    assert_eq!(ask(&file, "192.0.2.9", false, "a", "two words"), Some(Method::ScramSha256));
    assert_eq!(ask(&file, "192.0.3.9", false, "a", "app"), None);
    assert_eq!(ask(&file, "192.0.3.9", true, "x", "x"), Some(Method::Trust));
    assert_eq!(ask(&file, "192.0.3.9", false, "x", "x"), None, "hostssl needs TLS");
    assert_eq!(ask(&file, "127.0.0.1", false, "c", "all"), Some(Method::Trust), "a quoted all is a name");
    assert_eq!(ask(&file, "127.0.0.1", false, "c", "app"), None);
    assert_eq!(ask(&file, "127.0.0.1", true, "c", "all"), None, "hostnossl refuses TLS");
    assert_eq!(ask(&file, "::1", false, "c", "app"), Some(Method::Md5));
    assert_eq!(ask(&file, "192.0.3.9", true, "c", "gss"), Some(Method::Trust), "none of ours is GSS");
    assert_eq!(ask(&HbaFile::default(), "::1", false, "c", "app"), Some(Method::ScramSha256));
    assert_eq!(ask(&parse(""), "::1", false, "c", "app"), None, "an empty file is not a missing file");
}

#[test]
fn a_list_goes_on_behind_a_comma_and_a_line_behind_a_backslash() {
    let file = parse("host  a, b,,c  x,y \\\n 10.0.0.0/8 \\\n  trust");
    for database in ["a", "b", "c"] {
        assert_eq!(ask(&file, "10.1.2.3", false, "y", database), Some(Method::Trust));
    }
    assert_eq!(ask(&file, "10.1.2.3", false, "y", "d"), None);
    // A comma before a word joins nothing: the user is c here, as PostgreSQL has it.
    let file = parse("host a ,c 10.0.0.0/8 trust");
    assert_eq!(ask(&file, "10.1.2.3", false, "c", "a"), Some(Method::Trust));
    assert_eq!(ask(&file, "10.1.2.3", false, "x", "c"), None);
    let errors = HbaFile::parse("f", "host a b all trust\nhost a \\\n b all foo\n").expect_err("line 2");
    assert_eq!(errors[0].line, 2);
}

#[test]
fn quotes_take_the_meaning_away_where_they_begin_a_word() {
    let file = parse(
        "host \"sameuser\" \"+staff\" all trust\nhost a\"ll\" x all reject\nhost \"a\"\"b\" \"@x\" all md5\n\
         host \"replication\" \"a,b\" all trust\nhost \"#\" r all trust#comment\n",
    );
    for (user, database, method) in [
        ("+staff", "sameuser", Method::Trust),
        ("x", "anything", Method::Reject),
        ("@x", "a\"b", Method::Md5),
        ("a,b", "replication", Method::Trust),
        ("r", "#", Method::Trust),
    ] {
        assert_eq!(ask(&file, "10.1.2.3", false, user, database), Some(method), "{user} {database}");
    }
}

#[test]
fn networks_are_what_address_and_mask_say() {
    for (rule, inside, outside) in [
        ("10.1.2.3/8", "10.200.0.1", "11.0.0.1"),
        ("10.1.2.3/32", "10.1.2.3", "10.1.2.4"),
        ("0.0.0.0/0", "8.8.8.8", "::1"),
        ("::/0", "2001:db8::1", "8.8.8.8"),
        ("2001:db8::/32", "2001:db8:7::1", "2001:db9::1"),
        ("2001:db8:: ffff:ffff::", "2001:db8:7::1", "2001:db9::1"),
        ("10.0.0.5 255.0.0.255", "10.9.9.5", "10.9.9.6"),
    ] {
        let file = parse(&format!("host all all {rule} trust"));
        assert_eq!(ask(&file, inside, false, "a", "b"), Some(Method::Trust), "{rule}");
        assert_eq!(ask(&file, outside, false, "a", "b"), None, "{rule}");
    }
}

#[test]
fn what_must_be_asked_is_asked_when_a_rule_needs_it_and_not_before() {
    let file = parse(
        "host app root all trust\nhost app +staff 10.0.0.0/8 trust\nhost samerole all samehost md5\n\
         host all all samenet reject\nhost all all .example.org scram-sha-256\nhost all all Db.Example.Net cert2\n"
            .replace("cert2", "trust")
            .as_str(),
    );
    let mut facts = Facts::default();
    let who = asker("10.1.2.3", false, "root", "app");
    assert!(matches!(file.decide(who, &facts), Decision::Entry(entry) if entry.line() == 1), "nothing to ask");
    let who = asker("192.0.2.9", false, "ann", "app");
    assert_eq!(file.decide(who, &facts), Decision::Ask(Question::Interfaces), "the address already rules out line 2");
    let who = asker("10.1.2.3", false, "ann", "app");
    assert_eq!(file.decide(who, &facts), Decision::Ask(Question::Memberships));
    facts.memberships = Some(vec!["ann".to_owned(), "staff".to_owned()]);
    assert!(matches!(file.decide(who, &facts), Decision::Entry(entry) if entry.line() == 2));
    facts.memberships = Some(vec!["ann".to_owned(), "app".to_owned()]);
    assert_eq!(file.decide(who, &facts), Decision::Ask(Question::Interfaces));
    let own = |address: &str, mask: &str| (address.parse().expect("ip"), mask.parse().expect("ip"));
    facts.interfaces = Some(vec![own("10.1.2.3", "255.255.255.0")]);
    assert!(matches!(file.decide(who, &facts), Decision::Entry(entry) if entry.line() == 3), "a member of app");
    facts.interfaces = Some(vec![own("10.1.2.1", "255.255.255.0")]);
    assert!(matches!(file.decide(who, &facts), Decision::Entry(entry) if entry.line() == 4));
    facts.interfaces = Some(vec![own("10.1.3.1", "255.255.255.0")]);
    assert_eq!(file.decide(who, &facts), Decision::Ask(Question::Names));
    facts.names = Some(vec!["x.EXAMPLE.org".to_owned(), "db.example.net".to_owned()]);
    assert_eq!(file.decide(who, &facts), Decision::Ask(Question::Confirm("x.EXAMPLE.org".to_owned())));
    facts.confirmed = vec![("x.EXAMPLE.org".to_owned(), true)];
    assert!(matches!(file.decide(who, &facts), Decision::Entry(entry) if entry.line() == 5));
    facts.confirmed[0].1 = false;
    assert_eq!(file.decide(who, &facts), Decision::Ask(Question::Confirm("db.example.net".to_owned())));
    facts.confirmed.push(("db.example.net".to_owned(), false));
    assert_eq!(file.decide(who, &facts), Decision::NoEntry, "a name that does not lead back is no name");
    facts.names = Some(vec!["example.org".to_owned()]);
    assert_eq!(file.decide(who, &facts), Decision::NoEntry, "the domain itself is not below it");
    facts.memberships = Some(vec![]);
    assert_eq!(file.decide(who, &facts), Decision::NoEntry, "a role that does not exist is a member of nothing");
}

#[test]
fn physical_replication_matches_its_keyword_alone() {
    let file = parse("host all all all trust\nhost app,replication rep all md5\nhost \"replication\" all all reject");
    let who = |user, replication| Asker { replication, ..asker("10.1.2.3", false, user, "app") };
    let line = |who| match file.decide(who, &Facts::default()) {
        Decision::Entry(entry) => Some(entry.line()),
        _ => None,
    };
    assert_eq!(line(who("rep", true)), Some(2));
    assert_eq!(line(who("rep", false)), Some(1));
    assert_eq!(line(who("other", true)), None);
}

#[test]
fn certificates_and_patterns_are_demanded_as_written() {
    let file = parse(
        "hostssl /^db\\d+$ all all cert clientname=DN\n\
         hostssl all \"/^[a-c]{1,2}$\" all scram-sha-256 clientcert=verify-ca\n\
         hostssl all all all md5 clientcert=verify-full,clientname=CN\n",
    );
    let entry = |user, database| match file.decide(asker("10.1.2.3", true, user, database), &Facts::default()) {
        Decision::Entry(entry) => entry.clone(),
        other => panic!("{other:?}"),
    };
    let cert = entry("x", "db12");
    assert_eq!((cert.method, cert.client_name), (Method::Cert, ClientName::Dn));
    assert!(cert.needs_certificate && cert.needs_name);
    let ca = entry("ab", "x");
    assert!(ca.needs_certificate && !ca.needs_name);
    let full = entry("abc", "x");
    assert!(full.needs_certificate && full.needs_name && full.line() == 3);
    assert_eq!(full.place(), "hba.conf, line 3");
}

#[test]
fn what_is_wrong_names_file_line_word_and_remedy() {
    assert_eq!(
        problem("# who\nhost all all all gss"),
        "hba.conf, line 2: method \"gss\" is not built into the gate; use scram-sha-256, md5, cert, trust or reject"
    );
    for (line, words) in [
        ("host all all 10.0.0.1 trust", &["\"trust\" is not a mask", "ADDRESS/BITS"][..]),
        ("host all all 10.0.0.1", &["mask is missing", "10.0.0.1/BITS"]),
        ("host all all 10.0.0.1 ffff:: trust", &["other address family"]),
        ("host all all 10.0.0.0/99 trust", &["10.0.0.0/99", "\"99\""]),
        ("host all all 10.0.0/8 trust", &["10.0.0/8"]),
        ("host all all db.example.org/24 trust", &["host name with a mask"]),
        ("host all all 127.1 trust", &["\"127.1\" is not an address"]),
        ("host all all *.example.org trust", &["*.example.org", ".example.org"]),
        ("host all all a,b trust", &["address \"a,b\" is a list"]),
        ("host all all all trust,md5", &["method \"trust,md5\" is a list"]),
        ("host,local all all all trust", &["connection type \"host,local\""]),
        ("hots all all all trust", &["connection type \"hots\"", "hostnossl"]),
        ("include a b", &["connection type \"include\""]),
        ("host", &["database is missing"]),
        ("host all", &["user is missing"]),
        ("host all all", &["address is missing"]),
        ("host all all all", &["method is missing"]),
        ("local all all", &["method is missing"]),
        ("host \"all all all trust", &["quotation mark", "all all all trust"]),
        ("local all all pear", &["\"pear\" is unknown"]),
        ("local all all cert", &["hostssl instead of local"]),
        ("host all all all peer", &["local lines only"]),
        ("host all all all cert", &["hostssl instead of host"]),
        ("host all all all trust clientcert=verify-full", &["\"clientcert\" needs TLS"]),
        ("hostssl all all all cert clientcert=verify-ca", &["always verify-full"]),
        ("hostssl all all all trust clientcert=1", &["clientcert=1", "verify-ca or verify-full"]),
        ("hostssl all all all cert clientname=SAN", &["clientname=SAN", "CN or DN"]),
        ("hostssl all all all trust map=x", &["map=x", "not for this method"]),
        ("host all all all trust ldapserver=x", &["ldapserver=x", "unknown"]),
        ("host all all all trust again", &["\"again\" has no value"]),
        ("host /( all all trust", &["\"/(\"", "not understood"]),
        ("host @dbs all all trust", &["@dbs is not there"]),
        ("include other.conf", &["other.conf is not there"]),
        ("include_dir d", &["include_dir d is not there"]),
    ] {
        let text = problem(line);
        assert!(text.starts_with("hba.conf, line 1: "), "{text}");
        for word in words {
            assert!(text.contains(word), "{line}: {text}");
        }
    }
    let all = HbaFile::parse("f", "host\n\nhost all all all trust\nhoss x\n").expect_err("two");
    assert_eq!(all.iter().map(|error| error.line).collect::<Vec<_>>(), [1, 4], "all errors are told");
    assert_eq!(HbaFile::parse("f", &"#".repeat(2 << 20)).expect_err("long").len(), 1);
}

/// Files in memory.
struct Shelf(HashMap<&'static str, &'static str>);

impl Files for Shelf {
    fn read(&self, path: &Path) -> Result<String, FileTrouble> {
        let text = self.0.get(path.to_str().expect("text")).ok_or(FileTrouble::Missing)?;
        if *text == "!" { Err(FileTrouble::Other("is secret".to_owned())) } else { Ok((*text).to_owned()) }
    }
    fn list(&self, directory: &Path) -> Result<Vec<String>, FileTrouble> {
        let below = |path: &&str| Some(Path::new(path).strip_prefix(directory).ok()?.to_str()?.to_owned());
        let names: Vec<String> = self.0.keys().filter_map(below).collect();
        if names.is_empty() { Err(FileTrouble::Missing) } else { Ok(names) }
    }
}

fn ident_problem(line: &str) -> String {
    let errors = IdentFile::parse("pg_ident.conf", line).expect_err(line);
    assert_eq!(errors.len(), 1, "{errors:?}");
    errors[0].to_string()
}

/// Whether a certificate in this name may log in as the role, by a rule with `map=m`.
fn fits(rules: &HbaFile, name: &str, role: &str, facts: &Facts) -> Result<bool, Question> {
    let who = asker("10.1.2.3", true, role, "app");
    let Decision::Entry(entry) = rules.decide(who, facts) else { panic!("no rule") };
    rules.fits(entry, name, who, facts)
}

fn mapped(ident: &str) -> HbaFile {
    let maps = IdentFile::parse("pg_ident.conf", ident).expect(ident);
    parse("hostssl all all all cert map=m").with_maps(maps).expect(ident)
}

#[test]
fn maps_say_which_names_are_which_roles() {
    for (ident, name, roles, others) in [
        ("m ann boss\nm ann worker\nother ann root", "ann", &["boss", "worker"][..], &["ann", "root"][..]),
        ("m \"ann smith\" \"two words\" # why", "ann smith", &["two words"], &["ann"]),
        ("m /^(.*)@example\\.org$ \\1", "ann@example.org", &["ann"], &["ann@example.org", "\\1"]),
        ("m /^(.*)@example\\.org$ app_\\1_ro", "ann@example.org", &["app_ann_ro"], &["ann", "app_\\1_ro"]),
        // The first alone is replaced.
        ("m /^(.*)@example\\.org$ \\1\\1", "ann@example.org", &["ann\\1"], &["annann"]),
        ("m \"/^CN=([a-z ]+),O=x$\" \\1", "CN=ann smith,O=x", &["ann smith"], &["ann"]),
        ("m ann \\1", "ann", &["\\1"], &["ann"]),
        ("m ann all", "ann", &["anybody", "all"], &[]),
        ("m ann \"all\"", "ann", &["all"], &["anybody"]),
        ("m ann /^app_", "ann", &["app_1"], &["ann"]),
        ("m /^(ann)$ \"+\\1\"", "ann", &["+ann"], &["ann"]),
        ("m /an root", "joan", &["root"], &["joan"]),
        ("m /(.)(.) root", "xy", &["root"], &["x"]),
        ("# m ann boss\nm bob boss", "ann", &[], &["boss", "ann"]),
        ("m ANN ann", "ann", &[], &["ann"]),
    ] {
        let rules = mapped(ident);
        for (roles, wanted) in [(roles, true), (others, false)] {
            for role in roles {
                assert_eq!(fits(&rules, name, role, &Facts::default()), Ok(wanted), "{ident}: {name} as {role}");
            }
        }
    }
    // Groups are asked for, where a name fits and no other line lets in; none for whom it does not fit.
    let rules = mapped("m ann +staff\nm ann ann");
    let mut facts = Facts::default();
    assert_eq!(fits(&rules, "ann", "ann", &facts), Ok(true));
    assert_eq!(fits(&rules, "bob", "bob", &facts), Ok(false));
    assert_eq!(fits(&rules, "ann", "boss", &facts), Err(Question::Memberships));
    facts.memberships = Some(vec!["boss".to_owned(), "staff".to_owned()]);
    assert_eq!(fits(&rules, "ann", "boss", &facts), Ok(true));
    facts.memberships = Some(vec!["boss".to_owned()]);
    assert_eq!(fits(&rules, "ann", "boss", &facts), Ok(false));
    // Without a map the names are compared; an empty one is none.
    for plain in ["cert", "cert map="] {
        let plain = parse(&format!("hostssl all all all {plain}"));
        assert_eq!(fits(&plain, "ann", "ann", &facts), Ok(true));
        assert_eq!(fits(&plain, "ann", "bob", &facts), Ok(false));
    }
    // Maps that nobody looked for let nobody in.
    assert_eq!(fits(&parse("hostssl all all all cert map=m"), "ann", "ann", &facts), Ok(false));
}

#[test]
fn what_is_wrong_with_a_map_names_file_line_word_and_remedy() {
    for (line, words) in [
        ("m", &["name in the certificate is missing"][..]),
        ("m ann", &["database user is missing"]),
        ("m ann boss worker", &["\"worker\" is a fourth word", "quotation marks"]),
        ("m,n ann boss", &["name of the map \"m,n\" is a list"]),
        ("m ann,bob boss", &["\"ann,bob\" is a list"]),
        ("m ann boss,worker", &["\"boss,worker\" is a list"]),
        ("m \"ann boss", &["quotation mark"]),
        ("m /( boss", &["\"/(\"", "not understood"]),
        ("m /x\\y boss", &["\\y"]),
        ("m ann /[", &["not understood"]),
        ("m /^ann$ \\1", &["has none", "parentheses"]),
        ("m /^(?:ann)$ \\1", &["has none"]),
        ("m /(ann) \\1", &["begin it with ^ and end it with $"]),
        ("m /^(ann) \\1", &["end it with $"]),
        ("m /^(ann)\\$ \\1", &["end it with $"]),
        ("m /^(a|ab).*$ \\1", &["choice"]),
        ("m /^(a)$|^b$ \\1", &["choice"]),
        ("m /^(?:(a)|b)$ \\1", &["choice"]),
        ("m /^(?:a|ab)(.*)$ \\1", &["choice"]),
        ("m /^(?:ab?)*(.*)$ \\1", &["repeats a group"]),
        ("m /^(a){2}$ \\1", &["repeats a group"]),
        ("m /^(?:(a)x)+$ \\1", &["repeats a group"]),
        ("m /^(.*?)@.*$ \\1", &["rarely"]),
        ("m /^(.*)@.{2}?$ \\1", &["rarely"]),
        ("include more", &["more is not there"]),
        ("m @names boss", &["@names is not there"]),
    ] {
        let text = ident_problem(line);
        assert!(text.starts_with("pg_ident.conf, line 1: "), "{text}");
        for word in words {
            assert!(text.contains(word), "{line}: {text}");
        }
    }
    // What has one reading is taken.
    for line in ["/^([^@]+)@(?:a|b)\\.(?:x|yz)*$ \\1", "/^([[:alpha:]_]{2})[]|)(]$ x\\1", "/^(?:x)\\((a(b|c)*)$ \\1"] {
        let parsed = IdentFile::parse("f", &format!("m {line}"));
        assert_eq!(parsed.is_ok(), !line.contains("b|c"), "{line}: {parsed:?}");
    }
    let all = IdentFile::parse("f", "\nm\nm ann boss\nm ann\n").expect_err("two");
    assert_eq!(all.iter().map(|error| error.line).collect::<Vec<_>>(), [2, 4], "all errors are told");
}

#[test]
fn a_map_that_is_not_there_is_an_error_of_the_rule_that_names_it() {
    let hba = "host all all all md5\nhostssl all all all cert map=there\nhostssl all all all cert map=gone\n\
               local all all peer map=elsewhere\n";
    let maps = IdentFile::parse("/etc/pg_ident.conf", "there ann boss").expect("valid");
    let errors = parse(hba).with_maps(maps).expect_err("one is gone");
    assert_eq!(errors.len(), 1, "{errors:?}");
    assert_eq!(
        errors[0].to_string(),
        "hba.conf, line 3: the map \"gone\" is not in /etc/pg_ident.conf; add it there, or correct the name"
    );
    let errors = parse(hba).with_maps(IdentFile::default()).expect_err("there is no file");
    assert_eq!(errors.iter().map(|error| error.line).collect::<Vec<_>>(), [2, 3]);
    assert!(errors[0].problem.contains("auth.ident_file"), "{errors:?}");
    assert!(parse("host all all all md5").with_maps(IdentFile::default()).is_ok(), "nobody needs one");
}

#[test]
fn maps_have_files_of_their_own_too() {
    let shelf =
        Shelf(HashMap::from([("/etc/d/1.conf", "m ann one"), ("/etc/role", "two"), ("/etc/wrong", "m ann one\nm\n")]));
    let read = |text| IdentFile::parse_with(Path::new("/etc/ident"), text, &shelf);
    let maps = read("include_dir d\nm ann @role\ninclude_if_exists none").expect("valid");
    let rules = parse("hostssl all all all cert map=m").with_maps(maps).expect("there");
    for role in ["one", "two"] {
        assert_eq!(fits(&rules, "ann", role, &Facts::default()), Ok(true), "{role}");
    }
    let errors = read("m ann x\ninclude wrong").expect_err("line 2");
    assert_eq!(
        errors[0].to_string(),
        "/etc/wrong, line 2: the name in the certificate is missing; add it after the map's"
    );
}

fn with(files: &[(&'static str, &'static str)]) -> Result<HbaFile, Vec<String>> {
    let shelf = Shelf(files.iter().copied().collect());
    let main = shelf.0["/etc/hba.conf"];
    HbaFile::parse_with(Path::new("/etc/hba.conf"), main, &shelf)
        .map_err(|errors| errors.iter().map(ToString::to_string).collect())
}

#[test]
fn files_are_read_beside_the_file_that_names_them() {
    let file = with(&[
        (
            "/etc/hba.conf",
            "host @names/dbs x,@/srv/users all trust\ninclude_if_exists none\ninclude_dir d\ninclude more",
        ),
        ("/etc/names/dbs", "one, two # three\n@deeper\n"),
        ("/etc/names/deeper", "\"all\"\n"),
        ("/srv/users", "y +z"),
        ("/etc/more", "host all all all md5"),
        ("/etc/d/20.conf", "host d late all reject"),
        ("/etc/d/10.conf", "host d all 10.0.0.0/8 trust"),
        ("/etc/d/.hidden.conf", "nonsense"),
        ("/etc/d/10.conf~", "nonsense"),
    ])
    .expect("valid");
    for (address, user, database, place) in [
        ("10.0.0.1", "x", "one", "/etc/hba.conf, line 1"),
        ("10.0.0.1", "y", "two", "/etc/hba.conf, line 1"),
        ("10.0.0.1", "y", "all", "/etc/hba.conf, line 1"),
        ("10.0.0.1", "late", "d", "/etc/d/10.conf, line 1"),
        ("11.0.0.1", "late", "d", "/etc/d/20.conf, line 1"),
        ("11.0.0.1", "y", "three", "/etc/more, line 1"),
    ] {
        match file.decide(asker(address, false, user, database), &Facts::default()) {
            Decision::Entry(entry) => assert_eq!(entry.place(), place, "{user} {database}"),
            other => panic!("{user} {database}: {other:?}"),
        }
    }
    let none = file.decide(asker("10.0.0.1", false, "w", "one"), &Facts::default());
    assert_eq!(none, Decision::Ask(Question::Memberships));
}

#[test]
fn errors_of_files_name_the_file_they_are_in() {
    let errors = with(&[
        ("/etc/hba.conf", "include a\nhost @empty all all trust\nhost @torn all all trust\nhost all all all\n"),
        ("/etc/a", "\nhost all all all none\ninclude b\n"),
        ("/etc/b", "!"),
        ("/etc/empty", "# nobody\n"),
        ("/etc/torn", "x\n\"y\n"),
    ])
    .expect_err("five");
    let starts = [
        "/etc/hba.conf, line 2: the file \"@empty\" names nobody",
        "/etc/hba.conf, line 3: in /etc/torn, line 2: the quotation mark",
        "/etc/hba.conf, line 4: the method is missing",
        "/etc/a, line 2: method \"none\" is unknown",
        "/etc/a, line 3: the included file /etc/b is secret",
    ];
    assert_eq!(errors.len(), starts.len(), "{errors:#?}");
    for (error, start) in errors.iter().zip(starts) {
        assert!(error.starts_with(start), "{error}");
    }
    let circle = with(&[("/etc/hba.conf", "include a"), ("/etc/a", "include a\ninclude a")]).expect_err("a circle");
    assert!(circle.iter().any(|error| error.contains("more than")), "{:?}", circle.first());
    let circle = with(&[("/etc/hba.conf", "host @a all all md5"), ("/etc/a", "@a @a")]).expect_err("a circle");
    assert!(circle[0].contains("files deep"), "{circle:?}");
}

#[test]
fn doctor_learns_what_each_rule_demands() {
    let file = parse("local all all trust\nhost all a,b all trust\nhost all a,+c all md5\n");
    let seen: Vec<_> = file.entries().map(|(entry, users)| (entry.line(), entry.method, users)).collect();
    assert_eq!(seen, [(2, Method::Trust, Some(vec!["a", "b"])), (3, Method::Md5, None)]);
}

proptest::proptest! {
    #[test]
    fn arbitrary_text_never_panics(
        text in "\\PC{0,200}",
        near in "(host|local|hostssl|include)[ \",a-z0-9./\\\\#\n+@]{0,80}",
        pattern in "[\\[\\]\\\\(){}^$|*+?.:a-d0-9-]{0,30}",
    ) {
        let _ = HbaFile::parse("f", &text);
        let _ = HbaFile::parse("f", &near);
        let _ = HbaFile::parse("f", &format!("host \"/{pattern}\" all all trust"));
    }

    #[test]
    fn arbitrary_maps_never_panic(
        text in "\\PC{0,200}",
        near in "m ([ \",a-z0-9./\\\\#\n+@()^$]{0,80})",
        pattern in "\\^[\\[\\]\\\\(){}^$|*+?.:a-d0-9-]{0,30}\\$",
        name in "[a-d0-9@]{0,8}",
    ) {
        let _ = IdentFile::parse("f", &text);
        let _ = IdentFile::parse("f", &near);
        if let Ok(maps) = IdentFile::parse("f", &format!("m \"/{pattern}\" \\1")) {
            let rules = parse("hostssl all all all cert map=m").with_maps(maps).expect("there");
            let _ = fits(&rules, &name, &name, &Facts::default());
        }
    }
}

#[test]
fn an_address_that_is_none_is_named_and_not_its_mask() {
    for (address, wrong) in [("300.1.1.1/8", "300.1.1.1"), ("10.0.0.0/33", "33"), ("10.0.0.0/x", "x")] {
        let errors = HbaFile::parse("hba.conf", &format!("host all all {address} trust")).expect_err("refused");
        assert!(errors[0].to_string().ends_with(&format!("correct \"{wrong}\"")), "{}", errors[0]);
    }
}
