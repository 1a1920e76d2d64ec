//! `flashcomm pages`: completions and manual pages, from the command's own definition.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::CommandFactory;
use clap_complete::Shell;

use super::Cli;

/// Arguments.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Print the completions of this shell
    #[arg(long, value_enum, required_unless_present = "man")]
    completions: Option<Shell>,
    /// Write the manual pages, flashcomm.1 and one for each subcommand, to this directory
    #[arg(long, value_name = "DIR")]
    man: Option<PathBuf>,
}

/// Prints or writes them.
pub fn run(args: &Args) -> Result<()> {
    if let Some(shell) = args.completions {
        clap_complete::generate(shell, &mut Cli::command(), "flashcomm", &mut std::io::stdout());
    }
    if let Some(dir) = &args.man {
        let write = || {
            std::fs::create_dir_all(dir)?;
            clap_mangen::generate_to(Cli::command(), dir)
        };
        write().with_context(|| format!("cannot write manual pages to {}", dir.display()))?;
    }
    Ok(())
}
