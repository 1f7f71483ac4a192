//! The program as a user runs it, offline: help, usage errors, check-config, init, completions and manual pages.

use portcullis::app::cli;
use portcullis::base::config::Config;
use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use tempfile::TempDir;

/// Runs the program without a terminal.
fn portcullis(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_portcullis"))
        .args(args)
        .env_remove("RUST_LOG")
        .stdin(Stdio::null())
        .output()
        .expect("the program starts")
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).expect("UTF-8")
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).expect("UTF-8")
}

#[track_caller]
fn assert_exit(output: &Output, code: i32) {
    assert_eq!(output.status.code(), Some(code), "stdout: {}\nstderr: {}", stdout(output), stderr(output));
}

/// An `init` without questions into `dir`.
fn init(dir: &Path, more: &[&str]) -> Output {
    let dir = dir.to_str().expect("UTF-8");
    let mut args = vec!["init", "--service-name", "db.example.org", "--node", "alp=192.0.2.11"];
    args.extend(["--node", "midna=192.0.2.12,2001:db8::12", "--server", "192.0.2.53:53"]);
    args.extend(["--data-dir", "/var/lib/postgresql/15/main", "--bin-dir", "/usr/lib/postgresql/15/bin"]);
    args.extend(["--output-dir", dir]);
    args.extend(more);
    portcullis(&args)
}

/// A directory with a configuration that `check-config` finds good, and the path of the file.
fn good() -> (TempDir, String) {
    let dir = tempfile::tempdir().expect("a directory");
    assert_exit(&init(dir.path(), &["--witness"]), 0);
    let file = dir.path().join("portcullis.toml").to_str().expect("UTF-8").to_owned();
    (dir, file)
}

#[test]
fn help_of_every_verb_has_an_example_and_no_error() {
    let verbs: Vec<String> = cli::command().get_subcommands().map(|verb| verb.get_name().to_owned()).collect();
    assert!(verbs.len() >= 25, "{verbs:?}");
    for verb in &verbs {
        let output = portcullis(&[verb, "--help"]);
        assert_exit(&output, 0);
        let text = stdout(&output);
        assert!(text.contains(&format!("Example:\n  portcullis {verb}")), "{verb}: {text}");
        assert!(stderr(&output).is_empty());
    }
    assert_exit(&portcullis(&["recover", "--help"]), 0);
    assert!(stdout(&portcullis(&["--help"])).contains("Example:"));
    let version = portcullis(&["--version"]);
    assert_eq!(stdout(&version), format!("portcullis {}\n", env!("CARGO_PKG_VERSION")));
}

#[test]
fn wrong_usage_is_one_line_with_a_way_out() {
    let rows: &[(&[&str], i32, &str)] = &[
        (&[], 2, "portcullis --help"),
        (&["promot"], 2, "'promote'"),
        (&["promote", "--yess"], 2, "portcullis promote --help"),
        (&["--node", "alp", "rejoin"], 2, "portcullis rejoin --help"),
        (&["probe", "--interval", "5", "x"], 2, "250ms"),
        (&["events", "--since", "yesterday"], 2, "30m"),
        (&["check", "--unknown"], 3, "portcullis check --help"),
        (&["--log", "json", "check", "extra"], 3, "portcullis check --help"),
    ];
    for (args, code, words) in rows {
        let output = portcullis(args);
        assert_exit(&output, *code);
        let text = stderr(&output);
        assert!(text.starts_with("portcullis: ") && text.contains("; ") && text.contains(words), "{args:?}: {text}");
        assert_eq!(text.lines().count(), 1, "{args:?}: {text}");
        assert!(stdout(&output).is_empty());
    }
}

#[test]
fn what_is_not_built_says_so() {
    for args in [&["attach", "midna"][..], &["detach", "midna"]] {
        let output = portcullis(args);
        assert_exit(&output, 1);
        assert!(stderr(&output).contains("not built yet; "), "{args:?}");
    }
}

