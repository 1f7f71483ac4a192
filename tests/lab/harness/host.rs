//! One machine of the lab: a network namespace, and a pid, mount and UTS namespace whose PID 1 reaps. Killing that
//! PID 1 is pulling the power: the kernel kills every process of the machine with it.
//!
//! Also the lifeline. Every PID 1 and a janitor outside all namespaces read from one pipe whose only writer is the lab
//! process. However that process ends (return, panic, abort, SIGKILL, Ctrl-C), the pipe closes, the machines go dark,
//! and the janitor removes the namespaces and the lab's directory.

use super::net::{Plug, Switch};
use super::sys::{Fail, Outcome, now, run_quietly, secs, wait_until};
use portcullis::base::time::{Duration, Instant};
use rustix::process::{Pid, Signal, kill_process};
use std::fs;
use std::io::{BufRead, BufReader, PipeReader, PipeWriter};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex, PoisonError};

/// PID 1 of a machine: sets name and resolver, then reaps whatever ends until the lifeline closes. Pids start elsewhere
/// after each boot, or the lock files of the former life would name processes of this one.
const INIT: &str = r#"
trap '' HUP INT TERM
hostname "$1"
{ echo $(($(date +%s) % 1000 * 30 + 300)) >/proc/sys/kernel/ns_last_pid; } 2>/dev/null
mount --bind "$2" /etc/resolv.conf 2>/dev/null
exec 3<&0
cat <&3 >/dev/null &
lifeline=$!
exec 3<&-
printf ready >/proc/1/comm
while kill -0 $lifeline 2>/dev/null; do wait $lifeline; done
"#;

/// A machine with a real service manager: systemd-nspawn over this very machine's root, read-only below and forgotten
/// at the end. The bind mount of the root lives in a mount namespace of its own: nobody outside ever sees it. The
/// cgroup is the container's own, because two systemd in one would stop each other's services.
const CONTAINER: &str = r#"
name=$1; ns=$2; lab=$3
if [ -e /sys/fs/cgroup/cgroup.controllers ]; then cg=/sys/fs/cgroup/$ns; else cg=/sys/fs/cgroup/systemd/$ns; fi
mkdir -p "$cg"
mount --bind / /mnt || exit 1
sh -c 'echo 0 >"$1/cgroup.procs"; shift; exec "$@"' start "$cg" systemd-nspawn --quiet --directory=/mnt \
    --volatile=overlay --register=no --keep-unit --capability=CAP_NET_ADMIN --machine="$name" \
    --network-namespace-path="/run/netns/$ns" \
    --bind="$lab" --resolv-conf=off --bind-ro="$lab/resolv.conf:/etc/resolv.conf" --console=pipe \
    --boot -- --unit=basic.target
find "$cg" -depth -type d -exec rmdir {} + 2>/dev/null
"#;

/// What a machine's PID 1 is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Boot {
    /// A shell that reaps; enough for programs that need no service manager.
    Shell,
    /// systemd with its bus and polkit, and no service but those the test writes.
    Systemd,
}

/// Waits for the lab's end, then removes what it made: processes by namespace, namespaces, directory.
const JANITOR: &str = r#"
trap '' HUP INT TERM
dir=$1; shift
cat >/dev/null
round=0
while [ $round -lt 100 ]; do
    left=0
    for ns in "$@"; do
        for pid in $(ip netns pids "$ns" 2>/dev/null); do kill -KILL "$pid" 2>/dev/null; left=1; done
    done
    [ $left = 0 ] && break
    round=$((round + 1)); sleep 0.05
done
for ns in "$@"; do ip netns del "$ns" 2>/dev/null; done
rm -rf "$dir"
"#;

/// Holds the lab's things in the world; dropping it removes them all and waits until that is done.
#[derive(Debug)]
pub struct Lifeline {
    writer: Option<PipeWriter>,
    reader: PipeReader,
    janitor: Child,
}

impl Lifeline {
    /// Starts the janitor for a directory and a list of network namespaces (which need not exist yet).
    pub fn new(dir: &Path, namespaces: &[String]) -> Outcome<Lifeline> {
        let (reader, writer) = std::io::pipe()?;
        let janitor = Command::new("sh")
            .args(["-c", JANITOR, "janitor"])
            .arg(dir)
            .args(namespaces)
            .stdin(Stdio::from(reader.try_clone()?))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .current_dir("/")
            .process_group(0)
            .spawn()?;
        Ok(Lifeline { writer: Some(writer), reader, janitor })
    }

    pub fn reader(&self) -> Outcome<PipeReader> {
        Ok(self.reader.try_clone()?)
    }

