//! Completions and manual pages, generated from the definitions in `verbs.rs`.

use super::cli;
use crate::base::fault::{ExitCode, Fault};
use std::path::Path;

/// The section of the manual for programs of the administrator.
const SECTION: &str = "8";

/// The completion script of a shell.
pub fn completions(shell: clap_complete::Shell) -> String {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut cli::command(), "portcullis", &mut script);
    String::from_utf8_lossy(&script).into_owned()
}

/// Writes `portcullis.8` and `portcullis-VERB.8` into a directory that exists.
///
/// # Errors
/// Exit code 1: the directory cannot be written.
pub fn write_pages(dir: &Path) -> Result<(), Fault> {
    for (name, page) in pages() {
        let path = dir.join(&name);
        std::fs::write(&path, page).map_err(|error| {
            let text = format!("{} cannot be written ({error}); name a directory that exists", path.display());
            Fault::new(ExitCode::Failed, text)
        })?;
    }
    Ok(())
}

/// File name and text of each page.
pub fn pages() -> Vec<(String, Vec<u8>)> {
    let mut root = cli::command();
    root.build();
    // The root's own page last: `Man::new` takes it.
    let mut pages: Vec<_> = root.get_subcommands().filter(|verb| !verb.is_hide_set()).cloned().map(page).collect();
    pages.push(page(root));
    pages
}

fn page(command: clap::Command) -> (String, Vec<u8>) {
    let source = concat!("portcullis ", env!("CARGO_PKG_VERSION"));
    let page = clap_mangen::Man::new(command).section(SECTION).source(source).manual("Portcullis");
    let mut text = Vec::new();
    page.render(&mut text).expect("a Vec takes every byte");
    (page.get_filename(), text)
}
