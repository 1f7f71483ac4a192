//! docs/install.md, word for word: each recipe's commands are run on machines as bare as the guide says, in its order,
//! and what they print is compared with what is printed there.
//!
//! What is stood in for, honestly:
//! - The machines are systemd containers over this very machine's root, forgotten at the end: real systemd, polkit,
//!   apt and Debian's PostgreSQL, but its packages are there already, so apt downloads nothing. What installing
//!   `postgresql` does on a fresh machine, a cluster 15/main that runs, is done here just before `apt install`.
//! - The package is real, made by packaging/deb.sh, with a debug build of the program in it.
//! - The machine ns has BIND, as a site that has a zone: its zone and configuration before the guide are [`BIND`].
//! - There is no sshd: `... | ssh root@ADDRESS COMMAND` runs COMMAND on the machine with that address, with the pipe's
//!   text as its input.
//! - Commands have no terminal, so that there is no colour and no bar.
//!
//! What differs from run to run is compared by its form ([`FORMS`]); a line `[...]` in the guide stands for lines that
//! are left out there. `GUIDE_SAID=FILE` writes down what the commands said, for whoever edits the guide.

use crate::ensure;
use crate::harness::host::{Boot, Host, Lifeline};
use crate::harness::net::{Plug, Switch};
use crate::harness::node::http_from;
use crate::harness::sys::{Fail, Outcome, ms, now, run, secs, wait_until};
use crate::turns::Turn;
use regex::Regex;
use serde_json::Value;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

const GUIDE: &str = include_str!("../../docs/install.md");

/// The hosts of the guide and the last number of their addresses.
const HOSTS: [(&str, u8); 3] = [("alp", 11), ("midna", 12), ("ns", 53)];