#[test]
fn check_config_takes_what_init_wrote() {
    let (_dir, file) = good();
    for args in
        [&["check-config", &file][..], &["--config", &file, "check-config"], &["check-config", "--config", &file]]
    {
        let output = portcullis(args);
        assert_exit(&output, 0);
        assert!(stdout(&output).contains("good") && stdout(&output).contains("alp and midna"), "{}", stdout(&output));
        assert_eq!(stderr(&output), "");
    }
}

#[test]
fn check_config_names_file_line_key_and_remedy_of_every_error() {
    let (_dir, file) = good();
    let text = fs::read_to_string(&file).expect("written");
    let text = text.replace("[fence]\n", "[fence]\nlease = 5\nleese = \"5s\"\n");
    let line = 1 + text.lines().position(|line| line == "lease = 5").expect("there");
    fs::write(&file, text).expect("ours");
    let output = portcullis(&["check-config", &file]);
    assert_exit(&output, 2);
    let said: Vec<String> = stderr(&output).lines().map(ToOwned::to_owned).collect();
    assert_eq!(said.len(), 2, "{said:#?}");
    assert!(said[0].starts_with(&format!("portcullis: {file}:{line}: fence.lease: ")), "{said:#?}");
    assert!(said[0].ends_with("; write \"5s\""), "{said:#?}");
    assert!(said[1].starts_with(&format!("portcullis: {file}:{}: fence.leese: unknown key; ", line + 1)), "{said:#?}");
    assert!(stdout(&output).is_empty());
}

#[test]
fn check_config_names_the_line_of_hba_file_that_the_gate_would_not_take() {
    let (dir, file) = good();
    let hba = dir.path().join("hba.conf").to_str().expect("UTF-8").to_owned();
    let text = fs::read_to_string(&file).expect("written");
    let at = text.lines().position(|line| line.starts_with("# hba_file = ")).expect("the example names it");
    let mut lines: Vec<String> = text.lines().map(ToOwned::to_owned).collect();
    assert_eq!(lines[at - 1], "# [auth]");
    lines[at - 1] = "[auth]".to_owned();
    lines[at] = format!("hba_file = \"{hba}\"");
    fs::write(&file, lines.join("\n")).expect("ours");
    // Not there: scram-sha-256 for everyone.
    assert_exit(&portcullis(&["check-config", &file]), 0);
    fs::write(&hba, "# who may\nhost all all 192.0.2.0/24 scram-sha-256\n").expect("ours");
    assert_exit(&portcullis(&["check-config", &file]), 0);
    fs::write(&hba, "# who may\nhost all all 192.0.2.0/24 gss\nhost all all 10.0.0.1 trust\n").expect("ours");
    let output = portcullis(&["check-config", &file]);
    assert_exit(&output, 2);
    let said: Vec<String> = stderr(&output).lines().filter(|line| !line.contains("warning")).map(Into::into).collect();
    assert_eq!(said.len(), 2, "{said:#?}");
    assert!(said[0].starts_with(&format!("portcullis: {hba}:2: auth.hba_file: ")), "{said:#?}");
    assert!(said[0].ends_with("; use scram-sha-256, md5, cert, trust or reject"), "{said:#?}");
    assert!(said[1].starts_with(&format!("portcullis: {hba}:3: auth.hba_file: ")), "{said:#?}");
    fs::write(&hba, "hostssl all all all cert\n").expect("ours");
    let said = stderr(&portcullis(&["check-config", &file]));
    assert!(said.contains(&format!("{hba}:1: auth.hba_file: ")) && said.contains("auth.tls_ca_file"), "{said}");
    // A file of names has errors of its own.
    fs::write(&hba, "include more.conf\n").expect("ours");
    let more = dir.path().join("more.conf").to_str().expect("UTF-8").to_owned();
    fs::write(&more, "host all @names all trust\n").expect("ours");
    let said = stderr(&portcullis(&["check-config", &file]));
    assert!(said.contains(&format!("{more}:1: auth.hba_file: ")) && said.contains("names is not there"), "{said}");
    fs::write(dir.path().join("names"), "ann, bob\n").expect("ours");
    assert_exit(&portcullis(&["check-config", &file]), 0);
    fs::write(&hba, [0xff, 0xfe]).expect("ours");
    let said = stderr(&portcullis(&["check-config", &file]));
    assert!(said.contains(&format!("{file}:{}: auth.hba_file: ", at + 1)) && said.contains("UTF-8"), "{said}");
}

