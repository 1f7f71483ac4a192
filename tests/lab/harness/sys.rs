//! The lab's ground floor: errors as sentences, one clock, commands with a time limit, waiting with a deadline, and
//! threads that live in another network namespace.

use portcullis::base::time::{Duration, Instant};
use std::fmt;
use std::fs::File;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

pub use portcullis::io::clock::now;

/// What went wrong, as one sentence; the lab adds everybody's logs before it shows it.
#[derive(Debug, Clone)]
pub struct Fail(pub String);

pub type Outcome<T = ()> = Result<T, Fail>;

impl fmt::Display for Fail {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

macro_rules! from_error {
    ($($kind:ty),*) => {$(
        impl From<$kind> for Fail {
            fn from(error: $kind) -> Fail {
                Fail(format!("{}: {error}", stringify!($kind)))
            }
        }
    )*};
}
from_error!(
    std::io::Error,
    serde_json::Error,
    tokio_postgres::Error,
    std::num::ParseIntError,
    std::net::AddrParseError,
    rustix::io::Errno
);

impl From<String> for Fail {
    fn from(text: String) -> Fail {
        Fail(text)
    }
}
impl From<&str> for Fail {
    fn from(text: &str) -> Fail {
        Fail(text.to_owned())
    }
}

/// Fails the lab with a sentence unless the condition holds.
#[macro_export]
macro_rules! ensure {
    ($condition:expr, $($text:tt)*) => {
        if !$condition {
            return Err($crate::harness::sys::Fail(format!("{} (line {}): {}", file!(), line!(), format!($($text)*))));
        }
    };
}

/// Signed milliseconds from `earlier` to `later`; negative when `later` came first.
pub fn ms(earlier: Instant, later: Instant) -> i64 {
    let nanos = i128::from(later.as_nanos()) - i128::from(earlier.as_nanos());
    i64::try_from(nanos / 1_000_000).unwrap_or(i64::MAX)
}

pub const fn secs(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

pub const fn millis(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

/// Sleeps; only ever used between two looks at a condition, or where "nothing happens for this long" is the claim.
pub fn pause(duration: Duration) {
    std::thread::sleep(duration);
}

/// How long any set-up command may take before it is killed; set-up commands take well under a second each.
pub const COMMAND_LIMIT: Duration = secs(120);

/// Runs a command line to its end, killed by `timeout` after `limit`; the output is captured.
pub fn run_within(limit: Duration, words: &[&str]) -> Outcome<Output> {
    let limit = format!("{:.1}", limit.as_secs_f64());
    Command::new("timeout")
        .args(["-k", "1", &limit])
        .args(words)
        .stdin(Stdio::null())
        .output()
        .map_err(|error| Fail(format!("cannot run {words:?}: {error}")))
}

/// Runs a command line; anything but exit code 0 is a failure that quotes its output. Returns standard output.
pub fn run(words: &[&str]) -> Outcome<String> {
    let output = run_within(COMMAND_LIMIT, words)?;
    let out = String::from_utf8_lossy(&output.stdout).into_owned();
    if output.status.success() {
        return Ok(out);
    }
    let err = String::from_utf8_lossy(&output.stderr);
    Err(Fail(format!("`{}` ended with {}: {} {}", words.join(" "), output.status, out.trim(), err.trim())))
}

/// [`run`] for a line whose words hold no spaces.
pub fn sh_words(line: &str) -> Outcome<String> {
    let words: Vec<&str> = line.split_whitespace().collect();
    run(&words)
}

/// Runs it and does not mind failure: clean-up, and "remove it if it is there".
pub fn run_quietly(line: &str) {
    let words: Vec<&str> = line.split_whitespace().collect();
    let _ = run_within(secs(60), &words);
}

/// How often [`wait_until`] looks.
const LOOK_EVERY: Duration = millis(20);

/// Looks at a condition every 20 ms until it holds; returns how long that took, or fails naming what was awaited and
/// what was seen last (the error text of the last look, if it was an error).
pub fn wait_until(deadline: Duration, what: &str, mut holds: impl FnMut() -> Outcome<bool>) -> Outcome<Duration> {
    let start = now();
    loop {
        let last = holds();
        if matches!(last, Ok(true)) {
            return Ok(now().since(start));
        }
        if now().since(start) > deadline {
            let seen = last.err().map(|error| format!("; last look: {error}")).unwrap_or_default();
            return Err(Fail(format!("waited {deadline:?} in vain for: {what}{seen}")));
        }
        pause(LOOK_EVERY);
    }
}

/// The claim that something never happens: looks every 20 ms for the whole time and fails at the first sight of it.
pub fn never(during: Duration, what: &str, mut happens: impl FnMut() -> Outcome<bool>) -> Outcome {
    let start = now();
    while now().since(start) < during {
        if happens()? {
            return Err(Fail(format!("must not be, but was seen after {} ms: {what}", ms(start, now()))));
        }
        pause(LOOK_EVERY);
    }
    Ok(())
}

/// Moves the calling thread (and the threads it starts later) into a named network namespace.
pub fn enter_netns(name: &str) -> Outcome {
    let file = File::open(netns_path(name)).map_err(|error| Fail(format!("namespace {name}: {error}")))?;
    let kind = Some(rustix::thread::LinkNameSpaceType::Network);
    rustix::thread::move_into_link_name_space(file.as_fd(), kind)?;
    Ok(())
}

/// For threads that measure: what came in time must not be noted late because the machine is busy. Only for threads
/// that start no programs, which would inherit it.
pub fn be_prompt() {
    let _as_it_is = rustix::process::setpriority_process(None, -15);
}

pub fn netns_path(name: &str) -> PathBuf {
    Path::new("/run/netns").join(name)
}

/// Runs `work` on a thread of its own inside the namespace and waits for it.
pub fn in_netns<T: Send>(name: &str, work: impl FnOnce() -> Outcome<T> + Send) -> Outcome<T> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            enter_netns(name)?;
            work()
        });
        thread.join().unwrap_or_else(|_| Err(Fail("a thread of the lab panicked".to_owned())))
    })
}

