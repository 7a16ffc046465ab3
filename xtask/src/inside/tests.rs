//! `test`'s half inside the lab: runs the test programs and writes down what came of them.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use crate::error::Result;
use crate::test::device::Suite;

/// Which tests to run.
#[derive(Args, Clone, Debug)]
pub(crate) struct Options {
    /// Where to note what came of each program; those that stand there are left out
    #[arg(long)]
    results: PathBuf,
    /// Run only tests whose name contains this
    #[arg(long)]
    filter: Option<String>,
    /// The test programs: NAME=PATH
    programs: Vec<String>,
}

/// A program that takes longer hangs.
const LIMIT: Duration = Duration::from_secs(600);

/// Runs the tests; the status says only whether they could be run.
pub(crate) fn run(options: &Options) -> Result<i32> {
    let programs: Vec<_> = options
        .programs
        .iter()
        .filter_map(|program| program.split_once('='))
        .map(|(name, path)| (name.to_owned(), path.to_owned()))
        .collect();
    let suite = Suite {
        softmshv: "softmshv",
        programs: &programs,
        filter: options.filter.as_deref(),
        environment: &[],
        limit: LIMIT,
        results: Some(options.results.clone()),
    };
    suite.run()?;
    Ok(0)
}
