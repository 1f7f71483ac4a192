//! `portcullis cgi` in the cgi-bin of a real web server (lighttpd), as its own user, www-data, where the test is root.

use crate::pages::ask;
use crate::states::{active, serve};
use portcullis::base::config::Config;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

/// Ended when dropped.
struct WebServer(std::process::Child);

impl Drop for WebServer {
    fn drop(&mut self) {
        let _ended = self.0.kill();
        let _status = self.0.wait();
    }
}

fn write(path: &Path, text: &str, mode: u32) {
    std::fs::write(path, text).unwrap();
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
}

fn free_address() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

/// lighttpd with one program in its cgi-bin, and where it listens.
async fn web_server(folder: &Path, status_listen: SocketAddr) -> (WebServer, SocketAddr) {
    // As /usr/bin and /etc: for everyone to read.
    std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o755)).unwrap();
    let program = folder.join("portcullis");
    std::fs::copy(env!("CARGO_BIN_EXE_portcullis"), &program).unwrap();
    let runtime = folder.join("run");
    let example = Config::example();
    let config = format!("runtime_dir = \"{}\"\n{example}", runtime.display());
    let config = config.replace("# listen = \"127.0.0.1:6434\"", &format!("listen = \"{status_listen}\""));
    assert!(config.contains(&status_listen.to_string()));
    write(&folder.join("portcullis.toml"), &config, 0o644);
    let script = format!(
        "#!/bin/sh\nexec {} --config {} --node alp cgi\n",
        program.display(),
        folder.join("portcullis.toml").display()
    );
    std::fs::create_dir(folder.join("cgi-bin")).unwrap();
    write(&folder.join("cgi-bin/pool_nodes"), &script, 0o755);
    let at = free_address();
    let user = if rustix::process::geteuid().is_root() { "server.username = \"www-data\"\n" } else { "" };
    let text = format!(
        "server.modules = ( \"mod_cgi\" )\nserver.document-root = \"{}\"\nserver.bind = \"127.0.0.1\"\n\
         server.port = {}\n{user}$HTTP[\"url\"] =~ \"^/cgi-bin/\" {{ cgi.assign = ( \"\" => \"\" ) }}\n",
        folder.display(),
        at.port()
    );
    write(&folder.join("lighttpd.conf"), &text, 0o644);
    let mut lighttpd = Command::new("/usr/sbin/lighttpd");
    lighttpd.arg("-D").arg("-f").arg(folder.join("lighttpd.conf")).stdin(Stdio::null());
    let child = lighttpd.spawn().expect("lighttpd is there (packaging/setup.sh)");
    let server = WebServer(child);
    let listening = async {
        while tokio::net::TcpStream::connect(at).await.is_err() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), listening).await.expect("lighttpd listens");
    (server, at)
}

#[tokio::test]
async fn a_web_server_serves_the_lines_from_its_cgi_bin() {
    let folder = tempfile::tempdir().unwrap();
    let (status, _switches, _publish) = serve(active()).await;
    let (_server, at) = web_server(folder.path(), status).await;
    let (code, headers, body) = ask(at, "GET", "/cgi-bin/pool_nodes", "").await;
    assert_eq!((code, headers["content-type"].as_str()), (200, "text/plain"), "{body}");
    assert_eq!(body, active().pool_nodes_lines());
    let (code, _, body) = ask(at, "GET", "/cgi-bin/pool_nodes?format=4.3", "").await;
    assert_eq!((code, body), (200, active().pool_nodes_lines_of_4_3()));
    let (code, _, body) = ask(at, "GET", "/cgi-bin/pool_nodes?format=1", "").await;
    assert!(code == 400 && body.contains("one of 4.3"), "{code} {body}");
    // Words of a query reach the program as arguments on some servers: they choose nothing.
    let (code, _, body) = ask(at, "GET", "/cgi-bin/pool_nodes?fence", "").await;
    assert_eq!((code, body), (200, active().pool_nodes_lines()));
}

#[tokio::test]
async fn a_web_server_says_why_there_are_no_lines() {
    let folder = tempfile::tempdir().unwrap();
    let (_server, at) = web_server(folder.path(), free_address()).await;
    let (code, _, body) = ask(at, "GET", "/cgi-bin/pool_nodes", "").await;
    assert!(code == 503 && body.starts_with("portcullis: the daemon does not answer"), "{code} {body}");
}
