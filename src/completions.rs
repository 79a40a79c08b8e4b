//! Completion scripts for the usual shells, generated from the command line's
//! own definition.

use clap::CommandFactory as _;
use clap_complete::Shell;

use crate::cli::Cli;

/// Writes the script for `shell` to standard output.
pub fn print(shell: Shell) {
    let mut command = Cli::command();
    clap_complete::generate(shell, &mut command, "moemesh", &mut std::io::stdout());
}