#[test]
fn check_config_names_the_line_of_a_map_that_is_wrong_or_not_there() {
    let (dir, file) = good();
    let path = |name: &str| dir.path().join(name).to_str().expect("UTF-8").to_owned();
    let (hba, beside, own) = (path("hba.conf"), path("pg_ident.conf"), path("maps"));
    let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).expect("a certificate");
    for (name, text) in [("cert.pem", made.cert.pem()), ("key.pem", made.signing_key.serialize_pem())] {
        fs::write(path(name), text).expect("ours");
        fs::set_permissions(path(name), std::os::unix::fs::PermissionsExt::from_mode(0o600)).expect("ours");
    }
    let before = fs::read_to_string(&file).expect("written");
    let with = |more: &str| {
        let auth = format!(
            "{before}\n[auth]\nhba_file = \"{hba}\"\ntls_cert_file = \"{cert}\"\ntls_key_file = \"{key}\"\n\
             tls_ca_file = \"{cert}\"\n{more}\n",
            cert = path("cert.pem"),
            key = path("key.pem")
        );
        fs::write(&file, auth).expect("ours");
        let output = portcullis(&["check-config", &file]);
        (output.status.code(), stderr(&output).lines().filter(|line| !line.contains("warning")).collect::<String>())
    };
    fs::write(&hba, "# who\nhostssl all all all cert map=m\n").expect("ours");
    let (code, said) = with("");
    assert!(
        code == Some(2) && said.starts_with(&format!("portcullis: {hba}:2: auth.hba_file: the map \"m\"")),
        "{said}"
    );
    // Found beside hba_file, and not where a key names another.
    fs::write(&beside, "m /^(.*)@example\\.org$ \\1\n").expect("ours");
    assert_eq!(with(""), (Some(0), String::new()));
    let named = format!("ident_file = \"{own}\"");
    let (code, said) = with(&named);
    assert!(
        code == Some(2) && said.contains("auth.ident_file: ") && said.contains(&format!("{own} does not exist")),
        "{said}"
    );
    fs::write(&own, "other ann boss\n").expect("ours");
    assert!(with(&named).1.contains(&format!("is not in {own}; add it there")));
    fs::write(&own, "m ann boss\nm ann\n").expect("ours");
    let (code, said) = with(&named);
    assert!(code == Some(2) && said.starts_with(&format!("portcullis: {own}:2: auth.ident_file: ")), "{said}");
    fs::write(&own, "m ann boss\n").expect("ours");
    assert_eq!(with(&named), (Some(0), String::new()));
    // Revocation lists are read with the certificates they are for.
    let crl = path("cert.pem");
    let (code, said) = with(&format!("{named}\ntls_crl_file = \"{crl}\""));
    assert!(code == Some(2) && said.contains(&format!("portcullis: {crl}: there is no revocation list")), "{said}");
    let (code, said) = with(&format!("{named}\ntls_crl_file = \"/nowhere/crl\""));
    assert!(code == Some(2) && said.contains("auth.tls_crl_file: /nowhere/crl"), "{said}");
}

#[test]
fn check_config_of_no_file_or_no_text_is_an_error() {
    let dir = tempfile::tempdir().expect("a directory");
    let gone = dir.path().join("gone.toml");
    let output = portcullis(&["check-config", gone.to_str().expect("UTF-8")]);
    assert_exit(&output, 2);
    assert!(
        stderr(&output).contains("gone.toml") && stderr(&output).contains("portcullis init"),
        "{}",
        stderr(&output)
    );
    let binary = dir.path().join("binary.toml");
    fs::write(&binary, [0xff, 0xfe, 0x00]).expect("ours");
    assert_exit(&portcullis(&["check-config", binary.to_str().expect("UTF-8")]), 2);
}

