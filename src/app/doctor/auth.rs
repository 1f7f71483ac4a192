//! Who is let in at the gate, and whether PostgreSQL then lets the gate in as the same role: it logs in with what the
//! client proved, and where that was no password PostgreSQL's own rules must take it without one.
//!
//! What it is NOT: no judgement on addresses, and none on rules of PostgreSQL for single databases or groups of roles;
//! where one of those comes first, nothing is said. Errors of `hba_file` itself are `pair`'s, with the other files.

use super::gather::Facts;
use super::{Level, Report};
use crate::base::config::Config;
use crate::io::postgres::{HbaRule, Survey};
use crate::wire::hba::{HbaFile, Method};
use std::collections::BTreeMap;

pub(super) fn check(config: &Config, facts: &Facts, report: &mut Report) {
    let Ok(rules) = &facts.rules else { return };
    gate(rules, report);
    let Ok(survey) = &facts.survey else {
        report.unchecked("whether PostgreSQL lets the gate in as each role", "PostgreSQL cannot be asked");
        return;
    };
    report.checked("whether PostgreSQL lets the gate in as each role");
    ways_in(rules, survey, &config.postgres.admin_user, report);
    md5(rules, survey, report);
}

/// The gate's own rules.
fn gate(rules: &HbaFile, report: &mut Report) {
    report.checked("hba_file, rule by rule");
    for (entry, users) in rules.entries().filter(|(entry, _)| entry.method == Method::Trust && !entry.needs_name) {
        let who = users.map_or("whoever asks be any role it names".to_owned(), |users| {
            format!("whoever asks be {} without a password", users.join(", "))
        });
        let text = format!("{} lets {who} (trust)", entry.place());
        report.find(Level::Warning, "login.trust", text, "write scram-sha-256 or cert instead, then reload portcullis");
    }
}

/// The first local rule of PostgreSQL for a role in every database; `None`: that depends on more than is looked at.
fn way_in<'a>(survey: &'a Survey, role: &str) -> Option<Option<&'a HbaRule>> {
    for rule in survey.hba.iter().filter(|rule| rule.kind == "local" && rule.error.is_empty()) {
        if rule.databases.iter().all(|database| database == "replication") {
            continue;
        }
        if rule.users.iter().any(|user| user == "all" || user == role) {
            return rule.databases.iter().any(|database| database == "all").then_some(Some(rule));
        }
        if rule.users.iter().any(|user| user.starts_with(['+', '/'])) {
            return None;
        }
    }
    Some(None)
}

fn ways_in(rules: &HbaFile, survey: &Survey, admin: &str, report: &mut Report) {
    // Roles by what they lack, so that one line of pg_hba.conf is one finding.
    let mut lacking: BTreeMap<(bool, String), Vec<&str>> = BTreeMap::new();
    for (role, _) in &survey.roles {
        let Some(way) = way_in(survey, role) else { continue };
        let with_password = |wanted: bool| {
            rules.entries().any(|(entry, users)| {
                let password = matches!(entry.method, Method::ScramSha256 | Method::Md5);
                let serves = entry.method != Method::Reject && password == wanted;
                serves && users.is_none_or(|users| users.contains(&role.as_str()))
            })
        };
        let (method, line) = way.map_or(("no local line", 0), |rule| (rule.method.as_str(), rule.line));
        let mapped = way.is_some_and(|rule| rule.options.iter().any(|option| option.starts_with("map=")));
        let free = method == "trust" || (matches!(method, "peer" | "ident") && (mapped || role == admin));
        let by_password = free || matches!(method, "scram-sha-256" | "md5");
        for (password, enough) in [(true, by_password), (false, free)] {
            if !enough && with_password(password) {
                let which = if line == 0 { "no local line".to_owned() } else { format!("line {line} ({method})") };
                lacking.entry((password, which)).or_default().push(role);
            }
        }
    }
    for ((password, which), roles) in lacking {
        let how = if password { "with a password" } else { "without a password" };
        let names = roles.join(", ");
        let text = format!(
            "hba_file lets {names} in {how}, but pg_hba.conf ({which}) does not let the gate in as them that way"
        );
        let mut remedy = "in pg_hba.conf, before other local lines, then reload PostgreSQL:".to_owned();
        for role in roles {
            let method = if password { "scram-sha-256" } else { "peer map=portcullis" };
            remedy += &format!("\nlocal all \"{role}\" {method}");
        }
        if !password {
            remedy += "\nand in pg_ident.conf, for the user the daemon runs as, a line for each role:\n\
                       portcullis postgres ROLE";
        }
        report.find(Level::Warning, "login.lines", text, remedy);
    }
}

