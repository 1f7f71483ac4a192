//! Every class of error as a row: text, then the line, the key and the words that must be named.

use super::*;

const GOOD: &str = r#"
[service]
name = "db.example.org"
[[node]]
name = "alp"
address = "192.0.2.11"
[node.postgres]
data_dir = "/d"
bin_dir = "/b"
[[node]]
name = "midna"
address = "192.0.2.12"
[node.postgres]
data_dir = "/d"
bin_dir = "/b"
[cluster]
key_file = "/etc/portcullis/cluster.key"
[dns]
zone = "example.org"
servers = ["192.0.2.53:53"]
"#;

fn file() -> &'static Path {
    Path::new("/etc/portcullis/portcullis.toml")
}

fn parse(text: &str) -> Result<Config, Vec<ConfigError>> {
    Config::parse(text, file())
}

fn good() -> Config {
    parse(GOOD).expect("the good configuration parses")
}

/// The good text with `from` replaced by `to`.
fn with(from: &str, to: &str) -> String {
    assert!(GOOD.contains(from), "{from}");
    GOOD.replacen(from, to, 1)
}

/// The good text with more keys at its end; they start on line 21.
fn plus(more: &str) -> String {
    format!("{GOOD}{more}")
}

#[test]
fn defaults_are_those_of_the_contract() {
    let config = good();
    assert_eq!(config.state_dir, Path::new("/var/lib/portcullis"));
    assert_eq!(config.runtime_dir, Path::new("/run/portcullis"));
    let listen: Vec<String> = config.service.listen.iter().map(ToString::to_string).collect();
    assert_eq!(listen, ["0.0.0.0:6432", "[::]:6432"]);
    let node = &config.nodes[0];
    assert_eq!(node.peer_listen.to_string(), "192.0.2.11:6433");
    assert_eq!((node.weight, node.voter), (1.0, true));
    assert_eq!((node.postgres.host.as_str(), node.postgres.port), ("192.0.2.11", 5432));
    assert_eq!(node.postgres.socket_dir, Path::new("/var/run/postgresql"));
    assert!(node.postgres.start.is_none() && node.postgres.stop.is_none());
    assert_eq!(config.postgres.admin_user, "postgres");
    assert_eq!(config.auth.hba_file, Path::new("/etc/portcullis/hba.conf"));
    assert!(config.auth.tls_cert_file.is_none() && config.auth.ident_file.is_none() && config.auth.cache.is_zero());
    let dns = config.dns.as_ref().expect("written");
    assert_eq!(dns.mode, DnsMode::Update);
    assert_eq!((dns.poll, dns.ttl), (Duration::from_secs(1), Duration::from_secs(5)));
    let tsig = dns.tsig.as_ref().expect("update mode always signs");
    assert_eq!((tsig.name.as_str(), tsig.algorithm.as_str()), ("portcullis", "hmac-sha256"));
    assert_eq!(tsig.key_file, Path::new("/etc/portcullis/tsig.key"));
    assert_eq!(dns.propagation, Duration::ZERO);
    assert!(config.witness.is_none() && config.vip.is_none());
    assert_eq!((config.fence.lease, config.fence.max_drift), (Duration::from_secs(5), 0.01));
    assert_eq!((config.fence.margin, config.fence.postgres), (Duration::from_millis(500), FencePostgres::Demote));
    let replication = &config.replication;
    assert_eq!(replication.mode, ReplicationMode::Synchronous);
    assert_eq!(replication.on_standby_loss, OnStandbyLoss::Continue);
    assert_eq!(replication.standby_timeout, Duration::from_secs(3));
    assert_eq!((replication.user.as_str(), replication.slots), ("replicator", true));
    assert_eq!(replication.password_file, Path::new("/etc/portcullis/replication.pass"));
    assert_eq!((config.pool.size, config.pool.max_clients), (40, 10_000));
    assert_eq!(config.pool.query_wait, Duration::from_secs(30));
    assert_eq!(config.status_listen.map(|at| at.to_string()).as_deref(), Some("127.0.0.1:6434"));
}

