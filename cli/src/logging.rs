//! What is logged, and where: `-v` and `--log-file`, as cloud-hypervisor has them.

use std::{
    fs::{File, OpenOptions},
    io,
    path::{Path, PathBuf},
    sync::Mutex,
};

use clap::{ArgAction, Args};
use tracing::{Level, debug};

use crate::colour;

#[derive(Args)]
#[command(next_help_heading = "Logging")]
pub(crate) struct Logging {
    /// Say more than warnings: -v what happens, with who schedules, the plan and what came of it; -vv and -vvv details
    #[arg(short, action = ArgAction::Count, global = true)]
    verbosity: u8,
    /// Log to FILE, to what it has already, instead of standard error
    #[arg(long, value_name = "FILE", global = true)]
    log_file: Option<PathBuf>,
}

impl Logging {
    /// Begins to log.
    ///
    /// # Errors
    /// The file cannot be written.
    pub(crate) fn begin(&self) -> Result<(), String> {
        let level = match self.verbosity {
            0 => Level::WARN,
            1 => Level::INFO,
            2 => Level::DEBUG,
            _ => Level::TRACE,
        };
        let log = tracing_subscriber::fmt()
            .with_max_level(level)
            .with_target(false);
        match &self.log_file {
            None => log
                .with_writer(io::stderr)
                .with_ansi(colour::wanted(&io::stderr()))
                .without_time()
                .init(),
            Some(path) => {
                let file = append(path).map_err(|error| {
                    format!("--log-file: cannot write {}: {error}", path.display())
                })?;
                log.with_writer(Mutex::new(file)).with_ansi(false).init();
            }
        }
        debug!("rota {}", env!("CARGO_PKG_VERSION"));
        Ok(())
    }
}

fn append(path: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).append(true).open(path)
}