/// Roles whose secret is of the old kind.
fn md5(rules: &HbaFile, survey: &Survey, report: &mut Report) {
    for role in &survey.md5_roles {
        let methods: Vec<Method> = rules
            .entries()
            .filter(|(_, users)| users.as_ref().is_none_or(|users| users.contains(&role.as_str())))
            .map(|(entry, _)| entry.method)
            .collect();
        let remedy = format!("with password_encryption = 'scram-sha-256':\nALTER ROLE \"{role}\" PASSWORD '...';");
        if methods.contains(&Method::ScramSha256) && !methods.contains(&Method::Md5) {
            let text =
                format!("{role}'s password is stored as md5, but hba_file asks for scram-sha-256: it cannot log in");
            report.find(Level::Warning, "login.md5", text, remedy);
        } else if methods.contains(&Method::Md5) {
            if way_in(survey, role).flatten().is_some_and(|rule| rule.method == "scram-sha-256") {
                let text =
                    format!("{role}'s password is stored as md5, but pg_hba.conf asks the gate for scram-sha-256");
                report.find(Level::Warning, "login.md5", text, remedy);
            } else {
                let text = format!("{role}'s password is stored as md5: whoever reads the hash can log in with it");
                report.find(Level::Advice, "login.md5", text, remedy);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn local(line: u32, databases: &str, users: &str, method: &str, options: &str) -> HbaRule {
        let words = |list: &str| list.split(',').filter(|w| !w.is_empty()).map(str::to_owned).collect();
        HbaRule {
            line,
            kind: "local".into(),
            databases: words(databases),
            users: words(users),
            method: method.into(),
            options: words(options),
            ..HbaRule::default()
        }
    }

    fn judged(hba_file: &str, hba: Vec<HbaRule>, md5_roles: &[&str]) -> Vec<(Level, String, String)> {
        let rules = HbaFile::parse("hba.conf", hba_file).expect("valid");
        let roles = ["postgres", "app", "web"].map(|role| (role.to_owned(), role == "postgres")).to_vec();
        let md5_roles = md5_roles.iter().map(ToString::to_string).collect();
        let survey = Survey { hba, roles, md5_roles, ..Survey::default() };
        let mut report = Report::default();
        gate(&rules, &mut report);
        ways_in(&rules, &survey, "postgres", &mut report);
        md5(&rules, &survey, &mut report);
        report.findings.into_iter().map(|finding| (finding.level, finding.text, finding.remedy)).collect()
    }

    fn usual() -> Vec<HbaRule> {
        vec![
            local(1, "replication", "all", "peer", ""),
            local(2, "all", "postgres", "peer", ""),
            local(3, "all", "all", "scram-sha-256", ""),
        ]
    }

    #[test]
    fn the_recommended_setting_lets_the_gate_in() {
        assert_eq!(judged("host all all all scram-sha-256", usual(), &[]), []);
        assert_eq!(
            judged(
                "hostssl all web all cert",
                {
                    let mut all = usual();
                    all[1].users.push("web".into());
                    all[1].options.push("map=x".into());
                    all
                },
                &[]
            ),
            []
        );
    }

    #[test]
    fn whom_postgresql_does_not_take_is_named_with_the_lines_to_add() {
        let found = judged("hostssl all web all cert\nhost all all all scram-sha-256", usual(), &[]);
        let [(Level::Warning, text, remedy)] = &found[..] else { panic!("{found:?}") };
        assert!(text.contains("web in without a password") && text.contains("line 3 (scram-sha-256)"), "{text}");
        assert!(remedy.contains("\nlocal all \"web\" peer map=portcullis\n"), "{remedy}");
        // As Debian has it.
        let debian = vec![local(1, "all", "postgres", "peer", ""), local(2, "all", "all", "peer", "")];
        let found = judged("host all all all scram-sha-256", debian, &[]);
        let [(Level::Warning, text, _)] = &found[..] else { panic!("{found:?}") };
        assert!(text.contains("app, web in with a password") && text.contains("line 2 (peer)"), "{text}");
        let found = judged("host all app all md5", vec![], &[]);
        assert!(matches!(&found[..], [(Level::Warning, text, _)] if text.contains("(no local line)")), "{found:?}");
        // Nothing is claimed where it depends on more.
        assert_eq!(judged("host all app all md5", vec![local(1, "all", "+staff", "peer", "")], &[]), []);
        assert_eq!(judged("host all app all md5", vec![local(1, "shop", "all", "peer", "")], &[]), []);
    }

    #[test]
    fn trust_and_old_secrets_are_told() {
        let trusting = |users: &str| judged(users, vec![local(1, "all", "all", "trust", "")], &[]);
        assert!(matches!(&trusting("host all all all trust")[..], [(Level::Warning, text, _)]
            if text.starts_with("hba.conf, line 1 lets whoever asks be any role")));
        assert!(
            matches!(&trusting("host all app all trust")[..], [(Level::Warning, text, _)] if text.contains("be app"))
        );
        assert_eq!(trusting("hostssl all app all trust clientcert=verify-full"), []);
        for (gate, own, level, words) in [
            ("md5", "md5", Level::Advice, "can log in with it"),
            ("md5", "scram-sha-256", Level::Warning, "asks the gate for scram-sha-256"),
            ("scram-sha-256", "md5", Level::Warning, "it cannot log in"),
        ] {
            let found = judged(&format!("host all all all {gate}"), vec![local(1, "all", "all", own, "")], &["app"]);
            assert!(matches!(&found[..], [(found, text, _)] if *found == level && text.contains(words)), "{found:?}");
        }
    }
}
