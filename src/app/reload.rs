//! A reload: the configuration read again, compared key by key with the one in force, and applied as far as a daemon
//! that runs can. SIGHUP and the verb `reload` come here.
//!
//! What it is NOT: it changes nothing of the guard, the proofs or the addresses; those keys are named as in need of a
//! restart.
//!
//! **Invariant:** a file with an error changes nothing at all.

use super::daemon::read_rules;
use super::notices::Notices;
use crate::base::config::{Config, Pool, is_live};
use crate::base::fault::Fault;
use crate::io::files;
use crate::serve::command::Commands;
use crate::serve::listener::{Rules, raise_descriptor_limit};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

/// What a reload came to.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Reloaded {
    /// Keys that were changed and are in force.
    pub applied: Vec<String>,
    /// Keys that were changed and wait for a restart.
    pub waiting: Vec<String>,
    /// Why a key that could have been applied was not.
    pub refused: Vec<String>,
}

impl Reloaded {
    /// One sentence.
    pub fn text(&self) -> String {
        let mut text = "reloaded the files of [auth]".to_owned();
        if !self.applied.is_empty() {
            text.push_str(&format!(" and {}", self.applied.join(", ")));
        }
        if !self.waiting.is_empty() {
            text.push_str(&format!("; needs a restart: {}", self.waiting.join(", ")));
        }
        for why in &self.refused {
            text.push_str(&format!("; {why}"));
        }
        text
    }
}

/// Reads and applies. One for the daemon's life.
pub struct Reloader {
    file: PathBuf,
    rules: Arc<Rules>,
    commands: Commands,
    notices: Notices,
    /// What is in force: as at the start, but for what was applied since.
    running: Mutex<Config>,
}

impl Reloader {
    /// For a daemon that was started with this configuration.
    pub fn new(file: PathBuf, rules: Arc<Rules>, commands: Commands, notices: Notices, running: Config) -> Reloader {
        Reloader { file, rules, commands, notices, running: Mutex::new(running) }
    }

    /// Reads the file again and applies what can be applied.
    ///
    /// # Errors
    /// The file, or one that it names, is wrong; nothing was changed.
    pub fn reload(&self) -> Result<Reloaded, Fault> {
        let new = files::load_config(&self.file)?;
        let (hba, tls) = read_rules(&new.auth)?;
        // A poisoned lock cannot be: a panic ends the process.
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        let mut pool = Pool { mode: running.pool.mode, threads: running.pool.threads, ..new.pool.clone() };
        let mut done = Reloaded::default();
        (done.applied, done.waiting) = running.changes(&new).into_iter().partition(|key| is_live(key));
        if let Err(fault) = raise_descriptor_limit(pool.max_clients) {
            pool.max_clients = running.pool.max_clients;
            done.applied.retain(|key| key != "pool.max_clients");
            done.refused.push(format!("{fault}, then restart"));
        }
        self.rules.replace(hba, tls, new.auth.cache);
        self.commands.forget_roles();
        self.commands.set_limits(pool.clone());
        self.notices.set(new.notify.clone());
        running.console = new.console;
        running.notify = new.notify;
        running.auth = new.auth;
        running.pool = pool;
        self.commands.set_config(running.clone());
        Ok(done)
    }
}