#[test]
fn a_secret_open_to_others_is_refused_with_the_line_that_names_it() {
    for (name, key) in [
        ("cluster.key", "cluster.key_file"),
        ("tsig.key", "dns.tsig_key_file"),
        ("replication.pass", "replication.password_file"),
    ] {
        let (dir, file) = good();
        let secret = dir.path().join(name);
        fs::set_permissions(&secret, fs::Permissions::from_mode(0o644)).expect("ours");
        let output = portcullis(&["check-config", &file]);
        assert_exit(&output, 2);
        let text = fs::read_to_string(&file).expect("written");
        let line = 1 + text.lines().position(|line| line.contains(name) && !line.starts_with('#')).expect("there");
        let said = stderr(&output);
        assert!(said.contains(&format!("{file}:{line}: {key}: ")), "{said}");
        assert!(said.contains("0644") && said.contains(&format!("chmod o-rw {}", secret.display())), "{said}");
        let content = fs::read_to_string(&secret).expect("ours");
        assert!(!said.contains(content.trim()), "an error showed a secret");
    }
}

#[test]
fn missing_and_malformed_keys_are_refused() {
    let (dir, file) = good();
    let key = dir.path().join("cluster.key");
    for (content, words) in [("c2hvcnQ=\n", "5 bytes instead of 32"), ("not base64", "not base64"), ("", "is empty")] {
        fs::write(&key, content).expect("ours");
        let output = portcullis(&["check-config", &file]);
        assert_exit(&output, 2);
        assert!(stderr(&output).contains(words), "{}", stderr(&output));
    }
    fs::remove_file(&key).expect("ours");
    fs::remove_file(dir.path().join("tsig.key")).expect("ours");
    let output = portcullis(&["check-config", &file]);
    assert_exit(&output, 2);
    assert_eq!(stderr(&output).matches("does not exist; ").count(), 2, "{}", stderr(&output));
}

#[test]
fn init_never_overwrites() {
    let (dir, file) = good();
    let before: Vec<(String, Vec<u8>)> = ["portcullis.toml", "cluster.key", "tsig.key", "replication.pass"]
        .map(|name| (name.to_owned(), fs::read(dir.path().join(name)).expect("written")))
        .to_vec();
    let output = init(dir.path(), &["--witness"]);
    assert_exit(&output, 2);
    assert!(stderr(&output).contains(&format!("{file} exists; ")), "{}", stderr(&output));
    // Without the configuration, secrets that are there are kept: they may be the other node's.
    fs::remove_file(&file).expect("ours");
    let output = init(dir.path(), &["--witness"]);
    assert_exit(&output, 0);
    assert_eq!(stdout(&output).matches("kept ").count(), 3, "{}", stdout(&output));
    for (name, content) in before {
        assert!(fs::read(dir.path().join(&name)).expect("written") == content, "{name} changed");
    }
}

#[test]
fn init_writes_secrets_closed_to_others_and_different_each_time() {
    let (first, _) = good();
    let (second, _) = good();
    for name in ["cluster.key", "tsig.key", "replication.pass"] {
        let mode = fs::metadata(first.path().join(name)).expect("written").permissions().mode();
        assert_eq!(mode & 0o007, 0, "{name}: {mode:o}");
        let read = |dir: &TempDir| fs::read(dir.path().join(name)).expect("written");
        assert!(read(&first) != read(&second), "{name} is not random");
    }
}