/// The last `lines` lines of a file, or a note why there are none.
pub fn tail(path: &Path, lines: usize) -> String {
    match std::fs::read(path) {
        Err(error) => format!("({error})"),
        Ok(bytes) => {
            let text = String::from_utf8_lossy(&bytes);
            let all: Vec<&str> = text.lines().collect();
            all[all.len().saturating_sub(lines)..].join("\n")
        }
    }
}

/// Programs the lab needs, and the Debian package that brings each.
const TOOLS: [(&str, &str); 13] = [
    ("ip", "iproute2"),
    ("nft", "nftables"),
    ("named", "bind9"),
    ("knotd", "knot"),
    ("nsupdate", "bind9-dnsutils"),
    ("arping", "iputils-arping"),
    ("psql", "postgresql-client"),
    ("nsenter", "util-linux"),
    ("hostname", "hostname"),
    ("ps", "procps"),
    ("systemd-nspawn", "systemd-container"),
    ("dbus-daemon", "dbus"),
    ("pkcheck", "polkitd"),
];

/// Installs what is missing; a test never skips itself. Said on standard error, because it changes the machine.
pub fn install_missing_tools() -> Outcome {
    let have = |tool: &str| ["/usr/sbin", "/usr/bin", "/sbin", "/bin"].iter().any(|d| Path::new(d).join(tool).exists());
    let mut packages: Vec<&str> = TOOLS.iter().filter(|(tool, _)| !have(tool)).map(|(_, package)| *package).collect();
    if super::postgres::newest_bin_dir().is_none() {
        packages.push("postgresql");
    }
    if packages.is_empty() {
        return Ok(());
    }
    eprintln!("lab: installing {}", packages.join(" "));
    run_within(secs(300), &["apt-get", "-o", "DPkg::Lock::Timeout=240", "-qq", "update"])?;
    let mut words = vec!["env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-o", "DPkg::Lock::Timeout=240", "-qq"];
    words.extend(["-y", "--no-install-recommends", "install"]);
    words.extend(packages);
    let output = run_within(secs(600), &words)?;
    if output.status.success() { Ok(()) } else { Err(Fail(String::from_utf8_lossy(&output.stderr).into_owned())) }
}
