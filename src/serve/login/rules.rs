//! What `hba_file` says of a client: the rules are asked, and what they ask back is found out, at most once each.
//!
//! What it is NOT: it judges nothing itself (`wire::hba` does), and nobody is asked anything that no rule needs.

use super::Stop;
use crate::serve::listener::Proxy;
use crate::serve::roles::Unreadable;
use crate::serve::tls::ClientStream;
use crate::wire::hba::{Asker, Decision, Entry, Facts, HbaFile, Method, Question};
use crate::wire::pg::{Refusal, Startup};
use hickory_resolver::TokioResolver;
use hickory_resolver::proto::rr::{Name, RData, RecordType};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

/// Questions to the rules of one login; real ones ask five or six. Then it is refused.
const MAX_QUESTIONS: usize = 64;

/// What a connection may be for, as its startup message says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Purpose {
    Sql,
    /// `replication=true`: no database. (`replication=database` is an ordinary connection to the rules.)
    Replication,
}

impl Purpose {
    pub(super) fn of(startup: &Startup) -> Result<Purpose, Refusal> {
        // As PostgreSQL: the last one counts.
        let asked = startup.parameters.iter().rfind(|(name, _)| name == b"replication");
        let Some((_, value)) = asked else { return Ok(Purpose::Sql) };
        let value = String::from_utf8_lossy(value).to_ascii_lowercase();
        if value == "database" {
            return Ok(Purpose::Sql);
        }
        let is = |word: &str, least: usize| value.len() >= least && word.starts_with(&value);
        if is("true", 1) || is("yes", 1) || is("on", 2) || value == "1" {
            Ok(Purpose::Replication)
        } else if is("false", 1) || is("no", 1) || is("off", 2) || value == "0" {
            Ok(Purpose::Sql)
        } else {
            let text = format!("invalid value for parameter \"replication\": \"{}\"", value.escape_debug());
            let hint = "Valid values are: \"false\", 0, \"true\", 1, \"database\".";
            Err(Refusal::new("22023", text).hint(hint))
        }
    }
}

/// What the first matching rule demands, and what was found out for it.
pub(super) struct Demand<'a> {
    pub(super) entry: Entry,
    /// The rules it is one of: a reload may have replaced them since.
    rules: Arc<HbaFile>,
    asker: Asker<'a>,
    facts: Facts,
}

impl Demand<'_> {
    /// Whether a certificate in this name may log in as the role that was asked for.
    pub(super) async fn fits(&mut self, name: &str, proxy: &Proxy) -> Result<bool, Stop> {
        for _ in 0..MAX_QUESTIONS {
            match self.rules.fits(&self.entry, name, self.asker, &self.facts) {
                Ok(fits) => return Ok(fits),
                Err(question) => answer(question, self.asker, proxy, &mut self.facts).await?,
            }
        }
        Ok(false)
    }
}

/// Asks the rules; refusals are told in PostgreSQL's words.
pub(super) async fn demand<'a>(
    client: &ClientStream,
    peer: SocketAddr,
    startup: &'a Startup,
    proxy: &Proxy,
) -> Result<Demand<'a>, Stop> {
    let replication = Purpose::of(startup)? == Purpose::Replication;
    let (user, database) = (startup.user.as_str(), startup.database.as_str());
    let asker = Asker { address: peer.ip(), tls: client.is_tls(), user, database, replication };
    let refuse = |what: &str, preposition: &str, place: &str| {
        let encryption = if asker.tls { "SSL encryption" } else { "no encryption" };
        proxy.gate.count_auth_failure();
        tracing::info!(user, database, %peer, rule = place, "login refused by hba_file");
        let who = format!("host \"{}\", user \"{user}\"", asker.address);
        let text = if replication {
            format!("{what} replication connection {preposition} {who}, {encryption}")
        } else {
            let what = if what.ends_with("for") { what.to_owned() } else { format!("{what} connection for") };
            format!("{what} {who}, database \"{database}\", {encryption}")
        };
        Refusal::new("28000", text)
    };
    let rules = proxy.options.rules.hba();
    let mut facts = Facts::default();
    for _ in 0..MAX_QUESTIONS {
        match rules.decide(asker, &facts) {
            Decision::Entry(entry) if entry.method == Method::Reject => {
                return Err(refuse("pg_hba.conf rejects", "for", &entry.place()).into());
            }
            Decision::Entry(entry) => {
                let entry = entry.clone();
                return Ok(Demand { entry, rules, asker, facts });
            }
            Decision::NoEntry => return Err(refuse("no pg_hba.conf entry for", "from", "none").into()),
            Decision::Ask(question) => answer(question, asker, proxy, &mut facts).await?,
        }
    }
    Err(refuse("no pg_hba.conf entry for", "from", "none, after too many questions").into())
}