#[test]
fn init_without_a_terminal_names_what_is_missing_and_writes_nothing() {
    let dir = tempfile::tempdir().expect("a directory");
    let target = dir.path().join("new");
    let output =
        portcullis(&["init", "--service-name", "db.example.org", "--output-dir", target.to_str().expect("UTF-8")]);
    assert_exit(&output, 2);
    for flag in ["--node", "--data-dir", "--bin-dir"] {
        assert!(stderr(&output).contains(flag), "{}", stderr(&output));
    }
    assert!(!stderr(&output).contains("--service-name"), "{}", stderr(&output));
    let output = init(&target, &["--vip", "192.0.2.100"]);
    assert_exit(&output, 2);
    assert!(stderr(&output).contains("vip.address"), "{}", stderr(&output));
    assert!(!target.exists());
    // The key is made here in any case, shown to nobody, and printed for the DNS server only when that is asked for.
    let output = init(&target, &[]);
    assert_exit(&output, 0);
    let key = fs::read_to_string(target.join("tsig.key")).expect("written");
    assert!(stdout(&output).contains("portcullis init --dns-server bind"), "{}", stdout(&output));
    assert!(!stdout(&output).contains(key.trim()), "init showed the key");
    let dir = target.to_str().expect("UTF-8");
    for (server, words) in [
        ("bind", ["grant portcullis name db.example.org A AAAA;", "name _portcullis.db.example.org TXT;"]),
        ("knot", ["action: update", "[db.example.org., _portcullis.db.example.org.]"]),
    ] {
        let output = portcullis(&["init", "--dns-server", server, "--output-dir", dir]);
        assert_exit(&output, 0);
        assert!(stdout(&output).contains(key.trim()), "{server}: no key");
        assert!(words.iter().all(|words| stdout(&output).contains(words)), "{}", stdout(&output));
    }
}

#[test]
fn init_yes_takes_what_it_finds_and_flags_are_judged_before_anything_is_written() {
    let dir = tempfile::tempdir().expect("a directory");
    let target = dir.path().join("new");
    // A cluster that a person made with initdb and keeps elsewhere.
    let data = dir.path().join("data");
    fs::create_dir(&data).expect("ours");
    fs::write(data.join("PG_VERSION"), "15\n").expect("ours");
    fs::write(data.join("postgresql.conf"), "port = 5499\nunix_socket_directories = '/run/mine'\n").expect("ours");
    let data = data.to_str().expect("UTF-8");
    let run = |more: &[&str]| {
        let mut args = vec!["init", "--yes", "--service-name", "DB.example.org.", "--data-dir", data];
        args.extend(["--node", "alp=192.0.2.11", "--server", "192.0.2.53"]);
        args.extend(["--output-dir", target.to_str().expect("UTF-8")]);
        args.extend(more);
        portcullis(&args)
    };
    for (more, words) in [
        (&["--node", "midna=192.0.2.11"][..], "192.0.2.11 is the first node's"),
        (&["--node", "midna=127.0.0.1"], "reached by nobody else"),
        (&["--node", "Mid na=192.0.2.12"], "is not a node name"),
        (&["--node", "midna=192.0.2.12", "--zone", "example.net"], "--zone: "),
        (&["--node", "midna=192.0.2.12", "--server", "ns.example.org"], "write it as 192.0.2.53:53"),
        (&["--node", "midna=192.0.2.12", "--bin-dir", "bin"], "--bin-dir: "),
    ] {
        let output = run(more);
        assert_exit(&output, 2);
        assert!(stderr(&output).contains(words), "{more:?}: {}", stderr(&output));
        assert!(!target.exists(), "{more:?} left something behind");
    }
    assert_exit(&run(&["--node", "midna=192.0.2.12"]), 0);
    let text = fs::read_to_string(target.join("portcullis.toml")).expect("written");
    let config = Config::parse(&text, Path::new("x")).expect("it parses");
    assert_eq!(config.service.name, "db.example.org");
    let postgres = &config.nodes[1].postgres;
    assert_eq!((postgres.port, postgres.socket_dir.to_str()), (5499, Some("/run/mine")));
    assert_eq!(postgres.bin_dir.to_str(), Some("/usr/lib/postgresql/15/bin"));
    assert_eq!(config.dns.expect("with DNS").servers, ["192.0.2.53:53".parse().expect("an address")]);
}

