//! Start and exit code; everything else is in the library.

fn main() -> std::process::ExitCode {
    portcullis::app::cli::run()
}