/// Text, line, key, and words of the sentence.
type Row = (String, usize, &'static str, &'static [&'static str]);

#[test]
fn each_error_names_file_line_key_and_remedy() {
    let rows: Vec<Row> = vec![
        // unknown keys, at every level
        (plus("[fence]\nleese = \"5s\"\n"), 22, "fence.leese", &["unknown key", "did you mean \"lease\"?"]),
        (plus("[fense]\n"), 21, "fense", &["unknown key", "\"fence\""]),
        (with("[service]", "lease = \"5s\"\n[service]"), 2, "lease", &["unknown key", "belongs in [fence]"]),
        (plus("[pool]\nzzzzzzzzzz = 1\n"), 22, "pool.zzzzzzzzzz", &["unknown key", "nearest known key"]),
        (
            with("data_dir = ", "sokcet_dir = \"/s\"\ndata_dir = "),
            8,
            "node.alp.postgres.sokcet_dir",
            &["\"socket_dir\""],
        ),
        (with("name = \"alp\"", "name = \"alp\"\nvotter = true"), 6, "node.alp.votter", &["\"voter\""]),
        (with("name = \"midna\"", "name = \"none\""), 11, "node.none.name", &["no standby", "another name"]),
        (plus("tsig_key_file = \"\"\n"), 21, "dns.tsig_key_file", &["is empty", "signed", "/etc/portcullis/tsig.key"]),
        // syntax
        (with("name = \"alp\"", "name = alp"), 5, "TOML", &[]),
        (plus("[dns]\n"), 21, "TOML", &["duplicate"]),
        // types and units
        (plus("[fence]\nlease = 5\n"), 22, "fence.lease", &["needs its unit", "write \"5s\""]),
        (plus("[fence]\nlease = \"5\"\n"), 22, "fence.lease", &["has no unit", "write \"5s\""]),
        (plus("[fence]\nlease = \"0\"\n"), 22, "fence.lease", &["has no unit"]),
        (plus("[fence]\nlease = \"5 bananas\"\n"), 22, "fence.lease", &["not a duration", "write \"5s\""]),
        (plus("[fence]\nmargin = \"500500us\"\n"), 22, "fence.margin", &["finer than a millisecond"]),
        (plus("[fence]\nlease = \"2years\"\n"), 22, "fence.lease", &["longer than a year"]),
        (plus("[fence]\nmax_drift = 0.2\n"), 22, "fence.max_drift", &["out of range", "0.1"]),
        (plus("[fence]\nmax_drift = nan\n"), 22, "fence.max_drift", &["out of range"]),
        (plus("[fence]\nmax_drift = \"1%\"\n"), 22, "fence.max_drift", &["is a number, not text"]),
        (plus("[fence]\nkernel_gate = \"no\"\n"), 22, "fence.kernel_gate", &["true or false"]),
        (plus("[fence]\npostgres = \"kill\"\n"), 22, "fence.postgres", &["\"demote\" or \"stop\" or \"keep\""]),
        (plus("[pool]\nsize = 0\n"), 22, "pool.size", &["out of range"]),
        (plus("[pool]\nsize = \"40\"\n"), 22, "pool.size", &["whole number, not text"]),
        (plus("[status]\nlisten = \"localhost\"\n"), 22, "status.listen", &["address with a port"]),
        (with("name = \"db.example.org\"", "name = \"db..org\""), 3, "service.name", &["not a DNS name"]),
        (with("name = \"alp\"", "name = \"Alp\""), 5, "node.Alp.name", &["not a node name"]),
        (with("\"192.0.2.11\"", "\"alp.example.org\""), 6, "node.alp.address", &["not an IP address"]),
        (with("\"192.0.2.11\"", "[\"192.0.2.11\", \"192.0.2.13\"]"), 6, "node.alp.address", &["one family"]),
        (with("\"/d\"", "\"d\""), 8, "node.alp.postgres.data_dir", &["absolute path"]),
        (with("[\"192.0.2.53:53\"]", "\"192.0.2.53:53\""), 20, "dns.servers", &["is a list, not text"]),
        (with("[\"192.0.2.53:53\"]", "[\"ns.example.org\"]"), 20, "dns.servers", &["not an IP address"]),
        (with("servers = ", "tsig_algorithm = \"hmac-md5\"\nservers = "), 20, "dns.tsig_algorithm", &["hmac-sha256"]),
        (with("servers = ", "mode = \"auto\"\nservers = "), 20, "dns.mode", &["\"update\" or \"observe\""]),
        (with("[cluster]", "[[cluster]]"), 16, "cluster", &["section, not a list"]),
        (plus("[vip]\naddress = \"192.0.2.100\"\n"), 22, "vip.address", &["mask", "192.0.2.100/24"]),
        // required keys
        (with("name = \"db.example.org\"\n", ""), 2, "service.name", &["missing", "write name ="]),
        (with("name = \"alp\"\n", ""), 4, "node[1].name", &["missing"]),
        (with("address = \"192.0.2.11\"\n", ""), 4, "node.alp.address", &["missing"]),
        (with("data_dir = \"/d\"\n", ""), 7, "node.alp.postgres.data_dir", &["missing"]),
        (with("bin_dir = \"/b\"\n", ""), 7, "node.alp.postgres.bin_dir", &["missing"]),
        (with("key_file = ", "#"), 16, "cluster.key_file", &["missing"]),
        (plus("[vip]\n"), 21, "vip.address", &["missing"]),
        // relations
        (plus("[fence]\nlease = \"1900ms\"\n"), 22, "fence.lease", &["twice dns.poll", "write \"2s\" or more"]),
        (with("servers = ", "poll = \"3s\"\nservers = "), 1, "fence.lease", &["twice dns.poll", "\"6s\""]),
        (
            plus("[vip]\naddress = \"192.0.2.100/24\"\n[fence]\nlease = \"2500ms\"\n"),
            24,
            "fence.lease",
            &["VIP", "\"3s\""],
        ),
        (plus("[fence]\nmargin = \"99ms\"\n"), 22, "fence.margin", &["\"100ms\" or more"]),
        (with("servers = ", "poll = \"0s\"\nservers = "), 20, "dns.poll", &["without pause"]),
        (with("servers = ", "ttl = \"500ms\"\nservers = "), 20, "dns.ttl", &["whole seconds"]),
        (with("\"midna\"", "\"alp\""), 11, "node[2].name", &["[[node]] 1", "name of its own"]),
        (with("\"192.0.2.12\"", "\"192.0.2.11\""), 12, "node.midna.address", &["address of node alp"]),
        (
            with("\"192.0.2.12\"", "\"192.0.2.12\"\npeer_listen = \"192.0.2.11:6433\""),
            13,
            "node.midna.peer_listen",
            &["node alp"],
        ),
        (with("\"192.0.2.12\"", "\"192.0.2.12\"\nvoter = false"), 4, "node", &["1 voters", "exactly two"]),
        (with("zone = \"example.org\"", "zone = \"example.net\""), 3, "service.name", &["not within", "example.net"]),
        (with("zone = \"example.org\"", "zone = \"ample.org\""), 3, "service.name", &["not within"]),
        (plus("[auth]\ntls_cert_file = \"/c\"\n"), 22, "auth.tls_cert_file", &["tls_key_file too"]),
        (plus("[auth]\ntls_key_file = \"/k\"\n"), 22, "auth.tls_key_file", &["tls_cert_file too"]),
        (plus("[auth]\ntls_ca_file = \"/a\"\n"), 22, "auth.tls_ca_file", &["tls_cert_file too"]),
        (plus("[auth]\ntls_crl_file = \"/r\"\n"), 22, "auth.tls_crl_file", &["tls_ca_file too"]),
        (plus("[auth]\ncache = \"61s\"\n"), 22, "auth.cache", &["old password", "60s"]),
        (plus("[vip]\naddress = \"192.0.2.11/24\"\n"), 6, "node.alp.address", &["is the VIP"]),
        (plus("[witness]\nactive = \"alpp\"\n"), 22, "witness.active", &["no [[node]]"]),
        // not built yet
        (with("[[node]]", "passive = \"forward\"\n[[node]]"), 4, "service.passive", &["not built yet", "\"refuse\""]),
        (with("[[node]]", "units = [\"web service\"]\n[[node]]"), 4, "service.units", &["not the name of a unit"]),
        (with("[[node]]", "units = [\"postgresql@15-main.service\"]\n[[node]]"), 4, "service.units", &["every cut"]),
        (plus("[vip]\naddress = [\"192.0.2.100/24\", \"192.0.2.100/24\"]\n"), 22, "vip.address", &["twice"]),
        (
            plus("[vip]\naddress = \"192.0.2.100/24\"\nwitness = [\"192.0.2.12\"]\n"),
            23,
            "vip.witness",
            &["prove nothing"],
        ),
        (plus("[fence]\nstonith = [\"true\"]\n"), 22, "fence.stonith", &["full path"]),
        (plus("[pool]\nmode = \"statement\"\n"), 22, "pool.mode", &["\"session\"", "\"transaction\""]),
        (plus("[pool]\nlifetime = 20\n"), 22, "pool.lifetime", &["unit", "20s"]),
        (plus("[reads]\nbalance = true\n"), 22, "reads.balance", &["not built yet"]),
        (plus("[notify]\ncommand = [\"page\"]\n"), 22, "notify.command", &["full path", "no shell"]),
        (plus("[notify]\nmail = [\"-oQ/tmp\"]\n"), 22, "notify.mail", &["not one mail address"]),
        (plus("[notify]\nmail = [\"a@b, c@d\"]\n"), 22, "notify.mail", &["not one mail address"]),
        (plus("[notify]\nsendmail = \"sendmail\"\n"), 22, "notify.sendmail", &["absolute path"]),
        (with("servers = ", "update_command = [\"x\"]\nservers = "), 20, "dns.update_command", &["not built yet"]),
        (plus("[vip]\naddress = \"192.0.2.100/24\"\nwitness = [\"gw\"]\n"), 23, "vip.witness", &["gw"]),
        (with("[dns]\nzone = \"example.org\"\nservers = [\"192.0.2.53:53\"]\n", ""), 1, "dns", &["no [vip] either"]),
    ];
    for (text, line, key, words) in rows {
        let errors = parse(&text).expect_err(&text);
        let shown: Vec<String> = errors.iter().map(ToString::to_string).collect();
        assert_eq!(errors.len(), 1, "{key}: {shown:#?}");
        let error = &errors[0];
        assert_eq!((error.key.as_str(), error.line), (key, line), "{shown:#?}");
        assert!(shown[0].starts_with(&format!("/etc/portcullis/portcullis.toml:{line}: {key}: ")), "{shown:#?}");
        assert!(!error.remedy.is_empty() && !shown[0].contains('\n'), "{shown:#?}");
        for word in words {
            assert!(shown[0].contains(word), "\"{word}\" is not in {}", shown[0]);
        }
    }
}

#[test]
fn all_errors_come_at_once_in_file_order() {
    let text = with("name = \"alp\"", "name = \"alp\"\nvotter = true").replace("zone =", "zoen =")
        + "[pool]\nsize = 0\n[fence]\nlease = 5\n";
    let errors = parse(&text).expect_err("four mistakes");
    let keys: Vec<&str> = errors.iter().map(|error| error.key.as_str()).collect();
    assert_eq!(keys, ["node.alp.votter", "dns.zoen", "pool.size", "fence.lease"]);
}

#[test]
fn default_values_of_what_is_not_built_are_accepted() {
    let text = with("[[node]]", "passive = \"refuse\"\nunits = []\n[[node]]")
        .replace("zone =", "update_command = []\nzone =")
        + "[fence]\nkernel_gate = false\nstonith = []\n[pool]\nmode = \"session\"\n[reads]\nbalance = false\n\
           [notify]\ncommand = []\n[auth]\ntls_cert_file = \"\"\ntls_key_file = \"\"\ntls_ca_file = \"\"\n\
           tls_crl_file = \"\"\nident_file = \"\"\ncache = \"0s\"\n";
    parse(&text).expect("defaults are never errors");
}

#[test]
fn the_example_parses_in_all_its_shapes() {
    let two = Config::parse(&Config::example(), file()).expect("the example parses");
    assert_eq!(two.nodes.len(), 2);
    assert_eq!(two.service.name, "db.example.org");
    let mut template = Template { vip: Some("192.0.2.100/24".into()), witness: true, ..Template::default() };
    template.nodes[0].addresses = vec!["192.0.2.11".into(), "2001:db8::11".into()];
    template.nodes[1].addresses = vec!["2001:db8::12".into()];
    let full = Config::parse(&template.render(), file()).expect("the full example parses");
    assert!(full.vip.is_some());
    assert_eq!(full.witness.expect("asked for").active.as_str(), "alp");
    assert_eq!(full.nodes[1].peer_listen.to_string(), "[2001:db8::12]:6433");
    // What is commented out is the default: uncommented, the file says the same.
    let skip = ["start", "stop", "vip_interface", "interface"];
    let mut section = String::new();
    let mut text = String::new();
    for line in Config::example().lines() {
        let bare = line.strip_prefix("# ").unwrap_or(line);
        let key = bare.split_once('=').map(|(key, _)| key.trim()).filter(|key| !key.contains(' '));
        if bare.starts_with('[') {
            section = bare.to_owned();
        }
        let optional = ["[vip]", "[witness]"].contains(&section.as_str());
        let taken = !optional && (bare.starts_with('[') || key.is_some_and(|key| !skip.contains(&key)));
        text += if taken { bare } else { line };
        text.push('\n');
    }
    let spelt = Config::parse(&text, file()).expect("the uncommented example parses");
    assert_eq!(format!("{spelt:?}"), format!("{two:?}"));
}

#[test]
fn hostile_answers_stay_quoted_in_the_example() {
    let template = Template { service_name: "a\"\n[fence]\nlease = \"1s".into(), ..Template::default() };
    let errors = Config::parse(&template.render(), file()).expect_err("no DNS name");
    assert_eq!(errors.len(), 1);
    assert_eq!(errors[0].key, "service.name");
}

#[test]
fn more_nodes_than_two_are_no_voters_by_default() {
    let third =
        "[[node]]\nname = \"third\"\naddress = \"192.0.2.13\"\n[node.postgres]\ndata_dir = \"/d\"\nbin_dir = \"/b\"\n";
    let config = parse(&with("[cluster]", &format!("{third}[cluster]"))).expect("three nodes");
    let names: Vec<&str> = config.voters().iter().map(|node| node.name.as_str()).collect();
    assert_eq!(names, ["alp", "midna"]);
    assert_eq!(config.index(&"third".parse().expect("a name")), Some(2));
    assert!(config.node(&"fourth".parse().expect("a name")).is_none());
}

#[test]
fn the_wait_is_rounded_up_to_the_millisecond() {
    let mut config = good();
    for (lease, drift, margin, wait) in
        [(5000, 0.01, 500, 5602), (3000, 0.0, 200, 3200), (9000, 0.1, 100, 11_100), (3000, 0.01, 200, 3261)]
    {
        config.fence.lease = Duration::from_millis(lease);
        config.fence.max_drift = drift;
        config.fence.margin = Duration::from_millis(margin);
        assert_eq!(config.wait_before_takeover(), Duration::from_millis(wait), "{lease} {drift} {margin}");
    }
}

#[test]
fn the_digest_covers_what_a_pledge_rests_on_and_nothing_else() {
    let digest = |text: &str| parse(text).expect(text).shared_digest();
    let base = digest(GOOD);
    assert_eq!(base.len(), 16);
    let same = [
        with("\"/d\"", "\"/e\""),
        with("[service]", "state_dir = \"/s\"\n[service]"),
        plus("[pool]\nmax_clients = 50\n"),
        with("zone =", "poll = \"2s\"\nzone ="),
    ];
    for text in same {
        assert_eq!(digest(&text), base, "{text}");
    }
    let different = [
        plus("[fence]\nlease = \"6s\"\n"),
        plus("[fence]\nmargin = \"600ms\"\n"),
        plus("[fence]\nmax_drift = 0.02\n"),
        plus("[vip]\naddress = \"192.0.2.100/24\"\n"),
        with("\"192.0.2.12\"", "\"192.0.2.14\""),
        with("192.0.2.53:53", "192.0.2.54:53"),
        with("db.example.org", "db2.example.org"),
        with("zone =", "mode = \"observe\"\nzone ="),
        with("\"midna\"", "\"mina\""),
    ];
    let mut seen = vec![base];
    for text in different {
        let digest = digest(&text);
        assert!(!seen.contains(&digest), "{text}");
        seen.push(digest);
    }
}

#[test]
fn warnings_are_said_once_and_only_where_true() {
    let config = good();
    assert_eq!(config.warnings.len(), 1, "{:?}", config.warnings);
    assert!(config.warnings[0].contains("going alone"), "{:?}", config.warnings);
    let quiet = parse(&plus("[replication]\non_standby_loss = \"block\"\n")).expect("valid");
    assert!(quiet.warnings.is_empty(), "{:?}", quiet.warnings);
    let text = with("192.0.2.53:53", "192.0.2.11:53") + "[replication]\non_standby_loss = \"block\"\n";
    let on_node = parse(&text).expect("valid");
    assert_eq!(on_node.warnings.len(), 1, "{:?}", on_node.warnings);
    assert!(on_node.warnings[0].contains("no third voter"), "{:?}", on_node.warnings);
}

#[test]
fn observe_mode_signs_only_with_a_named_key() {
    let observe = |more: &str| {
        let config = parse(&with("zone =", &format!("mode = \"observe\"\n{more}zone ="))).expect("valid");
        config.dns.expect("written").tsig.is_some()
    };
    assert!(!observe(""));
    assert!(observe("tsig_key_file = \"/k\"\n"));
}

#[test]
fn names_lose_their_dot_and_case() {
    let text = with("\"db.example.org\"", "\"DB.Example.ORG.\"").replace("\"example.org\"", "\"Example.org.\"");
    let config = parse(&text).expect("valid");
    assert_eq!(config.service.name, "db.example.org");
    assert_eq!(config.dns.expect("written").zone, "example.org");
}

#[test]
fn debug_shows_no_secret() {
    assert_eq!(format!("{:?}", Secret::new(b"hunter2".to_vec())), "Secret(...)");
}

#[test]
fn arbitrary_text_never_panics() {
    use proptest::prelude::*;
    proptest!(|(text in "[\\[\\]a-z=\"0-9.\n# ]{0,200}")| {
        let _ = parse(&text);
        let _ = parse(&(GOOD.to_owned() + &text));
    });
}

#[test]
fn the_example_without_dns_is_a_service_with_a_vip_alone() {
    let template = Template { vip: Some("192.0.2.100/24".into()), dns: false, ..Template::default() };
    let config = parse(&template.render()).expect("it parses");
    assert!(config.dns.is_none() && config.vip.is_some());
    assert!(config.warnings.iter().any(|warning| warning.contains("no third voter")), "{:?}", config.warnings);
}
