//! A headless Chromium, driven over its debugging pipe (the DevTools protocol, NUL after each message): pages opened as
//! a phone or a desk sees them, with script or without, and everything they asked for or complained about.

use data_encoding::BASE64;
use serde_json::{Value, json};
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::pipe;
use tokio::time::timeout;

/// For each answer and each wait; on a machine that is very busy too.
const LIMIT: Duration = Duration::from_secs(90);

pub struct Browser {
    child: Child,
    to: pipe::Sender,
    from: pipe::Receiver,
    unread: Vec<u8>,
    next: u64,
    events: Vec<Value>,
    _folder: TempDir,
}

/// How a page is looked at.
#[derive(Debug, Clone, Copy)]
pub struct Look {
    pub width: u32,
    pub dark: bool,
    pub script: bool,
}

impl Look {
    pub const DESK: Look = Look { width: 1100, dark: false, script: true };
    pub const PHONE: Look = Look { width: 360, dark: true, script: false };
}

/// One open page.
#[derive(Debug, Clone)]
pub struct Tab {
    session: String,
    target: String,
}

impl Browser {
    pub async fn start() -> Browser {
        let folder = tempfile::tempdir().unwrap();
        let (to, from) = (folder.path().join("to"), folder.path().join("from"));
        for path in [&to, &from] {
            rustix::fs::mknodat(rustix::fs::CWD, path, rustix::fs::FileType::Fifo, rustix::fs::Mode::RWXU, 0).unwrap();
        }
        let from_pipe = pipe::OpenOptions::new().read_write(true).open_receiver(&from).unwrap();
        let to_pipe = pipe::OpenOptions::new().read_write(true).open_sender(&to).unwrap();
        // The browser reads commands from descriptor 3 and answers on 4.
        let line = "exec chromium --headless --no-sandbox --disable-gpu --disable-quic --no-first-run \
             --disable-background-networking --disable-component-update --disable-sync --disable-dev-shm-usage \
             --disable-extensions --hide-scrollbars --remote-debugging-pipe --user-data-dir=\"$HOME/data\" \
             3<\"$HOME/to\" 4>\"$HOME/from\" about:blank";
        let child = Command::new("sh")
            .args(["-c", line])
            .env("HOME", folder.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let (unread, events) = (Vec::new(), Vec::new());
        let mut browser = Browser { child, to: to_pipe, from: from_pipe, unread, next: 0, events, _folder: folder };
        // It may not be there (packaging/setup.sh installs it): then this says so after the limit.
        let version = browser.call(None, "Browser.getVersion", json!({})).await;
        assert!(version["product"].as_str().is_some_and(|name| name.contains("Chrom")), "{version}");
        browser
    }

    async fn message(&mut self) -> Value {
        loop {
            if let Some(end) = self.unread.iter().position(|byte| *byte == 0) {
                let rest = self.unread.split_off(end + 1);
                let whole = std::mem::replace(&mut self.unread, rest);
                return serde_json::from_slice(&whole[..end]).unwrap();
            }
            let mut more = vec![0; 1 << 16];
            let n = timeout(LIMIT, self.from.read(&mut more)).await.expect("chromium says nothing").unwrap();
            assert!(n > 0, "chromium ended");
            self.unread.extend_from_slice(&more[..n]);
        }
    }

    /// One command and its result; what comes in between is remembered.
    pub async fn call(&mut self, session: Option<&str>, method: &str, params: Value) -> Value {
        self.next += 1;
        let id = self.next;
        let mut command = json!({"id": id, "method": method, "params": params});
        if let Some(session) = session {
            command["sessionId"] = session.into();
        }
        let mut bytes = serde_json::to_vec(&command).unwrap();
        bytes.push(0);
        self.to.write_all(&bytes).await.unwrap();
        loop {
            let message = self.message().await;
            if message["id"] == id {
                assert!(message["error"].is_null(), "{method}: {}", message["error"]);
                return message["result"].clone();
            }
            self.events.push(message);
        }
    }

    async fn event(&mut self, tab: &Tab, method: &str) {
        let is = |event: &Value| event["method"] == method && event["sessionId"] == tab.session.as_str();
        while !self.events.iter().any(is) {
            let message = self.message().await;
            self.events.push(message);
        }
    }

    /// A new page at `url`, loaded.
    pub async fn open(&mut self, url: &str, look: Look) -> Tab {
        self.events.clear();
        let made = self.call(None, "Target.createTarget", json!({"url": "about:blank"})).await;
        let target = made["targetId"].as_str().unwrap().to_owned();
        let held = self.call(None, "Target.attachToTarget", json!({"targetId": target, "flatten": true})).await;
        let tab = Tab { session: held["sessionId"].as_str().unwrap().to_owned(), target };
        for domain in ["Page", "Runtime", "Network", "Log"] {
            self.on(&tab, &format!("{domain}.enable"), json!({})).await;
        }
        let size = json!({"width": look.width, "height": 800, "deviceScaleFactor": 1, "mobile": look.width < 500});
        self.on(&tab, "Emulation.setDeviceMetricsOverride", size).await;
        let scheme = if look.dark { "dark" } else { "light" };
        let media = json!({"features": [{"name": "prefers-color-scheme", "value": scheme}]});
        self.on(&tab, "Emulation.setEmulatedMedia", media).await;
        self.on(&tab, "Emulation.setScriptExecutionDisabled", json!({"value": !look.script})).await;
        self.on(&tab, "Page.navigate", json!({"url": url})).await;
        self.event(&tab, "Page.loadEventFired").await;
        tab
    }

    pub async fn close(&mut self, tab: Tab) {
        self.call(None, "Target.closeTarget", json!({"targetId": tab.target})).await;
    }

    async fn on(&mut self, tab: &Tab, method: &str, params: Value) -> Value {
        self.call(Some(&tab.session), method, params).await
    }

    /// The value of an expression in the page.
    pub async fn value(&mut self, tab: &Tab, expression: &str) -> Value {
        let asked = json!({"expression": expression, "returnByValue": true});
        let result = self.on(tab, "Runtime.evaluate", asked).await;
        assert!(result["exceptionDetails"].is_null(), "{expression}: {result}");
        result["result"]["value"].clone()
    }

    /// Waits until the expression is true.
    pub async fn until(&mut self, tab: &Tab, expression: &str) {
        let waiting = async {
            while self.value(tab, expression).await != true {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        timeout(LIMIT, waiting).await.unwrap_or_else(|_| panic!("never true: {expression}"));
    }

    /// What is to be read on the page.
    pub async fn text(&mut self, tab: &Tab) -> String {
        self.value(tab, "document.body.innerText").await.as_str().unwrap().to_owned()
    }

    /// Every address that the page asked for.
    pub fn asked(&self, tab: &Tab) -> Vec<String> {
        let events = self.events.iter().filter(|event| event["sessionId"] == tab.session.as_str());
        let requests = events.filter(|event| event["method"] == "Network.requestWillBeSent");
        requests.filter_map(|event| event["params"]["request"]["url"].as_str()).map(str::to_owned).collect()
    }

    /// What the page or the browser complained about: a policy violated, a script that failed.
    pub fn complaints(&self, tab: &Tab) -> Vec<&Value> {
        let bad = |event: &&Value| {
            let params = &event["params"];
            event["sessionId"] == tab.session.as_str()
                && match event["method"].as_str() {
                    Some("Runtime.exceptionThrown") => true,
                    Some("Log.entryAdded") => {
                        params["entry"]["level"] != "info" && params["entry"]["level"] != "verbose"
                    }
                    Some("Runtime.consoleAPICalled") => params["type"] == "error",
                    _ => false,
                }
        };
        self.events.iter().filter(bad).collect()
    }

    /// The whole page as PNG.
    pub async fn picture(&mut self, tab: &Tab) -> Vec<u8> {
        let shot = self.on(tab, "Page.captureScreenshot", json!({"captureBeyondViewport": true})).await;
        BASE64.decode(shot["data"].as_str().unwrap().as_bytes()).unwrap()
    }

    /// As high as it is, so that a picture shows all of it.
    pub async fn whole(&mut self, tab: &Tab, look: Look) {
        let height = self.value(tab, "document.documentElement.scrollHeight").await;
        let size = json!({"width": look.width, "height": height, "deviceScaleFactor": 1, "mobile": look.width < 500});
        self.on(tab, "Emulation.setDeviceMetricsOverride", size).await;
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // The rest of it goes with its first process.
        let _gone_already = self.child.kill();
        let _reaped = self.child.wait();
    }
}
