//! Watchers of both nodes' status pages, asked inside each node so that cut wires do not blind them. A node without
//! power is asked again when it has power.

use super::trace::Look;
use crate::harness::Lab;
use crate::harness::node::{http_from, text_at};
use crate::harness::sys::{Outcome, millis, now, pause};
use portcullis::base::time::Duration;
use serde_json::Value;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

const LOOK_EVERY: Duration = millis(50);

/// One thread for each node. They stop when dropped.
#[derive(Debug)]
pub struct Eyes {
    looks: Arc<Mutex<Vec<Look>>>,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Eyes {
    pub fn open(lab: &Lab) -> Outcome<Eyes> {
        let mut eyes = Eyes { looks: Arc::default(), stop: Arc::default(), threads: Vec::new() };
        for (index, node) in lab.nodes().into_iter().enumerate() {
            let (ns, looks, stop) = (node.ns().to_owned(), eyes.looks.clone(), eyes.stop.clone());
            let body = move || {
                while !stop.load(Ordering::Relaxed) {
                    if let Ok(look) = look(&ns, index) {
                        looks.lock().unwrap_or_else(PoisonError::into_inner).push(look);
                    }
                    pause(LOOK_EVERY);
                }
            };
            eyes.threads.push(std::thread::Builder::new().name("eyes".to_owned()).spawn(body)?);
        }
        Ok(eyes)
    }

    pub fn looks(&self) -> Vec<Look> {
        self.looks.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Stops them and returns all they saw.
    pub fn finish(mut self) -> Vec<Look> {
        self.close();
        self.looks()
    }

    fn close(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

impl Drop for Eyes {
    fn drop(&mut self) {
        self.close();
    }
}

fn look(ns: &str, node: usize) -> Outcome<Look> {
    let asked = now();
    let (_, body) = http_from(ns, "127.0.0.1", "/status.json")?;
    let answered = now();
    let status: Value = serde_json::from_str(&body)?;
    let number = |pointer: &str| status.pointer(pointer).and_then(Value::as_u64).unwrap_or_default();
    let open = status.pointer("/gate/open") == Some(&Value::Bool(true));
    Ok(Look {
        node,
        asked,
        answered,
        active: open || text_at(&status, "/role") == "active",
        open,
        complete: number("/journal/complete"),
        won: number("/journal/won"),
        lease_ms: number("/gate/lease_remaining_ms"),
        cuts: number("/counters/gate_cuts"),
    })
}
