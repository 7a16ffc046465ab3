//! The scheduler's benchmarks: the same threads and VPs under Rota's control plane and under those of others, side by side.
//!
//! ```text
//! experiment/b*.rs   what is compared, what is measured, what has to be reached
//!   protocol         every variant in every round, in random order; medians with confidence
//!     vm/            VMs as processes of threads, under a control plane
//!     vps/           VMs with real VPs, in a process under softmshv
//!   report, svg, book   a table with pass or MISS, raw JSON, a plot, the page of the book
//! ```

mod book;
mod clock;
mod experiment;
mod protocol;
mod report;
mod stats;
mod svg;
mod vm;
mod vps;

use std::{fs, path::PathBuf, process::ExitCode, time::Duration};

use clap::{Parser, Subcommand};

use crate::experiment::Settings;

/// What ends an experiment, in words.
type Error = Box<dyn std::error::Error + Send + Sync>;
type Result<T> = std::result::Result<T, Error>;

/// Measure the scheduler beside the control planes of others.
#[derive(Parser)]
#[command(name = "cargo xtask bench sched")]
struct Options {
    /// Only these experiments, as in B2,B3
    #[arg(long, value_delimiter = ',', ignore_case = true)]
    only: Vec<String>,
    /// Rounds: each runs every variant once, in another order
    #[arg(long, default_value_t = 15, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// How long each run is measured
    #[arg(long, default_value_t = 5.0)]
    seconds: f64,
    /// Repeat runs during which others used more of the machine than this, in percent; so many as count, twice
    #[arg(long, default_value_t = 100.0)]
    most_others: f64,
    /// Where raw figures go, as JSON
    #[arg(long, default_value = "target/bench/sched")]
    out: PathBuf,
    /// Where plots go
    #[arg(long, default_value = "docs/src/images/sched")]
    images: PathBuf,
    /// Write the tables into the book's page, too, and what B7 comes to into the README
    #[arg(long)]
    book: bool,
    /// Write them into another page than the book's, and leave the README alone
    #[arg(long, value_name = "FILE", requires = "book")]
    page: Option<PathBuf>,
    /// List the experiments, and measure nothing
    #[arg(long)]
    list: bool,
    #[command(subcommand)]
    inside: Option<Inside>,
}

#[derive(Subcommand)]
enum Inside {
    /// What an experiment runs in processes of its own
    #[command(hide = true)]
    Inside {
        what: String,
        #[arg(default_value = "")]
        argument: String,
    },
}

fn main() -> ExitCode {
    let options = Options::parse();
    let result = match &options.inside {
        Some(Inside::Inside { what, argument }) => match what.as_str() {
            "vm" => vm::inside(argument),
            "vps" => vps::inside(argument),
            "detect" => experiment::detect_inside(),
            other => Err(format!("nothing is called {other}").into()),
        },
        None => measure(&options),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// The exit status says nothing about criteria: a miss is a result.
fn measure(options: &Options) -> Result<()> {
    let scratch = Scratch::new()?;
    let settings = Settings {
        time: Duration::from_secs_f64(options.seconds.clamp(0.1, 600.0)),
        steps_per_us: clock::steps_per_us(),
        scratch: scratch.0.clone(),
        cpus: experiment::cpus()?,
    };
    let all = experiment::all(&settings);
    let known = |id: &String| all.iter().any(|it| it.id.eq_ignore_ascii_case(id));
    if let Some(id) = options.only.iter().find(|id| !known(id)) {
        return Err(format!("no experiment is called {id}; --list names them").into());
    }
    let chosen = all.into_iter().filter(|experiment| {
        let is = |id: &String| experiment.id.eq_ignore_ascii_case(id);
        options.only.is_empty() || options.only.iter().any(is)
    });
    fs::create_dir_all(&options.out)?;
    fs::create_dir_all(&options.images)?;
    for experiment in chosen {
        if options.list {
            println!("{:4} {}", experiment.id, experiment.title);
            continue;
        }
        let results = protocol::run(
            &experiment,
            &settings,
            options.runs,
            options.most_others / 100.0,
        )?;
        let report = report::Report::of(&experiment, &results);
        print!("{}", report.text());
        let name = experiment.id.to_lowercase();
        fs::write(
            options.out.join(format!("{name}.json")),
            serde_json::to_string_pretty(&report.raw())?,
        )?;
        fs::write(options.images.join(format!("{name}.svg")), report.plot())?;
        if options.book {
            book::fill(options.page.as_deref(), &name, &report)?;
        }
    }
    Ok(())
}

/// Ledgers of the experiments, which go with this.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Result<Self> {
        const PREFIX: &str = "sched-bench-";
        // Those of processes that were ended.
        for entry in fs::read_dir(std::env::temp_dir())?.flatten() {
            let name = entry.file_name().into_string().unwrap_or_default();
            if let Some(pid) = name.strip_prefix(PREFIX)
                && !PathBuf::from("/proc").join(pid).exists()
            {
                let _ = fs::remove_dir_all(entry.path());
            }
        }
        let path = std::env::temp_dir().join(format!("{PREFIX}{}", std::process::id()));
        fs::create_dir(&path)?;
        Ok(Self(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}