    /// Hands the lifeline to a process that outlives this one; ending that process ends the lab. Returns its pid.
    pub fn hand_over(&mut self) -> Outcome<u32> {
        let writer = self.writer.take().ok_or("the lifeline was handed over before")?;
        let keeper = Command::new("sleep")
            .arg("infinity")
            .stdin(Stdio::from(writer))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .current_dir("/")
            .process_group(0)
            .spawn()?;
        Ok(keeper.id())
    }
}

impl Drop for Lifeline {
    fn drop(&mut self) {
        if self.writer.take().is_some() {
            let _ = self.janitor.wait();
        }
    }
}

#[derive(Debug)]
struct Init {
    /// The `unshare` that is PID 1's parent, in our own pid namespace.
    parent: Child,
    /// PID 1 of the machine as seen from here.
    pid: i32,
}

impl Init {
    /// Kills PID 1 and with it the machine. It ends only when those who entered have reaped their commands, so these
    /// are woken for as long as it takes.
    fn end(&mut self) -> Outcome {
        send(self.pid, Signal::KILL)?;
        let waited = wait_until(secs(60), "PID 1 of a machine to end", || {
            wake_doors(self.pid);
            Ok(self.parent.try_wait()?.is_some())
        });
        waited.map(drop)
    }
}

/// One machine.
#[derive(Debug)]
pub struct Host {
    pub name: String,
    pub plug: Plug,
    switch: Switch,
    /// The lab's directory.
    pub lab_dir: PathBuf,
    lifeline: Arc<PipeReader>,
    boot: Boot,
    init: Mutex<Option<Init>>,
}

impl Host {
    /// Plugs the machine in and powers it on.
    pub fn new(
        name: &str,
        plug: Plug,
        switch: &Switch,
        lab_dir: &Path,
        lifeline: PipeReader,
        boot: Boot,
    ) -> Outcome<Host> {
        let host = Host {
            name: name.to_owned(),
            plug,
            switch: switch.clone(),
            lab_dir: lab_dir.to_owned(),
            lifeline: Arc::new(lifeline),
            boot,
            init: Mutex::new(None),
        };
        host.power_on()?;
        Ok(host)
    }

    pub fn ns(&self) -> &str {
        &self.plug.ns
    }

    pub fn address(&self) -> &str {
        &self.plug.address
    }

    /// A fresh boot: new namespaces, nothing running, the same disks and the same MAC address.
    pub fn power_on(&self) -> Outcome {
        self.switch.plug_in(&self.plug)?;
        let init = match self.boot {
            Boot::Shell => self.boot_shell()?,
            Boot::Systemd => self.boot_systemd()?,
        };
        *self.init.lock().unwrap_or_else(PoisonError::into_inner) = Some(init);
        Ok(())
    }

    fn boot_shell(&self) -> Outcome<Init> {
        let mut parent = Command::new("ip")
            .args(["netns", "exec", self.ns(), "unshare", "--pid", "--fork", "--uts", "--mount-proc"])
            .args(["--propagation", "slave", "--kill-child", "--", "sh", "-c", INIT, "init", &self.name])
            .arg(self.lab_dir.join("resolv.conf"))
            .stdin(Stdio::from(self.lifeline.try_clone()?))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .current_dir("/")
            .process_group(0)
            .spawn()?;
        let outer = parent.id();
        let mut pid = None;
        let ready = wait_until(secs(60), "PID 1 of a machine", || {
            // The first child exists before it has its own /proc, and calls itself so once its lifeline is held.
            let children = fs::read_to_string(format!("/proc/{outer}/task/{outer}/children"))?;
            pid = children.split_whitespace().next().and_then(|word| word.parse::<i32>().ok());
            let Some(pid) = pid else { return Ok(false) };
            Ok(fs::read_to_string(format!("/proc/{pid}/comm"))?.trim() == "ready")
        });
        let Some(pid) = pid.filter(|_| ready.is_ok()) else {
            let _ = parent.kill();
            let _ = parent.wait();
            return Err(Fail(format!("{} does not boot: {ready:?}", self.name)));
        };
        Ok(Init { parent, pid })
    }