/// What is compared by its form alone: pattern and what stands for it.
const FORMS: [(&str, &str); 12] = [
    (r"\b\d+ errors?(, the first: [ -:<-~]*)?", "<errors>"),
    (r"\b\d+ pieces? of advice", "<advice>"),
    (r"\b\d+ things were checked", "<checks>"),
    (r"\d{8}T\d{6}Z", "<stamp>"),
    (r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(\.\d+)?Z?", "<time>"),
    (r"\b\d\d:\d\d:\d\d\b", "<time>"),
    (r"\b[0-9A-F]+/[0-9A-F]{6,}\b", "<lsn>"),
    (r"\b\d+(\.\d+)? (ms|s|min)\b( ago)?", "<span>"),
    (r"\b\d+(\.\d+)? (B|kB|KiB|MB|MiB|GB|GiB)(/s)?\b", "<size>"),
    (r#"secret "?[A-Za-z0-9+/]{43}=+"?"#, "secret <key>"),
    (r"\bkey: [A-Za-z0-9+/]{43}=+", "key: <key>"),
    (r" {2,}", "  "),
];

/// One thing that the guide has a person do.
#[derive(Debug)]
enum Step {
    /// A command, and the lines it prints.
    Command { host: String, line: String, expected: Vec<String>, at: usize },
    /// A file to write, whole.
    File { host: String, path: String, text: String },
}

/// The steps of the section with this heading. Commands stand in blocks ```` ```console ````, after `HOST# `; a file is
/// a block ```` ```text HOST:PATH ````.
fn steps_of(heading: &str) -> Outcome<Vec<Step>> {
    let mut steps: Vec<Step> = Vec::new();
    let mut inside = false;
    let mut block: Option<String> = None;
    for (number, line) in GUIDE.lines().enumerate() {
        if block.is_none() && line.starts_with("## ") {
            inside = line == format!("## {heading}");
        }
        if !inside {
            continue;
        }
        if let Some(info) = line.strip_prefix("```") {
            block = match block {
                Some(_) => None,
                None => Some(info.to_owned()),
            };
            if let Some((host, path)) = info.strip_prefix("text ").and_then(|place| place.split_once(':')) {
                let (host, path) = (host.to_owned(), path.to_owned());
                steps.push(Step::File { host, path, text: String::new() });
            }
            continue;
        }
        match block.as_deref() {
            Some("console") => {
                let prompt = line.split_once("# ").filter(|(host, _)| HOSTS.iter().any(|(name, _)| name == host));
                match (prompt, steps.last_mut()) {
                    (Some((host, command)), _) => steps.push(Step::Command {
                        host: host.to_owned(),
                        line: command.to_owned(),
                        expected: Vec::new(),
                        at: number + 1,
                    }),
                    // A command that goes on in the next line.
                    (None, Some(Step::Command { line: command, expected, .. }))
                        if command.ends_with('\\') && expected.is_empty() =>
                    {
                        command.truncate(command.len() - 1);
                        command.push_str(line.trim_start());
                    }
                    (None, Some(Step::Command { expected, .. })) => expected.push(line.to_owned()),
                    (None, _) => return Err(Fail(format!("docs/install.md:{}: no prompt before this", number + 1))),
                }
            }
            Some(info) if info.starts_with("text ") => {
                if let Some(Step::File { text, .. }) = steps.last_mut() {
                    text.push_str(line);
                    text.push('\n');
                }
            }
            _ => {}
        }
    }
    match steps.is_empty() {
        true => Err(Fail(format!("docs/install.md has no commands under \"## {heading}\""))),
        false => Ok(steps),
    }
}

/// A line with what differs from run to run taken out.
fn form(line: &str) -> String {
    static ALL: OnceLock<Vec<(Regex, &str)>> = OnceLock::new();
    let all =
        ALL.get_or_init(|| FORMS.map(|(pattern, form)| (Regex::new(&format!("(?-u){pattern}")).unwrap(), form)).into());
    let text = all.iter().fold(line.to_owned(), |text, (pattern, form)| pattern.replace_all(&text, *form).into_owned());
    text.trim_end().to_owned()
}

/// Does what was said match what is printed? `[...]` stands for any number of lines.
fn matches(expected: &[String], said: &[String]) -> bool {
    match expected.split_first() {
        None => said.is_empty(),
        Some((first, rest)) if first == "[...]" => (0..=said.len()).any(|skip| matches(rest, &said[skip..])),
        Some((first, rest)) => said.split_first().is_some_and(|(line, more)| line == first && matches(rest, more)),
    }
}

/// The guide's machines, bare.
struct Machines {
    hosts: Vec<Host>,
    dir: PathBuf,
    _lifeline: Lifeline,
}

static MADE: AtomicU32 = AtomicU32::new(0);

impl Machines {
    fn new(name: &str, count: usize) -> Outcome<Machines> {
        let pid = std::process::id();
        let prefix = format!("pcg{pid}-{}", MADE.fetch_add(1, Ordering::Relaxed));
        let dir = PathBuf::from(format!("/tmp/pclab-{pid}-{name}"));
        let plugs: Vec<Plug> = HOSTS.iter().take(count).map(|(name, last)| Plug::new(&prefix, name, *last)).collect();
        let mut namespaces: Vec<String> = plugs.iter().map(|plug| plug.ns.clone()).collect();
        namespaces.push(format!("{prefix}-sw"));
        let lifeline = Lifeline::new(&dir, &namespaces)?;
        fs::create_dir(&dir)?;
        fs::write(dir.join("owner"), pid.to_string())?;
        fs::write(dir.join("resolv.conf"), "nameserver 192.0.2.53\noptions timeout:1 attempts:2\n")?;
        fs::copy(package()?, dir.join("portcullis.deb"))?;
        let switch = Switch::build(&prefix)?;
        // All at once: booting is mostly waiting.
        let hosts: Outcome<Vec<Host>> = std::thread::scope(|scope| {
            let (switch, dir, lifeline) = (&switch, &dir, &lifeline);
            let boot = |(plug, (name, _)): (Plug, (&'static str, u8))| {
                scope.spawn(move || Host::new(name, plug, switch, dir, lifeline.reader()?, Boot::Systemd))
            };
            let threads: Vec<_> = plugs.into_iter().zip(HOSTS).map(boot).collect();
            threads.into_iter().map(|t| t.join().unwrap_or_else(|_| Err("a thread panicked".into()))).collect()
        });
        let machines = Machines { hosts: hosts?, dir, _lifeline: lifeline };
        for host in &machines.hosts {
            host.exec("", &["sh", "-c", BARE, "bare", &machines.dir.display().to_string(), &host.name])?;
        }
        Ok(machines)
    }

    fn host(&self, name: &str) -> Outcome<&Host> {
        self.hosts.iter().find(|host| host.name == name).ok_or_else(|| Fail(format!("there is no machine {name}")))
    }

    fn at(&self, address: &str) -> Outcome<&Host> {
        let found = self.hosts.iter().find(|host| host.address() == address);
        found.ok_or_else(|| Fail(format!("no machine has the address {address}")))
    }

    /// Runs a line of the guide on a machine; what it printed, both outputs in one.
    fn type_in(&self, host: &Host, line: &str) -> Outcome<(String, i32)> {
        let mut input = None;
        let mut text = String::new();
        let mut code = 0;
        for part in line.split(" | ") {
            let (at, command) = match part.strip_prefix("ssh root@").and_then(|rest| rest.split_once(' ')) {
                // The quotes are the near shell's.
                Some((address, command)) => (self.at(address)?, command.trim_matches('\'')),
                None => (host, part),
            };
            if command.starts_with("apt install") && command.contains("postgresql") {
                at.exec("", &["sh", "-c", FRESH_POSTGRESQL])?;
            }
            let (out, err, ended) = in_shell(at, command, input.as_deref())?;
            text.push_str(&err);
            code = ended;
            input = Some(out);
        }
        text.push_str(&input.unwrap_or_default());
        Ok((text, code))
    }

    fn walk(&self, heading: &str) -> Outcome {
        if heading.contains("BIND") {
            self.host("ns")?.exec("", &["sh", "-c", BIND])?;
        }
        let mut said = format!("## {heading}\n\n");
        let mut wrong = String::new();
        let outcome = self.walk_all(heading, &mut said, &mut wrong);
        if let Some(file) = std::env::var_os("GUIDE_SAID") {
            let mut all = fs::read_to_string(&file).unwrap_or_default();
            all.push_str(&said);
            fs::write(&file, all)?;
        }
        match (outcome, wrong.is_empty()) {
            (Ok(()), true) => Ok(()),
            (outcome, _) => {
                let broken = outcome.err().map(|error| error.0).unwrap_or_default();
                Err(Fail(format!("{wrong}{broken}\n{}", self.logs())))
            }
        }
    }

    fn walk_all(&self, heading: &str, said: &mut String, wrong: &mut String) -> Outcome {
        let steps = steps_of(heading)?;
        let twice: Vec<(String, String)> = steps
            .iter()
            .filter_map(|step| match step {
                Step::Command { host, line, .. } if line.contains("--postgres ") => Some((host.clone(), line.clone())),
                _ => None,
            })
            .collect();
        for step in steps {
            match step {
                Step::File { host, path, text } => {
                    let file = self.dir.join("file");
                    fs::write(&file, text)?;
                    self.host(&host)?.exec("", &["cp", &file.display().to_string(), &path])?;
                }
                Step::Command { host, line, expected, at } => {
                    self.take_a_moment(&line)?;
                    let began = now();
                    let (text, code) = self.type_in(self.host(&host)?, &line)?;
                    let _ = writeln!(said, "{host}# {line}\n{text}(ended with {code} after {} ms)\n", ms(began, now()));
                    let is: Vec<String> = text.lines().map(form).collect();
                    let should: Vec<String> = expected.iter().map(|line| form(line)).collect();
                    if !matches(&should, &is) {
                        let _ = writeln!(
                            wrong,
                            "docs/install.md:{at}: {host}# {line}\n--- printed there\n{}\n--- said here (exit {code})\n\
                             {text}",
                            expected.join("\n")
                        );
                    }
                    if code != 0 {
                        let _ = writeln!(wrong, "docs/install.md:{at}: {host}# {line}\nended with {code}: {text}");
                        break;
                    }
                }
            }
        }
        // Typed again in service: nothing is touched, and the standby's data least of all.
        for (host, line) in twice {
            let (text, code) = self.type_in(self.host(&host)?, &line)?;
            let primary = line.contains("--postgres primary");
            let (should, words) = if primary { (0, "not restarted: nothing changed\n") } else { (2, "rejoin midna") };
            ensure!(code == should && text.contains(words), "{line}, typed again: {code}, {text}");
            ensure!(text.contains("kept /etc/portcullis/portcullis.toml"), "{line}, typed again: {text}");
        }
        let (text, code) = self.type_in(self.host("alp")?, "portcullis check")?;
        ensure!(code == 0, "check at the end: {text}");
        Ok(())
    }

    /// A person who has just started both daemons takes a moment to type on, as the guide says; a machine would not.
    fn take_a_moment(&self, line: &str) -> Outcome {
        let state = |host: &str| -> Outcome<Value> {
            let (code, body) = http_from(self.host(host)?.ns(), "127.0.0.1", "/status.json")?;
            ensure!(code == 200, "status.json of {host}: {code}");
            Ok(serde_json::from_str(&body)?)
        };
        let is = |status: &Value, pointer: &str| status.pointer(pointer) == Some(&Value::Bool(true));
        let pointer = match line.split(' ').nth(1) {
            Some("promote") => "/peer/reachable",
            Some("rejoin") => "/gate/open",
            Some("drill" | "doctor" | "status" | "nodes") => "/replication/in_sync",
            _ => return Ok(()),
        };
        wait_until(secs(60), &format!("alp to be ready for `{line}`"), || {
            let status = state("alp")?;
            if is(&status, pointer) { Ok(true) } else { Err(Fail(status.to_string())) }
        })
        .map(drop)
    }

    fn logs(&self) -> String {
        let script =
            "journalctl --no-pager -n 60 -o cat -u portcullis -u portcullis-witness -u 'postgresql@*' -u named";
        let of = |host: &Host| host.exec("", &["sh", "-c", script]).unwrap_or_else(|error| error.0);
        self.hosts.iter().map(|host| format!("=== {}\n{}\n", host.name, of(host))).collect()
    }
}

/// Nothing of the database and of the service is left of the machine that is underneath; the package lies where the
/// guide has it copied to.
const BARE: &str = r#"
rm -rf /etc/postgresql/* /var/lib/postgresql/* /var/log/postgresql/* /etc/portcullis /var/lib/portcullis
rm -rf /etc/systemd/system/postgresql@*.d /usr/sbin/policy-rc.d /var/lib/apt/lists/*
cp "$1/portcullis.deb" /root/portcullis_0.1.0_amd64.deb
echo "$2" >/etc/hostname
hostname "$2"
"#;

/// The name server of a site, before it knows of portcullis.
const BIND: &str = r#"
cat >/etc/bind/named.conf.local <<END
zone "example.org" { type primary; file "/var/lib/bind/example.org"; };
END
cat >/var/lib/bind/example.org <<'END'
$TTL 300
@    IN SOA ns.example.org. hostmaster.example.org. 1 3600 600 86400 60
     IN NS  ns.example.org.
ns   IN A   192.0.2.53
db 5 IN A   192.0.2.11
END
systemctl start named
"#;

/// What the installation of `postgresql` leaves on a fresh machine.
const FRESH_POSTGRESQL: &str = "\
set -e
[ -e /etc/postgresql/15/main ] || pg_createcluster 15 main >/dev/null
systemctl start postgresql@15-main
";

/// A command line by the machine's own shell, as root at home. Standard output, standard error, exit code.
fn in_shell(host: &Host, command: &str, input: Option<&str>) -> Outcome<(String, String, i32)> {
    use std::io::Write;
    let mut words = std::process::Command::new("nsenter");
    words.args(["-t", &host.init_pid()?.to_string(), "-n", "-p", "-m", "-u", "--"]);
    words.args(["timeout", "-k", "1", "300", "env", "-i", "HOME=/root", "LC_ALL=C.UTF-8", "TERM=dumb"]);
    words.args(["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "sh", "-c"]);
    words.arg(format!("cd /root && {command}")).current_dir("/");
    words.stdin(if input.is_some() { Stdio::piped() } else { Stdio::null() });
    let mut child = words.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    if let (Some(text), Some(mut stdin)) = (input, child.stdin.take()) {
        stdin.write_all(text.as_bytes())?;
    }
    let output = child.wait_with_output()?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Ok((text(&output.stdout), text(&output.stderr), output.status.code().unwrap_or(-1)))
}

/// The package with the program under test, made once.
fn package() -> Outcome<&'static Path> {
    static MADE: OnceLock<Outcome<(PathBuf, Lifeline)>> = OnceLock::new();
    let made = MADE.get_or_init(|| {
        let target = PathBuf::from(format!("/tmp/pclab-{}-package", std::process::id()));
        let lifeline = Lifeline::new(&target, &[])?;
        let program = env!("CARGO_BIN_EXE_portcullis");
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/packaging/deb.sh");
        let set = [
            format!("CARGO_TARGET_DIR={}", target.display()),
            format!("PORTCULLIS_BIN={program}"),
            "PORTCULLIS_DEB_COMPRESSION=-Znone".to_owned(),
        ];
        let mut words = vec!["env"];
        words.extend(set.iter().map(String::as_str));
        words.push(script);
        run(&words)?;
        let found = fs::read_dir(target.join("debian"))?.flatten().map(|entry| entry.path());
        let mut found = found.filter(|path| path.extension().is_some_and(|end| end == "deb"));
        Ok((found.next().ok_or("packaging/deb.sh left no package")?, lifeline))
    });
    made.as_ref().map(|(package, _)| package.as_path()).map_err(Clone::clone)
}

fn follow(name: &'static str, machines: usize, heading: &str) {
    let _turn = Turn::wait(name, false);
    let began = now();
    let outcome = Machines::new(name, machines).and_then(|bare| {
        let booted = now();
        eprintln!("{name}: booted in {} ms", ms(began, booted));
        bare.walk(heading)
    });
    eprintln!("{name}: {} ms in all, with the package if it was not made yet", ms(began, now()));
    if let Err(error) = outcome {
        panic!("{name}: {error}");
    }
}

/// Name of the lab, machines, heading.
const RECIPES: [(&str, usize, &str); 3] = [
    ("guidebind", 3, "DNS, with a BIND of your own"),
    ("guidewitness", 3, "DNS, with the embedded server"),
    ("guidevip", 2, "A virtual address alone"),
];

/// The first recipe; the others differ from it in a few lines, and `LAB_GUIDES=3` (`make soak`) follows them too.
#[test]
fn the_guide_is_followed_word_for_word() {
    let count = std::env::var("LAB_GUIDES").ok().and_then(|count| count.parse().ok()).unwrap_or(1);
    for (name, machines, heading) in RECIPES.into_iter().take(count) {
        follow(name, machines, heading);
    }
}

#[test]
fn the_guide_is_read_as_it_is_written() {
    let lines = |text: &str| text.lines().map(form).collect::<Vec<_>>();
    assert!(matches(&lines("a\n[...]\nd"), &lines("a\nb\nc\nd")));
    assert!(matches(&lines("a\n[...]"), &lines("a")));
    assert!(!matches(&lines("a\n[...]\nd"), &lines("a\nb")));
    assert!(!matches(&lines("a"), &lines("a\nb")));
    assert!(matches(&lines("took 1.5 s at 0/3000148"), &lines("took 20 ms at 1A/3000D28")));
    assert!(!matches(&lines("took 1.5 s"), &lines("took long")));
}