async fn answer(question: Question, asker: Asker<'_>, proxy: &Proxy, facts: &mut Facts) -> Result<(), Stop> {
    match question {
        Question::Memberships => {
            facts.memberships = Some(proxy.roles.memberships(asker.user).await.map_err(no_login)?);
        }
        Question::Interfaces => facts.interfaces = Some(interfaces()),
        Question::Names => facts.names = Some(names_of(asker.address).await),
        Question::Confirm(name) => {
            let confirmed = leads_to(&name, asker.address).await;
            if !confirmed {
                tracing::info!(name, address = %asker.address, "a client's host name does not lead back to it");
            }
            facts.confirmed.push((name, confirmed));
        }
    }
    Ok(())
}

/// For the client; the reason is for the log.
pub(super) fn no_login(unreadable: Unreadable) -> Stop {
    tracing::error!(error = %unreadable, "no login is possible");
    Refusal::new("57P03", "portcullis: PostgreSQL on this node does not accept connections now").into()
}

/// This machine's addresses with their masks, as they are now.
fn interfaces() -> Vec<(IpAddr, IpAddr)> {
    let found = match nix::ifaddrs::getifaddrs() {
        Ok(found) => found,
        Err(error) => {
            tracing::warn!(%error, "the addresses of this machine cannot be read; samehost and samenet match nobody");
            return Vec::new();
        }
    };
    let ip = |address: nix::sys::socket::SockaddrStorage| {
        let v4 = address.as_sockaddr_in().map(|address| IpAddr::V4(address.ip()));
        v4.or_else(|| address.as_sockaddr_in6().map(|address| IpAddr::V6(address.ip())))
    };
    found.filter_map(|interface| Some((ip(interface.address?)?, ip(interface.netmask?)?))).collect()
}

/// The system's resolver, with its hosts file, read anew: look-ups are rare, and its files change.
fn resolver() -> Option<TokioResolver> {
    let resolver = TokioResolver::builder_tokio().and_then(|builder| builder.build());
    resolver.inspect_err(|error| tracing::warn!(%error, "no resolver; host names in hba_file match nobody")).ok()
}

/// The names an address claims to have.
async fn names_of(address: IpAddr) -> Vec<String> {
    let Some(resolver) = resolver() else { return Vec::new() };
    let found = resolver.lookup(Name::from(address), RecordType::PTR).await;
    let found = found.inspect_err(|error| tracing::info!(%address, %error, "a client's host name cannot be found"));
    let Ok(found) = found else { return Vec::new() };
    let names = found.answers().iter().filter_map(|record| match &record.data {
        RData::PTR(name) => Some(name.to_utf8().trim_end_matches('.').to_owned()),
        _ => None,
    });
    names.collect()
}

async fn leads_to(name: &str, address: IpAddr) -> bool {
    let Some(resolver) = resolver() else { return false };
    // With its dot: no search list.
    let found = resolver.lookup_ip(format!("{name}.")).await;
    found.is_ok_and(|found| found.iter().any(|ip| ip == address))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parameter_replication_is_read_as_postgresql_reads_it() {
        let startup = |values: &[&str]| Startup {
            minor: 0,
            user: "a".to_owned(),
            database: "a".to_owned(),
            parameters: values.iter().map(|value| (b"replication".to_vec(), value.as_bytes().to_vec())).collect(),
            options: Vec::new(),
        };
        for yes in ["true", "TRUE", "t", "yes", "y", "on", "1"] {
            assert_eq!(Purpose::of(&startup(&[yes])), Ok(Purpose::Replication), "{yes}");
        }
        for no in ["false", "F", "no", "n", "off", "of", "0", "database"] {
            assert_eq!(Purpose::of(&startup(&[no])), Ok(Purpose::Sql), "{no}");
        }
        for wrong in ["", "o", "2", "truely", "physical"] {
            assert_eq!(Purpose::of(&startup(&[wrong])).map_err(|r| r.code), Err("22023"), "{wrong}");
        }
        assert_eq!(Purpose::of(&startup(&["true", "off"])), Ok(Purpose::Sql));
        assert_eq!(Purpose::of(&startup(&[])), Ok(Purpose::Sql));
    }

    #[tokio::test]
    async fn loopback_has_a_name_that_leads_back_and_an_address_with_a_mask() {
        let loopback = IpAddr::from([127, 0, 0, 1]);
        assert!(names_of(loopback).await.iter().any(|name| name == "localhost"));
        assert!(leads_to("localhost", loopback).await);
        assert!(!leads_to("localhost", IpAddr::from([192, 0, 2, 1])).await);
        assert!(interfaces().contains(&(loopback, IpAddr::from([255, 0, 0, 0]))));
    }
}
