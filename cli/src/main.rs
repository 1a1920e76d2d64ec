//! The `flashcomm` command: sees, proves and measures what the shim does, on a machine with GPUs or without.
//!
//! It calls NCCL as an application would, never from inside: its ranks live in child processes that open the shim, the
//! real NCCL and the driver with `dlopen(RTLD_LOCAL)` and call what `dlsym` finds on those handles. Of the library's own
//! code it uses what `flashcomm::tooling` offers, such as the table of settings. That code comes with our definitions of
//! `ncclAllReduce` and its like, but an executable exports nothing to the libraries it opens, so the real NCCL is
//! never shadowed by them; a test looks at the command's dynamic symbols.
//!
//! This file holds the subcommands, and what they share: sizes, tables and how the command ends.

mod bench;
mod client;
mod codec;
mod demo;
mod doctor;
mod pages;
mod plot;
mod provenance;
mod run;
mod tune;

use std::fmt;
use std::process::ExitCode;
use std::str::FromStr;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use comfy_table::{CellAlignment, LineStyle, Table, TableStyle};
use indicatif::{ProgressBar, ProgressStyle};

use client::machine::{self, NoGpu};
use client::party::{Assignment, Role};

/// Turns libflashcomm.so on, and sees, proves and measures what it does.
///
/// libflashcomm.so stands in front of NVIDIA's NCCL and sends the fp16 and bf16 sum all-reduces as 2 to 8 bits an element.
#[derive(Parser)]
#[command(name = "flashcomm", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
#[allow(clippy::large_enum_variant, reason = "there is one of it")]
enum Command {
    /// Starts a command with the shim in front of its NCCL, or prints the environment for that
    Run(Box<run::Args>),
    /// Says whether this machine is fit, and what the shim would do here
    Doctor(doctor::Args),
    /// Shows a sum all-reduce at each width: bytes on the wire, error, and whether all ranks agree
    Demo(demo::Args),
    /// Times sum all-reduces through the shim beside those of the real NCCL, in one run on one machine
    Bench(bench::Args),
    /// Measures which way sums of each size go fastest on this machine, and keeps it for later starts
    Tune(tune::Args),
    /// Says what each width and code loses on tensors of yours, and which to take for an error that you name
    Codec(codec::Args),
    /// Prints the completions of a shell, or writes the manual pages: for packages
    Pages(pages::Args),
    /// A child process of the others
    #[command(hide = true)]
    Rank {
        /// What to do, as JSON
        assignment: String,
    },
}

/// Exit code for a machine that lacks what was asked for.
const UNABLE: u8 = 2;

fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Command::Run(args) => return run::run(&args),
        Command::Doctor(args) => doctor::run(&args),
        Command::Demo(args) => demo::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Tune(args) => tune::run(&args),
        Command::Codec(args) => codec::run(&args),
        Command::Pages(args) => pages::run(&args).map(|()| true),
        Command::Rank { assignment } => rank(&assignment).map(|()| true),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("flashcomm: {error:#}");
            if error.is::<NoGpu>() { ExitCode::from(UNABLE) } else { ExitCode::FAILURE }
        }
    }
}

fn rank(assignment: &str) -> Result<()> {
    let told: Assignment = serde_json::from_str(assignment).context("this is for the command itself")?;
    match told.role {
        Role::Probe => machine::probe(told),
        Role::Nccl => machine::find_nccl(told),
        Role::Doctor => doctor::attempt::child(told),
        Role::Demo => demo::child(told),
        Role::Bench => bench::measure::child(told),
        Role::Tune => tune::child(told),
        Role::Kernels => bench::kernels::child(told),
    }
}

/// No lines but one under the header.
const PLAIN: TableStyle = TableStyle::new().header_separator(LineStyle::new('-', '-', '-', '-'));

/// A table of numbers: the first column names, the others are aligned to the right.
fn table<H: AsRef<str>>(header: &[H]) -> Table {
    let mut table = Table::new();
    table.load_style(PLAIN).set_header(header.iter().map(H::as_ref));
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

/// A bar on standard error, where that is a terminal.
fn progress(steps: usize) -> ProgressBar {
    let style = ProgressStyle::with_template("{bar:30} {pos}/{len} {msg}").expect("a template");
    ProgressBar::new(steps as u64).with_style(style)
}

/// A number of bytes, written as 65536, 64K, 8M or 1G.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Bytes(pub usize);

const UNITS: [(char, u32); 3] = [('G', 30), ('M', 20), ('K', 10)];

impl FromStr for Bytes {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let unit = UNITS.iter().find_map(|(letter, shift)| Some((text.strip_suffix(*letter)?, *shift)));
        let (digits, shift) = unit.unwrap_or((text, 0));
        let number = digits.parse::<usize>().ok().and_then(|number| number.checked_mul(1 << shift));
        number.map(Bytes).ok_or_else(|| format!("{text:?} is no size; write 65536, 64K, 8M or 1G"))
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (letter, shift) in UNITS {
            if self.0 != 0 && self.0.is_multiple_of(1 << shift) {
                return write!(f, "{}{letter}", self.0 >> shift);
            }
        }
        write!(f, "{}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_arguments_are_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn sizes_are_read_and_written_alike() {
        for (text, n_bytes) in [("0", 0), ("100", 100), ("64K", 65536), ("8M", 8 << 20), ("1G", 1 << 30)] {
            assert_eq!(text.parse(), Ok(Bytes(n_bytes)));
            assert_eq!(Bytes(n_bytes).to_string(), text);
        }
        assert!(["", "K", "8T", "-1", "1.5M", "99999999999999G"].iter().all(|text| text.parse::<Bytes>().is_err()));
    }
}