    fn boot_systemd(&self) -> Outcome<Init> {
        let log = fs::File::create(self.lab_dir.join(format!("{}-systemd.log", self.name)))?;
        let mut parent = Command::new("unshare")
            .args(["--mount", "--", "sh", "-c", CONTAINER, "container", &self.name, self.ns()])
            .arg(&self.lab_dir)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .current_dir("/")
            .process_group(0)
            .spawn()?;
        let mut pid = None;
        let ready = wait_until(secs(60), "systemd to have booted", || {
            let pids = super::sys::run(&["ip", "netns", "pids", self.ns()])?;
            pid = pids.split_whitespace().filter_map(|word| word.parse().ok()).find(|pid| inner_pid(*pid) == Some(1));
            let Some(pid) = pid else { return Ok(false) };
            Ok(Path::new(&format!("/proc/{pid}/root/run/dbus/system_bus_socket")).exists())
        });
        match (pid, ready) {
            (Some(pid), Ok(_)) => Ok(Init { parent, pid }),
            (pid, ready) => {
                let _ = pid.map(|pid| send(pid, Signal::KILL));
                let _ = parent.kill();
                let _ = parent.wait();
                Err(Fail(format!("{} does not boot: {ready:?}", self.name)))
            }
        }
    }

    /// Pulls the plug: first the wire (a dead machine sends no farewell), then every process, then the namespaces.
    /// Returns the moment the wire went dark.
    pub fn power_off(&self) -> Outcome<Instant> {
        self.switch.link_down(&self.plug)?;
        let dark = now();
        let init = self.init.lock().unwrap_or_else(PoisonError::into_inner).take();
        let mut init = init.ok_or_else(|| format!("{} has no power already", self.name))?;
        let path = format!("/proc/{}/ns/pid", init.pid);
        // Held open until nobody is looked for any more, or another lab's machine might get its number.
        let _held = fs::File::open(&path)?;
        let namespace = fs::read_link(&path)?;
        init.end()?;
        wait_until(secs(60), "every process of the machine gone", || Ok(processes_in(&namespace).is_empty()))?;
        self.switch.unplug(&self.plug);
        Ok(dark)
    }

    pub fn has_power(&self) -> bool {
        self.init.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    /// PID 1 of the machine as seen from here.
    pub fn init_pid(&self) -> Outcome<i32> {
        let init = self.init.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(init.as_ref().ok_or_else(|| format!("{} has no power", self.name))?.pid)
    }

    /// Every process of the machine, as pids seen from here; PID 1 first.
    pub fn processes(&self) -> Outcome<Vec<i32>> {
        let init = self.init_pid()?;
        let mut pids = processes_in(&fs::read_link(format!("/proc/{init}/ns/pid"))?);
        pids.sort_by_key(|pid| *pid != init);
        Ok(pids)
    }

    /// SIGSTOP to every process, again and again until a look finds all of them stopped. Returns when that was.
    pub fn freeze(&self) -> Outcome<Instant> {
        let start = now();
        loop {
            let running: Vec<i32> = self.processes()?.into_iter().filter(|pid| !stands_still(*pid)).collect();
            if running.is_empty() {
                return Ok(now());
            }
            for pid in running {
                let _ = send(pid, Signal::STOP);
            }
            if now().since(start) > secs(60) {
                return Err(Fail(format!("{} does not freeze", self.name)));
            }
        }
    }

    /// SIGCONT to every process. Returns the moment before the first.
    pub fn thaw(&self) -> Outcome<Instant> {
        let start = now();
        for pid in self.processes()? {
            let _ = send(pid, Signal::CONT);
        }
        wake_doors(self.init_pid()?);
        Ok(start)
    }

    /// Processes of the machine with this command name (`/proc/PID/comm`), as pids seen from here.
    pub fn named(&self, name: &str) -> Outcome<Vec<i32>> {
        let comm = |pid: i32| fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        Ok(self.processes()?.into_iter().filter(|pid| comm(*pid).trim_end() == name).collect())
    }

    /// Processes of the machine whose command line (`/proc/PID/cmdline`, PostgreSQL's titles too) holds the text.
    pub fn titled(&self, text: &str) -> Outcome<Vec<i32>> {
        let title = |pid: i32| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            String::from_utf8_lossy(&line).replace('\0', " ")
        };
        Ok(self.processes()?.into_iter().filter(|pid| title(*pid).contains(text)).collect())
    }

    pub fn link_down(&self) -> Outcome<Instant> {
        self.switch.link_down(&self.plug)?;
        Ok(now())
    }

    pub fn link_up(&self) -> Outcome {
        self.switch.link_up(&self.plug)?;
        // The kernel dropped the default route with the carrier's address scope at most; put it back if so.
        run_quietly(&format!("ip -n {} route replace default via {}", self.ns(), super::net::GATEWAY));
        Ok(())
    }

    /// Off the network with carrier still shown. Returns the moment just before.
    pub fn isolate(&self) -> Outcome<Instant> {
        let start = now();
        self.switch.isolate(&self.plug)?;
        Ok(start)
    }