/// Export and import by files, into directories of their own; secrets stand where the configuration names them.
#[test]
fn a_bundle_brings_everything_or_nothing() {
    let (dir, file) = good();
    let path = |name: &str| dir.path().join(name).to_str().expect("UTF-8").to_owned();
    let own = dir.path().to_str().expect("UTF-8").to_owned();
    let names = ["portcullis.toml", "cluster.key", "tsig.key", "replication.pass"];
    let read = || names.map(|name| fs::read(dir.path().join(name)).ok());
    let before = read();
    let bundle = path("bundle");
    assert_exit(&portcullis(&["init", "--export", &bundle, "--output-dir", &own]), 0);
    let mode = fs::metadata(&bundle).expect("written").permissions().mode();
    assert_eq!(mode & 0o7777, 0o600, "the bundle holds secrets: {mode:o}");
    let again = portcullis(&["init", "--export", &bundle, "--output-dir", &own]);
    assert_exit(&again, 2);
    assert!(stderr(&again).contains("exists; it is left as it is"), "{}", stderr(&again));
    let import = |from: &str| portcullis(&["init", "--import", from, "--output-dir", &own]);

    // The same is there already: nothing to do, and typed twice it does no harm.
    let output = import(&bundle);
    assert_exit(&output, 0);
    assert_eq!(stdout(&output).matches("kept ").count(), 4, "{}", stdout(&output));
    // Gone: everything comes back as it was, closed to others.
    names.iter().for_each(|name| fs::remove_file(dir.path().join(name)).expect("ours"));
    let output = import(&bundle);
    assert_exit(&output, 0);
    assert!(read() == before, "not what was exported");
    assert!(stdout(&output).contains("next:\n"), "{}", stdout(&output));
    for name in &names[1..] {
        let mode = fs::metadata(dir.path().join(name)).expect("there").permissions().mode();
        assert_eq!(mode & 0o007, 0, "{name}: {mode:o}");
    }
    assert_exit(&portcullis(&["check-config", &file]), 0);

    // Another file in the way: nothing is written, not even what is missing.
    fs::remove_file(path("cluster.key")).expect("ours");
    fs::write(path("tsig.key"), "b3RoZXI=\n").expect("ours");
    let output = import(&bundle);
    assert_exit(&output, 2);
    assert!(stderr(&output).contains("tsig.key exists and is not what "), "{}", stderr(&output));
    assert!(!dir.path().join("cluster.key").exists(), "half was written");
    fs::remove_file(path("tsig.key")).expect("ours");

    // Cut off, or changed on the way.
    let text = fs::read_to_string(&bundle).expect("written");
    for (name, broken) in [
        ("short", text[..text.len() - 40].to_owned()),
        ("changed", text.replace("midna", "midnb")),
        ("empty", String::new()),
    ] {
        fs::write(path(name), broken).expect("ours");
        let output = import(&path(name));
        assert_exit(&output, 2);
        assert!(stderr(&output).contains("export it anew (nothing was written)"), "{name}: {}", stderr(&output));
        assert!(!dir.path().join("cluster.key").exists(), "{name}: something was written");
    }

    // For the witness's machine: its key and the configuration, and no more.
    assert_exit(&import(&bundle), 0);
    let narrow = path("narrow");
    assert_exit(&portcullis(&["init", "--export", &narrow, "--for-witness", "--output-dir", &own]), 0);
    let cluster_key = fs::read_to_string(path("cluster.key")).expect("there");
    assert!(!fs::read_to_string(&narrow).expect("there").contains(cluster_key.trim()), "the cluster's key is in it");
    names.iter().for_each(|name| fs::remove_file(dir.path().join(name)).expect("ours"));
    let output = import(&narrow);
    assert_exit(&output, 0);
    assert!(stdout(&output).contains("systemctl enable --now portcullis-witness"), "{}", stdout(&output));
    assert!(dir.path().join("tsig.key").exists() && !dir.path().join("cluster.key").exists());
}