    pub fn rejoin_network(&self) -> Outcome {
        self.switch.rejoin_bridge(&self.plug)
    }

    /// A command line inside the machine, as `user` (root when empty), killed after `limit`.
    pub fn exec_within(&self, limit: Duration, user: &str, words: &[&str]) -> Outcome<Output> {
        let mut command = self.enter()?;
        let limit = format!("{:.1}", limit.as_secs_f64());
        command.args(["timeout", "-k", "1", &limit]).args(as_user(user)).args(words);
        Ok(command.stdin(Stdio::null()).output()?)
    }

    /// [`Host::exec_within`] as root, with both outputs handed over line by line as they come. Returns exit code and
    /// text.
    pub fn exec_live(&self, limit: Duration, words: &[&str], mut on_line: impl FnMut(&str)) -> Outcome<(i32, String)> {
        let mut command = self.enter()?;
        let limit = format!("{:.1}", limit.as_secs_f64());
        command.args(["timeout", "-k", "1", &limit, "sh", "-c", r#"exec "$@" 2>&1"#, "live"]).args(words);
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
        let mut text = String::new();
        if let Some(out) = child.stdout.take() {
            for line in BufReader::new(out).lines() {
                let line = line?;
                on_line(&line);
                text.push_str(&line);
                text.push('\n');
            }
        }
        Ok((child.wait()?.code().unwrap_or(-1), text))
    }

    /// [`Host::exec_within`] two minutes, where anything but exit code 0 is a failure. Returns standard output.
    pub fn exec(&self, user: &str, words: &[&str]) -> Outcome<String> {
        let output = self.exec_within(secs(120), user, words)?;
        let out = String::from_utf8_lossy(&output.stdout).into_owned();
        if output.status.success() {
            return Ok(out);
        }
        let err = String::from_utf8_lossy(&output.stderr).into_owned();
        Err(Fail(format!("on {}: {words:?} ended with {}: {} {}", self.name, output.status, out.trim(), err.trim())))
    }

    /// Starts a long-lived program inside the machine as a child of its PID 1, in a session of its own, with output
    /// appended to `log`. Returns its pid as seen from here.
    pub fn spawn(&self, log: &Path, environment: &[(&str, &str)], words: &[&str]) -> Outcome<i32> {
        let mut command = self.enter()?;
        let script = r#"log=$1; shift; setsid "$@" </dev/null >>"$log" 2>&1 & echo $!"#;
        command.args(["sh", "-c", script, "start"]).arg(log).args(words);
        command.envs(environment.iter().copied());
        let output = command.stdin(Stdio::null()).output()?;
        let inner: i32 = String::from_utf8_lossy(&output.stdout).trim().parse()?;
        let mut found = None;
        wait_until(secs(60), "the started program's pid", || {
            found = self.processes()?.into_iter().find(|pid| inner_pid(*pid) == Some(inner));
            Ok(found.is_some())
        })
        .map_err(|_| Fail(format!("{words:?} on {} ended at once: {}", self.name, super::sys::tail(log, 5))))?;
        found.ok_or_else(|| Fail("no pid".to_owned()))
    }

    /// A command that enters this machine; arguments to be added are the command line to run there.
    fn enter(&self) -> Outcome<Command> {
        let mut command = Command::new("nsenter");
        command.args(["-t", &self.init_pid()?.to_string(), "-n", "-p", "-m", "-u", "--"]);
        command.current_dir("/").env_remove("PGPASSWORD").env("LC_ALL", "C.UTF-8");
        Ok(command)
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let init = self.init.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(mut init) = init {
            let _ = init.end();
        }
    }
}

impl Host {
    /// Leaves the machine running when this value is dropped (the lifeline alone decides from now on).
    pub fn forget(&self) {
        self.init.lock().unwrap_or_else(PoisonError::into_inner).take();
    }
}

/// The words that make a command run as another system user.
pub fn as_user(user: &str) -> Vec<String> {
    if user.is_empty() {
        return Vec::new();
    }
    ["setpriv", "--reuid", user, "--regid", user, "--init-groups"].iter().map(|word| (*word).to_owned()).collect()
}

/// Sends a signal to a process of this lab, by its pid as seen from here.
pub fn send(pid: i32, signal: Signal) -> Outcome {
    let pid = Pid::from_raw(pid).ok_or("pid 0 is not a process of the lab")?;
    Ok(kill_process(pid, signal)?)
}

/// SIGSTOP to these processes; returns when every thread of all of them stands still.
pub fn stop_all(pids: &[i32]) -> Outcome<Instant> {
    for pid in pids {
        send(*pid, Signal::STOP)?;
    }
    wait_until(secs(60), "stopped processes to stand still", || Ok(pids.iter().all(|pid| stands_still(*pid))))?;
    Ok(now())
}

/// SIGCONT to these processes, those that are gone left out. Returns the moment before the first.
pub fn continue_all(pids: &[i32]) -> Instant {
    let start = now();
    for pid in pids {
        let _gone_is_fine = send(*pid, Signal::CONT);
    }
    start
}

/// Sets the limit of file descriptors of a running process (prlimit); returns the soft one before.
pub fn descriptors_limit(pid: i32, limit: u64) -> Outcome<u64> {
    set_limit(pid, "nofile", limit)
}

/// Sets the limit of processes of a running process's user, for that process alone; returns the soft one before.
pub fn processes_limit(pid: i32, limit: u64) -> Outcome<u64> {
    set_limit(pid, "nproc", limit)
}

/// The soft limit alone, so that it can be raised again; as the user that the daemon became, who needs no right for it.
fn set_limit(pid: i32, name: &str, limit: u64) -> Outcome<u64> {
    let (pid, flag) = (pid.to_string(), format!("--{name}"));
    let prlimit = |words: &[&str]| {
        let mut line = as_user(super::postgres::SYSTEM_USER);
        line.extend(["prlimit", "--pid", &pid].map(str::to_owned));
        line.extend(words.iter().map(|word| (*word).to_owned()));
        super::sys::run(&line.iter().map(String::as_str).collect::<Vec<_>>())
    };
    let before = prlimit(&[&flag, "-o", "SOFT", "--noheadings"])?;
    prlimit(&[&format!("{flag}={limit}:")])?;
    Ok(before.trim().parse().unwrap_or(1_000_000))
}

fn stands_still(pid: i32) -> bool {
    let Ok(threads) = fs::read_dir(format!("/proc/{pid}/task")) else { return true };
    let state = |path: PathBuf| fs::read_to_string(path.join("stat")).ok()?.rsplit_once(") ")?.1.chars().next();
    threads.flatten().all(|thread| state(thread.path()).is_none_or(|state| matches!(state, 'T' | 't' | 'Z' | 'X')))
}

/// An `nsenter` whose command is stopped with its machine stops itself, outside the machine, where nobody would wake it
/// and its caller would wait for ever. Continues those of our own that entered the machine with this PID 1.
fn wake_doors(init: i32) {
    let Ok(threads) = fs::read_dir("/proc/self/task") else { return };
    for thread in threads.flatten() {
        let children = fs::read_to_string(thread.path().join("children")).unwrap_or_default();
        for pid in children.split_whitespace().filter_map(|word| word.parse::<i32>().ok()) {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            if line.starts_with(format!("nsenter\0-t\0{init}\0").as_bytes()) && is_stopped(pid) {
                let _ = send(pid, Signal::CONT);
            }
        }
    }
}

/// Is the process there and not a zombie? Its first thread may be one while others still hold descriptors and locks.
pub fn is_alive(pid: i32) -> bool {
    stat_of(pid).is_some_and(|(state, threads)| (state != 'Z' && state != 'X') || threads > 1)
}

pub fn wait_dead(pid: i32) -> Outcome {
    wait_until(secs(60), "a killed process to be gone", || Ok(!is_alive(pid))).map(drop)
}

fn is_stopped(pid: i32) -> bool {
    state_of(pid).is_none_or(|state| matches!(state, 'T' | 't' | 'Z' | 'X'))
}

fn state_of(pid: i32) -> Option<char> {
    stat_of(pid).map(|(state, _)| state)
}

/// State letter and number of threads (/proc/PID/stat, fields 3 and 20); `None`: no such process.
fn stat_of(pid: i32) -> Option<(char, u32)> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = stat.rsplit_once(") ")?.1.split(' ');
    Some((fields.next()?.chars().next()?, fields.nth(16)?.parse().ok()?))
}

/// The process's pid in its innermost pid namespace.
fn inner_pid(pid: i32) -> Option<i32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find(|line| line.starts_with("NSpid:"))?;
    line.split_whitespace().next_back()?.parse().ok()
}

/// Live processes whose pid namespace is this one (`pid:[...]`, as /proc shows it).
fn processes_in(namespace: &Path) -> Vec<i32> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    let pids = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    pids.filter(|pid| fs::read_link(format!("/proc/{pid}/ns/pid")).is_ok_and(|link| link == namespace)).collect()
}