#[test]
fn the_example_is_printed_and_parses() {
    let output = portcullis(&["init", "--example"]);
    assert_exit(&output, 0);
    Config::parse(&stdout(&output), Path::new("example")).expect("the example parses");
}

#[test]
fn completions_and_manual_pages_are_made() {
    for shell in ["bash", "zsh", "fish"] {
        let output = portcullis(&["completions", shell]);
        assert_exit(&output, 0);
        assert!(stdout(&output).contains("switchover"), "{shell}");
    }
    // The script is shell that bash itself takes.
    let mut bash = Command::new("bash").args(["-n"]).stdin(Stdio::piped()).spawn().expect("bash");
    let script = portcullis(&["completions", "bash"]).stdout;
    bash.stdin.take().expect("piped").write_all(&script).expect("bash reads");
    assert!(bash.wait().expect("bash ends").success());

    let dir = tempfile::tempdir().expect("a directory");
    assert_exit(&portcullis(&["man", dir.path().to_str().expect("UTF-8")]), 0);
    for verb in cli::command().get_subcommands() {
        let page = dir.path().join(format!("portcullis-{}.8", verb.get_name()));
        let text = fs::read_to_string(&page).unwrap_or_else(|error| panic!("{}: {error}", page.display()));
        assert!(text.contains(".TH") && text.contains("Example:"), "{text}");
    }
    assert!(dir.path().join("portcullis.8").exists());
    let output = portcullis(&["man", dir.path().join("gone").to_str().expect("UTF-8")]);
    assert_exit(&output, 1);
    assert!(stderr(&output).contains("name a directory that exists"), "{}", stderr(&output));
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let mut child = Command::new(env!("CARGO_BIN_EXE_portcullis"))
        .args(["completions", "bash"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program starts");
    drop(child.stdout.take());
    let output = child.wait_with_output().expect("it ends");
    assert!(output.stderr.is_empty(), "{}", stderr(&output));
    assert_eq!(output.status.code(), Some(0));
}

/// On a terminal, by the keyboard: answers that cannot be are told and asked again, and none of the others is lost.
#[test]
fn init_asks_on_a_terminal_and_bad_answers_lose_nothing() {
    let dir = tempfile::tempdir().expect("a directory");
    let target = dir.path().join("new");
    let line = format!(
        "{} init --data-dir /nowhere/data --bin-dir /nowhere/bin --output-dir {}",
        env!("CARGO_BIN_EXE_portcullis"),
        target.display()
    );
    // The pty of script(1); its own copy of what was typed is thrown away.
    let mut child = Command::new("timeout")
        .args(["60", "script", "-qec", &line, "/dev/null"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("script, of bsdutils");
    // This name and address; the other name (this one, then another) and address; the service (no domain, then one);
    // DNS; its zone; portcullis serves it; where; write it.
    let keys = "alp\r192.0.2.11\ralp\rmidna\r192.0.2.300\r192.0.2.11\r192.0.2.12\rdb\rdb.portcullis.invalid\r\r\ry\r\
                192.0.2.53\r\r";
    let mut stdin = child.stdin.take().expect("piped");
    stdin.write_all(keys.as_bytes()).expect("script reads");
    let output = child.wait_with_output().expect("it ends");
    drop(stdin);
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    for words in [
        "alp is this machine; name the other one",
        "\"192.0.2.300\" is no address",
        "192.0.2.11 is the first node's",
        "write the full name, as db.example.org",
        "no zone with db.portcullis.invalid in it",
        "alp (192.0.2.11), midna (192.0.2.12)",
    ] {
        assert!(said.contains(words), "{words:?} was not said: {said}");
    }
    assert!(output.status.success(), "{said}");
    let text = fs::read_to_string(target.join("portcullis.toml")).expect("written");
    let config = Config::parse(&text, Path::new("x")).expect("it parses");
    assert_eq!(config.service.name, "db.portcullis.invalid");
    assert!(config.witness.is_some_and(|witness| witness.listen == ["192.0.2.53:53".parse().expect("an address")]));
}
